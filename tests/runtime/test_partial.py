"""Finished segments on the disk: what is taken up again, what is not, and that nothing of another's is touched."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from posecrafter_rt import atomic
from posecrafter_rt.errors import DiskFull, OutputExists, PoseCrafterError
from posecrafter_rt.runtime.partial import STATE, PartialRender, open_partial, read_state
from posecrafter_rt.runtime.report import SegmentReport
from posecrafter_rt.runtime.segments import SegmentChoice

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 9, 12, 3), np.uint8)
CARRIED = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.mp4.partial"


@pytest.fixture
def outputs(tmp_path: Path) -> list[Path]:
    return [tmp_path / "out.mp4", tmp_path / "out.png"]


def report(number: int) -> SegmentReport:
    skipped = [{"frame": number, "region": "face", "reason": "none is seen"}]
    return SegmentReport(
        edited_regions=number, skipped_regions=skipped, seconds={"decode": number / 3}, peak_rss_bytes=9
    )


def save_two(partial: PartialRender) -> None:
    partial.save(iter(FRAMES[:4]), CARRIED + 1, report(1))
    partial.save(iter(FRAMES[4:]), CARRIED, report(2))


def broken_off(folder: Path, outputs: list[Path], fingerprint: str = "a") -> None:
    """Leaves two finished segments."""
    with pytest.raises(KeyboardInterrupt), open_partial(folder, fingerprint, outputs) as partial:
        save_two(partial)
        raise KeyboardInterrupt


def test_what_was_finished_is_taken_up_bit_for_bit(folder: Path, outputs: list[Path]) -> None:
    broken_off(folder, outputs)
    with open_partial(folder, "a", outputs) as partial:
        assert partial.reports() == [report(1), report(2)]
        carried = partial.carried()
        assert carried is not None and torch.equal(carried, CARRIED)
        assert np.array_equal(np.stack(list(partial.frames())), FRAMES)


def test_a_segment_that_carries_nothing(folder: Path, outputs: list[Path]) -> None:
    with open_partial(folder, "a", outputs) as partial:
        assert partial.carried() is None and not partial.reports() and not list(partial.frames())
        partial.save(FRAMES[:1], CARRIED[:0], report(0))
        carried = partial.carried()
        assert carried is not None and carried.shape == (0, 4, 3, 3)


def test_what_was_chosen_for_automatic_segments_is_kept(folder: Path, outputs: list[Path]) -> None:
    choice = SegmentChoice(6, 2, "6 frames fit")
    with pytest.raises(KeyboardInterrupt), open_partial(folder, "a", outputs) as partial:
        assert partial.choice is None
        partial.fix(choice)
        save_two(partial)
        raise KeyboardInterrupt
    with open_partial(folder, "a", outputs) as partial:
        assert partial.choice == choice and len(partial.reports()) == 2
    with open_partial(folder, "b", outputs, force=True) as partial:
        assert partial.choice is None


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_segment_and_those_after_it_are_rendered_anew(folder: Path, outputs: list[Path], damage: str) -> None:
    broken_off(folder, outputs)
    file = folder / "segment-00000.safetensors"
    if damage == "altered":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with open_partial(folder, "a", outputs) as partial:
        assert not partial.reports()
        assert [path.name for path in folder.iterdir()] == [STATE]


def test_what_a_kill_leaves_is_removed(folder: Path, outputs: list[Path]) -> None:
    broken_off(folder, outputs)
    for name in (".segment-00002.1f3a.part.safetensors", "segment-00002.safetensors", ".state.77.part.json", "out.mp4"):
        (folder / name).write_bytes(b"half")
    with open_partial(folder, "a", outputs) as partial:
        assert len(partial.reports()) == 2
        assert sorted(path.name for path in folder.iterdir()) == [
            "segment-00000.safetensors", "segment-00001.safetensors", STATE]  # fmt: skip


def test_another_render_is_not_thrown_away_without_force(folder: Path, outputs: list[Path]) -> None:
    broken_off(folder, outputs)
    with pytest.raises(OutputExists, match="unfinished render") as caught, open_partial(folder, "b", outputs):
        pass
    assert caught.value.hint and "--force" in caught.value.hint
    with open_partial(folder, "a", outputs) as partial:
        assert len(partial.reports()) == 2
    with open_partial(folder, "b", outputs, force=True) as partial:
        assert not partial.reports()


def test_another_render_of_which_nothing_is_finished_hinders_none(
    folder: Path, outputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PartialRender, "remove", lambda self: None)  # killed
        with pytest.raises(KeyboardInterrupt), open_partial(folder, "a", outputs):
            (folder / ".out.12ab34cd.part.mp4").write_bytes(b"half")
            raise KeyboardInterrupt
    with open_partial(folder, "b", outputs) as partial:
        assert not partial.reports() and [path.name for path in folder.iterdir()] == [STATE]


def test_a_folder_that_holds_something_else_is_left_alone(folder: Path, outputs: list[Path]) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    for force in (False, True):
        refused = pytest.raises(OutputExists, match="holds no unfinished render")
        with refused, open_partial(folder, "a", outputs, force=force):
            pass
    assert (folder / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("leftover", [None, ".state.12ab34cd.part.json", STATE])
def test_a_kill_during_the_first_write_leaves_nothing_that_hinders(
    folder: Path, outputs: list[Path], leftover: str | None
) -> None:
    folder.mkdir()
    if leftover:
        (folder / leftover).write_bytes(b'{"finger')
    with open_partial(folder, "a", outputs) as partial:
        assert not partial.reports()


def test_a_failure_before_anything_is_finished_leaves_nothing(folder: Path, outputs: list[Path]) -> None:
    with pytest.raises(PoseCrafterError, match="no"), open_partial(folder, "a", outputs):
        raise PoseCrafterError("no")
    assert not folder.exists()


@pytest.mark.parametrize("step", ["save", "publish"])
def test_what_the_disk_had_no_room_to_list_does_not_count_as_finished(
    folder: Path, outputs: list[Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The same command would begin anew, so nothing is kept that says otherwise."""
    flush = atomic.flush_to_disk

    def full(path: Path) -> None:
        if path.name.startswith(".state."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    with pytest.raises(DiskFull), open_partial(folder, "a", outputs) as partial:
        for path in outputs:
            (folder / path.name).write_text(path.name)
        monkeypatch.setattr(atomic, "flush_to_disk", full)
        if step == "save":
            partial.save(FRAMES[:1], CARRIED, report(0))
        else:
            partial.publish(outputs)
    assert not folder.exists()


@pytest.mark.parametrize("parent", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_is_told_by_the_outputs_name(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / parent / "out.mp4"
    with pytest.raises(PoseCrafterError) as caught, open_partial(output.with_name("out.mp4.partial"), "a", [output]):
        pass
    assert str(caught.value) == f"cannot write {output}: not a directory" and caught.value.hint


def test_a_file_in_its_place_is_left_alone(folder: Path, outputs: list[Path]) -> None:
    folder.write_text("mine")
    with pytest.raises(OutputExists, match="holds no unfinished render"), open_partial(folder, "a", outputs):
        pass
    assert folder.read_text() == "mine"


def test_two_renders_into_one_folder_do_not_mix(folder: Path, outputs: list[Path]) -> None:
    with open_partial(folder, "a", outputs) as partial:
        partial.save(FRAMES[:1], CARRIED, report(0))
        for force in (False, True):
            refused = pytest.raises(PoseCrafterError, match="another process")
            with refused, open_partial(folder, "a", outputs, force=force):
                pass
        assert len(partial.reports()) == 1


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_moving_the_outputs_to_their_places_goes_on_where_it_broke_off(
    folder: Path, outputs: list[Path], monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    replace = os.replace

    def breaks_off(source: Path, target: Path) -> None:
        if target == (*outputs, None)[moved]:
            raise KeyboardInterrupt
        replace(source, target)

    with open_partial(folder, "a", outputs) as partial:
        save_two(partial)
        for path in outputs:
            (folder / path.name).write_text(path.name)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", breaks_off)
            patch.setattr(PartialRender, "remove", lambda self: None)
            if moved < len(outputs):
                with pytest.raises(KeyboardInterrupt):
                    partial.publish(outputs)
            else:
                partial.publish(outputs)
    assert [path.exists() for path in outputs] == [index < moved for index in range(2)]
    state = read_state(folder)
    assert state is not None and state["staged"]
    with open_partial(folder, "a", outputs) as partial:
        assert partial.holds(outputs)
        partial.publish(outputs)
    assert [path.read_text() for path in outputs] == ["out.mp4", "out.png"] and not folder.exists()


def test_outputs_that_were_taken_away_are_made_again(folder: Path, outputs: list[Path]) -> None:
    with open_partial(folder, "a", outputs) as partial:
        save_two(partial)
        partial.staged = True
        partial._write_state()
    with open_partial(folder, "a", outputs) as partial:
        assert not partial.holds(outputs) and len(partial.reports()) == 2


def test_outputs_that_were_taken_away_are_not_made_up_of_two_renders(folder: Path, outputs: list[Path]) -> None:
    """A forced render dies when its video is in its place; that is removed, and the next one dies with a new one made."""
    outputs[1].write_text("an earlier render's")
    with open_partial(folder, "a", outputs) as partial:
        save_two(partial)
        (folder / outputs[1].name).write_text("png")
        partial.staged = True
        partial._write_state()
    with pytest.raises(KeyboardInterrupt), open_partial(folder, "a", outputs) as partial:
        assert not partial.holds(outputs)
        (folder / outputs[0].name).write_text("mp4")
        raise KeyboardInterrupt
    with open_partial(folder, "a", outputs) as partial:
        assert not partial.holds(outputs) and len(partial.reports()) == 2


def test_a_folder_that_the_one_before_removes_just_then_is_made_anew(
    folder: Path, outputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being opened and being held it goes, and nobody holds what is gone against others."""
    flock, calls = fcntl.flock, []

    def flocked(descriptor: int, operation: int) -> None:
        if not calls:
            folder.rmdir()
        calls.append(1)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flocked)
    with open_partial(folder, "a", outputs) as partial:
        save_two(partial)
        with pytest.raises(PoseCrafterError, match="another process"), open_partial(folder, "a", outputs):
            pass

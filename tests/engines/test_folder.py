"""The engine folder: what it holds, refused when anything is off, with the command that builds it again."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from posecrafter_rt import atomic
from posecrafter_rt.atomic import sha256_file
from posecrafter_rt.engines.folder import building, open_folder, shared_bytes, take_networks
from posecrafter_rt.engines.manifest import read_manifest, rebuild_command, rebuild_networks_hint, write_manifest
from posecrafter_rt.errors import EngineFolderError


def build(path: Path, content: str = "network", force: bool = False) -> Path:
    with building(path, {"backend": "torch"}, force) as staging:
        (staging / "networks").mkdir()
        (staging / "networks" / "unet.bin").write_text(content)
        (staging / "reference.safetensors").write_text("frames")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_built_opens_and_knows_its_places(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "deep" / "me.engine"))
    assert folder.manifest["backend"] == "torch"
    assert set(folder.manifest["files"]) == {"networks/unet.bin", "reference.safetensors"}
    assert (folder.networks / "unet.bin").is_file() and names(tmp_path / "deep") == ["me.engine"]


def test_its_places_stay_where_they_are_wherever_the_program_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "me.engine")
    monkeypatch.chdir(tmp_path)
    folder = open_folder("me.engine")
    monkeypatch.chdir("/")
    assert (folder.networks / "unet.bin").is_file()


def test_its_places_stay_in_the_engine_that_was_opened_wherever_a_link_to_it_leads_later(tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(build(tmp_path / "v1", "first"))
    folder = open_folder(link)
    link.unlink()
    link.symlink_to(build(tmp_path / "v2", "second"))
    assert (folder.networks / "unet.bin").read_text() == "first"
    with pytest.raises(EngineFolderError, match=f"^{link}/none is not an engine folder$"):
        open_folder(link / "none")  # messages show the path that was given


def test_a_link_that_leads_elsewhere_while_files_are_hashed_gives_the_engine_that_it_led_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, link = build(tmp_path / "v1", "first"), build(tmp_path / "v2", "second"), tmp_path / "current"
    link.symlink_to(first)
    (tmp_path / "next").symlink_to(second)

    def deployed(path: Path) -> str:
        with suppress(FileNotFoundError):  # done for another file
            (tmp_path / "next").replace(link)
        return sha256_file(path)

    monkeypatch.setattr(atomic, "sha256_file", deployed)
    folder = open_folder(link)
    assert link.samefile(second) and folder.path.samefile(first)
    assert folder.manifest == read_manifest(first) and (folder.networks / "unet.bin").read_text() == "first"


@pytest.mark.parametrize("times", [1, 3])
def test_an_engine_that_is_replaced_while_it_is_opened_is_opened_anew(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two builds of one folder, or a server that starts while a build ends."""
    engine, contents = build(tmp_path / "e", "0"), iter(range(1, times + 1))

    def replaced(path: Path) -> str:
        if path == engine / "networks" / "unet.bin" and (content := next(contents, None)) is not None:
            build(engine, str(content))
        return sha256_file(path)

    monkeypatch.setattr(atomic, "sha256_file", replaced)
    folder = open_folder(engine)
    assert folder.manifest == read_manifest(engine) and (engine / "networks" / "unet.bin").read_text() == str(times)


def test_an_engine_that_is_replaced_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, contents = build(tmp_path / "e", "0"), iter(range(1, 100))

    def replaced(path: Path) -> str:
        if path == engine / "networks" / "unet.bin":
            build(engine, str(next(contents)))
        return sha256_file(path)

    monkeypatch.setattr(atomic, "sha256_file", replaced)
    with pytest.raises(EngineFolderError, match="was altered: networks/unet.bin"):
        open_folder(engine)
    assert next(contents) < 10


def test_a_build_learns_what_it_has_written(tmp_path: Path) -> None:
    manifest = {"backend": "torch", "size": (32, 48)}
    with building(tmp_path / "e", manifest) as staging:
        (staging / "networks").mkdir()
    assert manifest == read_manifest(tmp_path / "e") and manifest["seal"]


def test_links_to_the_files_of_a_verified_engine_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(build(tmp_path / "first.engine"))
    read = []
    monkeypatch.setattr(atomic, "sha256_file", lambda path: (read.append(path.name), sha256_file(path))[1])
    known: dict[str, str] = {}
    with building(tmp_path / "second.engine", {"backend": "torch"}, known=known) as staging:
        (staging / "networks").mkdir()
        known |= take_networks(source, staging)
        (staging / "reference.safetensors").write_text("other frames")
        (staging / "further").write_text("more")
    assert sorted(read) == ["further", "reference.safetensors"]
    second = open_folder(tmp_path / "second.engine")
    assert list(second.manifest["files"]) == ["further", "networks/unet.bin", "reference.safetensors"]
    assert second.manifest["files"]["networks/unet.bin"] == source.manifest["files"]["networks/unet.bin"]
    assert "unet.bin" in read  # it was read when that was opened
    assert shared_bytes(second.path, second.manifest["files"]) == len("network")
    assert shared_bytes(build(tmp_path / "third.engine"), second.manifest["files"]) == 0


def test_where_files_cannot_be_linked_it_is_said_once_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, folder = open_folder(build(tmp_path / "first.engine")), tmp_path / "second"
    shutil.copytree(source.networks, source.path / "more")

    def fails(first: object, second: Path) -> None:
        second.write_text("half a link")  # as a network's file system may leave behind
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", fails)
    (folder / "networks").mkdir(parents=True)
    assert take_networks(source, folder) == {"networks/unet.bin": source.manifest["files"]["networks/unet.bin"]}
    assert (folder / "networks" / "unet.bin").read_text() == "network" and not (folder / "more").exists()
    said = "cannot be shared (Invalid cross-device link): they are copied"
    assert [record.getMessage() for record in caplog.records] == [f"the networks of {source.path} {said}"]


def test_a_file_that_engines_share_is_altered_for_all_of_them(tmp_path: Path) -> None:
    first = build(tmp_path / "first.engine")
    os.link(first / "networks" / "unet.bin", tmp_path / "another")
    (tmp_path / "another").write_text("altered")
    with pytest.raises(EngineFolderError, match="unet.bin is not the file that was built") as caught:
        open_folder(first)
    assert str(caught.value.hint).startswith("other engines share this file") and "--force" in str(caught.value.hint)


def test_an_engine_has_the_name_that_the_user_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me").symlink_to(build(tmp_path / "3f2a9c"))
    monkeypatch.chdir(tmp_path / "3f2a9c")
    folders = [open_folder(path) for path in (tmp_path / "me", "../me", tmp_path / "3f2a9c", ".")]
    monkeypatch.chdir("/")
    names = [folder.name for folder in folders]
    assert names == ["me", "me", "3f2a9c", "3f2a9c"]
    (tmp_path / "me" / "more").touch()
    with pytest.raises(EngineFolderError, match=f"^{tmp_path}/me holds more") as caught:
        open_folder(tmp_path / "me")
    assert caught.value.hint and f"remove {tmp_path}/me/more" in caught.value.hint


def test_it_is_built_where_folders_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    def flush(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flushed.append(path.name)

    monkeypatch.setattr(os, "fsync", flush)
    open_folder(build(tmp_path / "me.engine"))
    assert {"unet.bin", "manifest.json"} <= {*flushed}


def test_caches_lie_outside_the_hashes(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "e"))
    for cache in (folder.inversions, folder.compiled):
        cache.mkdir()
        (cache / "anything").write_text("anything")
    open_folder(tmp_path / "e")


@pytest.mark.parametrize("name", ["networks/unet.bin", "reference.safetensors"])
def test_one_byte_changed_names_the_file(tmp_path: Path, name: str) -> None:
    file = build(tmp_path / "e") / name
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)
    with pytest.raises(EngineFolderError, match=f"altered: {name}") as caught:
        open_folder(tmp_path / "e")
    assert caught.value.hint and "build-engine" in caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [(b"torch", b"torcg"), (b'"seal": "', b'"seal": "0')])
def test_a_changed_manifest_is_refused(tmp_path: Path, before: bytes, after: bytes) -> None:
    manifest = build(tmp_path / "e") / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(before, after, 1))
    with pytest.raises(EngineFolderError, match="manifest.json"):
        open_folder(tmp_path / "e")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        r'{"schema": 0, "name": "\ud800"}',
        '{"schema": 0}',
        '{"schema": 0, "size": NaN}',
        '{"schema": 6, "size": NaN}',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (build(tmp_path / "e") / "manifest.json").write_text(content)
    with pytest.raises(EngineFolderError):
        open_folder(tmp_path / "e")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no file that root cannot read")
def test_a_manifest_that_cannot_be_read_is_not_said_to_be_damaged(tmp_path: Path) -> None:
    """As is the first byte of a process's memory, where nothing is."""
    manifest = build(tmp_path / "e") / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")
    with pytest.raises(EngineFolderError, match=r"e/manifest\.json cannot be read: input/output error$") as caught:
        open_folder(tmp_path / "e")
    assert caught.value.hint and "build" not in caught.value.hint


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = build(tmp_path / "e")
    (path / "networks" / "more").write_text("x")
    with pytest.raises(EngineFolderError, match="holds networks/more"):
        open_folder(path)
    (path / "networks" / "more").unlink()
    (path / "reference.safetensors").unlink()
    with pytest.raises(EngineFolderError, match="reference.safetensors is missing"):
        open_folder(path)
    with pytest.raises(EngineFolderError, match="not an engine folder"):
        open_folder(tmp_path / "nothing")


def test_what_is_no_engine_is_never_told_to_be_replaced(tmp_path: Path) -> None:
    """A checkpoint in the place of an engine, a web application's folder, and what is not there yet."""
    checkpoint, web, new = tmp_path / "me.ckpt", tmp_path / "web", tmp_path / "new.engine"
    checkpoint.touch()
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "mine", "schema": 1}')
    hints = []
    for path in (checkpoint, web, tmp_path, new):
        with pytest.raises(EngineFolderError, match=f"{path.name} is not an engine folder") as caught:
            open_folder(path)
        hints.append(caught.value.hint)
    build = "posecrafter-rt build-engine"
    assert hints == [f"an engine is a folder, which is built of a tuned checkpoint: {build} {checkpoint}",
                     f"{build} tuned.ckpt", f"{build} tuned.ckpt", f"{build} tuned.ckpt -o {new}"]  # fmt: skip


def test_a_changed_manifest_can_be_sealed_again(tmp_path: Path) -> None:
    path = build(tmp_path / "e")
    write_manifest(path, {**read_manifest(path), "backend": "openvino"})
    assert open_folder(path).manifest["backend"] == "openvino"


def test_what_mends_an_engine_says_what_its_manifest_says() -> None:
    path, command = Path("me.engine"), "posecrafter-rt build-engine tuned.ckpt -o me.engine"
    assert rebuild_command(path, {"device": {"type": "cpu"}, "feature_reuse": True}) == command
    manifest = {
        "backend": "tensorrt", "precision": "fp16", "size": [512, 384], "max_frames": 48, "feature_reuse": False,
        "loras": [{"file": "a style.safetensors", "sha256": "0", "scale": 0.5}, {"file": "b", "sha256": "1", "scale": 1.0}],
        "small_decoder": "2",
    }  # fmt: skip
    options = "--backend tensorrt --precision fp16 --size 512x384 --max-frames 48 --lora 'a style.safetensors':0.5 --lora b:1.0"
    assert rebuild_command(path, manifest) == f"{command} {options} --small-decoder FOLDER --no-feature-reuse"


@pytest.mark.parametrize("is_sealed", [True, False])
def test_an_engine_of_another_version_is_built_again_as_it_was_unless_somebody_has_altered_it(
    tmp_path: Path, is_sealed: bool
) -> None:
    path = build(tmp_path / "e")
    write_manifest(path, {**read_manifest(path), "schema": 2, "precision": "bf16"})
    if not is_sealed:
        file = path / "manifest.json"
        file.write_text(file.read_text().replace("bf16", "bf17"))
    with pytest.raises(EngineFolderError, match="another version") as caught:
        open_folder(path)
    options = " --backend torch --precision bf16" if is_sealed else ""
    assert caught.value.hint == f"build it again: posecrafter-rt build-engine tuned.ckpt -o {path}{options} --force"


def test_what_mends_networks_is_said_in_full_where_their_manifest_is_there(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "e"))
    command = f"posecrafter-rt build-engine tuned.ckpt -o {folder.path} --backend torch --force"
    assert rebuild_networks_hint(folder.networks) == f"build it again: {command}"
    (folder.path / "manifest.json").write_text("{}")
    for networks in (folder.networks, tmp_path):
        assert rebuild_networks_hint(networks) == "build it again: posecrafter-rt build-engine ... --force"

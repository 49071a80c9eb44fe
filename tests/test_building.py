"""Building engines of a tiny base: once, anew where something changed, never over what is not ours; and damaged ones."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from posecrafter_rt import atomic
from posecrafter_rt.atomic import sha256_file
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine, choose_max_frames, libraries_of
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.engine_training import choose_size
from posecrafter_rt.engines import LAST_RESORT, choose_backend, get_backend
from posecrafter_rt.engines.folder import PASSED_OVER, EngineFolder, open_folder
from posecrafter_rt.engines.manifest import read_manifest, write_manifest
from posecrafter_rt.errors import (
    BackendUnavailable,
    CheckpointError,
    DiskFull,
    EngineFolderError,
    ModelError,
    OutOfMemory,
    OutputExists,
    PoseCrafterError,
    ShapeError,
)
from posecrafter_rt.framing import resize_to, transform_keypoints
from posecrafter_rt.locks import locked
from posecrafter_rt.models.lora import Lora
from posecrafter_rt.tuning import TuneOptions, tune
from tests.tiny import SIZE, TORCH, some_poses


@pytest.fixture
def copied(tiny_engine: Path, tmp_path: Path) -> Path:
    """The tiny engine to write to."""
    return shutil.copytree(tiny_engine, tmp_path / "e")


def test_the_same_build_twice_is_nothing_to_do(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    before = (tiny_engine / "manifest.json").stat().st_mtime_ns
    result = build_engine(tiny_checkpoint, tiny_engine, TORCH)
    assert result.was_current and (tiny_engine / "manifest.json").stat().st_mtime_ns == before


FailFirstChoice = Callable[..., list[Exception]]


@pytest.fixture
def fail_first_choice(monkeypatch: pytest.MonkeyPatch) -> FailFirstChoice:
    """fail_first_choice(*errors): what `auto` takes here fails by them, in turn and then by the last; they are listed as raised."""

    def fail(*errors: Exception) -> list[Exception]:
        raised: list[Exception] = []

        def fails(*arguments: object) -> None:
            raised.append(errors[min(len(raised), len(errors) - 1)])
            raise raised[-1]

        monkeypatch.setattr(type(choose_backend("auto", "fp32")[0]), "build", fails)
        return raised

    return fail


@pytest.mark.parametrize("error", [AttributeError("no such method"), EngineFolderError("unet: an error of 0.3", "ask")])
def test_auto_passes_over_what_fails_and_says_so(
    error: Exception, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fails(self: object, model: object, arch: object, folder: Path, *arguments: object) -> None:
        (folder / "half").touch()
        raise error

    first, _ = choose_backend("auto", "fp32")
    assert first.name != LAST_RESORT
    monkeypatch.setattr(type(first), "build", fails)
    result = build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions(precision="fp32"))
    assert result.folder.manifest["backend"] == LAST_RESORT and not (tmp_path / "e" / "networks" / "half").exists()
    why = f"{first.name}: it failed at this engine: {error}"
    assert why in result.backend_reason and f"{first.name} is passed over" in caplog.text
    with pytest.raises(type(error)):
        build_engine(tiny_checkpoint, tmp_path / "f", BuildOptions(first.name, "fp32"))
    monkeypatch.setattr(type(first), "build", _no_space)
    with pytest.raises(DiskFull):
        build_engine(tiny_checkpoint, tmp_path / "f", BuildOptions(precision="fp32"))
    assert not (tmp_path / "f").exists()


def test_what_one_backend_alone_has_fails_with_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from posecrafter_rt.engines.openvino import OpenVinoBackend

    def fails(*arguments: object) -> None:
        raise AttributeError("no such method")

    monkeypatch.setattr(OpenVinoBackend, "unsupported_reason", lambda self, precision: None)
    monkeypatch.setattr(OpenVinoBackend, "build", fails)
    with pytest.raises(AttributeError, match="no such method"):
        build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions(precision="int8"))
    assert "passed over" not in caplog.text and not (tmp_path / "e").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and is taken")
def test_what_auto_takes_next_has_a_precision_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, which `openvino` gains by on some processors, `torch` is slower than in float32."""
    from posecrafter_rt.engines import openvino_operations
    from posecrafter_rt.engines.openvino import OpenVinoBackend

    precisions: list[str] = []

    def fails(*arguments: Any) -> None:
        precisions.append(arguments[4])
        raise AttributeError("no such method")

    monkeypatch.setattr(openvino_operations, "has_tiles", lambda: True)
    monkeypatch.setattr(OpenVinoBackend, "unsupported_reason", lambda self, precision: None)
    monkeypatch.setattr(OpenVinoBackend, "build", fails)
    built = build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions()).folder.manifest
    assert precisions == ["fp16"] and (built["backend"], built["precision"]) == (LAST_RESORT, "fp32")
    again = build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions())
    assert again.was_current and precisions == ["fp16"]


def test_what_auto_passed_over_is_not_tried_again_until_something_changes(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail_first_choice: FailFirstChoice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto, path, backend = BuildOptions(precision="fp32"), tmp_path / "e", type(choose_backend("auto", "fp32")[0])
    tries = fail_first_choice(AttributeError("no such method"))
    by_name = build_engine(tiny_checkpoint, path, BuildOptions(LAST_RESORT, "fp32")).folder
    assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 1
    caplog.clear()
    for _ in range(2):
        again = build_engine(tiny_checkpoint, path, auto)
        assert again.was_current and again.folder.manifest == by_name.manifest and len(tries) == 1
        hint = f"build-engine with --backend {backend.name} or --force tries it again"
        how = f"it failed at this engine before: no such method; {hint}"
        assert how in again.backend_reason and f"{backend.name} is passed over, {how}" in caplog.text
    assert build_engine(tiny_checkpoint, path, auto, force=True).was_current and len(tries) == 2
    assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 2
    with pytest.raises(AttributeError):
        build_engine(tiny_checkpoint, path, BuildOptions(backend.name, "fp32"))
    for changed in ("device", "libraries"):  # a driver, say, or a version
        with monkeypatch.context() as patch:
            if changed == "device":
                patch.setattr(backend, "device", lambda self: {"type": "cpu", "name": "another"})
            else:
                patch.setattr(backend, "libraries", ("torch", "numpy"))
            tries.clear()
            assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 1
    tries.clear()
    assert not build_engine(tiny_checkpoint, path, BuildOptions(precision="fp32", size=(48, 48))).was_current and tries
    open_folder(path)


def test_an_engine_that_auto_has_built_anew_says_what_it_passed_over(
    tiny_checkpoint: Path, tmp_path: Path, fail_first_choice: FailFirstChoice
) -> None:
    auto, tries = BuildOptions(precision="fp32"), fail_first_choice(AttributeError("no such method"))
    path = build_engine(tiny_checkpoint, tmp_path / "e", auto).folder.path
    assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 1
    (path / PASSED_OVER).write_text("{")
    assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 2


def test_what_was_passed_over_stays_so_when_what_was_built_instead_is_built_again(
    tiny_checkpoint: Path, tmp_path: Path, fail_first_choice: FailFirstChoice
) -> None:
    auto, tries = BuildOptions(precision="fp32"), fail_first_choice(AttributeError("no such method"))
    folder = build_engine(tiny_checkpoint, tmp_path / "e", auto).folder
    with (folder.networks / "unet.safetensors").open("ab") as file:
        file.write(b"damage")
    assert not build_engine(tiny_checkpoint, folder.path, auto).was_current
    assert build_engine(tiny_checkpoint, folder.path, auto).was_current and len(tries) == 1
    assert build_engine(tiny_checkpoint, folder.path, BuildOptions(LAST_RESORT, "fp32")).was_current
    assert build_engine(tiny_checkpoint, folder.path, auto).was_current and len(tries) == 1


def test_what_was_passed_over_stays_so_when_another_checkpoint_was_built_in_its_place(
    tiny_checkpoint: Path, tmp_path: Path, fail_first_choice: FailFirstChoice
) -> None:
    auto, tries, path = (
        BuildOptions(precision="fp32"),
        fail_first_choice(AttributeError("no such method")),
        tmp_path / "e",
    )
    tuned = Checkpoint.load(tiny_checkpoint)
    replace(tuned, metadata={**tuned.metadata, "prompt": "another"}).save(tmp_path / "other.ckpt")
    for checkpoint, count in ((tiny_checkpoint, 1), (tmp_path / "other.ckpt", 2), (tiny_checkpoint, 2)):
        assert not build_engine(checkpoint, path, auto).was_current and len(tries) == count
    assert build_engine(tiny_checkpoint, path, auto, force=True).was_current and len(tries) == 3
    shutil.rmtree(path / "networks")
    assert not build_engine(tiny_checkpoint, path, auto, force=True).was_current and len(tries) == 4
    assert len(json.loads((path / PASSED_OVER).read_text())) == 1  # the other's is forgotten


def test_a_reason_that_force_has_found_gone_is_not_given_again(
    tiny_checkpoint: Path, tmp_path: Path, fail_first_choice: FailFirstChoice
) -> None:
    auto, lasting = BuildOptions(precision="fp32"), AttributeError("no such method")
    tries = fail_first_choice(lasting, OutOfMemory("out of memory", "free some"), lasting)
    path = build_engine(tiny_checkpoint, tmp_path / "e", auto).folder.path
    assert build_engine(tiny_checkpoint, path, auto, force=True).was_current and len(tries) == 2
    assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 3
    assert build_engine(tiny_checkpoint, path, auto).was_current and len(tries) == 3


@pytest.mark.parametrize(("name", "libraries"), [("torch", set()), ("openvino", {"onnx", "onnx-ir", "onnxscript"}),
                                                 ("tensorrt", {"triton", "onnx", "onnx-ir", "onnxscript"}),
                                                 ("inductor", {"triton"})])  # fmt: skip
def test_an_engine_depends_on_the_libraries_that_its_backend_builds_with(name: str, libraries: set[str]) -> None:
    found = {*libraries_of(get_backend(name))}
    assert found & {"triton", "onnx", "onnx-ir", "onnxscript"} == libraries
    assert {"torch", "diffusers", "transformers", *get_backend(name).libraries} <= found


def test_other_libraries_may_change(
    tiny_checkpoint: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ("triton", "onnx", "onnx-ir", "onnxscript")
    monkeypatch.setattr("posecrafter_rt.machine.version", lambda name: "99" if name in others else version(name))
    assert build_engine(tiny_checkpoint, copied, TORCH).was_current
    build_engine(tiny_checkpoint, tmp_path / "refitted", BuildOptions(refit=copied))
    Avatar.load(copied).close()


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("out of memory", "free some"),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_was_too_little_may_suffice_the_next_time(
    error: Exception, tiny_checkpoint: Path, tmp_path: Path, fail_first_choice: FailFirstChoice
) -> None:
    tries = fail_first_choice(error)
    for count in (1, 2):
        result = build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions(precision="fp32"))
        assert result.folder.manifest["backend"] == LAST_RESORT and len(tries) == count


def _no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_the_base_recommends_anew_reaches_an_engine_that_was_built_before(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    frames = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    tune(frames, some_poses(2), tmp_path / "a.ckpt", TuneOptions(base=str(base), frames=2, steps=1, precision="fp32"))
    build_engine(tmp_path / "a.ckpt", options=TORCH)
    settings = json.loads((base / "posecrafter.json").read_text())
    (base / "posecrafter.json").write_text(json.dumps({**settings, "strength": 0.5}))
    again = build_engine(tmp_path / "a.ckpt", options=TORCH)
    assert not again.was_current and again.folder.manifest["recommended"]["strength"] == 0.5


@pytest.mark.parametrize(
    ("file", "change"),
    [("vae/config.json", {"scaling_factor": 0.5}), ("tokenizer/tokenizer_config.json", {"do_lower_case": False})],
)
def test_how_a_base_is_configured_anew_reaches_an_engine_that_was_built_before(
    file: str, change: dict[str, Any], tiny_base: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Of a checkpoint that does not know what its networks were; any other is refused."""
    base, tuned = shutil.copytree(tiny_base, tmp_path / "base"), Checkpoint.load(tiny_checkpoint)
    older = {name: value for name, value in tuned.metadata.items() if name != "configurations"}
    replace(tuned, metadata=older).save(tmp_path / "older.ckpt")
    options = replace(TORCH, base=str(base))
    before = build_engine(tmp_path / "older.ckpt", options=options).folder.manifest
    config = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**config, "_diffusers_version": "0.0"} if "vae" in file else config))
    if "vae" in file:
        assert build_engine(tmp_path / "older.ckpt", options=options).was_current
    (base / file).write_text(json.dumps({**config, **change}))
    again = build_engine(tmp_path / "older.ckpt", options=options)
    assert not again.was_current and again.folder.manifest["base_hash"] == before["base_hash"]
    if "vae" in file:  # tokenizers that are saved again are in other files
        with pytest.raises(CheckpointError, match="another configuration of the vae$"):
            build_engine(tiny_checkpoint, tmp_path / "newer.engine", options)


def test_an_engine_is_not_read_again_once_it_is_in_its_place(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another build may have replaced it by then. What is returned is what was written all the same."""
    hashed = []

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr(atomic, "sha256_file", noted)
    (tmp_path / "link").symlink_to(tmp_path)
    folder = build_engine(tiny_checkpoint, tmp_path / "link" / "e", TORCH).folder
    assert hashed and not [path for path in hashed if path.parent.resolve().is_relative_to(folder.path)]
    assert folder == open_folder(tmp_path / "link" / "e")


@pytest.mark.parametrize(("name", "engine"), [("jane.doe", "jane.doe.engine"), ("a.b.ckpt", "a.b.engine"),
                                              ("A.SafeTensors", "A.engine"), ("jane", "jane.engine")])  # fmt: skip
def test_a_name_with_a_dot_is_a_name(name: str, engine: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Else jane.smith would replace jane.doe."""
    shutil.copy(tiny_checkpoint, tmp_path / name)
    assert build_engine(tmp_path / name, options=TORCH).folder.path == tmp_path / engine


def test_one_byte_changed_is_refused_by_name(tiny_checkpoint: Path, copied: Path) -> None:
    file = copied / "networks" / "unet.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(EngineFolderError, match="networks/unet.safetensors"):
        Avatar.load(copied)
    assert not build_engine(tiny_checkpoint, copied, TORCH).was_current  # building again mends it
    Avatar.load(copied).close()


@pytest.mark.parametrize(("damage", "named"), [("missing", "is missing"), ("extra", "was not built with it"),
                                               ("torn manifest", "damaged"), ("schema", "another version"),
                                               ("device", "was built on another processor"),
                                               ("library", "was built on torch 1.0, this is torch 2"),
                                               ("package", "was built on posecrafter-rt 0.0")])  # fmt: skip
def test_other_damage_is_refused_with_the_reason(copied: Path, damage: str, named: str) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    if damage == "missing":
        (copied / "networks" / "vae.safetensors").unlink()
    elif damage == "extra":
        (copied / "networks" / "more.bin").write_bytes(b"x")
    elif damage == "torn manifest":
        (copied / "manifest.json").write_text("{")
    else:
        manifest |= {
            "schema": {"schema": 99},
            "device": {"device": {"type": "cpu", "name": "another processor"}},
            "library": {"libraries": {**manifest["libraries"], "torch": "1.0"}},
            "package": {"package": "0.0"},
        }[damage]
        write_manifest(copied, manifest)
    with pytest.raises(EngineFolderError, match=named) as caught:
        Avatar.load(copied)
    assert caught.value.hint and "build-engine" in caught.value.hint


def test_the_hint_is_the_command_that_builds_this_engine(
    tiny_checkpoint: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Checkpoint.load(tiny_checkpoint)
    frames, poses = resize_to(tuned.frames, (64, 96)), transform_keypoints(tuned.poses, (64, 96))
    replace(tuned, frames=frames, poses=poses).save(tmp_path / "tuned.ckpt")
    shutil.copy(tiny_lora, tmp_path / "a style.safetensors")
    monkeypatch.chdir(tmp_path)
    options = BuildOptions(
        "torch", "bf16", size=(32, 48), feature_reuse=False, loras=(Lora(Path("a style.safetensors"), 0.25),)
    )
    built = build_engine("tuned.ckpt", "me.engine", options).folder
    (built.networks / "unet.safetensors").unlink()
    with pytest.raises(EngineFolderError, match="is missing") as caught:
        Avatar.load("me.engine")
    program, *arguments = shlex.split(str(caught.value.hint).removeprefix("build it again: "))
    result = CliRunner().invoke(app, arguments)
    assert program == "posecrafter-rt" and result.exit_code == 0, result.output
    again = open_folder("me.engine").manifest
    assert again["fingerprint"] == built.manifest["fingerprint"]
    assert again["files"].keys() == built.manifest["files"].keys()


def test_parts_that_moved_are_given(tiny_base: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = {name: Path(shutil.copytree(tiny_base / name, tmp_path / "old" / name)) for name in ("controlnet", "vae")}
    tuned = Checkpoint.load(tiny_checkpoint)
    tuned.metadata.update({name: str(path) for name, path in parts.items()})
    tuned.save(tmp_path / "tuned.ckpt")
    moved = {name: str(shutil.move(path, tmp_path / name)) for name, path in parts.items()}
    with pytest.raises(ModelError, match="there is no vae at") as raised:
        build_engine(tmp_path / "tuned.ckpt", tmp_path / "e", TORCH)
    assert "--vae takes" in str(raised.value.hint)
    with pytest.raises(ModelError, match="there is no controlnet at") as raised:
        build_engine(tmp_path / "tuned.ckpt", tmp_path / "e", replace(TORCH, vae=moved["vae"]))
    assert "--controlnet takes" in str(raised.value.hint)
    with pytest.raises(OutputExists, match="from"):
        build_engine(tmp_path / "tuned.ckpt", moved["vae"], replace(TORCH, **moved), force=True)
    given = [str(tmp_path / "tuned.ckpt"), "-o", str(tmp_path / "e"), "--backend", "torch", "--precision", "fp32"]
    given += [argument for name, path in moved.items() for argument in (f"--{name}", path)]
    result = CliRunner().invoke(app, ["build-engine", *given])
    assert result.exit_code == 0, result.output
    assert build_engine(tmp_path / "tuned.ckpt", tmp_path / "e", replace(TORCH, **moved)).was_current


def test_what_the_user_made_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        build_engine(tiny_checkpoint, tmp_path / "notes", TORCH)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_what_an_engine_is_built_from_is_not_replaced_even_by_force(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    checkpoint = Path(shutil.copy(tiny_checkpoint, tmp_path / "mine" / "me.ckpt"))
    for output in (checkpoint, checkpoint.parent):
        with pytest.raises(OutputExists, match="from"):
            build_engine(checkpoint, output, TORCH, force=True)
    assert checkpoint.read_bytes() == tiny_checkpoint.read_bytes()


def test_an_engine_holds_no_other(tiny_checkpoint: Path, copied: Path) -> None:
    with pytest.raises(OutputExists, match=r"would lie in the engine .*, which holds nothing else"):
        build_engine(tiny_checkpoint, copied / "other.engine", TORCH, force=True)
    open_folder(copied)


def test_numbers_of_any_library_become_pythons_own() -> None:
    """For the manifest, which is written as JSON."""
    given = BuildOptions(size=tuple(np.array([512, 768])), max_frames=np.int64(64))  # type: ignore[arg-type]
    assert given == BuildOptions(size=(512, 768), max_frames=64)
    assert given.size is not None and {type(number) for number in (*given.size, given.max_frames)} == {int}


@pytest.mark.parametrize("size", ["32x32", (32,), (32.0, 32.0)])
def test_a_size_is_a_height_and_a_width(size: Any) -> None:
    with pytest.raises(ShapeError, match="a size of"):
        BuildOptions("torch", size=size)


def test_a_build_that_fails_leaves_nothing_and_the_old_engine_works(tiny_checkpoint: Path, copied: Path) -> None:

    def interrupt(stage: str, seconds_left: float | None) -> None:
        if stage == "vae":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_checkpoint, copied, BuildOptions("torch", "bf16"), progress=interrupt)
    assert list(copied.parent.iterdir()) == [copied]
    Avatar.load(copied).close()


def test_sizes_and_backends_that_cannot_be_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="33x32"):
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("torch", "fp32", size=(33, 32)))
    with pytest.raises(ShapeError, match="of 32x48 has another shape than the frames of tuning, 32x32") as caught:
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("torch", "fp32", size=(32, 48)))
    assert caught.value.hint == "tune with --size 32x48, or build for a size of tuning's shape"
    with pytest.raises(BackendUnavailable, match="magic"):
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("magic"))
    with pytest.raises(BackendUnavailable, match="fp8"):
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("torch", "fp8"))


@pytest.mark.parametrize(("size", "is_fine"), [
    (None, True), ((256, 320), True), ((96, 128), False), ((128, 224), False), ((160, 128), False), ((64, 81), True)])  # fmt: skip
def test_an_engine_has_the_shape_of_tuning(size: tuple[int, int] | None, is_fine: bool) -> None:
    """Then a training frame's pose, fitted twice, lies where the same pose does as a target, which is fitted once."""
    tuned, filmed = (128, 160), some_poses(1, size=(720, 1280))
    if not is_fine:
        with pytest.raises(ShapeError, match="another shape than the frames of tuning, 128x160"):
            choose_size(size, tuned)
        return
    chosen = choose_size(size, tuned)
    twice, once = transform_keypoints(transform_keypoints(filmed, tuned), chosen), transform_keypoints(filmed, chosen)
    assert np.abs(twice.keypoints - once.keypoints).max() < 0.02 * max(chosen)


def test_an_engine_that_is_loaded_is_not_replaced(tiny_checkpoint: Path, copied: Path) -> None:
    other, link = BuildOptions("torch", "bf16"), copied.with_name("link")
    link.symlink_to(copied)
    with Avatar.load(link) as avatar:
        for _ in range(2):
            with pytest.raises(EngineFolderError, match="is in use"):
                build_engine(tiny_checkpoint, copied, other)
            avatar.networks.close()  # as a render does when it comes to another precision
        assert build_engine(tiny_checkpoint, copied, TORCH).was_current
    assert not build_engine(tiny_checkpoint, copied, other).was_current
    with pytest.raises(EngineFolderError, match=f"^{link} was built anew after it had been opened"):
        avatar.render(some_poses(2), num_inference_steps=2)


def test_the_engine_to_refit_is_in_use_as_long_as_it_is_read(
    tiny_checkpoint: Path, copied: Path, tmp_path: Path
) -> None:
    is_in_use = {}

    def look(stage: str, seconds_left: float | None) -> None:
        try:
            with locked(copied / "manifest.json"):
                is_in_use[stage] = False
        except BlockingIOError:
            is_in_use[stage] = True

    build_engine(tiny_checkpoint, tmp_path / "refitted", BuildOptions(refit=copied), progress=look)
    assert not is_in_use["loading the tuned weights"] and is_in_use["writing the tuned weights"]
    look("at the end", None)
    assert not is_in_use["at the end"]


def test_the_most_frames_are_those_asked_for_or_of_the_engine_to_refit_or_the_usual_ones() -> None:
    tensorrt, source = get_backend("tensorrt"), EngineFolder(Path("a.engine"), {"max_frames": 20})
    assert choose_max_frames(BuildOptions(max_frames=8), tensorrt, SIZE, None) == 8
    assert choose_max_frames(BuildOptions(), tensorrt, SIZE, source) == 20
    assert choose_max_frames(BuildOptions(), tensorrt, SIZE, None) == 64
    assert choose_max_frames(BuildOptions(), get_backend("torch"), SIZE, None) is None
    with pytest.raises(PoseCrafterError, match="an engine for 1 frames at once"):
        choose_max_frames(BuildOptions(max_frames=1), tensorrt, SIZE, None)


def test_a_backend_that_takes_any_number_of_frames_is_not_told_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PoseCrafterError, match="backend torch takes any number of frames") as caught:
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("torch", "fp32", max_frames=32))
    assert caught.value.hint == "leave out --max-frames" and not list(tmp_path.iterdir())
    command = ["build-engine", str(tiny_checkpoint), "--backend", "torch", "-o", str(tmp_path / "a")]
    result = CliRunner().invoke(app, [*command, "--max-frames", "32"])
    assert result.exit_code == 1 and "leave out --max-frames" in result.output
    assert CliRunner().invoke(app, [*command, "--max-frames", "1"]).exit_code == 2


def test_more_frames_than_an_engine_takes_are_refused_before_any_work(copied: Path) -> None:
    """An engine of another backend that is said to take three stands for one that does."""
    manifest = read_manifest(copied)
    write_manifest(copied, {**manifest, "architecture": {**manifest["architecture"], "max_frames": 3}})
    before = sorted(copied.glob("inversions/*"))
    with Avatar.load(copied) as avatar:
        for options, at_once in (({}, 5), ({"segment": 3, "overlap": 0}, 4)):
            with pytest.raises(PoseCrafterError, match=f"^{at_once} frames at once, the reference among them, are more than "
                               "the 3 that this engine takes$") as caught:  # fmt: skip
                avatar.render(some_poses(4), num_inference_steps=2, **options)
            assert caught.value.hint and "--segment 2" in caught.value.hint
            assert ("--segment 2 --overlap 0," in caught.value.hint) == ("overlap" not in options)  # 4 are too many
            rebuild = f"build-engine tuned.ckpt -o {copied} --backend torch --precision fp32 --size 32x32"
            assert caught.value.hint.endswith(f"{rebuild} --max-frames {at_once}")
        with pytest.raises(PoseCrafterError, match="^4 frames at once are more than the 3") as caught:
            avatar.render(some_poses(4), num_inference_steps=2, mode="+selection")
        assert caught.value.hint and "--segment" not in caught.value.hint  # which that mode cannot
        assert sorted(copied.glob("inversions/*")) == before  # not even the reference was inverted
        options = avatar.resolve(num_inference_steps=2, segment="auto")
        choice = avatar.choose_segment(4, options)
        assert choice[:3] == (2, 0, "the engine takes 3 frames at once, the reference among them")
        assert len(avatar.render(some_poses(4), options)) == 4
        assert avatar.last_report is not None and avatar.last_report.options.overlap == 0

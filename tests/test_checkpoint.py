"""`tuned.ckpt`: what is saved is loaded, equal content is equal bytes, and every foreign file is one clear line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posecrafter_rt import checkpoint as checkpoint_module
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.errors import CheckpointError, DiskFull, OutputExists
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.poses.keypoints import PoseSequence


@pytest.fixture
def make_checkpoint(tiny_base: Path) -> Callable[..., Checkpoint]:
    def make(**metadata: Any) -> Checkpoint:
        model = load_base(str(tiny_base))
        random = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(parameter.shape, generator=generator)
            for name, parameter in named_parameters(model)
            if ".conv_temp." in name
            or name == "controlnet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.bias"
        }
        tensors["unet.conv_in.bias"] = torch.ones(32, dtype=torch.bfloat16)
        keypoints = random.uniform(0, 1, (2, 134, 3)).astype(np.float32)
        known = {"base": model.base_id, "base_hash": model.base_hash, "controlnet": None, "vae": None, "seed": 3,
                 "prompt": "a person", "size": [32, 48], "norm_scope": "clip", "steps": 7}  # fmt: skip
        frames = random.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
        return Checkpoint(tensors, frames, PoseSequence(keypoints, (32, 48), 25.0), {**known, **metadata})

    return make


@pytest.fixture
def saved(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Path:
    path = tmp_path / "tuned.ckpt"
    make_checkpoint().save(path)
    return path


def test_what_is_saved_is_loaded(make_checkpoint: Callable[..., Checkpoint], saved: Path) -> None:
    original, loaded = make_checkpoint(), Checkpoint.load(saved)
    assert loaded.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(loaded.tensors[name], tensor)
    np.testing.assert_array_equal(loaded.frames, original.frames)
    np.testing.assert_array_equal(loaded.poses.keypoints, original.poses.keypoints)
    assert (loaded.poses.canvas, loaded.poses.fps) == ((32, 48), 25.0)
    assert original.metadata.items() <= loaded.metadata.items()
    assert loaded.metadata["format_version"] == 1 and "torch" in loaded.metadata["versions"]
    assert loaded.digest() == original.digest()


def test_an_unknown_fps_stays_unknown(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    original = make_checkpoint()
    original.poses = PoseSequence(original.poses.keypoints, original.poses.canvas, None)
    original.save(tmp_path / "a.ckpt")
    assert Checkpoint.load(tmp_path / "a.ckpt").poses.fps is None


def test_equal_content_is_equal_bytes(saved: Path, tmp_path: Path) -> None:
    Checkpoint.load(saved).save(tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == saved.read_bytes()


def test_digest_tells_contents_apart(make_checkpoint: Callable[..., Checkpoint]) -> None:
    digests = {make_checkpoint().digest(), make_checkpoint(prompt="a man").digest(), make_checkpoint(seed=4).digest()}
    changed = make_checkpoint()
    changed.tensors["unet.conv_in.bias"] *= 2
    frames = make_checkpoint()
    frames.frames[0, 0, 0, 0] ^= 1
    assert len(digests | {changed.digest(), frames.digest()}) == 5


def test_it_is_a_plain_safetensors_file_with_one_json_header(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        (text,) = file.metadata().values()
    assert json.loads(text)["format"] == "posecrafter-rt checkpoint"


def test_nothing_is_overwritten_without_force(make_checkpoint: Callable[..., Checkpoint], saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(OutputExists):
        make_checkpoint(prompt="another").save(saved)
    assert saved.read_bytes() == before
    make_checkpoint(prompt="another").save(saved, force=True)
    assert Checkpoint.load(saved).metadata["prompt"] == "another"


def test_a_full_disk_leaves_the_old_file(
    make_checkpoint: Callable[..., Checkpoint], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint_module, "save_tensors", fail)
    with pytest.raises(DiskFull):
        make_checkpoint().save(saved, force=True)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(share: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    _refused(saved, "truncated or no checkpoint")


def test_a_missing_file(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.ckpt", "there is no checkpoint")
    _refused(tmp_path, "there is no checkpoint")


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "trace"),))

    for name in ("zip.ckpt", "zip.safetensors"):
        torch.save({"weights": Harm()}, tmp_path / name)
    torch.save({"weights": Harm()}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Harm()))
    for name in ("zip.ckpt", "zip.safetensors", "legacy.ckpt", "plain.ckpt"):
        _refused(tmp_path / name, "pickle, which could run code")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("start", [b"PK", *(bytes([0x80, version]) for version in range(2, 6))])
def test_a_checkpoint_that_begins_like_a_pickle_is_loaded(
    start: bytes, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """The first two bytes are of the header's length, and a long prompt makes it any multiple of 8."""
    path, wanted = tmp_path / "tuned.ckpt", int.from_bytes(start, "little")
    make_checkpoint(prompt="").save(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    prompt = "a" * ((wanted - length) % 65536)
    make_checkpoint(prompt=prompt).save(path, force=True)
    assert path.read_bytes()[:2] == start
    assert Checkpoint.load(path).metadata["prompt"] == prompt


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"posecrafter": "{}"}, {"posecrafter": "[]"}])
def test_another_safetensors_file(metadata: dict | None, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata)
    _refused(tmp_path / "other.safetensors", "but not a checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this release reads 1"),
        ({"metadata": None}, "damaged checkpoint"),
        ({"metadata": {"base": "embedded"}}, "does not say its base_hash"),
    ],
)
def test_another_header(change: dict, message: str, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["posecrafter"])
    save_file(load_file(saved), saved, {"posecrafter": json.dumps({**header, **change})})
    _refused(saved, message)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("frames", None, "damaged checkpoint"),
        ("keypoints", torch.full((2, 134, 3), torch.nan), "damaged checkpoint"),
        ("keypoints", torch.zeros(3, 134, 3), "2 frames but 3 poses"),
        ("frames", torch.zeros(2, 32, 48, 3), "frames are float32"),
        ("frames", torch.zeros(0, dtype=torch.uint8), "damaged checkpoint"),
        ("text_encoder.conv.weight", torch.zeros(1), "a tensor is called text_encoder.conv.weight"),
    ],
)
def test_damaged_contents(name: str, tensor: torch.Tensor | None, message: str, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    tensors = load_file(saved)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, saved, header)
    _refused(saved, message)


def test_frames_and_poses_must_fit(make_checkpoint: Callable[..., Checkpoint]) -> None:
    good = make_checkpoint()
    with pytest.raises(CheckpointError, match=r"frames are \(32, 48\) but the poses' canvas is \(64, 96\)"):
        Checkpoint(good.tensors, good.frames, PoseSequence(good.poses.keypoints, (64, 96)), good.metadata)


def test_load_model_puts_the_tensors_into_the_base(make_checkpoint: Callable[..., Checkpoint], saved: Path) -> None:
    model, expected = Checkpoint.load(saved).load_model(dtype=torch.bfloat16), make_checkpoint().tensors
    assert model.unet.norm_scope == "clip"
    parameters = dict(named_parameters(model))
    assert all(torch.equal(parameters[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_an_outline_has_what_was_tuned_and_nothing_of_the_base(
    make_checkpoint: Callable[..., Checkpoint], tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for file in base.rglob("*.safetensors"):
        file.unlink()
    checkpoint = make_checkpoint()
    outline, whole = checkpoint.load_outline(base=str(base)), checkpoint.load_model()
    assert outline.tuned == whole.tuned == set(checkpoint.tensors)
    assert outline.base_hash == whole.base_hash and outline.architecture() == whole.architecture()
    parameters = dict(named_parameters(outline))
    for name, parameter in named_parameters(whole):
        assert parameters[name].shape == parameter.shape and parameters[name].dtype == parameter.dtype
        assert parameters[name].is_meta == (name not in checkpoint.tensors)
        assert parameters[name].is_meta or torch.equal(parameters[name], parameter)
    assert all(parameter.is_meta for parameter in outline.text_encoder.parameters())


def test_a_base_of_another_configuration_gives_no_outline(
    make_checkpoint: Callable[..., Checkpoint], tiny_base: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(configurations=load_base(str(tiny_base)).configurations())
    config = shutil.copytree(tiny_base, tmp_path / "base") / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    with pytest.raises(CheckpointError, match="tuned with another configuration of the vae"):
        checkpoint.load_outline(base=str(tmp_path / "base"))


TEMPORAL = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("tuned", "is_split"),
    [
        (set(), False),
        ({"unet.conv_in.weight"}, True),
        ({"unet.conv_in.weight", "unet.conv_in.bias"}, False),
        ({f"{TEMPORAL}.conv_temp.weight", f"{TEMPORAL}.conv_temp.bias"}, True),  # made one with attn_temp.to_out
        (
            {
                f"{TEMPORAL}.{layer}.{kind}"
                for layer in ("conv_temp", "attn_temp.to_out.0")
                for kind in ("weight", "bias")
            },
            False,
        ),
    ],
)
def test_what_folding_would_make_of_tuned_and_other_weights_is_known(
    tiny_base: Path, tuned: set[str], is_split: bool
) -> None:
    model = load_base(str(tiny_base))
    model.tuned = frozenset(tuned)
    assert model.splits_modules() == is_split
    model.fold()
    expected = {name for name in tuned if TEMPORAL not in name}
    if any(TEMPORAL in name for name in tuned):
        expected |= {f"{TEMPORAL}.temporal_out.{kind}" for kind in ("weight", "bias")}
    assert model.tuned == expected and not model.tuned - dict(named_parameters(model)).keys()


def test_another_base_is_refused_with_both_hashes(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, write_tiny_base: Callable[..., Path]
) -> None:
    tuned, other = make_checkpoint(), write_tiny_base(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError) as raised:
        tuned.load_model(base=str(other))
    message = str(raised.value)
    assert tuned.metadata["base_hash"][:12] in message and load_base(str(other)).base_hash[:12] in message
    assert "(--base, --controlnet, --vae)" in str(raised.value.hint)


def test_a_part_that_moved_is_given_and_must_be_the_same(
    tiny_base: Path, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, write_tiny_base: Callable[..., Path]
) -> None:
    tuned, other = make_checkpoint(controlnet="/moved/controlnet", vae="/moved/vae"), write_tiny_base(tmp_path, seed=9)
    where = {"controlnet": str(tiny_base / "controlnet"), "vae": str(tiny_base)}
    assert tuned.load_model(**where).base_hash == tuned.metadata["base_hash"]
    for part in where:
        with pytest.raises(CheckpointError, match="was tuned on"):
            tuned.load_model(**{**where, part: str(other)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type epsilon, but .* has v_prediction"),
        ({"beta_end": 0.02}, "beta_end 0.012, but .* has 0.02"),
        ({"timestep_spacing": "trailing", "num_train_timesteps": 1000}, None),
    ],
)
def test_a_base_that_learned_by_another_schedule_is_refused(
    change: dict, message: str | None, tiny_base: Path, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    path = tmp_path / "edited" / "scheduler" / "scheduler_config.json"
    shutil.copytree(tiny_base, tmp_path / "edited")
    scheduler = json.loads(path.read_text())
    path.write_text(json.dumps({**scheduler, **change}))
    model, older = load_base(str(tmp_path / "edited")), make_checkpoint()
    older.require_base(model)
    tuned = replace(older, metadata={**older.metadata, "schedule": DDIMSchedule.from_config(scheduler).learned})
    tuned.save(tmp_path / "tuned.ckpt")
    loaded = Checkpoint.load(tmp_path / "tuned.ckpt")
    if message is None:  # only where a sampler steps
        loaded.require_base(model)
        return
    with pytest.raises(CheckpointError, match=message) as raised:
        loaded.require_base(model)
    assert "\n" not in str(raised.value) and "scheduler_config.json" in (raised.value.hint or "")


def test_what_a_later_version_says_of_the_schedule_is_no_difference(
    tiny_base: Path, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    model = load_base(str(tiny_base))
    make_checkpoint(schedule={**model.identity()["schedule"], "rescales": True}).require_base(model)
    with pytest.raises(CheckpointError, match="beta_end 2"):
        make_checkpoint(schedule={"rescales": True, "beta_end": 2}).require_base(model)


@pytest.mark.parametrize(("file", "change"), [("vae/config.json", {"scaling_factor": 0.5}),
                                              ("text_encoder/config.json", {"hidden_act": "gelu"})])  # fmt: skip
def test_a_base_of_the_same_weights_in_another_configuration_is_refused(
    file: str, change: dict[str, Any], tiny_base: Path, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    tuned = make_checkpoint(configurations={**load_base(str(tiny_base)).configurations(), "of a later version": "0"})
    base = shutil.copytree(tiny_base, tmp_path / "edited")
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **change}))
    model = load_base(str(base))
    make_checkpoint().require_base(model)  # an older one does not know
    part, (entry,) = Path(file).parent.name, change
    with pytest.raises(CheckpointError, match=f"another configuration of the {part.replace('_', ' ')}$") as raised:
        tuned.require_base(model)
    assert raised.value.hint and f"undo the change in {part}/config.json ({entry})" in raised.value.hint
    tuned.require_base(load_base(str(tiny_base)))


def test_a_base_that_was_saved_again_is_the_same(
    tiny_base: Path, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """With every default written out, or with none; of a checkpoint that knows only hashes, too."""
    for base, change in (
        (tmp_path / "first", {}),
        (tmp_path / "again", {"_name_or_path": "a", "architectures": ["A"]}),
    ):
        shutil.copytree(tiny_base, base)
        for part, default in (
            ("unet", "upcast_attention"),
            ("vae", "force_upcast"),
            ("text_encoder", "attention_dropout"),
        ):
            path = base / part / "config.json"
            config = json.loads(path.read_text())
            del config[default]
            path.write_text(json.dumps(config if base.name == "first" else {**json.loads(path.read_text()), **change}))
    first, again = (load_base(str(tmp_path / name)) for name in ("first", "again"))
    again.tokenizer.save_pretrained(tmp_path / "again" / "tokenizer")
    make_checkpoint(configurations=first.configurations()).require_base(load_base(str(tmp_path / "again")))
    make_checkpoint(configurations=again.configurations()).require_base(first)
    make_checkpoint(configurations={"vae": "a hash"}).require_base(first)


@pytest.mark.parametrize("table", [None, [], "0"])
def test_hashes_of_configurations_that_are_none_are_damage(
    table: Any, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(CheckpointError, match="configurations are not a table"):
        make_checkpoint(configurations=table)


@pytest.mark.parametrize("schedule", [None, [], ["epsilon"], "epsilon"])
def test_a_schedule_that_is_none_is_damage(schedule: Any, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["posecrafter"])
    header["metadata"]["schedule"] = schedule
    save_file(load_file(saved), saved, {"posecrafter": json.dumps(header)})
    _refused(saved, "damaged checkpoint: the noise schedule")


def _refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint.load(path)
    assert "\n" not in str(raised.value) and raised.value.hint

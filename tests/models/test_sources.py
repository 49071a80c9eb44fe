"""Where bases are looked for, and the one line when they are not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from posecrafter_rt.errors import DiskFull, ModelError
from posecrafter_rt.models.loading import load_base
from posecrafter_rt.models.small_decoder import load_small_decoder
from posecrafter_rt.models.sources import PARTS, SD15_FOLDER, hash_configs, lasting_id, locate_base, locate_component


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A hub with one repository: hub["folder"] holds its files, hub["calls"] what was asked of it.

    hub["error"]: what it raises instead. hub["snapshot"]: the folder of what was fetched.
    """
    snapshot = tmp_path_factory.mktemp("snapshot")
    state: dict[str, Any] = {"calls": [], "folder": None, "error": None, "snapshot": snapshot}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        state["calls"].append((repo_id, allow_patterns))
        if state["error"] is not None:
            raise state["error"]
        if state["folder"] is None:
            raise LocalEntryNotFoundError("cannot reach the hub\nand more lines")
        for path in state["folder"].rglob("*"):
            name = path.relative_to(state["folder"]).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / repo_id / name)
        return str(snapshot / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_hub_id_loads_like_its_folder(hub: dict[str, Any], tiny_base: Path) -> None:
    hub["folder"] = tiny_base
    model = load_base("some.owner/some-model", vae="owner/vae")
    assert model.base_id == "some.owner/some-model" and model.base_hash == load_base(str(tiny_base)).base_hash
    assert {repo_id for repo_id, _ in hub["calls"]} == {"some.owner/some-model", "owner/vae"}
    patterns, vae_patterns = (
        [pattern for repo_id, asked in hub["calls"] if repo_id == wanted for pattern in asked]
        for wanted in ("some.owner/some-model", "owner/vae")
    )
    assert "vae/diffusion_pytorch_model.safetensors" not in patterns  # another is given
    # Not the hub's whole repository, which holds the same weights five times.
    assert "unet/diffusion_pytorch_model.safetensors" in patterns and "text_encoder/model.safetensors" in patterns
    assert not any("*" in pattern and pattern not in ("tokenizer/*", "scheduler/*.json") for pattern in patterns)
    assert "diffusion_pytorch_model.safetensors" in vae_patterns


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        (["diffusion_pytorch_model.bin"], 1),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"], 1),
        (["diffusion_pytorch_model-00001-of-00002.bin", "diffusion_pytorch_model-00002-of-00002.bin"], 2),
        (["diffusion_pytorch_model.fp16-00001-of-00001.bin", "diffusion_pytorch_model.non_ema.bin"], 1),
    ],
)
def test_of_a_repository_the_first_form_is_fetched(
    held: list[str], taken: int, hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["folder"] = tmp_path
    for name in ("config.json", *held):
        (tmp_path / name).write_text("{}")
    part = locate_component("owner/controlnet", "controlnet")
    assert [path.name for path in part.files] == held[:taken]
    assert sorted(path.name for path in part.location.iterdir()) == ["config.json", *held[:taken]]


def test_each_network_is_fetched_in_the_form_it_has(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["folder"] = tmp_path
    held = {
        "unet": ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"],
        "controlnet": ["diffusion_pytorch_model.safetensors"],
        "vae": ["diffusion_pytorch_model.fp16.bin"],
        "text_encoder": ["pytorch_model.bin"],
    }  # fmt: skip
    for role, names in held.items():
        (tmp_path / role).mkdir()
        for name in ("config.json", *names):
            (tmp_path / role / name).write_text("{}")
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_text("{}")  # not needed, so not fetched
    base = locate_base("owner/model")
    assert {role: [path.name for path in base.component(role).files] for role in held} == held
    assert base.folder is not None and not (base.folder / "unet" / "diffusion_pytorch_model.bin").exists()


def test_configurations_are_hashed_without_fetching_weights(
    hub: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    hub["folder"] = tiny_base
    hashes = hash_configs(locate_base("owner/model"), {"vae": "owner/vae", "controlnet": None})
    assert not list(hub["snapshot"].rglob("*.safetensors"))
    assert hashes == hash_configs(locate_base(str(tiny_base)), {}) and set(hashes) == {*PARTS, "tokenizer"}


def test_a_configuration_is_known_by_what_it_says(tiny_base: Path, tmp_path: Path) -> None:
    """Not by how it is written, nor by whom."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    base = locate_base(str(folder))
    before = hash_configs(base, {})
    for part in PARTS:
        path = folder / part / "config.json"
        config = {**json.loads(path.read_text()), "_diffusers_version": "9", "transformers_version": "9"}
        path.write_text(json.dumps(dict(reversed(config.items()))))
    (folder / "tokenizer" / "README.md").write_text("read me")
    assert hash_configs(base, {}) == before
    for part in PARTS:
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    after = hash_configs(base, {})
    assert not [part for part in before if after[part] == before[part]]
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=f"{folder}/vae cannot be loaded"):
        hash_configs(base, {})


def test_a_single_file_has_the_configurations_of_the_package(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.ckpt"]
    for file in files:
        file.write_bytes(b"")
    first, second = (hash_configs(locate_base(str(file)), {"vae": str(file)}) for file in files)
    assert first == second == hash_configs(locate_base(str(SD15_FOLDER)), {})


def test_a_repository_without_weights_is_told_so(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["folder"] = tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no diffusion_pytorch_model\.safetensors, nor its fp16 or \.bin form"):
        locate_component("owner/vae", "vae")


def test_an_unreachable_hub_is_one_line(hub: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="the hub gave no base model owner/name: cannot reach the hub$") as raised:
        load_base("owner/name")
    assert "connection" in raised.value.hint


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.ProxyError("403 Forbidden\nand more"), "the hub gave no vae owner/vae: 403 Forbidden$"),
        (httpx.RemoteProtocolError("peer closed connection"), "the hub gave no vae owner/vae: peer closed connection$"),
        (RuntimeError("Data processing error: CAS service error"), "the hub gave no vae owner/vae: Data processing"),
    ],
)
def test_whatever_ends_a_download_is_one_line(error: Exception, message: str, hub: dict[str, Any]) -> None:
    hub["error"] = error
    with pytest.raises(ModelError, match=message) as raised:
        locate_component("owner/vae", "vae")
    assert "connection" in raised.value.hint and raised.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "blobs/1"),
                                   RuntimeError(f"Data processing error: {os.strerror(errno.ENOSPC)}")])  # fmt: skip
def test_a_full_disk_is_no_fault_of_the_hub(error: Exception, hub: dict[str, Any]) -> None:
    hub["error"] = error
    with pytest.raises(DiskFull, match="base model owner/name could not be fetched") as raised:
        locate_base("owner/name")
    assert "HF_HOME" in raised.value.hint


def test_memory_that_ran_out_is_no_fault_of_the_hub(hub: dict[str, Any]) -> None:
    hub["error"] = MemoryError()
    with pytest.raises(MemoryError):
        locate_base("owner/name")


def test_what_is_unsupported_costs_no_weights(hub: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    hub["folder"] = Path(shutil.copytree(tiny_base, tmp_path / "hub"))
    path = tmp_path / "hub" / "unet" / "config.json"
    config = json.loads(path.read_text())
    controlnet = str(tiny_base / "controlnet")
    for change, message in (
        ({"addition_embed_type": "text_time"}, "uses addition_embed_type"),
        ({"in_channels": 9}, "the U-Net reads 9, as an inpainting model does"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            load_base("owner/name", controlnet=controlnet)
    path.write_text(json.dumps(config))
    for given, message in (
        ({"controlnet": "/absent"}, "no controlnet at /absent"),
        ({"vae": "/absent"}, "no vae at /absent"),
    ):
        with pytest.raises(ModelError, match=message):
            load_base("owner/name", **given)
    shutil.rmtree(tmp_path / "hub" / "controlnet")
    (hub["snapshot"] / "owner" / "name" / "controlnet" / "config.json").unlink()
    with pytest.raises(ModelError, match="holds no ControlNet"):
        load_base("owner/name")
    assert not list(hub["snapshot"].rglob("*.safetensors"))


def test_a_hint_names_the_option_and_only_what_it_takes() -> None:
    hints = {}
    for kind, locate in (
        ("base", locate_base),
        ("vae", lambda source: locate_component(source, "vae")),
        ("controlnet", lambda source: locate_component(source, "controlnet")),
        ("small-decoder", lambda source: load_small_decoder(source, 4, 8, torch.float32)),
    ):
        with pytest.raises(ModelError, match="/absent") as raised:
            locate("/absent")
        hints[kind] = raised.value.hint
        assert f"--{kind} takes" in hints[kind] and "hub id" in hints[kind]
    assert [kind for kind, hint in hints.items() if '"embedded"' in hint] == ["base"]
    assert [kind for kind, hint in hints.items() if "weight file" not in hint] == ["small-decoder"]


@pytest.mark.parametrize("base", ["/absent/folder", "absent", "./absent/model", "owner/model.safetensors", "a/b/c", ""])
def test_what_cannot_be_a_hub_id_is_not_asked_for(base: str, hub: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        load_base(base)
    assert not hub["calls"]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"suffix is '\.onnx'"):
        locate_base(str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match=r"suffix is '\.onnx'"):
        locate_component(str(tmp_path / "model.onnx"), "vae")


def test_what_was_tuned_is_no_base(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    for path in (tiny_checkpoint, tiny_engine):
        with pytest.raises(ModelError, match="was tuned on a base; it is none itself") as caught:
            locate_base(str(path))
        assert caught.value.hint == f"give that one: posecrafter-rt inspect {path} names it"


def test_half_precision_and_sharded_files_are_found(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base / "vae", tmp_path / "vae"))
    whole = folder / "diffusion_pytorch_model.safetensors"
    whole.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    part = locate_component(str(tmp_path), "vae")
    assert part.location == folder and [path.name for path in part.files] == [
        "diffusion_pytorch_model.fp16.safetensors"]  # fmt: skip
    expected = load_base(str(tiny_base)).vae.state_dict()
    tensors = load_file(part.files[0])
    names = sorted(tensors)
    for index, chosen in enumerate((names[:9], names[9:]), start=1):
        save_file({name: tensors[name] for name in chosen},
                  folder / f"diffusion_pytorch_model-0000{index}-of-00002.safetensors")  # fmt: skip
    part = locate_component(str(folder), "vae")
    assert [path.name[-26:-12] for path in part.files] == ["00001-of-00002", "00002-of-00002"]
    found = load_base(str(tiny_base), vae=str(folder)).vae.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_file_of_a_diffusers_folder_has_the_configuration_beside_it(tiny_base: Path, tmp_path: Path) -> None:
    """And it may be in the original layout; a file of another name need not belong to that configuration."""
    file = Path(shutil.copytree(tiny_base / "vae", tmp_path / "vae")) / "diffusion_pytorch_model.safetensors"
    part = locate_component(str(file), "vae")
    assert part.config_folder == file.parent and part.is_single_file
    assert not locate_component(str(file.parent), "vae").is_single_file
    assert load_base(str(tiny_base), vae=str(file)).base_hash == load_base(str(tiny_base)).base_hash
    other = file.rename(file.with_name("sd.safetensors"))
    assert locate_component(str(other), "vae").config_folder == SD15_FOLDER / "vae"


def test_a_link_into_the_hubs_cache_is_remembered_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    """What it leads to has no suffix, and no configuration beside it."""
    snapshot = Path(shutil.copytree(tiny_base / "vae", tmp_path / "snapshots" / "vae"))
    file, blob = snapshot / "diffusion_pytorch_model.safetensors", tmp_path / "0123456789abcdef"
    file.rename(blob)
    file.symlink_to(blob)
    assert lasting_id(str(file)) == str(file)
    assert locate_component(lasting_id(str(file)), "vae").config_folder == snapshot


def test_a_folder_without_the_part(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="so it is no vae"):
        locate_component(str(tmp_path), "vae")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no diffusion_pytorch_model.safetensors"):
        locate_component(str(tmp_path), "vae")

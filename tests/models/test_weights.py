"""Stable Diffusion in one file: every tensor arrives, nothing is fetched, and no pickle runs."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from posecrafter_rt.errors import CheckpointError, ModelError
from posecrafter_rt.method.ddim import DDIMSchedule
from posecrafter_rt.models import sources
from posecrafter_rt.models.loading import PoseModel, load_base
from posecrafter_rt.models.weights import read_scheduler_config, read_weights

CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "controlnet": ControlNetModel,
    "text_encoder": CLIPTextModel,
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tiny_files(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original_layout: Callable
) -> dict[str, Path]:
    """The tiny base as one file, its ControlNet and VAE as their own; its sizes stand for the packaged ones."""
    monkeypatch.setattr(sources, "SD15_FOLDER", tiny_base)
    models = {name: cls.from_pretrained(tiny_base / name) for name, cls in CLASSES.items()}
    layouts = {name: original_layout(name, model) for name, model in models.items()}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "controlnet", "vae")}
    save_file({**layouts["unet"], **layouts["vae"], **layouts["text_encoder"]}, files["base"])
    save_file(layouts["controlnet"], files["controlnet"])
    save_file(original_layout("vae", models["vae"], prefix=""), files["vae"])
    return files


def _assert_equal(left, right) -> None:
    for name in ("unet", "controlnet", "vae", "text_encoder"):
        expected, found = getattr(left, name).state_dict(), getattr(right, name).state_dict()
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}.{key}"


@pytest.mark.usefixtures("no_network")
def test_one_file_equals_the_folder(tiny_base: Path, tiny_files: dict[str, Path]) -> None:
    folder = load_base(str(tiny_base))
    single = load_base(str(tiny_files["base"]), controlnet=str(tiny_files["controlnet"]), vae=str(tiny_files["vae"]))
    _assert_equal(folder, single)
    assert single.scheduler_config == folder.scheduler_config
    assert single.settings.size == (512, 512)  # the paper's: a file has no settings of its own


@pytest.mark.parametrize(
    ("tensor", "metadata", "yaml", "prediction_type"),
    [
        ("weight", None, None, "epsilon"),
        ("weight", {"modelspec.prediction_type": "epsilon"}, 'params:\n  parameterization: "eps"\n', "epsilon"),
        ("weight", None, "params:\n  # parameterization: v\n", "epsilon"),
        ("v_pred", None, None, "v_prediction"),
        ("weight", {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("weight", None, 'model:\n  params:\n    parameterization: "v"\n    beta: 1\n', "v_prediction"),
        ("weight", None, "model:\n  params:\n    parameterization: v  # not eps", "v_prediction"),
    ],
)
def test_a_file_that_says_it_predicts_v_is_believed(
    tensor: str, metadata: dict[str, str] | None, yaml: str | None, prediction_type: str, tmp_path: Path
) -> None:
    paths = [tmp_path / "model.v1.safetensors", tmp_path / "model.v1.ckpt"]
    save_file({tensor: torch.zeros(0)}, paths[0], metadata)
    if metadata is None:
        torch.save({"state_dict": {tensor: torch.zeros(0)}}, paths[1])
    else:  # which only safetensors hold, under whatever name
        save_file({tensor: torch.zeros(0)}, paths[1], metadata)
    if yaml is not None:
        (tmp_path / "model.v1.yaml").write_text(yaml)
    for path in paths:
        config = read_scheduler_config(sources.locate_base(str(path)))
        assert DDIMSchedule.from_config(config).prediction_type == prediction_type


def test_what_a_file_predicts_is_the_models(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    tensors = read_weights(tiny_files["base"])
    for marker in ("v_pred", "ztsnr"):
        save_file({**tensors, marker: torch.zeros(0)}, tmp_path / f"{marker}.safetensors")
    controlnet = str(tiny_files["controlnet"])
    model = load_base(str(tmp_path / "v_pred.safetensors"), controlnet=controlnet)
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    with pytest.raises(ModelError, match=r"ztsnr\.safetensors was trained on a schedule rescaled"):
        load_base(str(tmp_path / "ztsnr.safetensors"), controlnet=controlnet)


def test_torch_files_and_diffusers_names_load_too(tiny_base: Path, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "base.ckpt"
    torch.save({"state_dict": read_weights(tiny_files["base"]), "epoch": 3}, checkpoint)
    controlnet = tiny_base / "controlnet" / "diffusion_pytorch_model.safetensors"
    _assert_equal(load_base(str(tiny_base)), load_base(str(checkpoint), controlnet=str(controlnet)))


def test_a_vae_in_diffusers_layout_loads_under_its_old_names(
    tiny_base: Path, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_weights(tiny_base / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensors[name] for name in tensors}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, tmp_path / "old.safetensors")
    files = {name: str(path) for name, path in tiny_files.items()}
    found = load_base(files["base"], controlnet=files["controlnet"], vae=str(tmp_path / "old.safetensors"))
    _assert_equal(load_base(str(tiny_base)), found)


def test_dtype_is_the_one_asked_for(tiny_files: dict[str, Path]) -> None:
    model = load_base(str(tiny_files["base"]), controlnet=str(tiny_files["controlnet"]), dtype=torch.bfloat16)
    for module in model.modules().values():
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "lost", ["model.diffusion_model.input_blocks.1.1.norm.weight", "first_stage_model.quant_conv.weight",
             "cond_stage_model.transformer.text_model.final_layer_norm.weight", "model.diffusion_model.out.2.bias"]
)  # fmt: skip
def test_a_missing_tensor_is_an_error(lost: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    tensors = read_weights(tiny_files["base"])
    del tensors[lost]
    save_file(tensors, tmp_path / "lost.safetensors")
    with pytest.raises(ModelError, match=r"lost\.safetensors"):
        load_base(str(tmp_path / "lost.safetensors"), controlnet=str(tiny_files["controlnet"]))


def test_a_foreign_file_is_an_error(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelError, match=r"foreign\.safetensors"):
        load_base(str(tmp_path / "foreign.safetensors"), controlnet=str(tiny_files["controlnet"]))


def test_a_tensor_of_another_shape_is_an_error(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    tensors = read_weights(tiny_files["base"])
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(9)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="conv_out.bias in another shape"):
        load_base(str(tmp_path / "other.safetensors"), controlnet=str(tiny_files["controlnet"]))


def test_a_difference_is_no_controlnet(tiny_files: dict[str, Path]) -> None:
    save_file({**read_weights(tiny_files["controlnet"]), "difference": torch.zeros(1)}, tiny_files["controlnet"])
    with pytest.raises(ModelError, match=r"controlnet\.safetensors holds differences") as raised:
        load_base(str(tiny_files["base"]), controlnet=str(tiny_files["controlnet"]))
    assert "lllyasviel/control_v11p_sd15_openpose" in raised.value.hint


def test_averaged_weights_are_left_aside_and_said_so(
    tiny_base: Path, tiny_files: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = read_weights(tiny_files["base"])
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1 for name, tensor in unet.items()
    }
    assert len(averaged) > 100
    save_file({**tensors, **averaged}, tiny_files["base"])
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    found = load_base(str(tiny_files["base"]), controlnet=str(tiny_files["controlnet"]))
    _assert_equal(load_base(str(tiny_base)), found)
    assert [record.getMessage() for record in caplog.records if "EMA" in record.getMessage()] == [
        f"{tiny_files['base']} also holds averaged weights of the U-Net (EMA), which are not used"
    ]


def test_truncated_file_is_one_line(tiny_files: dict[str, Path]) -> None:
    content = tiny_files["base"].read_bytes()
    tiny_files["base"].write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="truncated") as raised:
        load_base(str(tiny_files["base"]), controlnet=str(tiny_files["controlnet"]))
    assert "\n" not in str(raised.value)


class _Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_does_not_run(suffix: str, writer: str, tmp_path: Path) -> None:
    path, trace = tmp_path / f"harm{suffix}", tmp_path / "trace"
    if writer == "torch":
        torch.save({"state_dict": _Harm(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": _Harm(trace)}))
    for load in (lambda: load_base(str(path)), lambda: read_weights(path)):
        with pytest.raises(ModelError) as raised:
            load()
        assert "\n" not in str(raised.value) and not trace.exists()
    with pytest.raises(CheckpointError, match="could run code") as refused:
        read_weights(path, CheckpointError)
    if writer == "torch":  # in a form that PyTorch does not read, it does not look for names
        assert str(refused.value).endswith(f"it holds {os.mkdir.__module__}.mkdir, which is no tensor")


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as PyTorch Lightning's ModelCheckpoint; it is there only to write files."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    kind = type("ModelCheckpoint", (), {"__module__": name})
    for folder in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, folder, ModuleType(folder))
    sys.modules[name].ModelCheckpoint = kind  # type: ignore[attr-defined]
    return kind


@pytest.mark.parametrize("numpys", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_a_lightning_file_is_read_without_what_training_put_beside_the_weights(
    numpys: bytes, lightning: type, tmp_path: Path
) -> None:
    instance = lightning()
    instance.patience = 3
    state = {"monitor": "val/loss", "best_model_score": np.float32(0.5), "scheduler": instance}
    content = {"epoch": 3, "callbacks": {lightning: state}, "state_dict": {"weight": torch.arange(3.0)}}
    torch.save(content, tmp_path / "v1.ckpt", _use_new_zipfile_serialization=False)
    written = (tmp_path / "v1.ckpt").read_bytes()
    (tmp_path / "v1.ckpt").write_bytes(written.replace(np.float32(0).__reduce__()[0].__module__.encode(), numpys))
    assert b"cpytorch_lightning" in written and numpys + b"\nscalar" in (tmp_path / "v1.ckpt").read_bytes()
    assert read_weights(tmp_path / "v1.ckpt")["weight"].tolist() == [0, 1, 2]
    torch.save(content, tmp_path / "zip.ckpt")
    assert read_weights(tmp_path / "zip.ckpt")["weight"].tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_stands_for_training_states_runs_no_code(lightning: type, tmp_path: Path) -> None:
    class Harm(lightning):  # type: ignore[misc, valid-type]
        def __reduce__(self) -> tuple:
            return lightning, (), {"best_model_score": _Harm(tmp_path / "trace")}

    torch.save({"callbacks": Harm(), "state_dict": {"weight": torch.zeros(1)}}, tmp_path / "harm.ckpt")
    with pytest.raises(ModelError, match="could run code") as refused:
        read_weights(tmp_path / "harm.ckpt")
    assert not (tmp_path / "trace").exists() and "save its state_dict alone" in str(refused.value.hint)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
def test_a_file_of_something_else_is_one_line(content: bytes, tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        with pytest.raises(ModelError) as raised:
            read_weights(path)
        assert "\n" not in str(raised.value)


def test_files_without_named_tensors(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="no tensors by name"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(ModelError, match="there is no file"):
        read_weights(tmp_path / "absent.pt")


@pytest.mark.usefixtures("no_network")
def test_packaged_tokenizer_is_clips() -> None:
    folder = sources.SD15_FOLDER / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # The ids that OpenAI's CLIP gives.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A PERSON").input_ids == [49406, 320, 2533, 49407]
    padded = tokenizer("a person", padding="max_length", max_length=77).input_ids
    assert len(padded) == 77 and set(padded[3:]) == {49407}
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(vocabulary) == 49408 and len(merges) == 48894
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    assert names[512:-2] == ["".join(merge.split(" ")) for merge in merges]


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
@torch.no_grad()
def test_stable_diffusion_15_in_one_file(tmp_path: Path, original_layout: Callable) -> None:
    """At real size, in bf16: what is written arrives by the packaged configuration alone, and a clip passes through."""
    folder, tensors, expected = sources.SD15_FOLDER, {}, {}
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    for name, cls in CLASSES.items():
        with torch.device("meta"):
            if name == "text_encoder":
                model = cls(CLIPTextConfig.from_pretrained(folder / name))
            else:
                model = cls.from_config(cls.load_config(folder / name, local_files_only=True))
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for index, parameter in enumerate(model.parameters()):
            repeats = -(-parameter.numel() // len(noise))
            parameter.copy_(noise.roll(index).repeat(repeats)[: parameter.numel()].reshape(parameter.shape))
        expected[name] = {key: value[:1].clone() for key, value in model.state_dict().items()}
        tensors[name] = original_layout(name, model)
    controlnet, base = tmp_path / "controlnet.safetensors", tmp_path / "base.safetensors"
    save_file(tensors.pop("controlnet"), controlnet)
    save_file({key: value for part in tensors.values() for key, value in part.items()}, base)
    del tensors, model
    try:
        loaded = load_base(str(base), controlnet=str(controlnet), dtype=torch.bfloat16)
    finally:
        shutil.rmtree(tmp_path)  # 3 GB
    for name, slices in expected.items():
        state = getattr(loaded, name).state_dict()
        assert all(torch.equal(state[key][:1], value) for key, value in slices.items())
    temporal = [block for block in loaded.unet.transformer_blocks() if hasattr(block, "attn_temp")]
    assert len(temporal) == 15 and torch.equal(temporal[0].attn_temp.to_q.weight, temporal[0].attn1.to_q.weight)
    _pass_a_clip(loaded)


def _pass_a_clip(model: PoseModel) -> None:
    """Two frames of 256 × 256 through every network that a denoising step needs."""
    networks = model.networks()
    (text,) = networks["text_encoder"](model.tokenize(["a person"]))
    unet_kv, controlnet_kv = networks["prompt_kv"](text)
    unet_time, controlnet_time = networks["time_tables"](torch.tensor([981]))
    (poses,) = networks["pose_embedding"](torch.zeros(2, 3, 256, 256, dtype=torch.bfloat16))
    latents = torch.zeros(2, 4, 32, 32, dtype=torch.bfloat16)
    scale = torch.ones(1, dtype=torch.bfloat16)
    residuals = networks["controlnet"](latents, controlnet_time, controlnet_kv, poses, scale)
    assert len(residuals) == 13
    (noise_pred,) = networks["unet"](latents, unet_time, unet_kv, *residuals)
    assert noise_pred.shape == latents.shape and noise_pred.isfinite().all()


def test_a_file_is_known_by_how_it_begins(tmp_path: Path) -> None:
    """Checkpoints of ours, and LoRAs that were renamed, are safetensors under another name."""
    path = tmp_path / "style.ckpt"
    save_file({"a": torch.arange(3.0)}, path)
    assert read_weights(path)["a"].tolist() == [0, 1, 2]
    torch.save({"a": torch.arange(3.0)}, path)
    assert read_weights(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(b"{")
    with pytest.raises(ModelError, match=r"style\.ckpt"):
        read_weights(path)

"""Bases from folders, overrides, tuned tensors, and ControlVideo's weight files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posecrafter_rt.errors import CheckpointError, ModelError
from posecrafter_rt.models import sources
from posecrafter_rt.models.loading import (
    apply_tensors,
    load_base,
    load_controlvideo_weights,
    locate_parts,
    named_parameters,
)

UNET_FILE = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def base_copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_a_folder_is_loaded_ready_to_run(tiny_base: Path) -> None:
    model = load_base(str(tiny_base))
    assert model.base_id == str(tiny_base.resolve()) and len(model.base_hash) == 64
    assert model.settings.size == (32, 32) and model.unet.norm_scope == model.controlnet.norm_scope == "frame"
    assert locate_parts(str(tiny_base)).size_multiple == model.architecture().size_multiple
    for module in model.modules().values():
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())


def test_norm_scope_comes_from_the_base_unless_given(base_copy: Path) -> None:
    (base_copy / "posecrafter.json").write_text('{"norm_scope": "clip"}')
    assert load_base(str(base_copy)).unet.norm_scope == "clip"
    assert load_base(str(base_copy), norm_scope="frame").controlnet.norm_scope == "frame"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_has_the_dtype_asked_for(dtype: torch.dtype, tiny_base: Path) -> None:
    for module in load_base(str(tiny_base), dtype=dtype).modules().values():
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}


def test_embedded_is_a_folder_like_any_other(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "EMBEDDED_FOLDER", tiny_base)
    model = load_base("embedded")
    assert model.base_id == "embedded" and model.base_hash == load_base(str(tiny_base)).base_hash
    monkeypatch.setattr(sources, "EMBEDDED_FOLDER", tmp_path / "absent")
    with pytest.raises(ModelError, match="not part of this installation"):
        load_base("embedded")


def test_hash_names_the_weights_and_not_their_place(base_copy: Path, tiny_base: Path) -> None:
    assert load_base(str(base_copy)).base_hash == load_base(str(tiny_base)).base_hash
    tensors = load_file(base_copy / UNET_FILE)
    tensors["conv_in.bias"] += 1
    save_file(tensors, base_copy / UNET_FILE)
    assert load_base(str(base_copy)).base_hash != load_base(str(tiny_base)).base_hash


def test_given_controlnet_and_vae_replace_the_bases_own(
    tiny_base: Path, tmp_path: Path, write_tiny_base: Callable
) -> None:
    other = write_tiny_base(tmp_path / "other", seed=5)
    model = load_base(str(tiny_base), controlnet=str(other), vae=str(other / "vae"))
    plain, expected = load_base(str(tiny_base)), load_base(str(other))
    assert torch.equal(model.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert torch.equal(model.controlnet.conv_in.weight, expected.controlnet.conv_in.weight)
    assert torch.equal(model.vae.decoder.conv_in.weight, expected.vae.decoder.conv_in.weight)
    assert len({model.base_hash, plain.base_hash, expected.base_hash}) == 3


def test_identity_finds_the_same_parts_from_anywhere(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tiny_base.parent)
    model = load_base(tiny_base.name, controlnet=f"{tiny_base.name}/controlnet")
    identity = model.identity()
    assert identity["vae"] is None and identity["base_hash"] == model.base_hash
    monkeypatch.chdir(tmp_path)
    assert load_base(identity["base"], controlnet=identity["controlnet"]).identity() == identity


def test_a_schedule_that_is_not_supported_is_refused_before_any_weights_are_read(base_copy: Path) -> None:
    path = base_copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    for weights in base_copy.rglob("*.safetensors"):
        weights.write_bytes(b"")  # would be an error of their own
    with pytest.raises(ModelError, match="rescale_betas_zero_snr is set, which is not supported") as raised:
        load_base(str(base_copy))
    assert raised.value.hint == "use a base model without rescale_betas_zero_snr"


def test_no_controlnet_is_an_error_that_names_one(base_copy: Path) -> None:
    shutil.rmtree(base_copy / "controlnet")
    with pytest.raises(ModelError, match="holds no ControlNet") as raised:
        load_base(str(base_copy))
    assert "lllyasviel/control_v11p_sd15_openpose" in raised.value.hint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_part_is_named(part: str, base_copy: Path) -> None:
    shutil.rmtree(base_copy / part)
    with pytest.raises(ModelError, match=f"no {part}/config.json"):
        load_base(str(base_copy))


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "unet/config.json", "tokenizer/vocab.json"])
def test_broken_json_is_one_line(file: str, base_copy: Path) -> None:
    (base_copy / file).write_text("{")
    with pytest.raises(ModelError) as raised:
        load_base(str(base_copy))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_tokenizer_without_words_is_refused(file: str, base_copy: Path) -> None:
    (base_copy / "tokenizer" / file).unlink()
    with pytest.raises(ModelError, match="no vocab.json and merges.txt"):
        load_base(str(base_copy))


def test_a_tokenizer_of_another_base_is_refused(base_copy: Path) -> None:
    shutil.rmtree(base_copy / "tokenizer")
    shutil.copytree(sources.SD15_FOLDER / "tokenizer", base_copy / "tokenizer")
    with pytest.raises(ModelError, match="the tokenizer has 49408 words"):
        load_base(str(base_copy))


def test_the_old_names_of_the_vaes_attention_load(base_copy: Path, tiny_base: Path) -> None:
    path = base_copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        for name in [name for name in tensors if f"mid_block.attentions.0.{new}." in name]:
            tensors[name.replace(new, old)] = tensors.pop(name)
    save_file(tensors, path)
    expected = load_base(str(tiny_base)).vae.state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_base(str(base_copy)).vae.state_dict().items()
    )


def test_a_missing_scheduler_is_one_line(base_copy: Path) -> None:
    shutil.rmtree(base_copy / "scheduler")
    with pytest.raises(ModelError, match="scheduler"):
        load_base(str(base_copy))


@pytest.mark.parametrize("part", ["unet", "controlnet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "incomplete", "another shape"])
def test_damaged_weights_are_one_line(part: str, damage: str, base_copy: Path) -> None:
    (path,) = (base_copy / part).glob("*.safetensors")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        name = sorted(tensors)[0]
        del tensors[name]
        if damage == "another shape":
            tensors[name] = torch.zeros(7, 7)
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError) as raised:
        load_base(str(base_copy))
    assert "\n" not in str(raised.value) and part in str(raised.value)


def test_a_pickle_in_a_folder_does_not_run(base_copy: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.mkdir, (base_copy / "trace",))

    (base_copy / UNET_FILE).unlink()
    torch.save({"conv_in.bias": Harm()}, (base_copy / UNET_FILE).with_suffix(".bin"))
    with pytest.raises(ModelError):
        load_base(str(base_copy))
    assert not (base_copy / "trace").exists()


def test_parts_that_do_not_fit_together(base_copy: Path, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    config = json.loads((base_copy / "controlnet" / "config.json").read_text())
    ControlNetModel.from_config({**config, "cross_attention_dim": 64}).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="cross_attention_dim is 32 but the ControlNet's is 64"):
        load_base(str(base_copy), controlnet=str(tmp_path / "wide"))


def test_a_hint_never_asks_for_what_was_given(base_copy: Path, tmp_path: Path) -> None:
    """Inpainting and InstructPix2Pix models are named; a ControlNet that does not fit is asked for by its base."""
    controlnet, path = str(shutil.copytree(base_copy / "controlnet", tmp_path / "cn")), base_copy / "unet/config.json"
    config = json.loads(path.read_text())
    for channels, kind in ((9, "an inpainting model"), (8, "an InstructPix2Pix model")):
        path.write_text(json.dumps({**config, "in_channels": channels}))
        with pytest.raises(
            ModelError, match=f"makes 4 channels but the U-Net reads {channels}, as {kind} does"
        ) as raised:
            load_base(str(base_copy), controlnet=controlnet)
        assert raised.value.hint == "use the model that it was made from"
    path.write_text(json.dumps({**config, "cross_attention_dim": 64}))
    with pytest.raises(ModelError, match="the text encoder gives 32 channels but the U-Net reads 64"):
        load_base(str(base_copy), controlnet=controlnet)
    text = base_copy / "text_encoder" / "config.json"
    text.write_text(json.dumps({**json.loads(text.read_text()), "hidden_size": 64}))
    with pytest.raises(ModelError, match="cross_attention_dim is 64 but the ControlNet's is 32") as raised:
        load_base(str(base_copy), controlnet=controlnet)
    assert raised.value.hint.startswith("use a ControlNet that was trained for this base")


def test_a_vae_on_another_scale_is_refused(tiny_base: Path, base_copy: Path, tmp_path: Path) -> None:
    def scaled(folder: Path, factor: float) -> str:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": factor}))
        return str(folder)

    sdxl = scaled(Path(shutil.copytree(tiny_base / "vae", tmp_path / "sdxl")), 0.13025)
    with pytest.raises(ModelError, match=r"scaling_factor is 0\.13025 but the base's own has 0\.18215") as raised:
        load_base(str(tiny_base), vae=sdxl)
    assert "stabilityai/sd-vae-ft-mse" in raised.value.hint
    with pytest.raises(ModelError, match=r"scaling_factor is 0\.13025"):  # its file has the folder's configuration
        load_base(str(tiny_base), vae=f"{sdxl}/diffusion_pytorch_model.safetensors")
    scaled(base_copy / "vae", 0.13025)  # the base's own is on that scale, too
    assert load_base(str(base_copy), vae=sdxl).vae.config["scaling_factor"] == 0.13025
    shutil.rmtree(base_copy / "vae")  # nothing but Stable Diffusion 1.5's to hold it against
    with pytest.raises(ModelError, match=r"scaling_factor is 0\.13025"):
        load_base(str(base_copy), vae=sdxl)
    assert load_base(str(base_copy), vae=str(tiny_base / "vae")).base_hash == load_base(str(tiny_base)).base_hash


def test_tuned_tensors_are_put_in_and_converted(tiny_base: Path) -> None:
    model = load_base(str(tiny_base), dtype=torch.bfloat16)
    names = [name for name, _ in named_parameters(model) if ".conv_temp." in name]
    apply_tensors(model, {name: torch.full_like(dict(named_parameters(model))[name], 0.5).float() for name in names})
    for name, parameter in named_parameters(model):
        if name in names:
            assert parameter.dtype == torch.bfloat16 and (parameter == 0.5).all()


@pytest.mark.parametrize("trailing", [(1,), (1, 1)])
def test_a_convolutions_trailing_ones_are_dropped(trailing: tuple[int, ...], tiny_model) -> None:
    name = next(name for name, _ in named_parameters(tiny_model) if name.endswith("conv_temp.weight"))
    values = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    apply_tensors(tiny_model, {name: values.reshape(32, 32, *trailing)})
    assert torch.equal(dict(named_parameters(tiny_model))[name], values)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("unet.nothing.weight", (3,), "no parameter unet.nothing.weight"),
        ("text_encoder.final_layer_norm.bias", (8,), "no parameter text_encoder.final_layer_norm.bias"),
        ("unet.conv_in.bias", (33,), r"shape \(33,\), the base's is \(32,\)"),
        ("unet.conv_in.bias", (32, 2), r"shape \(32, 2\)"),
    ],
)
def test_foreign_tensors_change_nothing(name: str, shape: tuple, message: str, tiny_model) -> None:
    good = "controlnet.conv_in.bias"
    before = dict(named_parameters(tiny_model))[good].clone()
    with pytest.raises(CheckpointError, match=message):
        apply_tensors(tiny_model, {good: before + 1, name: torch.zeros(shape)})
    assert torch.equal(dict(named_parameters(tiny_model))[good], before)


@pytest.fixture
def controlvideo_files(tiny_model, tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path, Path]:
    """The tiny base's tunable tensors, changed, as ControlVideo names and shapes them."""
    tensors = {
        name: parameter + 0.25 for name, parameter in named_parameters(tiny_model)
        if any(part in name for part in (".attn1.to_out.", ".attn_temp.", ".conv_temp."))
    }  # fmt: skip
    paths = []
    for prefix in ("unet", "controlnet"):
        named = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(prefix)}
        named = {name: value[:, :, None, None] if name.endswith("conv_temp.weight") else value
                 for name, value in named.items()}  # fmt: skip
        paths.append(tmp_path / f"100-{prefix}.pt")
        torch.save(named, paths[-1])
    return tensors, paths[0], paths[1]


def test_controlvideos_files_load(controlvideo_files, tiny_base: Path) -> None:
    expected, unet_path, controlnet_path = controlvideo_files
    found, model = load_controlvideo_weights(unet_path, controlnet_path), load_base(str(tiny_base), norm_scope="clip")
    assert found.keys() == expected.keys()
    apply_tensors(model, found)
    parameters = dict(named_parameters(model))
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())


def test_controlvideos_whole_state_dicts_and_prefixes_load(controlvideo_files, tmp_path: Path) -> None:
    expected, unet_path, controlnet_path = controlvideo_files
    content = torch.load(unet_path, weights_only=True)
    whole = {f"module.{name}": value for name, value in {**content, "conv_in.bias": torch.zeros(3)}.items()}
    torch.save(whole, tmp_path / "whole.pt")
    assert load_controlvideo_weights(tmp_path / "whole.pt", controlnet_path).keys() == expected.keys()


def test_controlvideos_files_that_are_none(controlvideo_files, tmp_path: Path) -> None:
    _, unet_path, controlnet_path = controlvideo_files
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no attn1.to_out"):
        load_controlvideo_weights(tmp_path / "other.pt", controlnet_path)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_controlvideo_weights(unet_path, tmp_path / "absent.pt")


def test_an_unknown_norm_scope_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="frmae"):
        load_base(str(tiny_base), norm_scope="frmae")  # type: ignore[arg-type]

"""Small decoders: what a new one is, what is given and what is refused, and that folding changes nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.empty import describe_modules, empty_modules
from posecrafter_rt.models.small_decoder import (
    SmallDecoder,
    decode_small,
    describe_config,
    empty_small_decoder,
    fold_small_decoder,
    hash_small_decoder,
    latents_of,
    load_small_decoder,
    new_small_decoder,
)
from posecrafter_rt.spec import SMALL_DECODER, network_specs

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def tiny_taesd(seed: int = 0) -> AutoencoderTiny:
    """Of two levels, as the tiny base's VAE doubles once."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_float32_whatever_the_default_type_is_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers warns of models that are cast by `to`."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        decoder = new_small_decoder(4, 2, drawn(0))
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert not caplog.records


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_new_one_fits_the_vae_and_is_drawn_by_the_generator(factor: int) -> None:
    first, again, other = (new_small_decoder(4, factor, drawn(seed)) for seed in (0, 0, 1))
    latents = torch.randn(2, 4, 6, 5, generator=drawn(2))
    assert first(latents).shape == (2, 3, 6 * factor, 5 * factor) and latents_of(first) == (4, factor)
    assert torch.equal(first(latents), again(latents)) and not torch.equal(first(latents), other(latents))
    assert 0.005 < float(first(latents).detach().std()) < 1  # neither dead nor wild


def test_frames_are_decoded_each_by_itself() -> None:
    decoder, latents = new_small_decoder(4, 4, drawn(0)), torch.randn(3, 4, 6, 5, generator=drawn(1))
    alone = torch.cat([decoder(part) for part in latents.split(1)])
    torch.testing.assert_close(decoder(latents), alone, **EXACT)


@torch.no_grad()
def test_folding_a_taesd_changes_nothing_and_drops_its_encoder() -> None:
    taesd, latents = tiny_taesd(), torch.randn(2, 4, 6, 5, generator=drawn(0))
    expected = taesd.decode(latents).sample
    fold_small_decoder(taesd)
    torch.testing.assert_close(decode_small(taesd, latents), expected, **EXACT)
    assert not list(taesd.encoder.parameters())
    assert not any(isinstance(module, torch.nn.Upsample) for module in taesd.modules())
    empty = empty_small_decoder(json.loads(json.dumps(describe_config(taesd))))
    assert {name: p.shape for name, p in empty.state_dict().items()} == {
        name: p.shape for name, p in taesd.state_dict().items()
    }


@torch.no_grad()
def test_what_is_given_is_what_was_saved(tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 6, 5, generator=drawn(0))
    for name, module in (("ours", new_small_decoder(4, 2, drawn(3))), ("taesd", tiny_taesd())):
        module.save_pretrained(tmp_path / name)
        loaded = load_small_decoder(str(tmp_path / name), 4, 2, torch.float32)
        assert torch.equal(decode_small(loaded, latents), decode_small(module, latents))
        assert isinstance(loaded, SmallDecoder) is (name == "ours")
    assert hash_small_decoder(str(tmp_path / "ours")) != hash_small_decoder(str(tmp_path / "taesd"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    new_small_decoder(4, 4, drawn(0)).save_pretrained(tmp_path / "larger")
    with pytest.raises(ModelError, match="enlarges 4 times, the base's VAE 4 and 2"):
        load_small_decoder(str(tmp_path / "larger"), 4, 2, torch.float32)
    AutoencoderKL(block_out_channels=(32,), norm_num_groups=32).save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match="holds AutoencoderKL, no small decoder"):
        load_small_decoder(str(tmp_path / "vae"), 4, 2, torch.float32)
    with pytest.raises(ModelError, match="small_decoder"):
        load_small_decoder(str(tmp_path / "nowhere"), 4, 2, torch.float32)


def test_a_single_file_is_refused_because_it_does_not_say_what_it_holds(tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    for read in (lambda: load_small_decoder(file, 4, 2, torch.float32), lambda: hash_small_decoder(file)):
        with pytest.raises(
            ModelError, match=r"model\.safetensors is a single file, .* small decoder it holds$"
        ) as caught:
            read()
        assert "a folder or hub id" in str(caught.value.hint)


def test_a_model_with_one_has_one_network_more(tiny_model) -> None:
    without = tiny_model.networks()
    tiny_model.small_decoder = new_small_decoder(4, tiny_model.architecture().vae_scale_factor, drawn(0))
    arch, networks = tiny_model.architecture(), tiny_model.networks()
    assert set(networks) - set(without) == {SMALL_DECODER} and SMALL_DECODER in network_specs(arch)
    tiny_model.fold()
    empty = empty_modules(describe_modules(tiny_model))
    assert {name: set(module.state_dict()) for name, module in tiny_model.modules().items()} == {
        name: set(module.state_dict()) for name, module in empty.items()
    }

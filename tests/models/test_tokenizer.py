"""Tokens without transformers are those that transformers gives, for the words of either base.

Tests of posecrafter_rt/models/tokenizer.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizerFast

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.loading import tokenize
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.models.tokenizer import PromptTokenizer

PROMPTS = [
    "",
    "a person",
    "  A Person,\twearing\na RED hat -- it's 1999!  ",
    "ein Mädchen mit Hut, 写真, 🙂🙂, e\u0301",
    "<|endoftext|> a <|startoftext|> person",
    "a " * 75,
    "person " * 200,
]


@pytest.fixture(params=["tiny", "Stable Diffusion 1.5", "padded and cut on the left"])
def written(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> tuple[CLIPTokenizerFast, Path]:
    """A base's tokenizer, and its files as an engine has them."""
    folder = tiny_base / "tokenizer" if request.param == "tiny" else SD15_FOLDER / "tokenizer"
    sides = dict.fromkeys(("padding_side", "truncation_side"), "left") if "left" in request.param else {}
    tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True, **sides)
    tokenizer.save_pretrained(tmp_path)
    return tokenizer, tmp_path


def test_tokens_are_those_of_transformers(written: tuple[CLIPTokenizerFast, Path]) -> None:
    tokenizer, folder = written
    ours, expected = PromptTokenizer(folder, 77)(PROMPTS), tokenize(tokenizer, PROMPTS, 77)
    assert ours.dtype == torch.int64 and torch.equal(ours, expected)
    assert torch.equal(PromptTokenizer(folder, 77)(PROMPTS[1:2]), expected[1:2])


@pytest.mark.parametrize("by_transformers", [False, True])
def test_what_is_cut_is_told_once(
    written: tuple[CLIPTokenizerFast, Path], caplog: pytest.LogCaptureFixture, by_transformers: bool
) -> None:
    tokenizer = partial(tokenize, written[0], num_tokens=77) if by_transformers else PromptTokenizer(written[1], 77)
    tokenizer(["a person", " " + "a " * 75])
    assert not caplog.records
    whole, rest = " " + "a  " * 75, "b " * 100 + "é"  # more than twice as many as there may be
    prompt = f"{rest} {whole}" if written[0].truncation_side == "left" else whole + rest
    ids = tokenizer([prompt, "a person"])
    assert torch.equal(ids[:1], tokenizer([whole]))
    assert caplog.messages == [f"the prompt has more than 75 tokens and is cut; left out is: {rest}"]


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_text("{}"), lambda path: path.write_text('{"pad_token": "no word of it"}')],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_them_is_refused(written: tuple[CLIPTokenizerFast, Path], name: str, damage: object) -> None:
    assert callable(damage)
    damage(written[1] / name)
    with pytest.raises(ModelError, match="no tokenizer of an engine") as caught:
        PromptTokenizer(written[1], 77)
    assert caught.value.hint == "build the engine again"

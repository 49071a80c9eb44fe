"""Tokenize prompts without transformers, which takes longer to import than everything else that a render needs.

Layer 3: tokenizers and torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from posecrafter_rt.errors import ModelError

log = logging.getLogger(__name__)


class PromptTokenizer:
    """Does what `PoseModel.tokenize` does, from the files that `save_pretrained` writes for a model's tokenizer."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        """Args: num_tokens: length of the text encoder's input. Raises: ModelError if files are missing or broken."""
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
            padding = config["pad_token"]
            padding_id = self._tokenizer.token_to_id(padding)
            padded, cut = (config.get(f"{name}_side", "right") for name in ("padding", "truncation"))
            self._tokenizer.enable_padding(direction=padded, length=num_tokens, pad_token=padding, pad_id=padding_id)
            self._tokenizer.enable_truncation(num_tokens, direction=cut)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ModelError(
                f"{folder} is no tokenizer of an engine: {error}", hint="build the engine again"
            ) from error

    def __call__(self, prompts: list[str]) -> Tensor:
        """Return input_ids int64 (prompts, num_tokens), with begin and end tokens, padded or cut; log what is cut."""
        all_encoded = self._tokenizer.encode_batch(prompts)
        warn_of_cuts(prompts, all_encoded)
        return torch.tensor([encoded.ids for encoded in all_encoded], dtype=torch.int64)


def warn_of_cuts(prompts: Sequence[str], all_encoded: Sequence[Encoding]) -> None:
    """Log, for each prompt that was cut, the text that is left out."""
    for prompt, encoded in zip(prompts, all_encoded, strict=True):
        if encoded.overflowing:
            (start, _), *_, (_, stop) = encoded.offsets[1:-1]  # without the begin and end tokens
            left_out = prompt[:start].strip() or prompt[stop:].strip()  # some tokenizers cut on the left
            log.warning("the prompt has more than %d tokens and is cut; left out is: %s",
                        len(encoded.ids) - 2, left_out)  # fmt: skip

"""Recipe: a CLIP text encoder and tokenizer in miniature, in SD 1.5's own formats.

Layer 4, training only.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from posecrafter_rt.embedded.architecture import TEXT

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = [
    "a",
    "an",
    "the",
    "and",
    "with",
    "in",
    "of",
    "on",
    "person",
    "man",
    "woman",
    "child",
    "wearing",
    "shirt",
    "sweater",
    "jacket",
    "coat",
    "dress",
    "trousers",
    "hat",
    "cap",
    "beard",
    "glasses",
    "hair",
    "short",
    "long",
    "curly",
    "bald",
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "gray",
    "dark",
    "light",
    "striped",
    "plain",
    "background",
    "wall",
    "room",
    "car",
    "window",
    "outdoors",
    "smiling",
    "talking",
    "standing",
    "sitting",
    "waving",
    "face",
    "hand",
]


def _byte_alphabet() -> list[str]:
    """Return the 256 printable stand-ins for bytes that GPT-2's and CLIP's byte-level BPE use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the settings; words outside the list are split into bytes, as in CLIP."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_alphabet()
    vocabulary = alphabet + [character + "</w>" for character in alphabet]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                vocabulary.append(left + right)
            left += right
    vocabulary += [START, END]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END,
                "unk_token": END, "pad_token": END, "do_lower_case": True}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build a CLIPTextModel of two layers over the small vocabulary."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ids))

"""`posecrafter.json`: the paper's values where it is silent, one clear line where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.settings import SETTINGS_FILE, BaseSettings


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    settings = BaseSettings.load(tmp_path)
    assert settings == BaseSettings()
    assert (settings.size, settings.learning_rate, settings.steps, settings.minibatch) == ((512, 512), 0.003, None, 8)
    assert settings.prompt == "a person"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    settings = BaseSettings(size=(128, 160), trainable=(r"\.attn1\.",), steps=40, learning_rate=1e-3, norm_scope="clip")
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings.to_json()))
    assert BaseSettings.load(tmp_path) == settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": [128]}, {"size": 128}, {"size": [0, 128]}, {"size": [12.5, 128]}, {"norm_scope": "batch"},
        {"trainable": []}, {"trainable": ["("]}, {"trainable": "attn1"}, {"learning_rate": 0}, {"steps": 0},
        {"learning_rate": "fast"}, {"steps": True}, {"weight_decay": -1}, {"minibatch": 0}, {"shared_noise": 2},
        {"prompt": 3}, {"learning_rate_decay": 1}, {"inversion_substeps": 0}, {"strength": 0}, {"strength": 1.1},
        {"decoder_steps": -1}, {"decoder_steps": True}, {"decoder_steps": "many"}, {"decoder_learning_rate": 0},
        {"small_decoder_steps": 1.5}, {"small_decoder_learning_rate": -1},
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(wrong: dict, tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(wrong))
    with pytest.raises(ModelError, match=f"the setting {next(iter(wrong))} is"):
        BaseSettings.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("[1]", "holds list"), ('{"stepz": 1}', "stepz")]
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(ModelError, match=message):
        BaseSettings.load(tmp_path)

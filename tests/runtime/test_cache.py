"""The inversion cache: what was saved is found, what is damaged is not taken, what cannot be written does not matter."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from posecrafter_rt.engines import PRECISIONS
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.runtime import cache as cache_module
from posecrafter_rt.runtime.cache import InversionCache, inversion_key
from posecrafter_rt.runtime.options import RenderOptions

LATENTS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))


def test_what_was_saved_is_found_bit_for_bit(tmp_path: Path) -> None:
    InversionCache(tmp_path / "new").save({"frame": 1}, LATENTS)
    found = InversionCache(tmp_path / "new").load({"frame": 1})
    assert found is not None and torch.equal(found, LATENTS)
    assert InversionCache(tmp_path / "new").load({"frame": 2}) is None


def key_of(precision: str = "fp32", threads: Sequence[int] = ()) -> dict[str, Any]:
    manifest = dict.fromkeys(("checkpoint", "base_hash", "backend", "norm_scope", "scheduler", "size", "libraries"), "")
    schedule = DDIMSchedule.from_config({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012})
    options = RenderOptions(inversion_substeps=1, strength=1.0)
    return inversion_key(manifest, schedule, options, frame=0, prompt="", precision=precision, threads=threads)


def test_what_another_precision_rounded_otherwise_is_another_inversion() -> None:
    paths = {InversionCache(Path()).path(key_of(precision)) for precision in PRECISIONS}
    assert len(paths) == len(PRECISIONS) == 4


def test_what_another_number_of_threads_rounded_otherwise_is_another_inversion() -> None:
    keys = [key_of(threads=threads) for threads in ([], [1], [2], [2])]
    assert len({InversionCache(Path()).path(key) for key in keys}) == 3
    assert "threads" not in keys[0]  # nor does what does not round by them


def test_one_altered_byte_is_noticed(tmp_path: Path) -> None:
    cache = InversionCache(tmp_path)
    cache.save({}, LATENTS)
    content = bytearray(cache.path({}).read_bytes())
    content[-1] ^= 1
    cache.path({}).write_bytes(content)
    assert cache.load({}) is None


def failing(error: Exception) -> object:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(("target", "error", "reason"), [
    ("posecrafter_rt.atomic.os.fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left"),
    ("posecrafter_rt.atomic.os.open", PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "permission denied"),
    ("posecrafter_rt.atomic.os.open", OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only file system"),
    (f"{cache_module.__name__}.Path.mkdir", PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
    (f"{cache_module.__name__}.save_tensors", OSError(28, "No space left on device"), "no space left"),
    (f"{cache_module.__name__}.save_tensors", OSError(5, "Input/output error"), "Input/output error"),
])  # fmt: skip
def test_what_cannot_be_written_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    target: str, error: Exception, reason: str,
) -> None:  # fmt: skip
    cache = InversionCache(tmp_path / "inversions")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "posecrafter_rt"):
        patch.setattr(target, failing(error))
        cache.save({}, LATENTS)
    assert "the inversion is not kept for the next time" in caplog.text and reason in caplog.text
    assert cache.load({}) is None and not list((tmp_path).rglob("*.*"))
    cache.save({}, LATENTS)
    assert cache.load({}) is not None

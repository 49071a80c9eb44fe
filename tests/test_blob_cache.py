"""Blobs between processes: what is damaged is not read, what cannot be written does not matter."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posecrafter_rt import blob_cache
from posecrafter_rt.blob_cache import BlobCache


def test_what_was_saved_is_loaded_by_another_cache(tmp_path: Path) -> None:
    BlobCache(tmp_path / "new").save({"a": 1, "b": [2, 3]}, b"content")
    assert BlobCache(tmp_path / "new").load({"b": (2, 3), "a": 1}) == b"content"
    assert BlobCache(tmp_path / "new").holds({"b": [2, 3], "a": 1})
    assert BlobCache(tmp_path / "new").load({"a": 2}) is None and not BlobCache(tmp_path / "new").holds({"a": 2})
    assert BlobCache(tmp_path / "absent").load({"a": 1}) is None


def test_what_was_saved_is_read_where_it_lies_and_again_once_it_was_let_go_of(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    BlobCache(tmp_path).save({}, content)
    blob = BlobCache(tmp_path).map({})
    assert blob is not None and blob.array.tobytes() == content
    blob.release()
    BlobCache(tmp_path).path({}).unlink()  # as when it is too old
    assert blob.array.tobytes() == content
    BlobCache(tmp_path).save({}, b"")
    assert BlobCache(tmp_path).load({}) == b""
    BlobCache(tmp_path).path({}).write_bytes(b"")
    assert BlobCache(tmp_path).map({}) is None


@pytest.mark.parametrize("position", [0, 11, 12, -1])
def test_one_altered_byte_is_noticed(tmp_path: Path, position: int) -> None:
    cache = BlobCache(tmp_path)
    cache.save({}, b"some content")
    content = bytearray(cache.path({}).read_bytes())
    content[position] ^= 1
    cache.path({}).write_bytes(content)
    assert cache.load({}) is None


@pytest.mark.parametrize("length", [0, 10, 32, 40])
def test_a_torn_file_is_noticed(tmp_path: Path, length: int) -> None:
    cache = BlobCache(tmp_path)
    cache.save({}, b"some content")
    os.truncate(cache.path({}), length)
    assert cache.load({}) is None


def test_the_oldest_files_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_cache, "MAX_FILES", 3)
    cache = BlobCache(tmp_path)
    for number in range(5):
        cache.save({"n": number}, b"x")
        os.utime(cache.path({"n": number}), (number, number))
    assert [number for number in range(5) if cache.load({"n": number})] == [2, 3, 4]


@pytest.mark.parametrize("read", [BlobCache.load, BlobCache.map])
def test_what_is_used_counts_as_new(
    read: Callable[[BlobCache, Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every build needs is not lost to what came later and was needed once."""
    monkeypatch.setattr(blob_cache, "MAX_FILES", 3)
    cache = BlobCache(tmp_path)
    for number in range(5):
        cache.save({"n": number}, b"x")
        os.utime(cache.path({"n": number}), (number, number))
        assert read(cache, {"n": 0}) is not None
    assert [number for number in range(5) if cache.holds({"n": number})] == [0, 3, 4]


def test_what_may_not_be_marked_as_used_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another user's cache."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    cache = BlobCache(tmp_path)
    cache.save({}, b"x")
    monkeypatch.setattr(os, "utime", refuse)
    blob = cache.map({})
    assert cache.load({}) == b"x" and blob is not None and blob.array.tobytes() == b"x"


def test_no_more_bytes_than_allowed_but_for_the_newest(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=3 * (32 + 100))
    for number in range(5):
        cache.save({"n": number}, bytes(100))
        os.utime(cache.path({"n": number}), (number, number))
    assert [number for number in range(5) if cache.load({"n": number})] == [2, 3, 4]
    cache.save({}, bytes(1000))
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [32 + 1000]


def test_a_file_that_another_process_removes_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A link to nothing stands for it: it is listed, and is not there when it is asked about."""
    monkeypatch.setattr(blob_cache, "MAX_FILES", 1)
    (tmp_path / "gone.blob").symlink_to("absent")
    cache = BlobCache(tmp_path)
    for number in range(2):
        cache.save({"n": number}, b"x")
        os.utime(cache.path({"n": number}), (number, number))
    assert cache.load({"n": 1}) == b"x" and cache.load({"n": 0}) is None and not caplog.messages


def test_a_folder_that_cannot_be_searched_holds_nothing(tmp_path: Path) -> None:
    """The system refuses a name of this length to root, too, to whom it permits any folder."""
    cache = BlobCache(tmp_path / ("x" * 300))
    assert not cache.holds({}) and cache.load({}) is None and cache.map({}) is None and not cache.save({}, b"x")


def test_a_folder_that_cannot_be_written_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "posecrafter_rt"):
        BlobCache(tmp_path / "file").save({}, b"x")
    assert "not kept" in caplog.text


def test_what_was_written_is_kept_although_an_old_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blob_cache, "MAX_FILES", 1)
    (tmp_path / "folder.blob").mkdir()  # which `unlink` refuses
    os.utime(tmp_path / "folder.blob", (0, 0))
    cache = BlobCache(tmp_path)
    with caplog.at_level(logging.WARNING, "posecrafter_rt"):
        assert cache.save({}, b"x")
    assert cache.load({}) == b"x" and "folder.blob" in caplog.text and "not kept" not in caplog.text

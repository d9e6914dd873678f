"""The cache: what is recalled, what counts as absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fxquant.cache import Cache, code_signature, user_folder
from fxquant.errors import ArtefactError


def test_a_value_is_made_once(tmp_path: Path) -> None:
    for cache in (Cache(), Cache(tmp_path / "new" / "folder")):
        assert cache.recall("k", lambda: [1.5, 2]) == [1.5, 2]
        assert cache.recall("k", lambda: pytest.fail("made again")) == [1.5, 2]
    other = Cache(tmp_path / "new" / "folder")
    assert other.recall("k", lambda: pytest.fail("made again")) == [1.5, 2]
    assert other.recall("other", lambda: 3) == 3


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text('{"half')
    assert Cache(tmp_path).recall("k", lambda: 7) == 7
    assert Cache(tmp_path).recall("k", lambda: pytest.fail("made again")) == 7


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be made"):
        Cache(tmp_path / "file")


def test_tensors_and_texts(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.read("k") is None
    cache.write("k", {"a": "text"}, {"x": torch.arange(3)})
    texts, tensors = Cache(tmp_path).read("k") or ({}, {})
    assert texts["a"] == "text"
    assert torch.equal(tensors["x"], torch.arange(3))
    cache.forget("k")
    assert cache.read("k") is None
    assert Cache().read("k") is None
    Cache().write("k", {}, {})


def test_the_longest_unused_files_make_room_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(bytes(10_000))
    cache = Cache(tmp_path, limit_bytes=5_000)
    keys = [f"{index:016x}" for index in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.recall(key, lambda: "a" * 2_000)
        os.utime(tmp_path / f"{key}.json", (age, age))
        cache = Cache(tmp_path, limit_bytes=5_000)
    assert Cache(tmp_path).recall(keys[1], lambda: pytest.fail("made again"))
    cache.recall(keys[3], lambda: "a" * 2_000)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.txt", f"{keys[1]}.json", f"{keys[3]}.json"}


def test_a_result_that_cannot_be_kept_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ArtefactError("no space left")

    monkeypatch.setattr("fxquant.cache.write_file", full)
    with pytest.warns(UserWarning, match="no space left"):
        assert Cache(tmp_path).recall("k", lambda: 7) == 7


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "fxquant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_folder().is_relative_to(Path.home())


def test_the_sources_are_part_of_the_key() -> None:
    assert len(code_signature()) == 16


def test_tensors_are_made_once_and_a_damaged_file_again(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor(2, dtype=torch.int8)}
    for make in (lambda: tensors, lambda: pytest.fail("made again")):
        for cache in (Cache(tmp_path), Cache(tmp_path)):
            found = cache.recall_tensors("k", make)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    file = tmp_path / "k.part"
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(Cache(tmp_path).recall_tensors("k", lambda: tensors)["a"], tensors["a"])
    assert Cache(tmp_path).recall_tensors("k", lambda: pytest.fail("made again")).keys() == tensors.keys()

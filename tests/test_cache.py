"""The cache: what is recalled, what counts as absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.cache import Cache
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

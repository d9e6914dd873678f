"""The cache: what is recalled, what counts as absent."""

from __future__ import annotations

import multiprocessing
import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.artefact import container
from fxquant.artefact.cache import Cache, code_signature, signature, user_folder
from fxquant.artefact.container import write_file
from fxquant.commands.options import cache_folder
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

    monkeypatch.setattr("fxquant.artefact.cache.write_file", full)
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


def test_a_flipped_byte_of_a_json_entry_is_never_another_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine fails meanwhile
    value = {"weight": {"blocks.0.attn.qkv": [0.125, 3e-7]}, "notes": [None, True, "text"]}
    Cache(tmp_path).recall("k", lambda: value)
    file = tmp_path / "k.json"
    content, draw = file.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        assert Cache(tmp_path).recall("k", lambda: "made again") in (value, "made again")


@pytest.mark.parametrize("text", ["[]", "7", "[" * 50_000, '{"digest": 1, "value": 2}', "\x00", '{"value": 1}'])
def test_a_json_entry_of_another_form_counts_as_absent(text: str, tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text(text)
    assert Cache(tmp_path).recall("k", lambda: "made") == "made"


def test_an_entry_under_anothers_name_counts_as_absent(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.recall("a", lambda: 1)
    cache.write("a", {}, {"x": torch.zeros(1)})
    for suffix in ("json", "safetensors"):
        (tmp_path / f"a.{suffix}").rename(tmp_path / f"b.{suffix}")
    assert Cache(tmp_path).recall("b", lambda: 2) == 2
    assert Cache(tmp_path).read("b") is None


def test_tensors_read_share_no_memory(tmp_path: Path) -> None:
    Cache(tmp_path).write("k", {}, {"a": torch.zeros(3), "b": torch.zeros(3)})
    _, tensors = Cache(tmp_path).read("k") or ({}, {})
    tensors["a"].add_(1)
    assert torch.equal(tensors["b"], torch.zeros(3))


def test_whatever_changes_what_a_module_computes_changes_its_signature() -> None:
    made = [nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-2), nn.LayerNorm(4).double(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()]
    with_buffer = nn.Identity()
    with_buffer.register_buffer("hidden", torch.ones(1), persistent=False)
    made += [nn.Identity(), with_buffer, nn.Sequential(nn.Identity())]
    assert len({signature(module) for module in made}) == len(made)
    assert signature(nn.LayerNorm(4)) == signature(nn.LayerNorm(4))


def test_signatures_tell_values_apart_that_read_alike() -> None:
    big = torch.zeros(5000)
    other = big.clone()
    other[2500] = 1  # printed, the two are the same
    assert signature({"a": [big]}) != signature({"a": [other]})
    assert signature(1, 2) != signature(12)
    assert signature(1, 2) != signature([1, 2])


def test_parts_are_the_first_to_go_and_those_of_finished_work_all_go(tmp_path: Path) -> None:
    keys = [f"{index:016x}" for index in range(4)]
    cache = Cache(tmp_path, limit_bytes=20_000)
    cache.write(keys[0], {}, {"x": torch.zeros(2_000)})
    os.utime(tmp_path / f"{keys[0]}.safetensors", (1, 1))
    with cache.work(keys[3]):
        cache.write(keys[1], {}, {"x": torch.zeros(1_000)}, part=True)
        assert cache.read(keys[1], part=True) is not None
    assert cache.read(keys[1], part=True) is None, "parts are known to their work alone"
    cache.write(keys[2], {}, {"x": torch.ones(2_000)})
    assert {file.name for file in tmp_path.iterdir()} == {f"{keys[0]}.safetensors", f"{keys[2]}.safetensors"}
    with cache.work(keys[3]):
        cache.write(keys[1], {}, {}, part=True)
    cache.forget_parts(keys[3])
    assert not list(tmp_path.glob("*.part"))


def hammer(folder: Path, seed: int) -> None:
    """Write and read in a folder that holds a few entries, as a process of its own."""
    warnings.simplefilter("error")
    draw = random.Random(seed)
    for _ in range(60):
        key = f"{draw.randrange(12):016x}"
        cache = Cache(folder, limit_bytes=20_000)
        if draw.random() < 0.5:
            assert cache.recall(key, lambda key=key: key * 100) == key * 100  # type: ignore[misc]
        else:
            tensor = torch.full((700,), int(key, 16), dtype=torch.float32)
            assert torch.equal(cache.recall_tensors(key, lambda tensor=tensor: {"x": tensor})["x"], tensor)  # type: ignore[misc]


def test_many_processes_share_a_folder_at_its_limit(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=hammer, args=(tmp_path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert 0 < sum(sizes) <= 20_000 + 3 * max(sizes)


def test_two_processes_that_make_room_at_once_keep_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has written its own; both then look at the same folder."""
    keys = [f"{index:016x}" for index in range(2)]
    first, second = (Cache(tmp_path, limit_bytes=1_000) for _ in keys)

    def meanwhile(file: Path, content: bytes) -> None:
        write_file(file, content)
        os.utime(file, (100, 100))
        monkeypatch.undo()
        second.recall(keys[1], lambda: "b" * 900)

    monkeypatch.setattr("fxquant.artefact.cache.write_file", meanwhile)
    first.recall(keys[0], lambda: "a" * 900)
    assert [file.name for file in tmp_path.iterdir()] == [f"{keys[1]}.json"]


def test_a_file_that_another_process_removes_while_room_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, limit_bytes=1_000)
    cache.recall("0" * 16, lambda: 1)
    listed = [tmp_path / f"{name * 16}.json" for name in "012"]  # the second is there no longer
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    assert cache.recall("2" * 16, lambda: "a" * 2_000) == "a" * 2_000


def test_a_folder_that_cannot_be_written_to_warns_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    with pytest.warns(UserWarning, match="not cached"):
        assert cache.recall("a", lambda: 7) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.recall_tensors("b", dict) == {}


def test_a_user_without_a_home_is_warned_and_has_no_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ArtefactError, match="set HOME or XDG_CACHE_HOME"):
        user_folder()
    assert cache_folder(None, no_cache=False) is None
    assert "no home folder" in capsys.readouterr().err.replace("\n", " ")


def test_temporary_files_of_killed_processes_go_with_the_next_write(tmp_path: Path) -> None:
    left = tmp_path / f".{'0' * 16}.json.12345678.partial"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    Cache(tmp_path).recall("1" * 16, lambda: 1)
    assert [file.name for file in tmp_path.iterdir()] == [f"{'1' * 16}.json"]


def test_a_file_that_vanishes_while_it_is_opened_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    assert cache.write("key", {}, {"x": torch.ones(3)})

    def vanished(*_: object) -> None:
        raise RuntimeError("unable to open file in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(container, "safe_open", vanished)
    assert cache.read("key") is None

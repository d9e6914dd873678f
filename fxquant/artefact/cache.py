"""What long work has computed, kept on disk under a signature of all it depends on.

    scores = cache.recall(signature(model, images, settings), compute)

Equal signatures mean equal results, so a stored value stands for the computation. A file that cannot be read, or whose
content does not match its digest, counts as absent: it is computed and written again. Values are JSON; `read` and
`write` keep texts with tensors (safetensors). Nothing is ever unpickled.

*Parts* are results of work that is not finished: a layer, a batch, a hundred steps of training. They let a process that
was killed go on where it was, are the first to be removed where room is needed, and go once the whole is kept.

Several processes may use one folder: a file appears whole or not at all, a reader keeps what it has opened, and all
processes remove files in the same order, so the newest file stays whoever makes room. Temporary files that killed
processes have left go with the next write (`write_file`). Ranks that work together (`fxquant.ranks`) find what the
first of them finds, in its folder, and it writes for all; what one alone computes or gathers, it keeps by itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.container import pack_file, read_file, write_file
from fxquant.checks.untrusted import from_json
from fxquant.errors import ArtefactError

_OWN_FILE = re.compile(r"[0-9a-f]{16}\.(json|safetensors|([0-9a-f]{16}\.)?part)")
_PACKAGES = ("fxquant", "passes", "allocators")
_VERSIONS_OF = ("fxquant", "torch", "timm", "numpy", "mip")

Kept = tuple[dict[str, str], dict[str, Tensor]]
"""Texts and tensors by name, as a file keeps them."""


def signature(*values: Any) -> str:
    """A digest of JSON values, tensors and modules: equal settings have equal signatures, across processes.

    Of a module it covers all parameters and buffers, and the class and plain attributes (numbers, texts) of every
    module in it: an epsilon changes what is computed as a weight does. Of a graph module, those that its graph reads.
    """
    total = hashlib.sha256()
    for value in values:
        total.update(_digest_of(value))
    return total.hexdigest()[:16]


def _digest_of(value: Any) -> bytes:
    if isinstance(value, GraphModule):
        used = {str(node.target) for node in value.graph.nodes if node.op in ("call_module", "get_attr")}
        return _digest_of([[path, _digest_of(attrgetter(path)(value)).hex()] for path in sorted(used)])
    if isinstance(value, nn.Module):
        tensors = (*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False))
        held = [[name, _digest_of(tensor).hex()] for name, tensor in sorted(tensors)]
        return _digest_of([held, sorted([path, *_plain(module)] for path, module in value.named_modules())])
    if isinstance(value, Tensor):
        content = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return content.digest()
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_described).encode()).digest()


def _described(value: Any) -> str:
    """A value that JSON does not have, inside one that it has."""
    return _digest_of(value).hex() if isinstance(value, nn.Module | Tensor) else str(value)


def _plain(module: nn.Module) -> list[Any]:
    """A module's class and those of its attributes that are plain values; its mode is none of its settings."""
    found = {name: value for name, value in vars(module).items() if _is_plain(value) and name[0] != "_"}
    return [type(module).__name__, sorted((name, repr(value)) for name, value in found.items() if name != "training")]


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


@functools.cache
def code_signature() -> str:
    """A digest of this package's own sources, and of the versions of what computes with them.

    So what an edited or older version kept is not taken for ours.
    """
    root = Path(__file__).parents[2]
    files = sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py"))
    versions = [importlib.metadata.version(name) for name in _VERSIONS_OF]
    return signature(versions, *(f"{file.relative_to(root)}\n{file.read_text('utf-8')}" for file in files))


def user_folder() -> Path:
    """The user's own cache folder for fxquant: below XDG_CACHE_HOME where set, else where the platform keeps caches.

    Raises ArtefactError where no home folder is known.
    """
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found) / "fxquant"
    if sys.platform == "win32" and (found := os.environ.get("LOCALAPPDATA")):
        return Path(found) / "fxquant" / "cache"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ArtefactError(
            f"there is no cache folder, since this user has no home folder ({error}): set HOME or XDG_CACHE_HOME"
        ) from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fxquant"


class Cache:
    """JSON values and tensors by signature: one file each in a folder, or in memory only when there is no folder.

    folder: made where it is missing. limit_bytes: of all files in it together; a new file over it removes parts first,
    then the longest unused. Raises ArtefactError where the folder cannot be made; one that cannot be written to is
    worth a warning, and nothing more is kept.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit_bytes: float = 4e9) -> None:
        self.folder = None if folder is None else Path(folder)
        self.limit_bytes = limit_bytes
        self._work = ""
        self._known: dict[str, Any] = {}
        self._writes = self.folder is not None
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                raise ArtefactError(f"the cache folder {folder} cannot be made: {error}; give another one") from error

    def recall(self, key: str, make: Callable[[], Any]) -> Any:
        """The value kept under this signature, else what `make` returns (a JSON value), which is kept at once."""
        found = ranks.once("recalling", lambda: self._known[key] if key in self._known else self._read_json(key))
        if found is None:
            made = make()
            found = ranks.once("keeping", lambda: made)
            text = json.dumps(found)
            seal = _seal(key, text)
            self._put(f"{key}.json", f'{{"digest": "{seal}", "value": {text}}}'.encode())
        self._known[key] = found
        return found

    def read(self, key: str, *, part: bool = False) -> Kept | None:
        """Texts and tensors that `write` kept under this signature; None without a folder and for a damaged file."""
        folder, name = self.folder, self._name(key, part)
        return None if folder is None else ranks.once("reading the cache", lambda: _read(folder / name, key))

    def write(self, key: str, texts: Mapping[str, str], tensors: Mapping[str, Tensor], *, part: bool = False) -> bool:
        """Keep texts and tensors under this signature; returns whether they are kept.

        Without a folder nothing is; where it cannot be written to, the first time warns.

        Args:
            key: the signature of all that the result depends on.
            texts: JSON texts to keep, by name.
            tensors: tensors to keep, by name.
            part: whether the result belongs to work that is not finished.
        """
        return self._may_write() and self._put(self._name(key, part), pack_file({**texts, "signature": key}, tensors))

    def key_of(self, *values: Any) -> str:
        """The signature of values and of our sources; empty without a folder, where nothing is kept under it."""
        return "" if self.folder is None else signature(code_signature(), *values)

    def recall_tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a part kept under this signature (on the CPU), else what `make` returns, kept at once.

        Without a folder nothing is kept: tensors are large, and the pass that made them has them.
        """
        kept = self.read(key, part=True)
        if kept is not None:
            return kept[1]
        found = make()
        self.write(key, {}, found, part=True)
        return found

    def forget(self, key: str) -> None:
        """Remove what `write` kept under this signature."""
        if self.folder is not None and self._may_write():
            with suppress(OSError):
                (self.folder / self._name(key, part=False)).unlink()

    @contextmanager
    def work(self, key: str) -> Iterator[None]:
        """Inside, parts belong to the work of this signature, and are known to it alone."""
        before, self._work = self._work, f"{key}."
        try:
            yield
        finally:
            self._work = before

    def forget_parts(self, key: str) -> None:
        """Remove all parts of the work of this signature, whichever process has kept them: the whole is kept.

        Every rank does, in its own folder.
        """
        for file in self._files() if self._writes else []:
            if file.name.startswith(f"{key}.") and file.suffix == ".part":
                with suppress(OSError):
                    file.unlink()

    def _may_write(self) -> bool:
        """Whether this process keeps results: of several ranks the first does; each, what it alone has computed."""
        return self._writes and (ranks.is_first() or ranks.count() == 1)

    def _name(self, key: str, part: bool) -> str:
        return f"{self._work}{key}.part" if part else f"{key}.safetensors"

    def _read_json(self, key: str) -> Any:
        if self.folder is None:
            return None
        file = self.folder / f"{key}.json"
        try:
            found = from_json(file.read_text("utf-8"), dict, f"{file}")
            if found["digest"] != _seal(key, json.dumps(found["value"])):
                return None
        except (OSError, ValueError, KeyError, RecursionError, ArtefactError):
            return None
        _touch(file)
        return found["value"]

    def _put(self, name: str, content: bytes) -> bool:
        """Write a file, then make room; a result that cannot be kept is still a result, so failing only warns."""
        if self.folder is None or not self._may_write():
            return False
        try:
            write_file(self.folder / name, content)
        except ArtefactError as error:
            self._writes = False  # one warning, not one for every result
            warnings.warn(f"not cached, and nothing after it: {error}", stacklevel=3)
            return False
        self._make_room()
        return True

    def _make_room(self) -> None:
        """Remove our own files until the rest fits the limit: parts first, of each kind the longest unused.

        The newest of all stays, whatever its size. Every process sorts alike, so two that write at once do not remove
        each other's newest file.
        """
        found = []
        now = time.time_ns()
        for file in self._files():
            with suppress(OSError):  # another process may have removed it
                if _OWN_FILE.fullmatch(file.name):
                    status = file.stat()
                    used_ns = min(status.st_mtime_ns, now)  # a clock that was wrong gives nobody precedence
                    found.append((used_ns, file.name, status.st_size, file))
        found.sort(reverse=True)
        kept, rest = found[:1], found[1:]
        rest.sort(key=lambda row: row[3].suffix == ".part")  # stable: entries first, then parts, each newest first
        room = self.limit_bytes - sum(size for _, _, size, _ in kept)
        for _, _, size, file in rest:
            room -= size
            if room < 0:
                with suppress(OSError):
                    file.unlink()

    def _files(self) -> list[Path]:
        with suppress(OSError):
            return [] if self.folder is None else list(self.folder.iterdir())
        return []


def _read(file: Path, key: str) -> Kept | None:
    """What `Cache.write` kept in a file under a signature; None for a damaged file."""
    try:
        texts, tensors = read_file(file)
    except (ArtefactError, OSError):
        return None
    if texts.get("signature") != key:  # a file that was given another's name
        return None
    _touch(file)
    return texts, _unshared(tensors)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: a file holds equal ones once, and who reads them may write to one."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    return found


def _seal(key: str, text: str) -> str:
    """The digest of a JSON entry: of its value and of the signature that it stands under."""
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def _touch(file: Path) -> None:
    """Say that a file was used; another process may have removed it, or own it."""
    with suppress(OSError):
        os.utime(file)

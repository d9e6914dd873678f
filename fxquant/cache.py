"""What long work has computed, kept on disk under a signature of all it depends on.

    scores = cache.recall(signature(model, images, settings), compute)

Equal signatures mean equal results, so a stored value stands for the computation. A file that cannot be read, or whose
content does not match its digest, counts as absent: it is computed and written again. Values are JSON; `read` and
`write` keep texts with tensors (safetensors). Files are removed, the longest unused first, where the folder grows over
its limit. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ArtefactError
from fxquant.runtime.container import pack_file, read_file, write_file

_OWN_FILE = re.compile(r"[0-9a-f]{16}\.(json|safetensors)")
_PACKAGES = ("fxquant", "passes")


def signature(*values: Any) -> str:
    """A digest of JSON values, tensors and modules: equal settings have equal signatures, across processes."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            for name, tensor in sorted(value.state_dict().items()):
                total.update(f"{name}{signature(tensor)}".encode())
        elif isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(json.dumps(value, sort_keys=True, default=str).encode())
    return total.hexdigest()[:16]


@functools.cache
def code_signature() -> str:
    """A digest of this package's own sources, so that what an edited or older version kept is not taken for ours."""
    root = Path(__file__).parents[1]
    files = sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py"))
    return signature(*(f"{file.relative_to(root)}\n{file.read_text('utf-8')}" for file in files))


def user_folder() -> Path:
    """The user's own cache folder for fxquant: below XDG_CACHE_HOME where set, else where the platform keeps caches."""
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found) / "fxquant"
    if sys.platform == "win32" and (found := os.environ.get("LOCALAPPDATA")):
        return Path(found) / "fxquant" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fxquant"


class Cache:
    """JSON values and tensors by signature: one file each in a folder, or in memory only when there is no folder.

    folder: made where it is missing. limit_bytes: of all files in it together; a new file over it removes the longest
    unused. Raises ArtefactError where the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit_bytes: float = 4e9) -> None:
        self.folder = None if folder is None else Path(folder)
        self.limit_bytes = limit_bytes
        self._known: dict[str, Any] = {}
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ArtefactError(f"the cache folder {folder} cannot be made: {error}; give another one") from error

    def recall(self, key: str, make: Callable[[], Any]) -> Any:
        """The value kept under this signature, else what `make` returns (a JSON value), which is kept at once."""
        if key not in self._known:
            found = self._read_json(key)
            if found is None:
                found = make()
                self._put(f"{key}.json", json.dumps(found).encode())
            self._known[key] = found
        return self._known[key]

    def read(self, key: str) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """Texts and tensors that `write` kept under this signature; None without a folder and for a damaged file."""
        if self.folder is None:
            return None
        file = self.folder / f"{key}.safetensors"
        try:
            found = read_file(file)
            os.utime(file)
        except (ArtefactError, OSError):
            return None
        return found

    def write(self, key: str, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """Keep texts and tensors under this signature; does nothing without a folder, warns where it cannot write."""
        if self.folder is not None:
            self._put(f"{key}.safetensors", pack_file(texts, tensors))

    def recall_tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors kept under this signature (on the CPU), else what `make` returns, which is kept at once.

        Without a folder nothing is kept: tensors are large, and the pass that made them has them.
        """
        kept = self.read(key)
        if kept is not None:
            return kept[1]
        found = make()
        self.write(key, {}, found)
        return found

    def forget(self, key: str) -> None:
        """Remove what `write` kept under this signature."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"{key}.safetensors").unlink()

    def _read_json(self, key: str) -> Any:
        if self.folder is None:
            return None
        file = self.folder / f"{key}.json"
        try:
            found = json.loads(file.read_text())
            os.utime(file)
        except (OSError, ValueError):
            return None
        return found

    def _put(self, name: str, content: bytes) -> None:
        """Write a file, then make room; a result that cannot be kept is still a result, so failing only warns."""
        if self.folder is None:
            return
        try:
            write_file(self.folder / name, content)
        except ArtefactError as error:
            warnings.warn(f"not cached: {error}", stacklevel=3)
            return
        self._make_room(name)

    def _make_room(self, newest: str) -> None:
        """Remove our own files, the longest unused first, until the rest fits the limit; the newest stays."""
        assert self.folder is not None
        found = []
        for file in self.folder.iterdir():
            with suppress(OSError):  # another process may have removed it
                if _OWN_FILE.fullmatch(file.name) and file.name != newest:
                    found.append((file.stat().st_mtime, file.stat().st_size, file))
        room = self.limit_bytes - (self.folder / newest).stat().st_size
        for _, size, file in sorted(found, reverse=True):
            room -= size
            if room < 0:
                with suppress(OSError):
                    file.unlink()

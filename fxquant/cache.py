"""What long work has computed, kept on disk under a signature of all it depends on.

    scores = cache.recall(signature(model, images, settings), compute)

Equal signatures mean equal results, so a stored value stands for the computation. A file that cannot be read counts
as absent: it is computed and written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ArtefactError
from fxquant.runtime.container import write_file


def signature(*values: Any) -> str:
    """A digest of JSON values, tensors and modules: equal settings have equal signatures, across processes."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            for name, tensor in sorted(value.state_dict().items()):
                total.update(f"{name}{signature(tensor)}".encode())
        elif isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(json.dumps(value, sort_keys=True, default=str).encode())
    return total.hexdigest()[:16]


class Cache:
    """JSON values by signature: one file each in a folder, or in memory only when there is no folder.

    Raises ArtefactError where the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Any] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ArtefactError(f"the cache folder {folder} cannot be made: {error}") from error

    def recall(self, key: str, make: Callable[[], Any]) -> Any:
        """The value kept under this signature, else what `make` returns (a JSON value), which is kept at once."""
        if key not in self._known:
            found = self._read(key)
            if found is None:
                found = make()
                if self.folder is not None:
                    write_file(self.folder / f"{key}.json", json.dumps(found).encode())
            self._known[key] = found
        return self._known[key]

    def _read(self, key: str) -> Any:
        if self.folder is None:
            return None
        try:
            return json.loads((self.folder / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None

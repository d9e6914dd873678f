"""What ranks of a process group send to each other, as bytes: values with tensors in them, and errors.

They are pickled. All ranks run one program and trust each other; nothing of it is ever read from a file.
"""

from __future__ import annotations

import pickle
from io import BytesIO
from typing import TYPE_CHECKING, Any

from fxquant.errors import DistributedError, FxQuantError

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "start all ranks again: with a cache folder, what was finished is not done again"


class _Pickler(pickle.Pickler):
    """Pickles tensors as their bytes: views without the rest of their memory, and onto the CPU."""

    def reducer_override(self, value: Any) -> Any:
        """How a value is put together again."""
        import torch

        if type(value) is torch.Tensor:
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return _tensor_of, (pickle.PickleBuffer(flat.numpy().data), value.dtype, tuple(value.shape))
        return NotImplemented


def _tensor_of(content: bytearray | bytes, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    import torch

    if not content:
        return torch.empty(shape, dtype=dtype)
    own = content if isinstance(content, bytearray) else bytearray(content)
    return torch.frombuffer(own, dtype=dtype).reshape(shape)


def to_bytes(value: Any) -> bytes:
    """A value, whose tensors go to the CPU, without gradients."""
    buffer = BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def from_bytes(content: bytearray) -> Any:
    """The value that `to_bytes` was given."""
    return pickle.loads(content)


def error_to_bytes(error: Exception) -> bytes:
    """Its class where it is one of ours, and what it says."""
    kind = type(error) if isinstance(error, FxQuantError) else None
    text = str(error) if kind else f"{type(error).__name__}: {error}"
    try:
        return to_bytes((kind, text))
    except (pickle.PicklingError, AttributeError, TypeError):  # a class that only this process has
        return to_bytes((None, text))


def error_from_bytes(content: bytearray, rank: int) -> Exception:
    """The error that `error_to_bytes` was given, to be raised on other ranks. rank: where it was raised."""
    kind, text = pickle.loads(content)
    if kind is None:
        return DistributedError(f"rank {rank} has failed with {text}; {REMEDY}")
    found = kind(text)
    assert isinstance(found, Exception)
    return found

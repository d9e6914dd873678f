"""How many thresholds lie below each value: `torch.bucketize`, faster where there are many values.

A binary search mispredicts its branches: 30 ns a value from 6 bits on. The upper 16 bits of a float32 say nearly as
much. They name one of 65,536 buckets of neighbouring numbers, and for each a table holds how many thresholds lie below
the whole bucket, and the one that may lie inside it: two lookups and one comparison, 6 to 16 ns at any width
(`benchmarks/evaluation_speed.py`). Values in a bucket that holds several thresholds (tiny numbers, the ends of an 8-bit
grid) are searched for as before. The counts are the same for every value, except that a signalling NaN is below or
above all thresholds as its sign says.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MANY: Final = 2**19
"""From this many values on the table, which takes 2 ms to make, is worth it."""

_BUCKETS: Final = 2**16


def thresholds_below(x: Tensor, thresholds_k: Tensor) -> Tensor:
    """How many of the ascending thresholds are less than each value; NaN counts as the largest.

    Args:
        x: float32, any shape.
        thresholds_k: float32 (K,), ascending, finite, on the device of x.

    Returns int32, the shape of x.
    """
    is_traced = torch.compiler.is_compiling() or torch.compiler.is_exporting() or isinstance(x, FakeTensor)
    if is_traced or x.numel() < MANY or x.device.type != "cpu":
        return torch.bucketize(x, thresholds_k, out_int32=True)
    return _by_table(x.detach().flatten(), thresholds_k).reshape(x.shape)


def _by_table(x_n: Tensor, thresholds_k: Tensor) -> Tensor:
    least, inside, is_crowded = _table(thresholds_k)
    bucket_n = (x_n.view(torch.int32) >> 16).bitwise_and_(_BUCKETS - 1)
    found_n = least.index_select(0, bucket_n).add_(x_n > inside.index_select(0, bucket_n))
    if bool(is_crowded.any()):
        places = is_crowded.index_select(0, bucket_n).nonzero().flatten()
        found_n[places] = torch.bucketize(x_n[places], thresholds_k, out_int32=True)
    return found_n


def _table(thresholds_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every bucket: thresholds below all of it, int32; the next threshold, float32; whether it has several, bool."""
    bits = torch.arange(_BUCKETS, dtype=torch.int32) << 16
    # The number with the least and with the largest magnitude. Buckets of infinity hold NaN too, which is not meant.
    near, far = (each.view(torch.float32) for each in (bits, bits | 0xFFFF))
    far = torch.where(near.isinf(), near, far)
    of_near, of_far = (torch.bucketize(each, thresholds_k, out_int32=True) for each in (near, far))
    least, most = torch.minimum(of_near, of_far), torch.maximum(of_near, of_far)
    beyond = torch.full((1,), torch.inf)
    return least, torch.cat([thresholds_k, beyond]).index_select(0, least), most - least > 1

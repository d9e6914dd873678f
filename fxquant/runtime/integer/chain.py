"""A chain of lowered layers as one module: one call for whole blocks, on a few images at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxquant.runtime.integer.lowered import IntegerAttention, IntegerLinear, LayerNormToCodes
from fxquant.runtime.integer.row_order import ReorderRows
from fxquant.runtime.native import library, operators

ChainLayer = LayerNormToCodes | IntegerLinear | IntegerAttention
_ALIGNMENT = 64


@dataclass(frozen=True)
class Step:
    """A layer and what it reads: number 0 is the chain's input, number i + 1 the result of step i.

    Args:
        layer: the integer module.
        input: the number of the value that it reads.
        residual: the number of the value that a linear layer adds to its result, where it adds one.
    """

    layer: ChainLayer
    input: int
    residual: int = 0


@dataclass(frozen=True)
class RowOrder:
    """What a chain takes its rows for.

    Args:
        gather: where the first step's rows come from; None: as they lie.
        tokens: rows that belong together, as attention sees them; 0: all of an image.
        returns: the result's rows go back to where they came from.
    """

    gather: ReorderRows | None = None
    tokens: int = 0
    returns: bool = False


class IntegerChain(nn.Module):
    """Layers one after the other, from float32 to what the last one gives. `layout` is all it consists of.

    Args:
        steps: the layers in the order they run.
        channels: channels of the first step's input.
        width: channels of the result of the last step.
        order: the order of rows that the chain works in.
    """

    layout: Tensor

    def __init__(self, steps: Sequence[Step], channels: int, width: int, order: RowOrder = RowOrder()) -> None:
        """channels, width: of the first step's input and of the result of the last step."""
        super().__init__()
        self.tokens, self.parts = order.tokens, 1 if order.gather is None else order.gather.parts
        self.rows = None if order.gather is None else len(order.gather.rows)
        last = steps[-1].layer
        self.width, self.steps = width, len(steps)
        self.gives_codes = last.epilogue.gives_codes if isinstance(last, IntegerLinear) else True
        self.register_buffer("layout", _layout(steps, channels, order))

    def forward(self, x: Tensor) -> Tensor:
        """float32 (B, ..., channels / parts) to float32 or uint8 (B, N / parts, width), N rows in an image.

        With an order B is what is left of all rows.
        """
        rows = x.flatten(1, -2) if self.rows is None else x.reshape(-1, self.rows, x.shape[-1])
        result: Tensor = torch.ops.fxquant.chain(
            rows, self.layout, self.width, self.gives_codes, self.tokens, self.parts
        )
        return result

    def extra_repr(self) -> str:
        """How much it holds."""
        return f"{self.steps} layers"


def _layout(steps: Sequence[Step], channels: int, order: RowOrder) -> Tensor:
    header = library.ChainHeader(library.CHAIN_MAGIC, library.LAYOUT_VERSION, len(steps), channels, parts=1)
    parts: list[Tensor] = []
    end = ctypes.sizeof(header) + len(steps) * ctypes.sizeof(library.StepSpec)

    def put(part: Tensor | None) -> int:
        """Where the part will lie; 0 for none."""
        nonlocal end
        if part is None:
            return 0
        place = -(-end // _ALIGNMENT) * _ALIGNMENT
        flat = part.detach().contiguous().flatten().view(torch.uint8)
        parts.extend((torch.zeros(place - end, dtype=torch.uint8), flat))
        end = place + flat.numel()
        return place

    if order.gather is not None:
        rows = order.gather.rows.to(torch.int32)
        header.order, header.order_rows, header.parts = put(rows), len(rows), order.gather.parts
        header.returns = int(order.returns)
    records = b""
    for step in steps:
        layer, record = step.layer, library.StepSpec(input=step.input, residual=step.residual)
        if isinstance(layer, IntegerLinear):
            record.kind, body = library.LINEAR, layer.layout
        elif isinstance(layer, IntegerAttention):
            record.kind, body = library.ATTENTION, layer.spec
            if layer.bias is not None:
                bias = layer.bias.float()
                record.bias, record.bias_groups, record.bias_bytes = put(bias), len(bias), bias.nbytes
        else:
            record.kind, body, record.epsilon = library.LAYER_NORM, layer.spec, layer.epsilon
            record.weight = put(None if layer.weight is None else layer.weight.float())
            record.bias = put(None if layer.bias is None else layer.bias.float())
        record.offset, record.bytes = put(body), body.numel()
        records += bytes(record)
    return torch.cat([operators.spec_tensor(header), torch.frombuffer(bytearray(records), dtype=torch.uint8), *parts])

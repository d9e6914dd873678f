"""Chains against their layers one by one, on any number of threads and with rows in another order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import BackendError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime import simulated
from fxquant.runtime.integer import lowered
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.integer.chain import IntegerChain, RowOrder, Step
from fxquant.runtime.integer.row_order import ReorderRows
from fxquant.runtime.native import library
from tests.lowering import needs_kernels

pytestmark = pytest.mark.quick


@needs_kernels
@pytest.mark.parametrize(("count", "tokens"), [(12, 5), (1, 301)])
def test_chains_on_several_threads_and_with_groups_of_biases(count: int, tokens: int) -> None:
    """One image of many tokens: threads share its rows between attentions."""
    code = byte_code(UniformQuantizer(8, 0.1))
    assert code is not None
    steps, channels = [], 6
    torch.manual_seed(0)
    for index, groups in enumerate((2, 3) if count == 12 else (1, 1)):
        qkv, projection = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        sources = [
            simulated.QuantizedLinear(w.weight, w.bias, UniformQuantizer(4, torch.full((len(w.weight), 1), 0.1)), None)
            for w in (qkv, projection)
        ]
        bias = torch.randn(groups, 2, tokens, tokens) * 5
        codes = lowered.Epilogue(library.CODES, (code,))
        attention = lowered.IntegerAttention(2, 3, lowered.AttentionCodes((code,) * 3, code, code), bias)
        first = 4 * index
        steps += [
            Step(lowered.LayerNormToCodes(nn.LayerNorm(channels), code), first),
            Step(lowered.IntegerLinear(sources[0], code, codes), first + 1),
            Step(attention, first + 2),
            Step(lowered.IntegerLinear(sources[1], code), first + 3),
        ]
    chain, x = IntegerChain(steps, channels, channels), torch.randn(count, tokens, channels)
    expected = x
    for step in steps:
        expected = step.layer(expected)
    threads = torch.get_num_threads()
    try:
        for used in (1, 2, 4, 12):
            torch.set_num_threads(used)
            assert torch.equal(chain(x), expected)
    finally:
        torch.set_num_threads(threads)
    if count == 1:
        return
    with pytest.raises(BackendError, match="a size is out of range"):
        chain(x[:, :4])
    with pytest.raises(BackendError, match="a size is out of range"):
        chain(x[:4])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
def test_chains_read_and_write_rows_in_another_order(threads: int) -> None:
    code = byte_code(UniformQuantizer(8, 0.1))
    assert code is not None
    torch.manual_seed(0)
    rows, channels = torch.randperm(30), 8
    sources = {}
    for inner, out in ((8, 5), (32, 5), (8, 8)):
        weight = nn.Linear(inner, out)
        grid = UniformQuantizer(4, torch.full((out, 1), 0.1))
        sources[inner, out] = simulated.QuantizedLinear(weight.weight, weight.bias, grid, None)

    def chain(inner: int, out: int, order: RowOrder) -> tuple[IntegerChain, list[nn.Module]]:
        layers = [lowered.LayerNormToCodes(nn.LayerNorm(inner), code), lowered.IntegerLinear(sources[inner, out], code)]
        return IntegerChain([Step(layers[0], 0), Step(layers[1], 1)], inner, out, order), layers

    x = torch.randn(4, 30, channels)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for out, returns in ((5, True), (8, True), (5, False)):
            found, layers = chain(channels, out, RowOrder(ReorderRows(rows, (30,)), 6, returns))
            ordered = layers[1](layers[0](x[:, rows]))
            assert torch.equal(found(x), ordered[:, rows.argsort()] if returns else ordered)
        merged = ReorderRows(torch.randperm(28), (7,), 4)
        found, layers = chain(32, 5, RowOrder(merged, 1))
        assert torch.equal(found(x[:, :28]), layers[1](layers[0](merged(x[:, :28]))))
        with pytest.raises(RuntimeError, match="28"):
            found(x)  # 30 rows
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("place", [-1, 30, 0])
def test_chains_refuse_orders_that_are_none(place: int) -> None:
    code = byte_code(UniformQuantizer(8, 0.1))
    assert code is not None
    rows = torch.arange(30)
    rows[3] = place  # 0 is there twice then
    chain = IntegerChain(
        [Step(lowered.LayerNormToCodes(nn.LayerNorm(8), code), 0)], 8, 8, RowOrder(ReorderRows(rows, (30,)), 6, True)
    )
    with pytest.raises(BackendError, match="damaged"):
        chain(torch.randn(2, 30, 8))

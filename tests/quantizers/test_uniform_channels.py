"""Weights whose channels have widths of their own: what each channel gets, which widths are chosen, what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.artefact.packing import pack_rows, packed_bytes, unpack_rows
from fxquant.artefact.weight_codes import packed_codes, unpacked_codes
from fxquant.errors import ArtefactError, StateError
from fxquant.quantizers.learned import LearnedCodes, SoftRounding
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.search import WIDEST_MIXED, search_weight
from fxquant.quantizers.statistics.feedback import column_order, factor, powers_left
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.quantizers.uniform_channels import UniformChannelsQuantizer, mixed_widths
from fxquant.runtime.simulated import QuantizedLinear

pytestmark = pytest.mark.quick

WIDTHS = [3, 2, 4, 3, 4, 2]


def weight_of(rows: int = 6, columns: int = 20) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantizer_of(weight: Tensor, widths: list[int]) -> UniformChannelsQuantizer:
    width_o1 = torch.tensor(widths)[:, None]
    return UniformChannelsQuantizer(3, weight.abs().amax(1, keepdim=True) / 2.0 ** (width_o1 - 1), width_o1)


def test_every_channel_is_quantized_at_its_width() -> None:
    weight = 1.2 * weight_of()
    quantizer = quantizer_of(weight_of(), WIDTHS)
    for row, width in enumerate(WIDTHS):
        alone, own = UniformQuantizer(width, quantizer.scale[row]), weight[row : row + 1]
        assert torch.equal(quantizer(weight)[row], alone(own)[0])
        assert torch.equal(quantizer.quantize(weight)[row], alone.quantize(own)[0])
        assert [float(end[row]) for end in quantizer.reach] == [float(end) for end in alone.reach]
    assert torch.equal(quantizer.dequantize(quantizer.quantize(weight)), quantizer(weight))
    assert (quantizer.bits, quantizer.widest_bits, quantizer.code_range) == (3, 4, (-8, 7))
    halved = quantizer.rescaled(quantizer.scale / 2)
    assert torch.equal(halved(weight / 2), quantizer(weight) / 2)


def test_it_is_rebuilt_from_its_settings() -> None:
    quantizer = quantizer_of(weight_of(), WIDTHS)
    rebuilt = Quantizer.from_settings(quantizer.settings())
    rebuilt.load_state_dict(quantizer.state_dict())
    rebuilt.check_numbers()
    assert torch.equal(rebuilt(weight_of()), quantizer(weight_of()))


@pytest.mark.parametrize("widths", [[1, 3, 5], [3, 3, 4], [9, 0, 0], [3, 3]])
def test_widths_that_no_weight_has_are_refused(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="channel"):
        UniformChannelsQuantizer(3, torch.ones(3, 1), torch.tensor(widths)[:, None])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=5), st.booleans())
def test_mixed_widths_are_the_best_of_all(drawn: list[list[float]], are_convex: bool) -> None:
    """Among all choices of as many wider as narrower channels, tried one by one, where each bit brings less than the
    one before; elsewhere they are at least no worse than one width for all."""
    cost = torch.tensor(drawn, dtype=torch.float64).T.sort(0, descending=True).values
    if are_convex:
        gain, price = (cost[:-1] - cost[1:]).sort(0).values
        cost = torch.stack([price + gain, gain, torch.zeros_like(gain)])
    widths = mixed_widths(cost, 2)
    assert int((widths - 3).sum()) == 0
    found = float(cost.gather(0, (widths.long() - 2)[None]).sum())
    choices = [c for c in itertools.product((0, 1, 2), repeat=cost.shape[1]) if sum(c) == cost.shape[1]]
    best = min(float(cost.gather(0, torch.tensor([choice])).sum()) for choice in choices)
    assert found <= float(cost[1].sum()) + 1e-9
    assert not are_convex or found == pytest.approx(best)


def test_search_gives_more_bits_to_channels_that_count() -> None:
    weight, importance = weight_of(16), torch.tensor([0.01] * 13 + [100.0] * 3)
    alone = {each.bits: each for each in search_weight(weight, (2, 3, 4, 5, 6, 7), 10, None, importance)}
    mixed = search_weight(weight, (2, 3, 4, 5, 6, 7), 10, None, importance, mixed=True)
    for found in mixed:
        quantizer, plain = found.quantizer, alone[found.bits]
        if not 2 < found.bits <= WIDEST_MIXED:
            assert type(quantizer) is UniformQuantizer
            assert torch.equal(quantizer.scale, plain.quantizer.scale)
            continue
        assert isinstance(quantizer, UniformChannelsQuantizer)
        widths = quantizer.widths[:, 0].float()
        assert float(widths.mean()) == found.bits
        assert float(widths[:13].mean()) < found.bits < float(widths[13:].mean())
        assert found.loss < 0.8 * plain.loss
        error = (quantizer(weight) - weight).double().square().sum(1)
        assert found.loss == pytest.approx(0.5 * float((error * importance).sum()) / 10, rel=1e-4)
        assert found.noise == pytest.approx(float(error.sum()), rel=1e-4)


def test_search_for_rounding_with_feedback_goes_by_what_is_left() -> None:
    """R_jj^2 by the Cholesky factor in the order of the columns; less than what rounding to nearest costs."""
    weight, mixing = weight_of(12, 40), torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    gram = mixing @ mixing.T
    order = column_order(gram)
    assert gram.diagonal()[order].diff().max() <= 0
    damped = gram.double() + 0.1 * gram.diagonal().mean() * torch.eye(40)
    upper = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    powers = powers_left(gram, 0.1)
    torch.testing.assert_close(powers[order].double(), upper.diagonal().square(), rtol=1e-4, atol=1e-4)
    feedback, left = factor(gram[order][:, order], 0.1, torch.float64)
    torch.testing.assert_close(feedback.triu(1), (upper / upper.diagonal()).triu(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(left.float(), powers[order], rtol=1e-4, atol=1e-4)
    (found,) = search_weight(weight, (3,), 10, gram, dampening=0.1)
    error = (found.quantizer(weight) - weight).square()
    assert found.loss == pytest.approx(0.5 * float((error @ powers).sum()) / 10, rel=1e-4)
    (nearest,) = search_weight(weight, (3,), 10, gram)
    assert found.loss < nearest.loss


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 8), min_size=1, max_size=9), st.integers(1, 11), st.integers(0, 2**32 - 1))
def test_rows_are_packed_at_their_widths(widths: list[int], columns: int, seed: int) -> None:
    bits_o = torch.tensor(widths)
    drawn = torch.rand(len(widths), columns, generator=torch.Generator().manual_seed(seed))
    codes = (drawn * 2 ** bits_o[:, None] - 2 ** (bits_o[:, None] - 1)).floor().to(torch.int8)
    packed = pack_rows(codes, bits_o)
    assert len(packed) == sum(packed_bytes(widths.count(bits) * columns, bits) for bits in set(widths))
    assert torch.equal(unpack_rows(packed, codes.shape, bits_o), codes)
    with pytest.raises(ArtefactError, match="are uint8"):
        unpack_rows(packed[:-1], codes.shape, bits_o)


def test_a_weight_is_packed_as_its_quantizer_says() -> None:
    weight = weight_of(6, 24)
    quantizer = quantizer_of(weight, WIDTHS)
    codes = quantizer.quantize(weight).to(torch.int8)
    packed = packed_codes(codes, quantizer)
    assert len(packed) == 3 * weight.numel() // 8  # as with 3 bits for each channel
    assert torch.equal(unpacked_codes(packed, (6, 24), quantizer), codes)
    with pytest.raises(ArtefactError, match="do not fit"):
        packed_codes(codes.flip(0), quantizer)
    with pytest.raises(ArtefactError, match="6 channels do not fit"):
        unpacked_codes(packed, (12, 12), quantizer)


def test_learned_codes_stay_within_the_width_of_their_channel() -> None:
    weight = weight_of()
    quantizer = quantizer_of(weight, WIDTHS)
    learned = LearnedCodes(weight, quantizer)
    with torch.no_grad():
        learned.units += 20
        learned.log_factor += 0.1
    finished = learned.finish()
    assert isinstance(finished, UniformChannelsQuantizer)
    assert torch.equal(finished.widths, quantizer.widths)
    torch.testing.assert_close(finished(learned()), learned())
    torch.testing.assert_close(learned()[:, 0], (finished.ends[1] * finished.scale)[:, 0])
    soft = SoftRounding(weight, quantizer)
    with torch.no_grad():
        soft.logits += 20
    torch.testing.assert_close(quantizer(soft.hard()), soft.hard())


def layer_of(widths: list[int]) -> QuantizedLinear:
    return QuantizedLinear(weight_of(), None, quantizer_of(weight_of(), widths), None)


def test_a_state_brings_widths_of_its_own() -> None:
    source, target = layer_of([2, 4, 2, 4, 3, 3]), layer_of([3] * 6)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("name", ["codes beyond a channel's width", "widths of another mean"])
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    layer = layer_of(WIDTHS)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    if name == "widths of another mean":
        state["weight_quantizer.widths"] += 1
    else:
        state["weight_codes"][1, 0] = 3  # of 2 bits; other channels have 4
    with pytest.raises(StateError, match=r"a mean of 3|within the widths of their channels"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight_codes, layer_of(WIDTHS).weight_codes)

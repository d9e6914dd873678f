"""Quantizers being learned: AdaRound's soft weights and loss, straight-through gradients, dropped quantization."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.quantizers.adalog import AdaLogQuantizer, AdaLogZeroQuantizer
from fxquant.quantizers.learned import LearnedCodes, LearnedScale, SoftRounding
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.shifted_regions import ShiftedRegionsQuantizer
from fxquant.quantizers.uniform import UniformQuantizer

FAMILIES: list[Quantizer] = [
    UniformQuantizer(3, 0.3),
    UniformQuantizer(4, 0.2, 5),
    UniformQuantizer(4, torch.tensor([0.1, 0.2, 0.4, 0.8])),
    ShiftedRegionsQuantizer(4, 0.02, 1, 4),
    Log2Quantizer(3, 1.5),
    AdaLogQuantizer(3, 1.5, 30, 0.17),
    AdaLogZeroQuantizer(3, 1.5, 30, 0.17),
]


def values(seed: int = 0) -> torch.Tensor:
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))


def with_zero_points(weight: torch.Tensor, bits: int) -> UniformQuantizer:
    """Asymmetric, each row's range just covered."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return UniformQuantizer(bits, scale, torch.round(-low / scale))


class TestZeroPoints:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(3)) + 0.5
    quantizer = with_zero_points(weight, 4)

    @pytest.mark.parametrize("shift", [0, 1])
    def test_codes_to_start_from(self, shift: int) -> None:
        codes = (self.quantizer.quantize(self.weight) + shift).clamp(*self.quantizer.code_range)
        wanted = self.quantizer.dequantize(codes)
        torch.testing.assert_close(SoftRounding(self.weight, self.quantizer, codes).hard(), wanted)
        torch.testing.assert_close(LearnedCodes(self.weight, self.quantizer, codes)(), wanted)

    def test_what_was_learned_is_what_is_kept(self) -> None:
        learned = LearnedCodes(self.weight, self.quantizer)
        with torch.no_grad():
            learned.log_factor += 0.1
        torch.testing.assert_close(learned.finish()(learned()), learned())


class TestSoftRounding:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(4, weight.abs().amax(1, keepdim=True) / 7)

    def test_starts_at_the_float_weight_and_rounds_to_nearest(self) -> None:
        rounding = SoftRounding(self.weight, self.quantizer)
        torch.testing.assert_close(rounding(), self.weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(rounding.hard(), self.quantizer(self.weight))

    def test_starts_at_given_codes(self) -> None:
        codes = (self.quantizer.quantize(self.weight) + 1).clamp(*self.quantizer.code_range)
        rounding = SoftRounding(self.weight, self.quantizer, codes)
        torch.testing.assert_close(rounding.hard(), self.quantizer.dequantize(codes))
        between = (rounding() - rounding.hard()) * (self.weight - rounding.hard())
        assert float(between.detach().min()) >= -1e-6, "soft weights lie towards the float ones"

    @given(st.floats(2, 20))
    def test_penalty_is_adarounds(self, beta: float) -> None:
        rounding = SoftRounding(self.weight, self.quantizer)
        logits = rounding.logits.detach()
        expected = 0.0
        for a in logits.flatten().tolist():
            h = min(max(1.2 / (1 + math.exp(-a)) - 0.1, 0.0), 1.0)
            expected += 1 - abs(2 * h - 1) ** beta
        assert float(rounding.penalty(beta).detach()) == pytest.approx(expected, rel=1e-4)

    def test_descending_the_penalty_settles_every_weight(self) -> None:
        rounding = SoftRounding(self.weight, self.quantizer)
        optimizer = torch.optim.Adam(rounding.parameters(), 0.1)
        for _ in range(200):
            optimizer.zero_grad()
            rounding.penalty(2.0).backward()
            optimizer.step()
        assert float(rounding.penalty(2.0).detach()) < 1e-3
        torch.testing.assert_close(rounding(), rounding.hard())


class TestLearnedCodes:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    quantizer = UniformQuantizer(3, weight.abs().amax(1, keepdim=True) / 3)

    def test_starts_at_the_nearest_or_the_given_codes(self) -> None:
        torch.testing.assert_close(LearnedCodes(self.weight, self.quantizer)(), self.quantizer(self.weight))
        codes = (self.quantizer.quantize(self.weight) + 1).clamp(*self.quantizer.code_range)
        learned = LearnedCodes(self.weight, self.quantizer, codes)
        torch.testing.assert_close(learned(), self.quantizer.dequantize(codes))
        leaning = (learned.units - codes) * (self.weight / self.quantizer.scale - codes)
        assert float(leaning.detach().min()) >= 0, "units lean towards the weight"

    def test_gradients_are_straight_through(self) -> None:
        """d/du = s inside the range of codes, 0 outside; d/dt = the weight itself."""
        weight = torch.tensor([[0.2, 1.3, 9.0, -9.0]])
        learned = LearnedCodes(weight, UniformQuantizer(3, torch.tensor([[0.5]])))
        learned().sum().backward()
        assert learned.units.grad.tolist() == [[0.5, 0.5, 0.0, 0.0]]
        torch.testing.assert_close(learned.log_factor.grad, learned().sum(1, keepdim=True).detach())

    def test_what_was_learned_is_what_is_kept(self) -> None:
        learned = LearnedCodes(self.weight, self.quantizer)
        with torch.no_grad():
            learned.log_factor += 0.1 * torch.randn(6, 1, generator=torch.Generator().manual_seed(2))
            learned.units += 0.7
        torch.testing.assert_close(learned.finish()(learned()), learned())
        assert not torch.equal(learned(), self.quantizer(self.weight))


class TestLearnedScale:
    @pytest.mark.parametrize("quantizer", FAMILIES, ids=repr)
    def test_starts_as_the_quantizer(self, quantizer: Quantizer) -> None:
        torch.testing.assert_close(LearnedScale(quantizer, 0.5).eval()(values()), quantizer(values()))

    @pytest.mark.parametrize("quantizer", FAMILIES, ids=repr)
    def test_what_was_learned_is_what_is_kept(self, quantizer: Quantizer) -> None:
        learned = LearnedScale(quantizer, 0.0)
        with torch.no_grad():
            learned.log_factor.fill_(0.25)
        finished = learned.finish()
        torch.testing.assert_close(finished(values()), learned(values()).detach(), rtol=1e-4, atol=1e-5)
        assert finished is not quantizer
        assert not torch.equal(finished(values()), quantizer(values()))

    @pytest.mark.parametrize("quantizer", FAMILIES, ids=repr)
    def test_gradients_are_straight_through(self, quantizer: Quantizer) -> None:
        """1 inside the range and 0 outside for x; (result - x) inside and the end's level outside for t = log c."""
        offset = getattr(quantizer, "offset", 0.0)
        x = (values() * 3).requires_grad_()
        learned = LearnedScale(quantizer, 0.0)
        learned(x).sum().backward()
        low, high = quantizer(torch.full((4,), -1e6)), quantizer(torch.full((4,), 1e6))
        inside = (x >= low) & (x <= high)
        assert 0 < int(inside.sum()) < inside.numel()
        assert torch.equal(x.grad, inside.float())
        result = quantizer(x.detach())
        expected = torch.where(inside, result - x.detach(), result + offset).sum()
        assert float(learned.log_factor.grad) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)

    def test_scale_gradient_matches_the_slope_of_the_error(self) -> None:
        """Averaged over many values, the straight-through gradient of the squared error is its numerical slope."""
        x = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(3))
        learned = LearnedScale(UniformQuantizer(3, 0.4), 0.0)

        def error(t: float) -> torch.Tensor:
            with torch.no_grad():
                learned.log_factor.fill_(t)
            return (learned(x) - x).square().mean()

        error(0.0).backward()
        slope = (float(error(0.05).detach()) - float(error(-0.05).detach())) / 0.1
        assert float(learned.log_factor.grad) == pytest.approx(slope, rel=0.1)

    def test_a_scale_counts_as_it_is_told(self) -> None:
        x = values()[:8].requires_grad_()
        once, thrice, never = (LearnedScale(FAMILIES[0]) for _ in range(3))
        thrice.counts, never.counts = 3.0, 0.0
        results = [learned(x) for learned in (once, thrice, never)]
        slopes = [torch.autograd.grad(result.sum(), x)[0] for result in results]
        assert all(torch.equal(result, results[0]) for result in results)
        assert all(torch.equal(slope, slopes[0]) for slope in slopes)
        for learned in (once, thrice, never):
            learned(x).sum().backward()
        assert never.log_factor.grad is None
        torch.testing.assert_close(thrice.log_factor.grad, 3 * once.log_factor.grad)

    def test_under_autocast_values_have_the_type_of_products_and_gradients_that_of_the_input(self) -> None:
        quantizer = UniformQuantizer(3, 0.25)
        learned, x = LearnedScale(quantizer), values().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = learned(x)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result.float(), quantizer(x)), "multiples of a quarter are exact in bfloat16"
        result.sum().backward()
        assert x.grad.dtype == torch.float32

    def test_dropping(self) -> None:
        x, quantizer = values(), UniformQuantizer(2, 1.0)
        learned = LearnedScale(quantizer, 0.5, torch.Generator().manual_seed(0)).train()
        result = learned(x)
        kept, quantized = result == x, result == quantizer(x)
        assert bool((kept | quantized).all())
        assert 0.35 < float(kept.float().mean()) < 0.65
        assert not torch.equal(result, learned(x)), "drawn anew every time"

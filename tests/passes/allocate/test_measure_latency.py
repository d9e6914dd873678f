from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fxquant
from allocators.milp import Milp
from allocators.problem.budget import Budget
from fxquant.errors import BudgetError, InfeasibleBudgetError, PipelineError
from fxquant.graph.capture.tracing import trace
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.native import library
from fxquant.session.session import Session
from passes.allocate import measure_latency
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.measure_latency import LATENCY, MeasureLatency
from passes.pipeline.contract import PassContext
from passes.recipes import RECIPES, best, mptq_vit
from passes.search.search_cache import run_prefix, split
from tests.lowering import needs_kernels
from tests.models import images, vit

pytestmark = needs_kernels

BITS = (2, 4, 8)
OPTIONS: dict[str, Any] = {"backend": "cpu-native", "bits": BITS}
WHOLE_MS = 20.0
TIMED_BY_WIDTH = ("mptq_vit", "tsptq_vit")
"""Recipes whose quantizers take kernels longer at 8 bits; others have no byte codes, or one digit at every width."""


needs_avx2 = pytest.mark.skipif(
    library.why_absent() is not None or "avx2" not in library.instruction_sets(), reason="no AVX2"
)


def digits(code: ByteCode) -> int:
    return int(code.levels_spec().count)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Times made up: a product takes as many ms as its input has digits. Returns what was asked for.

    Of a set on which digits are all that matters.
    """
    library.select_instruction_set("scalar")
    asked: list[tuple[Any, ...]] = []

    def linear_ms(rows: int, inner: int, out: int, bits: int, code: ByteCode, threads: int) -> float:
        asked.append(("linear", rows, inner, out, bits, digits(code), threads))
        return float(digits(code))

    def matmul_ms(*given: Any) -> float:
        *sizes, left, _, threads = given
        asked.append(("matmul", *sizes, digits(left), threads))
        return float(digits(left))

    monkeypatch.setattr(measure_latency, "linear_ms", linear_ms)
    monkeypatch.setattr(measure_latency, "matmul_ms", matmul_ms)
    monkeypatch.setattr(measure_latency, "least_ms", lambda run, threads, seconds: (run(), WHOLE_MS)[1])
    yield asked
    library.select_instruction_set()


def test_the_widest_model_takes_what_was_measured_and_digits_are_what_narrowing_saves(
    calls: list[tuple[Any, ...]],
) -> None:
    table = Session(vit(depth=2), images(3), recipe="mptq_vit", **OPTIONS).cost_table("W8A8, 1ms")
    assert table.usage(table.highest())["latency_ms"] == WHOLE_MS
    # OPT-m and twin scales have two digits at 8 bits: fc2 and the second product of attention, in both blocks.
    assert table.minimum_usage()["latency_ms"] == WHOLE_MS - 4
    assert table.latency_ms is not None
    saved = table.latency_ms[:, -1, -1] - table.latency_ms[:, 0, 0]
    assert {role for role, ms in zip(table.roles, saved, strict=True) if ms} == {"fc2", "av"}


def test_each_shape_is_timed_once(calls: list[tuple[Any, ...]]) -> None:
    table = Session(vit(depth=2), images(3), recipe="mptq_vit", **OPTIONS).cost_table("W8A8, 1ms")
    assert len(calls) == len(set(calls))
    assert ("linear", 5, 24, 72, 8, 1, 1) in calls, "qkv: 5 tokens of one image"
    assert ("linear", 4, 3 * 16 * 16, 24, 8, 1, 1) in calls, "patch embedding: a row for each patch"
    assert ("matmul", 3, 5, 5, 8, 2, 1) in calls, "av: three heads"
    assert len(table.layers) > len({call[:4] for call in calls})


@needs_avx2
def test_on_avx2_each_width_of_codes_is_timed(calls: list[tuple[Any, ...]]) -> None:
    library.select_instruction_set("avx2")
    Session(vit(depth=1), images(3), recipe="mptq_vit", **OPTIONS).cost_table("W8A8, 1ms")
    qkv = [call for call in calls if call[:5] == ("linear", 5, 24, 72, 8)]
    assert qkv == [("linear", 5, 24, 72, 8, 1, 1)] * len(BITS)


def test_a_weight_is_timed_at_the_width_of_its_widest_channel(calls: list[tuple[Any, ...]]) -> None:
    """Candidates of 3, 4 and 5 bits: only that of 4 has both neighbours, and so channels of 3, 4 and 5 bits."""
    Session(vit(depth=1), images(3), recipe="best", backend="cpu-native", bits=(3, 4, 5)).cost_table("W5A5, 1ms")
    widths = {call[4] for call in calls if call[:4] == ("linear", 5, 24, 72)}
    assert widths == {3, 5}


def test_batch_size_and_threads(calls: list[tuple[Any, ...]]) -> None:
    latency = MeasureLatency(batch_size=4, threads=2)
    options: dict[str, Any] = {**OPTIONS, "recipe": "mptq_vit", "latency": latency}
    found = fxquant.compile(vit(depth=1), "W8A8, 30ms", calibration=images(3), **options)
    assert ("linear", 20, 24, 72, 8, 1, 2) in calls
    assert any(call[:5] == ("matmul", 12, 5, 5, 8) and call[-1] == 2 for call in calls)
    assert found.card["latency"].startswith("batch of 4, 2 threads, ")
    assert "batch of 4, 2 threads" in str(found.report())
    assert "latency ms 20" in str(found.report())


@pytest.mark.parametrize("name", TIMED_BY_WIDTH)
def test_every_recipe_keeps_the_latency(name: str, calls: list[tuple[Any, ...]]) -> None:
    pipeline = RECIPES[name](f"W8A8, {WHOLE_MS - 1}ms", allocator=Milp(), **OPTIONS)
    found = fxquant.compile(vit(depth=1), None, calibration=images(3), recipe=pipeline)
    assert found.allocation is not None
    assert found.allocation.usage["latency_ms"] <= WHOLE_MS - 1


def test_out_of_reach_says_the_minimum(calls: list[tuple[Any, ...]]) -> None:
    session = Session(vit(), images(3), recipe="mptq_vit", **OPTIONS)
    with pytest.raises(InfeasibleBudgetError, match=r"latency_ms 15 is below the minimum reachable 16"):
        session.compile("15ms")
    pinned = Session(vit(), images(3), recipe="mptq_vit", overrides={"blocks.0.*.fc2": 8}, **OPTIONS)
    with pytest.raises(InfeasibleBudgetError, match=r"reachable 17, pinned by blocks\.0\.mlp\.fc2 \(W8A8, \+1\);"):
        pinned.compile("16ms")


def test_budgets_that_no_kernel_can_answer() -> None:
    for backend in ("simulated", "cpu-onednn"):
        with pytest.raises(BudgetError, match="needs backend='cpu-native'"):
            best("W4A4, 5ms", backend=backend)
    with pytest.raises(BudgetError, match="batch_size of at least 1"):
        MeasureLatency(batch_size=0)
    with pytest.raises(PipelineError, match=r"AllocateBits.*requires 'latency known'"):
        mptq_vit("W4A4").replace(AllocateBits, AllocateBits(Budget(latency_ms=5)))
    with pytest.raises(PipelineError, match="latency"):
        fxquant.compile(vit(), None, calibration=images(3), recipe=mptq_vit(4), latency=MeasureLatency())


@pytest.mark.parametrize(("slower", "expected"), [(1.02, [1.01, 1.01, 1.01]), (1.5, [1.0, 1.5, 1.5])])
def test_weight_widths_within_noise_are_equal_and_wider_ones_no_faster(
    slower: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At 4 bits slower than at 8, by noise or truly.
    monkeypatch.setattr(measure_latency, "linear_ms", lambda *given: {2: 1.0, 4: slower, 8: (1 + slower) / 2}[given[3]])
    monkeypatch.setattr(measure_latency, "matmul_ms", lambda *given: 1.0)
    monkeypatch.setattr(measure_latency, "least_ms", lambda run, threads, seconds: WHOLE_MS)
    table = Session(vit(depth=1), images(3), recipe="naive_min_max", **OPTIONS).cost_table("W8A8, 1ms")
    assert table.latency_ms is not None
    last = table.latency_ms[-1, :, 0]
    assert last.tolist() == pytest.approx((np.array(expected) - min(expected)).tolist())


def test_times_are_kept_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit(depth=1), images(3)

    def compiled(budget: str) -> fxquant.Compiled:
        return fxquant.compile(model, budget, calibration=x, backend="cpu-native", cache=tmp_path, bits=(6, 8))

    first = compiled("W8A8, 1000ms")
    assert first.allocation is not None
    assert 0 < first.allocation.usage["latency_ms"] < 1000
    for name in ("linear_ms", "matmul_ms", "least_ms"):
        monkeypatch.setattr(measure_latency, name, lambda *_: pytest.fail("timed again"))
    second = compiled("W6A6, 1000ms")
    assert second.allocation is not None
    assert second.allocation.usage["latency_ms"] <= first.allocation.usage["latency_ms"]


def test_times_are_no_part_of_what_is_searched(calls: list[tuple[Any, ...]]) -> None:
    prefix, rest = split(mptq_vit("W8A8, 20ms", **OPTIONS))
    assert [type(step).__name__ for step in rest] == ["MeasureLatency", "AllocateBits", "SubstituteQuantizers"]
    searched = run_prefix(prefix, trace(vit(depth=1), images(2)), PassContext(images(3)))
    assert LATENCY not in searched.meta


def test_the_frontier_along_the_latency(calls: list[tuple[Any, ...]]) -> None:
    limits = [16, 18, 20]
    found = fxquant.frontier(vit(), images(3), axis="latency_ms", recipe="mptq_vit", limits=limits, **OPTIONS)
    assert [point.allocation.usage["latency_ms"] for point in found.points] == limits

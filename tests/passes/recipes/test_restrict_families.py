from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fxquant
from fxquant.errors import BackendError, MissingExtraError, OverrideError, PatternError, PipelineError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.quantizers.families import BYTE_FAMILIES, FAMILIES, UNIFORM_FAMILIES, families_named
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.native.library import UNIFORM
from fxquant.session.session import Session
from passes.pipeline.contract import PassContext
from passes.recipes import adalog, best, mptq_vit, recipe
from passes.recipes.restrict_families import restrict_families
from passes.search.calibrate import Calibrate
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from tests.models import images, vit
from tests.operands import input_candidates
from tests.quantizers.plain_versions import statistics_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_what_is_said_of_families_is_true_of_every_quantizer_they_build(family: str, bits: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    x = x.abs() / x.abs().max() if "softmax" in family or "log" in family else x
    proposals = FAMILIES[family].propose(statistics_of(x), bits)
    for index in np.linspace(0, len(proposals.levels) - 1, 30, dtype=int):
        code = byte_code(proposals.build(int(index)))
        if family not in ("o-2sf", "ptf"):  # where channels differ they have several scales, and no byte codes
            assert (code is not None) == (bits <= BYTE_FAMILIES.get(family, 0))
            assert (code is not None and code.kind == UNIFORM) == (family in UNIFORM_FAMILIES)


def test_families_and_widths_that_a_backend_runs() -> None:
    insert = PlanOperands(post_softmax="log2|adalog-softmax|twin-softmax")
    assert restrict_families(insert, "simulated") == insert
    native = restrict_families(insert, "cpu-native")
    assert (native.post_softmax, native.post_gelu) == ("log2<=4|twin-softmax", "opt-m")
    assert restrict_families(native, "cpu-native") == native
    onednn = restrict_families(insert, "cpu-onednn")
    assert (onednn.post_gelu, onednn.other) == ("asymmetric", "symmetric")
    assert onednn.post_softmax == insert.post_softmax, "oneDNN runs no attention, whatever its quantizers"
    assert restrict_families(insert, "cuda") == onednn
    openvino = restrict_families(insert, "openvino")
    assert (openvino.post_gelu, openvino.post_softmax, openvino.other) == ("asymmetric", "asymmetric", "symmetric")
    with pytest.raises(BackendError, match="post_gelu='adalog-zero-gelu'"):
        adalog(4, backend="cpu-native")
    with pytest.raises(BackendError, match="no backend is called 'gpu'"):
        best(4, backend="gpu")


def test_limits_are_read_and_checked() -> None:
    assert families_named("log2<=4|opt-m") == (("log2", 4), ("opt-m", 8))
    for wrong, message in (("log3<=4", "log3"), ("log2<=four", "log2<=four"), ("log2|", "''")):
        with pytest.raises(PatternError, match=message):
            PlanOperands(post_softmax=wrong)


def test_at_widths_that_log2_cannot_run_the_other_family_is_taken() -> None:
    insert = restrict_families(PlanOperands(post_softmax="asymmetric|log2|twin-softmax"), "cpu-native")
    assert insert.post_softmax == "asymmetric|log2<=4|twin-softmax"
    pipeline = best(8, bits=(3, 4, 5, 8)).replace(PlanOperands, insert)
    searching = pipeline[: pipeline.position(SearchScales) + 1]
    searched = searching.run(trace(vit(depth=1), images(3)), PassContext(images(3)))
    (node,) = nodes_with_role(searched, Role.AV)
    kinds = [candidate.quantizer.kind for candidate in input_candidates(annotation_of(node))[0]]
    assert kinds[2:] == ["shifted-regions", "uniform"]


def only_log2(budget: str, **options: Any) -> fxquant.Pipeline:
    insert = restrict_families(PlanOperands(post_softmax="log2"), "cpu-native")
    return mptq_vit(budget, bits=(2, 4, 8), **options).replace(PlanOperands, insert)


def test_widths_without_a_family_are_not_allocated() -> None:
    found = fxquant.compile(vit(depth=1), None, calibration=images(3), recipe=only_log2("W8A8"))
    assert {row.role: row.activation_bits for row in found.layers}["av"] == 4
    assert {row.activation_bits for row in found.layers if row.role != "av"} == {8}


def test_a_width_without_a_family_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calibrate, "apply", lambda *_: pytest.fail("calibration has begun"))
    with pytest.raises(OverrideError, match=r"'blocks.0.attn.av' is pinned at 8 bits.*end at 4"):
        fxquant.compile(vit(), None, calibration=images(3), recipe=only_log2("W8A8", overrides={"av": 8}))


@pytest.mark.parametrize(
    ("backend", "name", "integer"),
    [
        ("cpu-native", "best", 8),
        ("cpu-native", "mptq_vit", 8),
        ("cpu-onednn", "best", 5),
        ("cpu-onednn", "mptq_vit", 5),
        ("openvino", "best", 8),
    ],
)
def test_every_layer_a_backend_can_run_runs_as_integers(backend: str, name: str, integer: int) -> None:
    x = images(3)
    found = fxquant.compile(vit(depth=1), "W5A6", calibration=x, recipe=name, backend=backend)
    assert found.card["backend"].startswith(f"{backend}: {integer} of 8 layers run as integers")
    assert f"{backend}: {integer} of 8 layers" in str(found.report())
    try:
        lowered = found.lowered(backend)
    except (BackendError, MissingExtraError):
        pytest.skip(f"{backend} cannot run on this machine")
    runs = sum(row.execution != "simulated" for row in lowered.layers)
    assert runs == integer or (backend == "openvino" and runs > integer / 2)  # which decides by itself, in small models
    session = Session(vit(depth=1), x, recipe=name, backend=backend)
    assert session.compile("W5A6").card["backend"] == found.card["backend"]


def test_what_stays_simulated_is_named() -> None:
    found = fxquant.compile(vit(depth=1), "W8A8", calibration=images(3), backend="cpu-native", fully_quantized=True)
    assert "simulated: blocks.0.norm1, " in found.card["backend"]


def test_a_pipeline_has_its_own_families() -> None:
    with pytest.raises(PipelineError, match="backend"):
        fxquant.compile(vit(), None, calibration=images(3), recipe=recipe("best")(4), backend="auto")

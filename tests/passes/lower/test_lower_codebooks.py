"""Models whose activations have codebooks: every layer runs as integers, in chains too, and they survive a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from fxquant.artefact import artefact
from fxquant.errors import ArtefactError
from fxquant.export.onnx_file import to_onnx
from fxquant.export.openvino_model import OpenvinoModel
from fxquant.graph.notes import execution_of
from fxquant.graph.printer import format_graph
from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.lowered import IntegerLinear, ToCodes
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedLinear
from passes.lower.integer_plan import code_of
from passes.lower.lower import backend_summary
from passes.lower.rewrites.plan_integers import PlanIntegers
from passes.pipeline.contract import PassContext
from passes.substitute.tabulate_gelu import TabulateGelu
from tests.assertions import exact
from tests.export.runtimes import run_in_onnxruntime
from tests.lowering import lower, needs_kernels, quantized
from tests.models import ARCHITECTURES, ONE_BLOCK, images

BOOKS: dict[str, Any] = {"bits": (3, 4, 5), "post_gelu": "codebook", "other": "codebook"}


@pytest.fixture(scope="module", params=[("vit", "W4A3"), ("vit", "W4A5"), ("swin that pads", "W4A4")], ids=str)
def simulated(request: pytest.FixtureRequest) -> tuple[GraphModule, Tensor]:
    name, budget = request.param
    return quantized(name, budget=budget, **BOOKS), images(8, ARCHITECTURES[name]()[1], seed=5)


def assert_close(found: Tensor, truth: Tensor) -> None:
    """But for images in which a code lay beside a threshold; it moves the output by what one code is worth."""
    off, scale = (found - truth).abs().amax(1), truth.abs().max()
    assert (off < 4e-6 * scale).float().mean() >= 0.5
    assert off.max() < 0.2 * scale


def books(graph_module: GraphModule) -> list[CodebookQuantizer]:
    return [module for module in graph_module.modules() if isinstance(module, CodebookQuantizer)]


@needs_kernels
@torch.inference_mode()
def test_every_layer_runs_as_integers_and_chains_give_the_same_bits(simulated: tuple[GraphModule, Tensor]) -> None:
    graph_module, x = simulated
    assert len(books(graph_module)) > 8
    low = lower(copy.deepcopy(graph_module))
    assert "simulated" not in execution_of(low).values()
    assert any(kernel.startswith("attention ") for kernel in execution_of(low).values())
    assert_close(low(x), exact(graph_module, x))
    chained = lower(copy.deepcopy(graph_module), chains=True)
    assert "IntegerChain" in format_graph(chained)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for batch in (x, x[:1]):
                assert torch.equal(chained(batch), low(batch))
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_gelu_and_book_become_one_table() -> None:
    graph_module, x = quantized("vit", budget="W4A3", **BOOKS), images(8, seed=5)
    assert TabulateGelu().apply(graph_module, PassContext()) == 2
    low = lower(copy.deepcopy(graph_module))
    epilogues = [module.epilogue for module in low.modules() if isinstance(module, IntegerLinear)]
    assert sum(epilogue.kind == library.TABLE_CODES for epilogue in epilogues) == 2
    assert "simulated" not in execution_of(low).values()
    with torch.inference_mode():
        assert_close(low(x), exact(graph_module, x))


@needs_kernels
def test_a_book_after_softmax_runs_unfused() -> None:
    graph_module, x = quantized("vit", budget="W4A4", **BOOKS, post_softmax="codebook"), images(8, seed=5)
    low = lower(copy.deepcopy(graph_module))
    assert execution_of(low)["blocks.0.attn.av"].startswith("matmul ")
    assert "simulated" not in execution_of(low).values()
    with torch.inference_mode():
        assert_close(low(x), exact(graph_module, x))


def test_backends_of_uniform_codes_leave_books_alone(simulated: tuple[GraphModule, Tensor]) -> None:
    for backend in ("cpu-onednn", "cuda"):
        assert "0 of" in backend_summary(simulated[0], backend)


@needs_kernels
@pytest.mark.parametrize("has_zero", [True, False])
def test_codes_move_before_a_pad_only_where_the_book_has_zero(has_zero: bool) -> None:
    book = CodebookQuantizer(2, 0.05, 20, [0, 20 if has_zero else 25, 90, 255])
    weight = torch.randn(5, 6)
    root, graph = nn.Module(), fx.Graph()
    root.add_module("linear", QuantizedLinear(weight, None, UniformQuantizer(4, torch.full((5, 1), 0.3)), book))
    x = torch.randn(2, 3, 4)
    source = graph.placeholder("x")
    padded = graph.call_function(functional.pad, (graph.call_method("reshape", (source, 6, 4)), (1, 1)))
    graph.output(graph.call_module("linear", (padded,)))
    graph_module = GraphModule(root, graph)
    ShapeProp(graph_module).propagate(x)
    PlanIntegers().apply(graph_module, PassContext())
    ((node, code),) = [
        (node, code) for node in graph_module.graph.nodes if (code := code_of(graph_module, node)) is not None
    ]
    assert node.args[0].name == ("x" if has_zero else "pad")
    pad = ToCodes(code)(torch.zeros(1))
    assert (int(pad) == book.zero) == has_zero


def test_books_survive_a_file(simulated: tuple[GraphModule, Tensor], tmp_path: Path) -> None:
    graph_module, x = simulated
    artefact.save(tmp_path / "model.fxq", graph_module, card={})
    loaded = artefact.load(tmp_path / "model.fxq").graph_module
    assert sorted(book.codes for book in books(loaded)) == sorted(book.codes for book in books(graph_module))
    with torch.inference_mode():
        assert torch.equal(loaded(x), graph_module(x))
        if library.why_absent() is None:
            assert torch.equal(lower(loaded, chains=True)(x), lower(graph_module, chains=True)(x))


@pytest.mark.parametrize("codes", [[], [3, 3], [9, 4], [0, 256], [0, 1, 2, 3, 4], [0.0], "01", None])
def test_books_of_a_file_that_are_none_are_refused(codes: object) -> None:
    with pytest.raises(ArtefactError, match="settings of quantizer kind 'codebook' do not fit"):
        Quantizer.from_settings({"kind": "codebook", "bits": 2, "zero": 20, "codes": codes})


def test_exported_books_run_as_bytes() -> None:
    for module in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    graph_module, x = quantized(ONE_BLOCK, budget="W4A4", **BOOKS), images(8, seed=5)
    content = to_onnx(graph_module).content
    assert_close(run_in_onnxruntime(content, x), exact(graph_module, x))
    model = OpenvinoModel(content)
    assert_close(model(x), exact(graph_module, x))
    assert model.kernels()["blocks.0.attn.qkv"] == model.kernels()["blocks.0.mlp.fc2"] == "linear openvino"

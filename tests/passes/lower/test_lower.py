"""Lowered graphs against the simulated ones they came from: code by code, layer by layer, and end to end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

import fxquant
from allocators.uniform import Uniform
from fxquant.data import embedded
from fxquant.errors import ArtefactError, BackendError
from fxquant.graph.annotation import Fact, annotate, annotation_of, facts_of, nodes_with_role
from fxquant.graph.printer import format_graph
from fxquant.quantizers.log2 import Log2Quantizer
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime import simulated
from fxquant.runtime.integer import lowered
from fxquant.runtime.integer.byte_codes import byte_code
from fxquant.runtime.integer.chain import IntegerChain, RowOrder, Step
from fxquant.runtime.integer.lowered import ToCodes
from fxquant.runtime.integer.row_order import ReorderRows
from fxquant.runtime.integer.torch_linear import IntMmLinear
from fxquant.runtime.native import library
from passes.lower.exact_codes import integer_codes
from passes.lower.lower import Lower, execution_of, execution_summary, resolved
from passes.lower.rewrite import Miss
from passes.lower.rewrites.assemble_tokens import AssembleTokens
from passes.lower.rewrites.order_rows import OrderRows
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.recipes import RECIPES
from passes.search.insert_observers import InsertObservers
from tests.passes.models import ARCHITECTURES, images, traced, vit

needs_kernels = pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="oneDNN needs AVX512-VNNI to be exact")


def quantized(architecture: str, recipe: str = "mptq_vit", budget: str = "W4A6", **options: Any) -> GraphModule:
    model, size = ARCHITECTURES[architecture]()
    calibration = images(4, size)
    options = {"bits": (3, 4, 6, 8), "allocator": Uniform(), **options}
    return RECIPES[recipe](budget, **options).run(traced(model, calibration), PassContext(calibration))


def lower(graph_module: GraphModule, backend: str = "cpu-native", chains: bool = False) -> GraphModule:
    return Pipeline([Lower(backend, chains)], assumes=[Fact.QUANTIZED]).run(graph_module, PassContext())


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)

    def run_all(self, x: Tensor) -> dict[Node, Any]:
        with torch.inference_mode():
            self.run(x)
        return self.env


def exact(graph_module: GraphModule, x: Tensor) -> Tensor:
    """The simulated graph in float64: what both float32 and integers approximate."""
    with torch.inference_mode():
        return copy.deepcopy(graph_module).double()(x.double())


CASES = [
    ("vit", "mptq_vit"), ("vit", "tsptq_vit"), ("deit distilled", "mptq_vit"), ("deit3", "naive_min_max"),
    ("swin that pads", "mptq_vit"),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def simulated_graph(request: pytest.FixtureRequest) -> tuple[GraphModule, Tensor]:
    name, recipe = request.param
    return quantized(name, recipe), images(8, ARCHITECTURES[name]()[1], seed=5)


@needs_kernels
def test_every_layer_gives_the_same_codes_and_outputs(simulated_graph: tuple[GraphModule, Tensor]) -> None:
    graph_module, x = simulated_graph
    values = Recorder(graph_module).run_all(x)
    seen = 0
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(node.target) if node.op == "call_module" else None
        codes = integer_codes(module, node)
        if isinstance(codes, Miss):
            continue
        inputs = [values[source] for source in node.args]
        names = ("left_quantizer", "right_quantizer") if len(inputs) == 2 else ("input_quantizer",)
        made = [ToCodes(code)(value) for code, value in zip(codes, inputs, strict=True)]
        for code, name, value, found in zip(codes, names, inputs, made, strict=True):
            levels = torch.arange(256) - code.zero if code.identity else torch.from_numpy(code.levels)
            torch.testing.assert_close(
                levels[found.long()].double() * code.unit, getattr(module, name)(value).double(), rtol=1e-6, atol=0
            )
        kind = {
            simulated.QuantizedLinear: lowered.IntegerLinear,
            simulated.QuantizedConv2d: lowered.IntegerConv2d,
            simulated.QuantizedMatmul: lowered.IntegerMatmul,
        }[type(module)]
        integer = kind(*codes) if kind is lowered.IntegerMatmul else kind(module, *codes)
        scale = float(values[node].abs().max())
        torch.testing.assert_close(integer(*made), values[node], rtol=1e-5, atol=2e-6 * scale)
        seen += 1
    assert seen == sum(annotation_of(n).activation_bits is not None for n in graph_module.graph.nodes)


@needs_kernels
def test_lowered_is_as_close_to_exact_arithmetic_as_simulated(simulated_graph: tuple[GraphModule, Tensor]) -> None:
    graph_module, x = simulated_graph
    before = format_graph(graph_module)
    low = lower(graph_module)
    assert format_graph(graph_module) == before
    assert Fact.LOWERED in facts_of(low)
    assert "simulated" not in execution_of(low).values()
    truth = exact(graph_module, x)
    with torch.inference_mode():
        off = (low(x) - truth).abs().amax(1)
        scale = truth.abs().max()
        # Most images agree to float rounding. In the others one code lay beside a threshold, as happens to the
        # simulated graph in float32 too; then the output moves by what one code is worth.
        assert (off < 2e-6 * scale).float().mean() >= 0.5
        assert off.max() < 0.1 * scale


@needs_kernels
def test_bytes_flow_from_layer_to_layer() -> None:
    low = lower(quantized("vit"))
    text = format_graph(low)
    block = text[text.index("%blocks_1_norm1") : text.index("%norm ")]
    assert block == (
        "%blocks_1_norm1 = layer_norm(%blocks_0_mlp_fc2)\n"
        "%blocks_1_attn_qkv = qkv[w4a6](%blocks_1_norm1)\n"
        "%blocks_1_attn_integer_attention = IntegerAttention(%blocks_1_attn_qkv)\n"
        "%getitem_17 = getitem(%blocks_1_attn_integer_attention, (:, 0:1))\n"  # from here on, the class token
        "%blocks_1_attn_proj = proj[w4a6](%getitem_17, %getitem_18)\n"
        "%blocks_1_norm2 = layer_norm(%blocks_1_attn_proj)\n"
        "%blocks_1_mlp_fc1 = fc1[w4a6](%blocks_1_norm2)\n"
        "%blocks_1_mlp_fc2 = fc2[w4a6](%blocks_1_mlp_fc1, %blocks_1_attn_proj)\n"
    )


@needs_kernels
@pytest.mark.parametrize("architecture", ["vit", "deit distilled", "deit3", "swin", "swin that pads"])
def test_chains_give_the_same_bits(architecture: str) -> None:
    graph_module, x = quantized(architecture), images(5, ARCHITECTURES[architecture]()[1], seed=5)
    apart, chained = lower(copy.deepcopy(graph_module)), lower(graph_module, chains=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.inference_mode():
                for batch in (x, x[:1]):
                    assert torch.equal(chained(batch), apart(batch))
    finally:
        torch.set_num_threads(threads)
    assert execution_of(chained) == execution_of(apart)
    assert "IntegerChain" in format_graph(chained)


@needs_kernels
def test_blocks_of_a_vit_are_chains() -> None:
    low = lower(quantized("vit"), chains=True)
    text = format_graph(low)
    assert "attention" not in text
    # All but the last; up to the last attention; the last MLP, on the class token.
    found = [module for module in low.modules() if isinstance(module, IntegerChain)]
    assert [chain.steps for chain in found] == [7, 3, 3]
    assert [chain.gives_codes for chain in found] == [False, True, False]


@needs_kernels
def test_swin_windows_keep_bytes_through_rolls_and_padding() -> None:
    text = format_graph(lower(quantized("swin that pads")))
    assert text.count("IntegerAttention") == 4
    assert "value=128" in text
    assert text.count("ToCodes") == 2  # the image and the head


@needs_kernels
def test_windows_are_ordered_once_for_a_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module, x = quantized("swin"), images(5, 32, seed=5)
    low = lower(copy.deepcopy(graph_module))
    text = format_graph(low)
    block = text[text.index("%windows_layers_0_blocks_1_norm1") : text.index("%layers_1_downsample_norm")]
    assert block == (
        "%windows_layers_0_blocks_1_norm1 = ReorderRows(%reshape_3)\n"
        "%layers_0_blocks_1_norm1 = layer_norm(%windows_layers_0_blocks_1_norm1)\n"
        "%layers_0_blocks_1_attn_qkv = qkv[w4a6](%layers_0_blocks_1_norm1)\n"
        "%layers_0_blocks_1_attn_integer_attention = IntegerAttention(%layers_0_blocks_1_attn_qkv)\n"
        "%layers_0_blocks_1_attn_proj = "
        "proj[w4a6](%layers_0_blocks_1_attn_integer_attention, %windows_layers_0_blocks_1_norm1)\n"
        "%image_layers_0_blocks_1_norm1 = ReorderRows(%layers_0_blocks_1_attn_proj)\n"
        "%reshape_6 = reshape(%image_layers_0_blocks_1_norm1, %getitem, -1, 12)\n"
        "%layers_0_blocks_1_norm2 = layer_norm(%reshape_6)\n"
        "%layers_0_blocks_1_mlp_fc1 = fc1[w4a6](%layers_0_blocks_1_norm2)\n"
        "%layers_0_blocks_1_mlp_fc2 = fc2[w4a6](%layers_0_blocks_1_mlp_fc1, %reshape_6)\n"
        "%merge_layers_1_downsample_norm = ReorderRows(%layers_0_blocks_1_mlp_fc2)\n"
    )
    assert "roll" not in text
    monkeypatch.setattr(OrderRows, "apply", lambda *_: 0)
    as_traced = lower(graph_module)
    assert "roll" in format_graph(as_traced)
    with torch.inference_mode():
        assert torch.equal(low(x), as_traced(x))
        assert torch.equal(low(x[:1]), as_traced(x[:1]))


@needs_kernels
def test_blocks_of_a_swin_are_chains() -> None:
    low = lower(quantized("swin"), chains=True)
    assert "attention" not in format_graph(low)
    found = [module for module in low.modules() if isinstance(module, IntegerChain)]
    assert [chain.steps for chain in found] == [7, 7, 2, 7, 7]
    assert [chain.tokens for chain in found] == [16, 16, 1, 16, 16]
    assert [chain.parts for chain in found] == [1, 1, 4, 1, 1]


@needs_kernels
def test_fully_quantized_names_what_stays_simulated() -> None:
    graph_module = quantized("swin", fully_quantized=True)
    x = images(8, 32, seed=5)
    low = lower(graph_module)
    kernels = execution_of(low)
    assert {layer.rpartition(".")[2].rstrip("12") for layer, kernel in kernels.items() if kernel == "simulated"} == {
        "norm", "softmax",
    }  # fmt: skip
    assert kernels["layers.0.blocks.0.attn.qk"].startswith("matmul ")
    with torch.inference_mode():
        off = (low(x) - exact(graph_module, x)).abs().amax(1)
    assert (off < 1e-5).float().mean() >= 0.5
    assert "the others simulated" in execution_summary(kernels)


@needs_kernels
def test_lowering_twice_changes_nothing() -> None:
    once = lower(quantized("vit"))
    twice = lower(once)
    assert format_graph(twice) == format_graph(once)
    assert execution_of(twice) == execution_of(once)


def note_bits(graph_module: GraphModule) -> None:
    """Let linear layers' annotations say what was put into their modules by hand."""
    for node in nodes_with_role(graph_module):
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, simulated.QuantizedLinear):
            weight_bits, (bits,) = module.operand_bits()
            annotate(node, weight_bits=weight_bits, activation_bits=bits)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("log2 of 5 bits", "simulated"),
        ("row-log", "simulated"),
        ("a scale per channel", "simulated"),
        ("a zero-point in the weight", "simulated"),
        ("no input quantizer", "simulated"),
        ("log2 of 4 bits", "linear"),
    ],
)
def test_what_is_not_exact_stays_simulated(change: str, expected: str) -> None:
    graph_module = quantized("vit")
    fc1: Any = graph_module.get_submodule("blocks.0.mlp.fc1")
    changes = {
        "log2 of 5 bits": ("input_quantizer", Log2Quantizer(5, 1.0)),
        "log2 of 4 bits": ("input_quantizer", Log2Quantizer(4, 1.0)),
        "row-log": ("input_quantizer", RowLogQuantizer(4, 0.6)),
        "a scale per channel": ("input_quantizer", UniformQuantizer(4, torch.full((24,), 0.1))),
        "a zero-point in the weight": ("weight_quantizer", UniformQuantizer(4, 0.1, 3)),
        "no input quantizer": ("input_quantizer", None),
    }
    name, quantizer = changes[change]
    setattr(fc1, name, quantizer)
    fc1.refresh()
    note_bits(graph_module)
    low = lower(graph_module)
    assert execution_of(low)["blocks.0.mlp.fc1"].split()[0] == expected
    assert execution_of(low)["blocks.0.mlp.fc2"].split()[0] == "linear"
    x = images(3, seed=9)
    with torch.inference_mode():
        assert (low(x) - graph_module(x)).abs().amax(1).min() < 1e-4


@needs_kernels
@pytest.mark.parametrize("post_softmax", ["twin-softmax", "row-log"])
def test_patterns_that_do_not_match_run_unfused(post_softmax: str) -> None:
    model = vit(depth=1)
    graph_module = traced(model, images(2))
    # The attention's weights are also an output of sorts: a second reader of the softmax.
    pipeline = RECIPES["mptq_vit"]("W4A6", bits=(4, 6), allocator=Uniform())
    pipeline = pipeline.changed(InsertObservers, post_softmax=post_softmax)
    quantized_graph = pipeline.run(graph_module, PassContext(images(4)))
    nodes = {node.name: node for node in quantized_graph.graph.nodes}
    softmax = nodes["blocks_0_attn_softmax"]
    add = nodes["add_1"]
    with quantized_graph.graph.inserting_before(add):
        mean = quantized_graph.graph.call_method("mean", (softmax,))
        total = quantized_graph.graph.call_function(torch.add, (add.args[1], mean))
    total.meta["tensor_meta"] = add.meta["tensor_meta"]
    add.update_arg(1, total)
    quantized_graph.recompile()
    low = lower(quantized_graph)
    assert execution_of(low)["blocks.0.attn.qk"].startswith("matmul ")
    x = images(4, seed=3)
    with torch.inference_mode():
        assert (low(x) - exact(quantized_graph, x)).abs().amax(1).min() < 1e-5


@needs_kernels
def test_shapes_asked_for_and_modules_called_twice_are_right() -> None:
    graph_module = quantized("vit")
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    proj, total, fc2 = nodes["blocks_0_attn_proj"], nodes["add_1"], nodes["blocks_1_mlp_fc2"]
    with graph.inserting_after(proj):
        shape = graph.call_function(getattr, (proj, "shape"))
    with graph.inserting_after(total):
        view = graph.call_method("view", (total, shape))
    total.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)
    with graph.inserting_after(fc2):
        twice = graph.call_module(fc2.target, (fc2.args[0],))
    fc2.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    for node, like in ((view, total), (twice, fc2)):
        node.meta["tensor_meta"] = like.meta["tensor_meta"]
    graph.eliminate_dead_code()
    with graph.inserting_before(twice):
        again = graph.call_module(fc2.target, (twice.args[0],))
    again.meta["tensor_meta"] = twice.meta["tensor_meta"]
    with graph.inserting_after(twice):
        both = graph.call_function(torch.add, (twice, again))
    both.meta["tensor_meta"] = twice.meta["tensor_meta"]
    twice.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    graph_module.recompile()
    low, x = lower(graph_module), images(4, seed=3)
    assert execution_of(low)["blocks.0.attn.proj"].startswith("linear ")
    assert execution_of(low)["blocks.1.mlp.fc1"].startswith("linear ")
    with torch.inference_mode():
        assert (low(x) - exact(graph_module, x)).abs().amax(1).min() < 1e-5


@needs_kernels
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_lowered_graphs_compile_and_export(architecture: str) -> None:
    low, x = lower(quantized(architecture), chains=True), images(3)
    with torch.inference_mode():
        expected = low(x)
    with torch.no_grad():
        exported = torch.export.export(low, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        assert torch.equal(exported.module()(x[:2]), expected[:2])
        calls = {str(node.target) for node in exported.graph.nodes if "fxquant" in str(node.target)}
        assert {f"fxquant.{name}.default" for name in ("quantize", "linear", "chain")} <= calls
        compiled = torch.compile(low, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)


@needs_kernels
@pytest.mark.parametrize(
    "operator", ["quantize", "layer_norm", "linear", "matmul", "attention", "patches", "tokens", "chain"]
)
def test_operators_pass_torchs_own_checks(operator: str) -> None:
    code = byte_code(UniformQuantizer(8, 0.1))
    spec = ToCodes(code).spec
    weight = nn.Linear(6, 5)
    source = simulated.QuantizedLinear(weight.weight, weight.bias, UniformQuantizer(4, torch.full((5, 1), 0.1)), None)
    codes = torch.randint(0, 256, (2, 4, 6), dtype=torch.uint8)
    matmul = lowered.IntegerMatmul(code, code)
    attention = lowered.IntegerAttention(1, 2, lowered.AttentionCodes((code,) * 3, code, code))
    norm = lowered.LayerNormToCodes(nn.LayerNorm(6), code)
    steps = [Step(norm, 0), Step(lowered.IntegerLinear(source, code), 1)]
    arguments: dict[str, tuple[Any, ...]] = {
        "quantize": (torch.randn(3, 4), spec),
        "layer_norm": (torch.randn(3, 4), spec, torch.ones(4), None, 1e-6),
        "linear": (codes, lowered.IntegerLinear(source, code).layout, 5, False, None),
        "matmul": (codes, codes, matmul.levels, 128, 0.01, True),
        "attention": (codes, attention.spec, None),
        "patches": (torch.randint(0, 256, (2, 3, 7, 9), dtype=torch.uint8), [3, 2], [2, 3]),
        "tokens": (torch.randn(2, 4, 6), torch.randn(4, 6), torch.randn(1, 6)),
        "chain": (torch.randn(2, 4, 6), IntegerChain(steps, 6, 5).layout, 5, False, 2),
    }
    torch.library.opcheck(getattr(torch.ops.fxquant, operator).default, arguments[operator])


@pytest.fixture(scope="module")
def compiled() -> fxquant.Compiled:
    return fxquant.compile(embedded.load_model(), "W4A4", calibration=embedded.calibration_images(8))


@needs_kernels
def test_embedded_model_agrees_on_the_test_images(compiled: fxquant.Compiled) -> None:
    low = compiled.lowered("cpu-native")
    x = embedded.test_images()[0][:300]
    truth = exact(compiled.graph_module, x)
    with torch.inference_mode():
        found, simulated_scores = low(x), compiled(x)
    # Rounding in float32 moves the simulated scores as much on most images. On some, a value beside a threshold falls
    # on its other side; one that images share, such as of their background, does so on many. Few change class.
    error, simulated_error = ((scores - truth).abs().amax(1) for scores in (found, simulated_scores))
    assert error.median() < 1.5 * simulated_error.median()
    assert error.max() < 1.0
    assert (found.argmax(1) != truth.argmax(1)).sum() <= 3


@needs_kernels
def test_loading_lowered(compiled: fxquant.Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model.fxq")
    low = fxquant.load(tmp_path / "model.fxq", backend="auto")
    x = embedded.test_images()[0][:5]
    with torch.inference_mode():
        assert torch.equal(low(x), compiled.lowered()(x))
    assert {row.execution.split()[0] for row in low.layers} == {"convolution", "linear", "attention"}
    assert {row.execution for row in compiled.layers} == {"simulated"}
    assert "execution   integer: 38 of 38 layers" in str(low.report())
    with pytest.raises(ArtefactError, match="save the model it was lowered from"):
        low.save(tmp_path / "lowered.fxq")
    # Packed weights and what the layouts need besides: far below the simulated model's float weights and codes.
    layouts = sum(b.numel() for name, b in low.graph_module.named_buffers() if name.endswith("layout"))
    packed = sum(row.weight_bytes for row in low.layers if row.weight_bits)
    assert packed < layouts < 1.8 * packed  # rows of 96 numbers are short: scales and biases weigh


@needs_vnni
def test_onednn_runs_the_linear_layers(compiled: fxquant.Compiled) -> None:
    low = compiled.lowered("cpu-onednn")
    x = embedded.test_images()[0][:100]
    with torch.inference_mode():
        found, expected = low(x), compiled(x)
    assert {row.execution for row in low.layers} == {"simulated", "linear onednn"}
    assert (found - expected).abs().amax(1).median() < 1e-4
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(low)(x), found)


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's int8 products run on a CPU too, so all but the place can be tested there."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr("passes.lower.backends.cuda._GPU", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("cpu_as_gpu")
def test_cuda_runs_the_linear_layers(compiled: fxquant.Compiled) -> None:
    low = compiled.lowered("cuda")
    assert {row.execution for row in low.layers} == {"simulated", "linear cuda"}
    for x in (embedded.test_images()[0][:100], embedded.test_images()[0][:1]):
        with torch.inference_mode():
            found, expected = low(x), compiled(x)
        assert found.device == x.device
        assert (found - expected).abs().amax(1).median() < 1e-4
    again = Pipeline([Lower("cuda")], assumes=[Fact.QUANTIZED]).run(low.graph_module, PassContext())
    assert format_graph(again) == format_graph(low.graph_module)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_cuda_leaves_models_alone_that_have_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.lower.backends.cuda._GPU", "meta")
    graph_module = quantized("vit")
    for module in graph_module.modules():
        if isinstance(module, simulated.QuantizedLinear):
            module.input_quantizer = None
    note_bits(graph_module)
    low = lower(graph_module, "cuda")
    assert {str(parameter.device) for parameter in low.state_dict().values()} == {"cpu"}


@needs_kernels
@pytest.mark.parametrize(("inner", "out", "rows"), [(7, 5, 1), (32, 8, 17), (30, 24, 40)])
def test_torchs_int8_products_equal_the_kernels(inner: int, out: int, rows: int) -> None:
    code = byte_code(UniformQuantizer(6, 0.1, zero_point=20))
    assert code is not None
    layer = nn.Linear(inner, out)
    grid = UniformQuantizer(4, torch.rand(out, 1) + 0.1)
    source = simulated.QuantizedLinear(layer.weight, layer.bias, grid, None)
    x = torch.randn(2, rows, inner) * 3
    expected = lowered.IntegerLinear(source, code)(ToCodes(code)(x))
    torch.testing.assert_close(IntMmLinear(source, code)(x), expected, rtol=1e-6, atol=1e-6)


def test_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no backend is called 'gpu'; there are auto, cpu-native"):
        Lower("gpu")
    monkeypatch.setattr(library, "_found", lambda: "no compiler was found")
    with pytest.raises(BackendError, match="no compiler"):
        lower(quantized("vit"), "cpu-native")
    assert resolved("auto") in ("cpu-onednn", "simulated")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert resolved("auto") == "simulated"
    with pytest.raises(BackendError, match="AVX512-VNNI"):
        resolved("cpu-onednn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="GPU"):
        resolved("cuda")
    graph_module = quantized("vit")
    low = lower(graph_module, "auto")
    assert set(execution_of(low).values()) == {"simulated"}
    assert execution_summary(execution_of(low)) == "simulated"


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


def test_an_order_is_undone_by_its_inverse_only() -> None:
    rows = torch.randperm(12)
    order, back = ReorderRows(rows, (3, 4)), ReorderRows(rows.argsort(), (12,))
    x = torch.randn(2, 12, 5)
    assert torch.equal(back(order(x)), x)
    assert order.undone_by(back)
    assert not order.undone_by(ReorderRows(rows, (12,)))
    assert not order.undone_by(ReorderRows(torch.arange(6), (6,)))


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "stride"), [((16, 16), (16, 16)), ((3, 5), (2, 1)), ((1, 1), (4, 3)), ((20, 33), (1, 1))]
)
def test_patches_are_what_unfold_gives(kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, (3, 4, 20, 33), dtype=torch.uint8)
    found = torch.ops.fxquant.patches(codes, kernel, stride)
    expected = codes.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    assert torch.equal(found, expected.permute(0, 2, 3, 1, 4, 5).flatten(3))
    with pytest.raises(BackendError, match="have no patches"):
        torch.ops.fxquant.patches(codes, (21, 1), stride)


@needs_kernels
@pytest.mark.parametrize("front", [0, 2])
def test_tokens_are_joined_and_added(front: int) -> None:
    x, positions, first = torch.randn(3, 70, 8), torch.randn(70, 8), torch.randn(front, 8)
    found = torch.ops.fxquant.tokens(x, positions, first)
    assert torch.equal(found, torch.cat([first.expand(3, -1, -1), x + positions], 1))
    with pytest.raises(BackendError, match="do not fit tokens"):
        torch.ops.fxquant.tokens(x, positions[1:], first)


@needs_kernels
@pytest.mark.parametrize("architecture", ["vit", "deit distilled", "deit3", "vit, average pool and fc_norm", "swin"])
def test_tokens_are_assembled_in_one_step(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module, x = quantized(architecture), images(5, ARCHITECTURES[architecture]()[1], seed=5)
    low = lower(copy.deepcopy(graph_module))
    assert format_graph(low).count("AssembleTokens") == (architecture != "swin")
    monkeypatch.setattr(AssembleTokens, "apply", lambda *_: 0)
    with torch.inference_mode():
        assert torch.equal(low(x), lower(graph_module)(x))


class Positions(nn.Module):
    """Sums and joins that look like positions and class tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.positions, self.one = nn.Parameter(torch.randn(1, 4, 6)), nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        added = x + self.positions
        if self.kind == "read twice":
            return torch.cat([self.one.expand(x.shape[0], -1, -1), added], 1).sum(1) + added.sum(1)
        if self.kind == "behind":
            return torch.cat([x, self.one.expand(x.shape[0], -1, -1)], 1) * 2
        if self.kind == "another dimension":
            return torch.cat([self.one.expand(x.shape[0], 4, -1), added], 2)
        return torch.cat([self.one.expand(x.shape[0], -1, -1), x], 1) + 1.0


@needs_kernels
@pytest.mark.parametrize("kind", ["read twice", "behind", "another dimension", "a number"])
def test_what_only_looks_like_tokens_computes_the_same(kind: str) -> None:
    model, x = Positions(kind).eval(), torch.randn(3, 4, 6)
    graph_module = fx.symbolic_trace(model)
    ShapeProp(graph_module).propagate(x)
    with torch.inference_mode():
        expected = model(x)
        AssembleTokens().apply(graph_module, PassContext())
        graph_module.recompile()
        assert torch.equal(graph_module(x), expected)

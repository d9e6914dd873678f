"""Layers of a lowered graph against those of the simulated one, each on the inputs that the simulated one has.

What one layer gets wrong shows at its own output, and not at the model's, where a single code at an edge between two
levels moves a ViT's scores at 3 bits by a tenth. So the lowered graph runs node by node, and wherever it holds what the
simulated graph holds too, the two are compared, and the run goes on with the simulated value:

- bytes that a layer reads: each is the code of x + e, x the simulated value and |e| at most EDGE of the root mean
  square of x; all but STRAYS of them, since one code that falls the other way moves those behind it;
- floats that a layer gives: within FLOATS, relative, of what the layer gives in the simulated graph, or what the node
  after it gives where the kernel does that too, or of the sum of both where the kernel adds a residual (in Swin, rows
  of that sum are in the order of windows, which no node of the simulated graph has).

Between two such places lies a layer or two (qkv and the attention behind it, fc1 and GELU). Deliberately not compared:
what has another shape than in the simulated graph, as windows in another order; the next layer's bytes are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import module_of
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.integer.lowered import RowLogToCodes, ToCodes
from fxquant.runtime.simulated import QuantizedMatmul, QuantizedWeightModule
from passes.lower.integer_plan import layer_of
from passes.pipeline.contract import Pass, PassContext

EDGE, FLOATS = 1e-3, 1e-3
STRAYS, FEWEST = 5e-3, 16
"""Share of bytes that may be others for no reason of their own, and how many always may, in small tensors."""


@torch.no_grad()
def first_difference(simulated: GraphModule, by_layer: Pass, images_bchw: Tensor) -> tuple[str, Tensor]:
    """The first layer that computes something else when lowered, in words, "" for none; and the lowered output.

    Args:
        simulated: the graph that is lowered; it is not changed.
        by_layer: a pass that lowers every layer to a node of its own.
        images_bchw: float (B, C, H, W), which both run on.
    """
    lowered = copy.deepcopy(simulated)
    by_layer.apply(lowered, PassContext())
    values = _Values(simulated)
    values.run(images_bchw.clone())
    comparison = _Comparison(lowered, simulated, values.values)
    comparison.run(images_bchw.clone())
    return comparison.problem, lowered(images_bchw)


class _Values(Interpreter):
    """Keeps every tensor, and no float weight that was not there before."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.graph_module = graph_module
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        module = module_of(self.graph_module, node)
        lean = module if isinstance(module, QuantizedWeightModule) and not module.has_weight else None
        result = super().run_node(node)
        if lean is not None:
            lean.refresh()
        if isinstance(result, Tensor):
            self.values[node.name] = result.clone()
        return result


class _Comparison(Interpreter):
    """Runs a lowered graph on what the simulated one holds. problem: the first difference, in words."""

    def __init__(self, lowered: GraphModule, simulated: GraphModule, values: dict[str, Tensor]) -> None:
        super().__init__(lowered)
        self.simulated, self.values, self.problem = simulated, values, ""
        self.named = {node.name: node for node in simulated.graph.nodes}
        self.open: list[str] = []  # layers whose results have not been compared yet

    def run_node(self, node: Node) -> Any:
        counterpart = self.named.get(node.name)
        if counterpart is None or not annotation_of(node).has_bits or node.op != "call_module":
            return super().run_node(node)
        arguments, keywords = self.fetch_args_kwargs_from_env(node)
        given = list(arguments)
        quantizers = _quantizers(module_of(self.simulated, counterpart))
        for index, quantizer in enumerate(quantizers):
            source = counterpart.args[index]
            expected = self.values.get(source.name) if isinstance(source, Node) else None
            if index < len(given) and expected is not None:
                given[index] = self._read(node, given[index], expected, quantizer)
        residual = given[len(quantizers)] if len(given) > len(quantizers) > 0 else None
        return self._gave(node, counterpart, self.call_module(str(node.target), tuple(given), keywords), residual)

    def _read(self, node: Node, found: Tensor, expected: Tensor, quantizer: Quantizer | None) -> Tensor:
        """What a layer reads in the simulated graph, as it reads it in the lowered one, after a comparison."""
        wanted = _rows_like(found, expected)
        code = byte_code(quantizer) if found.dtype == torch.uint8 else None
        if wanted is None or (found.dtype == torch.uint8 and code is None):
            return found
        if code is None:
            wanted = wanted.to(found)
            self._note(node, "reads", _relative(found, wanted), _relative(found, wanted) > FLOATS)
            return wanted
        strays = _strays(found, wanted, code)
        allowed = max(FEWEST, STRAYS * found.numel())
        self._note(node, "reads", strays / max(found.numel(), 1), strays > allowed)
        return _bytes(wanted, code)

    def _gave(self, node: Node, counterpart: Node, found: Any, residual: Tensor | None) -> Any:
        """What a layer gives in the simulated graph, after a comparison, if it gives floats of the same kind.

        Args:
            node: the lowered layer.
            counterpart: the simulated one.
            found: what the lowered one gave.
            residual: float, of the shape of `found`, which the lowered one has added; None where it adds nothing.
        """
        self.open.append(layer_of(node))
        if not isinstance(found, Tensor) or not found.is_floating_point():
            return found
        near = [self.values[other.name] for other in _with_readers(counterpart) if other.name in self.values]
        own = self.values.get(counterpart.name)
        if residual is not None and own is not None and own.shape == residual.shape:
            near.append(own + residual)
        fits = [fit.to(found) for value in near if (fit := _rows_like(found, value)) is not None]
        if not fits:
            return found
        off, closest = min(((_relative(found, fit), place) for place, fit in enumerate(fits)), default=(0.0, 0))
        self._note(node, "gives", off, off > FLOATS)
        return fits[closest]

    def _note(self, node: Node, what: str, off: float, is_wrong: bool) -> None:
        """Take layers for right that have not been compared before, or note the difference, if it is the first."""
        layer, others = layer_of(node), [name for name in self.open if name != layer_of(node)]
        if is_wrong and not self.problem and what == "gives":
            between = f" (or one whose bytes it reads: {', '.join(others)})" if others else ""
            self.problem = f"the first layer that differs is '{layer}'{between}, by {off:.3g} of its output"
        elif is_wrong and not self.problem:
            before = f"one of {', '.join(others)}" if others else "what lies between layers"
            self.problem = (
                f"the first layer that differs is before '{layer}', {before}: {off:.3g} of what it reads is wrong"
            )
        self.open = []


def _quantizers(module: nn.Module | None) -> tuple[Quantizer | None, ...]:
    """Of a simulated layer's inputs, in order; none for what is no product."""
    if isinstance(module, QuantizedWeightModule):
        return (module.input_quantizer,)
    return (module.left_quantizer, module.right_quantizer) if isinstance(module, QuantizedMatmul) else ()


def _bytes(x: Tensor, code: ByteCode) -> Tensor:
    x = x.float().cpu().contiguous()
    found: Tensor = (RowLogToCodes(code) if code.of_rows else ToCodes(code))(x)
    return found


def _strays(found: Tensor, x: Tensor, code: ByteCode) -> int:
    """How many bytes are not the code of any value as near to x as EDGE allows."""
    if code.of_rows:  # codes of a row say how far its numbers are below the largest
        return int((found != _bytes(x, code)).sum())
    off = EDGE * float(x.double().square().mean().sqrt())
    ends = torch.stack([_levels(_bytes(x - off, code), code), _levels(_bytes(x + off, code), code)])
    level = _levels(found, code)
    return int(((level < ends.amin(0)) | (level > ends.amax(0))).sum())


def _levels(codes: Tensor, code: ByteCode) -> Tensor:
    """What bytes stand for, in units; ascending with the value."""
    return codes.int() - code.zero if code.identity else torch.from_numpy(code.levels)[codes.long()]


def _with_readers(node: Node) -> list[Node]:
    """The node, its readers, and theirs."""
    near = list(node.users)
    return [node, *near, *(far for reader in near for far in reader.users)]


def _rows_like(value: Tensor, expected: Tensor) -> Tensor | None:
    """What a lowered value is compared with: the first tokens where it has only those that are read; None: nothing."""
    if value.shape == expected.shape:
        return expected
    is_less = value.ndim == expected.ndim == 3 and value.shape[1] < expected.shape[1]
    fits = is_less and value.shape[::2] == expected.shape[::2]
    return expected[:, : value.shape[1]] if fits else None


def _relative(found: Tensor, expected: Tensor) -> float:
    spread = (expected.double() - expected.double().mean()).square().mean().sqrt().clamp_min(1e-12)
    return float((found.double() - expected.double()).square().mean().sqrt() / spread)

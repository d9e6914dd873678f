"""Layer-wise relevance: how much of the predicted class's logit passes through every layer.

    R = activation * gradient of the logit,    I_l = mean over images of sum |R| at layer l, normalised to sum 1

The graph is rewritten, on a copy, so that ordinary autograd is the propagation rule of AttnLRP (Achtibat et al. 2024):

    linear, convolution, residual sum   epsilon rule with epsilon 0: the gradient itself
    LayerNorm, normalization, division  the denominator is detached: linear in x
    softmax                             gradient (Taylor) rule: the gradient itself
    matmul, product of activations      bilinear: half the gradient to either operand
    GELU and its like                   identity rule: f(x) = x (f(x) / x), the factor detached
    product with a constant             the constant is a factor (scale, layer scale, rotary embedding)

Outputs are those of the model. What every rule conserves is stated by `Balance`: the logit is the relevance of the
image, of the biases and added constants, and the remainder of softmax's Taylor expansion. Importance is Mix-QViT's
first criterion (its text says layer-wise relevance from the predicted class; the rules are decided here).
Deliberately not done: the gamma rule, which makes pixel maps smoother but needs one more pass per linear layer.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from fxquant.errors import CalibrationError, SensitivityError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.nodes import module_of, tensor_at
from fxquant.graph.structure.kind import Kind, is_quick_gelu, kind_of, tensor_inputs
from fxquant.sensitivity.sums import Sums

_PRODUCTS: dict[Any, Callable[[Tensor, Any], Tensor]] = {
    torch.matmul: torch.matmul,
    operator.mul: torch.mul, operator.imul: torch.mul, torch.mul: torch.mul, "mul": torch.mul, "mul_": torch.mul,
}  # fmt: skip
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, "add_": "add", "sub_": "sub"}
_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}


@dataclass(frozen=True)
class Balance:
    """Where the predicted classes' logits went, each summed over the images given.

    logit = image + biases + constants + softmax, up to rounding, if every operation is one of the module's list.

    Args:
        logit: the predicted classes' logits.
        image: relevance of the pixels.
        biases: of all biases, of LayerNorm's too.
        constants: of added constants (position embedding, class token).
        softmax: of s - J x, what a softmax's linear expansion has at x = 0.
    """

    logit: float
    image: float
    biases: float
    constants: float
    softmax: float

    @property
    def unexplained(self) -> float:
        """The logit less its parts."""
        return self.logit - self.image - self.biases - self.constants - self.softmax


class Relevance:
    """Relevance of a graph's nodes for the class the model predicts.

    graph_module: traced, with roles; observers may be in place. It is copied, never changed.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = rewritten(graph_module)
        self._watched = nodes_with_role(self.graph_module)
        self._recorder = _Recorder(self.graph_module)

    def of(self, images_bchw: Tensor) -> dict[str, Tensor]:
        """Relevance at the output of every layer, by public name and of its output's shape; "" is the image itself.

        images_bchw: float (B, C, H, W). Raises CalibrationError where the model does not return class scores.
        """
        logit, image = self._forward(images_bchw, self._watched)
        values = [image, *(self._recorder.values[node] for node in self._watched)]
        gradients = torch.autograd.grad(logit.sum(), values, materialize_grads=True)
        names = ["", *(annotation_of(node).layer for node in self._watched)]
        found = {name: (v * g).detach() for name, v, g in zip(names, values, gradients, strict=True)}
        self._recorder.values.clear()
        return found

    def importance(self, batches: Iterable[Tensor], sums: Sums | None = None) -> dict[str, float]:
        """I_l by layer, sums to 1: mean over images of sum |R| at the output of every layer that multiplies.

        sums: of the batches before these, where there were any. Raises SensitivityError where a relevance is not
        finite.
        """
        names = [annotation_of(n).layer for n in self._watched if _multiplies(annotation_of(n).role)]
        sums = Sums() if sums is None else sums
        for batch in batches:
            found = self.of(batch)
            for name in names:
                sums.add(name, float(found[name].abs().sum(dtype=torch.float64)))
        whole = sum(sums[name] for name in names)
        if not 0 < whole < float("inf"):
            raise SensitivityError(f"relevance over all layers sums to {whole}: the model's output must depend on them")
        return {name: sums[name] / whole for name in names}

    def balance(self, images_bchw: Tensor) -> Balance:
        """What became of the logits of these images; see `Balance`."""
        softmaxes = [n for n in self.graph_module.graph.nodes if annotation_of(n).role is Role.SOFTMAX]
        biases = [p for name, p in self.graph_module.named_parameters() if name.rpartition(".")[2] == "bias"]
        constants = [tensor_at(self.graph_module, n) for n in self.graph_module.graph.nodes if n.op == "get_attr"]
        leaves = [*biases, *(c for c in {id(c): c for c in constants}.values() if c.is_floating_point())]
        for leaf in leaves:
            leaf.requires_grad_(True)
        try:
            watched = [*softmaxes, *(source for node in softmaxes for source in node.all_input_nodes)]
            logit, image = self._forward(images_bchw, watched)
            outputs = [self._recorder.values[node] for node in softmaxes]
            sources = [image, *leaves, *outputs]
            gradients = torch.autograd.grad(logit.sum(), sources, materialize_grads=True)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        parts = [float((value * gradient).detach().sum()) for value, gradient in zip(sources, gradients, strict=True)]
        at_softmaxes = gradients[len(sources) - len(outputs) :]
        linear = sum(self._through_softmax(node, g) for node, g in zip(softmaxes, at_softmaxes, strict=True))
        self._recorder.values.clear()
        ends = (0, 1, 1 + len(biases), 1 + len(leaves), None)
        of_image, of_biases, of_constants, of_softmax = (sum(parts[i:j]) for i, j in itertools.pairwise(ends))
        return Balance(float(logit.detach().sum()), of_image, of_biases, of_constants, of_softmax - linear)

    def _through_softmax(self, node: Node, gradient: Tensor) -> float:
        """Sum of (J x) g, J the softmax's derivative at its recorded input x: what it passes on."""
        s, x = (self._recorder.values[n].detach() for n in (node, node.all_input_nodes[0]))
        dim = int(self.graph_module.get_submodule(str(node.target)).dim)  # type: ignore[arg-type]
        return float((s * (x - (s * x).sum(dim, keepdim=True)) * gradient).sum())

    def _forward(self, images_bchw: Tensor, watched: Iterable[Node]) -> tuple[Tensor, Tensor]:
        """Logits (B,) of the predicted classes, and the image they were computed from; watched values are recorded."""
        image = images_bchw.detach().clone().requires_grad_(True)
        self._recorder.watched = set(watched)
        with torch.enable_grad():
            output = self._recorder.run(image)
        scores = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            raise CalibrationError(
                "relevance starts from class scores (B, classes), and this model returns others: leave it out, "
                'mix_qvit(budget, importance="none")'
            )
        return scores.amax(1), image


def rewritten(graph_module: GraphModule) -> GraphModule:
    """A copy that computes the same and whose gradients follow the rules above."""
    changed = copy.deepcopy(graph_module)
    varying: set[Node] = set()
    for node in changed.graph.nodes:
        if node.op == "placeholder" or any(source in varying for source in tensor_inputs(node)):
            varying.add(node)
        node.target = _OUT_OF_PLACE.get(node.target, node.target)  # or values kept for their gradient would change
    rules = [(node, rule) for node in changed.graph.nodes if (rule := _rule_of(changed, node, varying)) is not None]
    for node, (module, arguments) in rules:
        name = f"relevance_{node.name}"
        changed.add_submodule(name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", name, arguments, {}
    changed.graph.lint()
    changed.recompile()
    return changed


def _rule_of(graph_module: GraphModule, node: Node, varying: set[Node]) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """The module that replaces a node and its arguments; None where the gradient is the rule."""
    kind = kind_of(graph_module, node)
    module = module_of(graph_module, node)
    if isinstance(module, nn.LayerNorm):
        return _LayerNorm(module), node.args[:1]
    if module is not None and kind in (Kind.GELU, Kind.ACTIVATION):
        return _Identity(module), node.args[:1]
    if is_quick_gelu(node):
        return _Product(torch.mul, (1.0, 0.0)), node.args[:2]
    if node.op in ("call_function", "call_method") and kind is Kind.ACTIVATION:
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
        return _Identity(getattr(functional, name)), node.args[:1]
    if node.target is functional.normalize:
        return _Normalize({**dict(zip(("p", "dim", "eps"), node.args[1:], strict=False)), **node.kwargs}), node.args[:1]
    function = _PRODUCTS.get(node.target) or (torch.div if node.target in _QUOTIENTS else None)
    operands = [isinstance(value, Node) and value in varying for value in node.args[:2]]
    if function is None or not any(operands) or not all(isinstance(value, Node) for value in node.args[:2]):
        return None
    if function is torch.div:
        return (_Product(function, (1.0, 0.0)), node.args[:2]) if operands[0] else None
    return _Product(function, tuple(vary / sum(operands) for vary in operands)), node.args[:2]


class _Product(nn.Module):
    """A bilinear operation whose operands get these shares of the gradient."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], shares: tuple[float, ...]) -> None:
        super().__init__()
        self.function, self.shares = function, shares

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        result: Tensor = self.function(_share(left, self.shares[0]), _share(right, self.shares[1]))
        return result


def _share(x: Any, share: float) -> Any:
    """The value x, whose gradient is `share` times as large."""
    if share == 1 or not isinstance(x, Tensor):
        return x
    return x.detach() + share * (x - x.detach()) if share else x.detach()


class _Identity(nn.Module):
    """f(x) with f(0) = 0 as a multiple of x: relevance passes unchanged."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        factor = self.inner(x.detach().clone()) / x.detach()
        return x * factor.nan_to_num(0.0, 0.0, 0.0)


class _LayerNorm(nn.Module):
    """LayerNorm with the standard deviation held fixed."""

    def __init__(self, inner: nn.LayerNorm) -> None:
        super().__init__()
        self.inner = inner
        self.dimensions = tuple(range(-len(inner.normalized_shape), 0))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dimensions, keepdim=True)
        deviation = (centred.detach().square().mean(self.dimensions, keepdim=True) + self.inner.eps).sqrt()
        normalized = centred / deviation
        scaled = normalized if self.inner.weight is None else normalized * self.inner.weight
        return scaled if self.inner.bias is None else scaled + self.inner.bias


class _Normalize(nn.Module):
    """`functional.normalize` with the norm held fixed."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = {"p": 2.0, "dim": 1, "eps": 1e-12, **options}

    def forward(self, x: Tensor) -> Tensor:
        norm: Tensor = x.detach().norm(self.options["p"], self.options["dim"], keepdim=True)
        return x / norm.clamp_min(self.options["eps"])


class _Recorder(Interpreter):
    """Keeps the values of watched nodes, all differentiable."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.watched: set[Node] = set()
        self.values: dict[Node, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node not in self.watched:
            return result
        # A layer fed by constants only, as an attention pool's query is, has relevance too.
        self.values[node] = result if result.requires_grad else result.requires_grad_()
        return self.values[node]


def _multiplies(role: Role | None) -> bool:
    return role is not None and (role.has_weight or role.is_matmul)

"""BalanceHeads: turn queries and keys, head by head, so that few bits serve both, exactly.

    q k^T = (q M) (k M^-T)^T,   softmax(q (k - c)^T) = softmax(q k^T)

for any invertible M and any c that is the same for all keys of a head. Both are folded into the linear layers that give
q and k. One scale for all channels of q leaves noise of power d^2 / 12 in every one of them, and d follows their
spread; so the noise of the product goes with tr(S_q) tr(S_k), S_q the second moment of queries, S_k the covariance of
keys. The M with M^T S_q M = M^-1 S_k M^-T, diagonal, makes that as small as it can be, the square of
tr((S_q^1/2 S_k S_q^1/2)^1/2); an orthogonal matrix after it spreads what is left evenly over channels. c is the mean
key, where softmax takes away what is added to a row. Rotary embeddings, norms of q and k, and relative positions that
read q stand in the way; the note says where.

Left out: values and proj could be turned likewise. On a ViT-tiny that lost at 4 and 6 bits: tokens that attention parks
on have values near zero, which such a change moves away from the level that is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.facts import ROLES_ASSIGNED, Fact
from fxquant.graph.structure.query_keys import QueryKey, query_keys
from passes.pipeline.contract import Effect, PassContext
from passes.prepare.folds import FOLDED, note_fold

TOGETHER = 4  # images that are run at once
_TINY = 1e-30


@dataclass(frozen=True)
class BalanceHeads:
    """Balance queries and keys of every attention that allows it.

    dampening: share of the mean variance of a head that is added to every direction, so that none is stretched without
    bound. Applying it twice is harmless but not idempotent: the second time balances what the first has left.
    """

    dampening: float = 0.01

    requires: ClassVar[frozenset[Fact]] = frozenset({ROLES_ASSIGNED})
    provides: ClassVar[frozenset[Fact]] = frozenset({FOLDED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    effect: ClassVar[Effect] = Effect.EXACT

    def __post_init__(self) -> None:
        """Raise CalibrationError for options that do not fit."""
        check_fields(self, CalibrationError)
        if not 0 < self.dampening < 1:
            raise CalibrationError(f"dampening must be above 0 and below 1; found {self}")

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fold in place; returns the number of linear layers changed.

        Notes `balanced`: by product the factor by which tr(S_q) tr(S_k) shrinks, mean over heads; `refused`: by product
        why it was left alone.
        """
        products, refused = query_keys(graph_module, context.images)
        moments = _Moments(graph_module, products.values())
        with torch.no_grad():
            for _, batch in context.gather("measuring queries and keys", moments, graph_module, together=TOGETHER):
                moments.run(batch)
        layers = {node for product in products.values() for node in (product.query, product.key)}
        for node in layers:
            _own(graph_module, node)
        factors: dict[str, float] = {}
        for node, product in products.items():
            name = annotation_of(node).layer
            factors[name] = 0.0
            for query, key in product.heads:
                of_query, of_key = moments.second(product.query, query), moments.second(product.key, key)
                mean = moments.mean(product.key, key) * product.ignores_rows
                of_key = positive(of_key - torch.outer(mean, mean))
                matrix = balancing(of_query, of_key, self.dampening)
                inverse = torch.linalg.inv(matrix)
                _fold(graph_module, product.query, query, matrix.T, torch.zeros_like(mean))
                _fold(graph_module, product.key, key, inverse, mean)
                after = (matrix.T @ of_query @ matrix).trace() * (inverse @ of_key @ inverse.T).trace()
                before = of_query.trace() * of_key.trace()
                factors[name] += float(after / before if before > _TINY else 1) / len(product.heads)
        note_fold(graph_module, type(self).__name__)
        context.note(balanced=factors, refused={annotation_of(node).layer: reason for node, reason in refused.items()})
        return len(layers)


def balancing(query: Tensor, key: Tensor, dampening: float) -> Tensor:
    """M, float64 (D, D), with M^T S_q M = M^-1 S_k M^-T of one variance in all channels.

    Args:
        query, key: S_q and S_k, float64 (D, D), positive semidefinite; for dampening see BalanceHeads. The variances
            are equal where D is a power of two, else nearly so.
        dampening: share of the mean variance that is added to every direction, see BalanceHeads.
    """
    eye = torch.eye(len(query), dtype=query.dtype, device=query.device)
    of_query, of_key = (
        moment + (dampening * moment.trace() / len(moment)).clamp_min(_TINY) * eye for moment in (query, key)
    )
    values, vectors = torch.linalg.eigh(of_query)
    root, inverse = ((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
    values, vectors = torch.linalg.eigh(root @ of_key @ root)
    matrix: Tensor = inverse @ (vectors * values.clamp_min(_TINY**2).pow(0.25)) @ spreading(len(query))
    return matrix


def positive(moment: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix to a symmetric one, float64 (D, D): rounding may leave it less."""
    values, vectors = torch.linalg.eigh(moment)
    nearest: Tensor = (vectors * values.clamp_min(0)) @ vectors.T
    return nearest


def spreading(size: int) -> Tensor:
    """An orthogonal matrix, float64 (size, size): Hadamard's for powers of two, all of one magnitude; else random."""
    if size & (size - 1):
        draw = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        orthogonal: Tensor = torch.linalg.qr(draw)[0]
        return orthogonal
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.div(matrix, size**0.5)


def _own(graph_module: GraphModule, node: Node) -> None:
    """Give a linear layer a bias, and parameters of its own: equal tensors of a recalled graph share memory."""
    linear: Any = graph_module.get_submodule(str(node.target))
    weight = linear.weight.detach().clone()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.detach().clone()
    linear.weight, linear.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))


def _fold(graph_module: GraphModule, node: Node, channels: Tensor, turn: Tensor, shift: Tensor) -> None:
    """y[channels] becomes turn (y[channels] - shift) for the outputs y of a linear layer."""
    linear: Any = graph_module.get_submodule(str(node.target))
    turn, shift = turn.to(linear.weight.device), shift.to(linear.weight.device)
    linear.weight[channels] = (turn @ linear.weight[channels].double()).to(linear.weight.dtype)
    linear.bias[channels] = (turn @ (linear.bias[channels].double() - shift)).to(linear.bias.dtype)


class _Moments(Interpreter):
    """Streams the means and second moments, float64, of the channels that products read, head by head."""

    def __init__(self, graph_module: GraphModule, products: Iterable[QueryKey]) -> None:
        super().__init__(graph_module)
        self.places = {_place(node, part): part for product in products for node, part in product.channels()}
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.moments: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        mine = [place for place in self.places if place[0] == node.name]
        if mine:
            rows = result.flatten(0, -2).double()
            self.counts[node.name] = self.counts.get(node.name, 0) + len(rows)
            for place in mine:
                part = rows[:, self.places[place]]
                self.sums[place] = self.sums.get(place, 0) + part.sum(0)
                self.moments[place] = self.moments.get(place, 0) + part.T @ part
        return result

    def state(self) -> dict[str, Tensor]:
        """All sums so far."""
        sums = {f"{kind}/{name}/{first}": tensor for kind, of in (("sum", self.sums), ("moment", self.moments))
                for (name, first), tensor in of.items()}  # fmt: skip
        return sums | {f"count/{name}": torch.tensor(count) for name, count in self.counts.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state."""
        self.sums, self.moments, self.counts = {}, {}, {}
        self.merge(state)

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the sums over further images."""
        for path, tensor in state.items():
            kind, name, *first = path.split("/")
            if kind == "count":
                self.counts[name] = self.counts.get(name, 0) + int(tensor)
            else:
                of, place = self.sums if kind == "sum" else self.moments, (name, int(first[0]))
                of[place] = of[place] + tensor if place in of else tensor

    def mean(self, node: Node, channels: Tensor) -> Tensor:
        """Of a head's channels, (D,), on the host: what follows of it is small, and there the same for every device."""
        return self.sums[_place(node, channels)].cpu() / self.counts[node.name]

    def second(self, node: Node, channels: Tensor) -> Tensor:
        """Second moment of a head's channels, (D, D), on the host."""
        return self.moments[_place(node, channels)].cpu() / self.counts[node.name]


def _place(node: Node, channels: Tensor) -> tuple[str, int]:
    """A head of a layer, by its first channel: no channel is in two."""
    return node.name, int(channels[0])

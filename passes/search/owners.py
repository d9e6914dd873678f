"""Which rank has what observers have gathered: each layer's sums are on one rank, which then searches and rounds it.

    owners = owners_among_ranks(graph_module, nodes)        # before gathering; None for a process alone
    settle(observers, owners_of_observers)                  # after it
    context.deal("searching scales", ..., owners=owners_of_nodes(graph_module, nodes))

So sums are sent to one rank in place of all, and N ranks hold 1 / N of them each once images have been seen. Layers of
one kind are spread evenly, which spreads memory, search and rounding alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.fx import GraphModule, Node

from fxquant import ranks
from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import device_of, module_of
from fxquant.quantizers.observers import Observer
from passes.pipeline.gathering import SENT_TOGETHER, State
from passes.search.insert_observers import observers_of

HISTOGRAM = 1 << 17  # numbers that one takes, about


def owners_among_ranks(graph_module: GraphModule, nodes: Sequence[Node]) -> list[int] | None:
    """Of each node the rank that is to have what its observers gather; None where there is one rank."""
    if ranks.count() == 1:
        return None
    return ranks.owners_of([_numbers(graph_module, node) for node in nodes], ranks.count())


def settle(observers: Sequence[Observer], owners: Sequence[int]) -> None:
    """Let every rank know which one has an observer's statistics. owners: of each observer."""
    here = {
        place: observer.gram is not None
        for place, (observer, owner) in enumerate(zip(observers, owners, strict=True))
        if owner == ranks.number()
    }
    have_gram = {place: has for found in ranks.from_all("settling statistics", here) for place, has in found.items()}
    for place, (observer, owner) in enumerate(zip(observers, owners, strict=True)):
        observer.leave_to(owner, have_gram[place], is_here=place in here)


def owners_of_nodes(graph_module: GraphModule, nodes: Sequence[Node]) -> list[int] | None:
    """Of each node the rank that has what its observers have gathered; None where every rank has all."""
    found = [next((o.owner for _, o in observers_of(graph_module, node)), None) for node in nodes]
    return None if all(owner is None for owner in found) else [owner or 0 for owner in found]


@contextmanager
def collected(graph_module: GraphModule) -> Iterator[None]:
    """Inside, the first rank has what all observers hold, to write it to a file. Every rank enters."""
    device = device_of(graph_module)
    observers = [module for module in graph_module.modules() if isinstance(module, Observer)]
    owned = [(each, each.owner, each.has_gram) for each in observers if each.owner is not None]
    for at in range(0, len(owned), SENT_TOGETHER):
        own = {
            place: observer.state()
            for place, (observer, owner, _) in enumerate(owned[at : at + SENT_TOGETHER], at)
            if owner == ranks.number()
        }
        nothing: list[dict[int, State]] = [{}] * (ranks.count() - 1)
        for found in ranks.handed_over("collecting statistics", [own, *nothing]):
            for place, state in found.items():
                owned[place][0].restore({name: tensor.to(device) for name, tensor in state.items()})
    if not ranks.is_first():
        yield
        return
    try:
        for observer in observers:
            observer.owner = None
        yield
    finally:
        for observer, owner, has_gram in owned:
            observer.leave_to(owner, has_gram, is_here=owner == ranks.number())


def _numbers(graph_module: GraphModule, node: Node) -> float:
    """How many numbers observers of a node and its search have to do with: of a weight, its own and a Gram matrix's."""
    module, found = module_of(graph_module, node), float(HISTOGRAM * len(annotation_of(node).operands))
    if isinstance(module, nn.Linear | nn.Conv2d):
        columns = module.weight[0].numel()
        found += module.weight.numel() + columns * columns
    return found

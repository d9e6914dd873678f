"""What a backend is: a value that says what runs as integers, whether it can run here, and which passes lower to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from fxquant.errors import FxQuantError
from passes.pipeline.contract import Pass


@dataclass(frozen=True)
class Backend:
    """What runs a lowered graph. A module of `passes.lower.backends` ends in one.

    Args:
        name: as users write it; the module's name, with "-" for "_".
        summary: what runs as integers, in a few words, for help texts.
        families: of quantizers that it runs, by name, with their widest widths in bits.
        edges: into layers that it runs, as `PlanOperands` calls them.
        instead: by edge, the family that takes the place of those that it does not run; where an edge has none, a
            recipe without any that it runs is refused.
        finds: the nodes of a simulated graph that will run as integers.
        why_absent: the error that says what is missing on this machine; None where it can run.
        pipeline: the passes that lower a graph, in order.
        choice: its place among those that "auto" tries; None: it is taken by its name only.
    """

    name: str
    summary: str
    finds: Callable[[GraphModule], Collection[Node]]
    why_absent: Callable[[], FxQuantError | None]
    pipeline: tuple[Pass, ...]
    families: Mapping[str, int] = field(default_factory=dict)
    edges: tuple[str, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)
    choice: int | None = None

"""Notes: values about a whole graph that one pass leaves and another reads, each with its key and its type.

Annotations speak of one node. What is true or known of the graph as a whole (the share of weights that tracing saw, the
kernel of every layer, measured latencies) stands in `graph_module.meta`. A `Note` is the one way to it: whoever writes
a value declares its note as a constant beside itself, and readers import it from there. The notes below are read in
rooms that may not import the writer, so they stand here.

    COVERAGE.write(graph_module, 0.99)
    COVERAGE.get(graph_module)          # 0.99, a float for the type checker too; None where nothing was written
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.fx import GraphModule

from fxquant.errors import ModelError

T = TypeVar("T")


@dataclass(frozen=True)
class Note(Generic[T]):
    """One value about a whole graph.

    Args:
        key: its key in the graph's meta, unlike every other note's.
        kind: the class of the value.
        remedy: what the caller does where the value is missing, for the message.
    """

    key: str
    kind: type[T]
    remedy: str = "run the pass that writes it first"

    def write(self, graph_module: GraphModule, value: T) -> None:
        """Set the value, in place of an earlier one."""
        graph_module.meta[self.key] = value

    def get(self, graph_module: GraphModule) -> T | None:
        """The value; None where nothing was written, or something of another class."""
        found = graph_module.meta.get(self.key)
        return found if isinstance(found, self.kind) else None

    def of(self, graph_module: GraphModule) -> T:
        """The value. Raises ModelError where the graph has none."""
        found = self.get(graph_module)
        if found is None:
            raise ModelError(f"this graph says nothing of its {self.key}: {self.remedy}")
        return found


COVERAGE = Note("coverage", float, "make it with fxquant.trace")
"""Share of the model's weight elements that are visible in the graph, 0 to 1. Written by tracing."""

IMAGE_SHAPE: Note[tuple[int, ...]] = Note("image_shape", tuple, "make it with fxquant.trace")
"""(channels, height, width) of an image that the graph takes. Written by tracing."""

CLASSES = Note("classes", int)
"""How many classes the model says it has; there is no note where it does not say. Written by tracing."""

EXPORTED: Note[str] = Note("exported", str)
"""Why tracing failed, where torch.export took the model in its place. Written by tracing."""

SIZES: Note[dict[Any, GraphModule]] = Note("sizes", dict, "run AddSizes first")
"""By (height, width), graphs for images of other sizes, which call the same modules. Written by AddSizes."""

EXECUTION: Note[dict[str, str]] = Note("execution", dict, "run Lower first")
"""By layer, the kernel that runs it, such as "linear avx512-vnni", or "simulated". Written by Lower."""

FACTS: Note[frozenset[Any]] = Note("facts", frozenset)
"""Which facts have been declared. Written and read by `fxquant.graph.facts` only."""


def execution_of(graph_module: GraphModule) -> dict[str, str]:
    """By layer, the kernel that runs it, such as "linear avx512-vnni", or "simulated"; empty before Lower."""
    return dict(EXECUTION.get(graph_module) or {})

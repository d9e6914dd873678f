"""Lower: run quantized nodes as integers where kernels can do so exactly; the rest stays simulated, and says so.

The lowered graph computes what the simulated one does: the same codes, outputs within float rounding. Which kernel
each layer got is in `fxquant.graph.notes.execution_of(graph_module)`; what stayed behind, and why, in the notes of the
journal's entry (`passes.lower.rewrite`). A lowered graph belongs to the machine it was lowered on: save the simulated
one. Running it again changes nothing.

How is said by the backend: each is a value with a pipeline of passes (`passes.lower.backends`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxquant.checks.arguments import text
from fxquant.checks.hints import check_fields
from fxquant.errors import BackendError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.facts import LOWERED, QUANTIZED, Fact, facts_of
from fxquant.graph.notes import EXECUTION, execution_of
from passes.lower.backends import AUTO, backend_names, backends
from passes.lower.batch_shapes import forget_batch_shapes
from passes.lower.prove_lowering import prove_lowering
from passes.lower.rewrites.fuse_chains import FuseChains
from passes.pipeline.contract import PassContext

SIMULATED = "simulated"


@dataclass(frozen=True)
class Lower:
    """Replace simulated nodes by integer ones.

    backend: one of `passes.lower.backends`, or "auto", the first that this machine has of those that may be chosen so.
    chains: run whole blocks in one call, where the backend can; without, the graph shows every layer.
    """

    backend: str = AUTO
    chains: bool = True

    requires: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})
    provides: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise BackendError for options that do not fit."""
        check_fields(self, BackendError)
        check_backend(self.backend)

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Lower in place; returns how many layers run as integers. Raises BackendError where a backend cannot run."""
        name = resolved(self.backend)
        known = execution_of(graph_module)
        layers = [annotation_of(node).layer for node in _with_bits(graph_module)]
        for step in backends()[name].pipeline:
            if self.chains or not isinstance(step, FuseChains):
                step.apply(graph_module, context)
        forget_batch_shapes(graph_module)
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
        found = execution_of(graph_module)
        execution = {layer: found.get(layer, SIMULATED) for layer in dict.fromkeys([*layers, *known])}
        EXECUTION.write(graph_module, execution)
        context.note(backend=name, kernels=sorted(set(execution.values())))
        return sum(kernel != SIMULATED for kernel in execution.values())

    def prove(self, simulated: GraphModule, lowered: GraphModule, context: PassContext) -> tuple[float, float] | None:
        """How far the lowered graph is from the simulated one, see `prove_lowering`; None: nothing was lowered.

        Args:
            simulated: the graph before it was lowered.
            lowered: the same graph, lowered.
            context: what the pass was given.
        """
        if resolved(self.backend) == SIMULATED or LOWERED in facts_of(simulated):
            return None
        return prove_lowering(simulated, lowered, self, replace(self, chains=False), context.answers)


def execution_summary(execution: dict[str, str]) -> str:
    """One line: how many layers run as integers, and how; "simulated" where none does."""
    kernels = Counter(kernel for kernel in execution.values() if kernel != SIMULATED)
    if not kernels:
        return SIMULATED
    listed = ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())
    rest = "" if kernels.total() == len(execution) else "; the others simulated"
    return f"integer: {kernels.total()} of {len(execution)} layers ({listed}){rest}"


def check_backend(backend: str) -> None:
    """Raise BackendError for a name that no backend has."""
    if text("backend", backend, BackendError) not in backend_names():
        raise BackendError(f"no backend is called {backend!r}; there are {', '.join(backend_names())}")


def backend_summary(graph_module: GraphModule, backend: str) -> str:
    """One line on a simulated graph: how many of its layers a backend will run as integers, and which not.

    The kernels need not be on this machine, except to say what "auto" is.
    """
    name = resolved(backend) if backend == AUTO else backend
    runs = set(backends()[name].finds(graph_module))
    layers = {annotation_of(node).layer: node in runs for node in _with_bits(graph_module)}
    left = [layer for layer, is_integer in layers.items() if not is_integer]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    rest = f"; simulated: {', '.join(left[:3])}{more}" if left else ""
    return f"{name}: {len(layers) - len(left)} of {len(layers)} layers run as integers{rest}"


def resolved(backend: str) -> str:
    """What "auto" means here.

    Raises BackendError, saying what is missing, for a backend that cannot run; MissingExtraError without its extra.
    """
    if backend == AUTO:
        choices = [found for found in backends().values() if found.choice is not None]
        ordered = sorted(choices, key=lambda found: found.choice or 0)
        name = next(found.name for found in ordered if found.why_absent() is None)
        if (missing := ordered[0].why_absent()) is not None:
            warnings.warn(f"backend 'auto' is {name!r} here: {missing}", stacklevel=2)  # Python shows it once
        return name
    error = backends()[backend].why_absent()
    if error is not None:
        raise error
    return backend


def _with_bits(graph_module: GraphModule) -> list[Node]:
    return [node for node in nodes_with_role(graph_module) if annotation_of(node).has_bits]

"""What a backend runs as integers, as families of quantizers: chosen before anything is searched, not after.

    plan = restrict_families(PlanOperands(post_softmax="log2|twin-softmax"), "cpu-native")
    plan.post_softmax    # "log2<=4|twin-softmax"

What it runs is said by its own value (`passes.lower.backend.Backend`). Deliberately not done: layers that no quantizer
would help (grouped convolutions, softmax and layer norm under the fully quantized protocol);
`passes.lower.lower.backend_summary` counts them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxquant.errors import BackendError
from fxquant.graph.annotation import Allowed
from fxquant.quantizers.families import families_named, text_of
from passes.lower.backends import AUTO, backends
from passes.lower.lower import check_backend, resolved
from passes.search.plan_operands import PlanOperands


def restrict_families(plan: PlanOperands, backend: str) -> PlanOperands:
    """A plan with the families of each input that the backend runs, at the widths at which it runs them.

    Others have something take their place, where the backend says what. The kernels need not be on this machine, except
    to say what "auto" is. Raises BackendError for an edge whose families it runs at no width, with nothing instead.
    """
    check_backend(backend)
    found = backends()[resolved(backend) if backend == AUTO else backend]
    changes: dict[str, Any] = {}
    for edge in found.edges:
        text = getattr(plan, edge)
        if text is None:
            continue
        known = [(family, widest) for family, widest in families_named(text) if family in found.families]
        kept = [Allowed(family, min(widest, found.families[family])) for family, widest in known]
        if not kept and edge not in found.instead:
            raise BackendError(
                f"{found.name} cannot run the quantizers of {edge}={text!r} as integers at any width: take a recipe "
                f"with others, such as 'best', leave the backend out, or name some of {', '.join(found.families)}"
            )
        changes[edge] = text_of(kept) or found.instead[edge]
    return replace(plan, **changes)

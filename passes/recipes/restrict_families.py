"""What a backend runs as integers, as families of quantizers: chosen before anything is searched, not after.

    plan = restrict_families(PlanOperands(post_softmax="log2|twin-softmax"), "cpu-native")
    plan.post_softmax    # "log2<=4|twin-softmax"

Deliberately not done: layers that no quantizer would help (grouped convolutions, softmax and layer norm under the fully
quantized protocol); `passes.lower.lower.backend_summary` counts them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxquant.errors import BackendError
from fxquant.quantizers.families import families_named
from fxquant.runtime.integer.byte_codes import BYTE_FAMILIES, UNIFORM_FAMILIES
from passes.lower.lower import SIMULATED, check_backend, resolved
from passes.search.plan_operands import PlanOperands

_RUNS = {
    "cpu-native": (BYTE_FAMILIES, ("post_gelu", "post_softmax", "other", "image")),
    "cpu-onednn": (UNIFORM_FAMILIES, ("post_gelu", "other")),
    "cuda": (UNIFORM_FAMILIES, ("post_gelu", "other")),
    "openvino": (UNIFORM_FAMILIES, ("post_gelu", "post_softmax", "other", "image")),
}
"""By backend: families with their widest widths in bits, and the inputs of layers, as PlanOperands names them."""

_UNIFORM = {"post_gelu": "asymmetric", "post_softmax": "asymmetric", "other": "symmetric", "image": "symmetric"}
"""What takes the place of other families where only uniform ones run."""


def restrict_families(plan: PlanOperands, backend: str) -> PlanOperands:
    """A plan with the families of each input that the backend runs, at the widths at which it runs them.

    All but "cpu-native" run uniform quantizers only, which take the place of others. The kernels need not be on
    this machine, except to say what "auto" is. Raises BackendError for a backend of which this is not known, and for an
    input whose families "cpu-native" can run at no width.
    """
    check_backend(backend)
    name = resolved(backend) if backend == "auto" else backend
    if name == SIMULATED:
        return plan
    if name not in _RUNS:
        raise BackendError(f"which quantizers {name!r} runs as integers is not known; it is of {', '.join(_RUNS)}")
    runs, fields = _RUNS[name]
    changes: dict[str, Any] = {}
    for field in fields:
        text = getattr(plan, field)
        if text is None:
            continue
        kept = [(family, min(widest, runs[family])) for family, widest in families_named(text) if family in runs]
        if not kept and name == "cpu-native":
            raise BackendError(
                f"cpu-native cannot run the quantizers of {field}={text!r} as integers at any width: take a recipe "
                f"with others, such as 'best', leave the backend out, or name some of {', '.join(runs)}"
            )
        named = [family if widest == 8 else f"{family}<={widest}" for family, widest in kept]
        changes[field] = "|".join(named) or _UNIFORM[field]
    return replace(plan, **changes)

"""Backends that hand the whole model to another runtime, as its ONNX export: all alike but for the runtime."""

from __future__ import annotations

from collections.abc import Callable

from fxquant.errors import MissingExtraError
from fxquant.quantizers.families import UNIFORM_FAMILIES
from passes.lower.backend import Backend
from passes.lower.rewrites.call_runtime import CallRuntime
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, uniform_nodes


def whole_model(name: str, title: str, check: Callable[[], None], call: CallRuntime) -> Backend:
    """The backend of a runtime.

    Args:
        name: of the backend.
        title: what the runtime calls itself.
        check: raises MissingExtraError where the runtime is not installed.
        call: the pass that puts one call in the place of all nodes.
    """

    def why_absent() -> MissingExtraError | None:
        try:
            check()
        except MissingExtraError as error:
            return error
        return None

    return Backend(
        name=name,
        summary=f"what {title} makes of the exported model",
        families=UNIFORM_FAMILIES,
        edges=tuple(UNIFORM_INSTEAD),
        instead=UNIFORM_INSTEAD,
        finds=uniform_nodes,
        why_absent=why_absent,
        pipeline=(call,),
    )

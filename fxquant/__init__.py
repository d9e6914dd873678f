"""fxquant: mixed-precision post-training quantization of Vision Transformers on torch.fx.

    quantized = fxquant.compile(model, "W4A4", calibration=images)

What passes do is logged at the level INFO by the logger "fxquant", one line a pass as it ends, and one a layer that a
backend runs in a slower way: `logging.basicConfig(level=logging.INFO)` shows it.

Names are resolved on first use, so importing one pass does not import the whole house.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocators.problem.budget import Budget
    from fxquant import ranks
    from fxquant.data import embedded
    from fxquant.detection.compiled_detector import CompiledDetector, load_detector
    from fxquant.detection.session import DetectorSession, compile_detector
    from fxquant.graph.capture.tracing import trace
    from fxquant.session.compiled import Compiled, load
    from fxquant.session.model_frontier import frontier
    from fxquant.session.session import Session, compile
    from fxquant.synthesis.pictures import Synthesis
    from fxquant.synthesis.synthesize import synthesize
    from passes.pipeline.contract import PassContext
    from passes.pipeline.pipeline import Pipeline

__version__ = "0.2.0"
__all__ = [
    "Budget",
    "Compiled",
    "CompiledDetector",
    "DetectorSession",
    "PassContext",
    "Pipeline",
    "Session",
    "Synthesis",
    "compile",
    "compile_detector",
    "embedded",
    "frontier",
    "load",
    "load_detector",
    "ranks",
    "synthesize",
    "trace",
]

_MODULES = ("embedded", "ranks")
_HOMES = {
    "Budget": "allocators.problem.budget",
    "Compiled": "fxquant.session.compiled",
    "CompiledDetector": "fxquant.detection.compiled_detector",
    "DetectorSession": "fxquant.detection.session",
    "PassContext": "passes.pipeline.contract",
    "Pipeline": "passes.pipeline.pipeline",
    "Session": "fxquant.session.session",
    "Synthesis": "fxquant.synthesis.synthesize",
    "compile": "fxquant.session.session",
    "compile_detector": "fxquant.detection.session",
    "embedded": "fxquant.data.embedded",
    "frontier": "fxquant.session.model_frontier",
    "load": "fxquant.session.compiled",
    "load_detector": "fxquant.detection.compiled_detector",
    "ranks": "fxquant.ranks",
    "synthesize": "fxquant.synthesis.synthesize",
    "trace": "fxquant.graph.capture.tracing",
}


def _refuse_shadowed_packages() -> None:
    """Say so when a folder called `passes` or `allocators` hides ours.

    Raises ImportError naming the folder that shadows them.
    """
    from importlib.util import find_spec
    from pathlib import Path

    for name in ("passes", "allocators"):
        spec = find_spec(name)
        places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
        if not any((place / "py.typed").exists() for place in places):
            where = ", ".join(map(str, places)) or (spec.origin if spec else None) or "nowhere"
            raise ImportError(
                f"fxquant needs its own top-level package {name!r}, but that name resolves to {where}; "
                f"rename or move that folder, or take it off sys.path"
            )


_refuse_shadowed_packages()
logging.getLogger(__name__).addHandler(logging.NullHandler())  # who wants to read the log says where it goes


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fxquant' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if name in _MODULES else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""The whole model as ONNX Runtime runs its export; what it makes of each layer is asked of the optimized model."""

from __future__ import annotations

from fxquant.errors import MissingExtraError
from fxquant.export.onnxruntime_model import OnnxruntimeModel, check_onnxruntime
from fxquant.quantizers.families import UNIFORM_FAMILIES
from passes.lower.backend import Backend
from passes.lower.rewrites.call_runtime import CallRuntime
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, uniform_nodes


def _why_absent() -> MissingExtraError | None:
    try:
        check_onnxruntime()
    except MissingExtraError as error:
        return error
    return None


BACKEND = Backend(
    name="onnxruntime",
    summary="what ONNX Runtime makes of the exported model",
    families=UNIFORM_FAMILIES,
    edges=("post_gelu", "post_softmax", "other", "image"),
    instead=UNIFORM_INSTEAD,
    finds=uniform_nodes,
    why_absent=_why_absent,
    pipeline=(CallRuntime(OnnxruntimeModel, "onnxruntime_model", "onnxruntime"),),
)

"""The whole model as OpenVINO runs its ONNX export; what it makes of each layer is asked of the compiled model."""

from __future__ import annotations

from fxquant.errors import MissingExtraError
from fxquant.export.openvino_model import OpenvinoModel, check_openvino
from fxquant.quantizers.families import UNIFORM_FAMILIES
from passes.lower.backend import Backend
from passes.lower.rewrites.call_runtime import CallRuntime
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, uniform_nodes


def _why_absent() -> MissingExtraError | None:
    try:
        check_openvino()
    except MissingExtraError as error:
        return error
    return None


BACKEND = Backend(
    name="openvino",
    summary="what OpenVINO makes of the exported model",
    families=UNIFORM_FAMILIES,
    edges=("post_gelu", "post_relu", "post_softmax", "other", "image"),
    instead=UNIFORM_INSTEAD,
    finds=uniform_nodes,
    why_absent=_why_absent,
    pipeline=(CallRuntime(OpenvinoModel, "openvino_model", "any"),),
)

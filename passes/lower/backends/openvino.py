"""The whole model as OpenVINO runs its ONNX export; what it makes of each layer is asked of the compiled model."""

from __future__ import annotations

from fxquant.export.openvino_model import OpenvinoModel, check_openvino
from passes.lower.rewrites.call_runtime import CallRuntime
from passes.lower.whole_model import whole_model

BACKEND = whole_model("openvino", "OpenVINO", check_openvino, CallRuntime(OpenvinoModel, "openvino_model", "any"))

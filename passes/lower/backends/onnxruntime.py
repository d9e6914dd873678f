"""The whole model as ONNX Runtime runs its export; what it makes of each layer is asked of the optimized model."""

from __future__ import annotations

from fxquant.export.onnxruntime_model import OnnxruntimeModel, check_onnxruntime
from passes.lower.rewrites.call_runtime import CallRuntime
from passes.lower.whole_model import whole_model

_CALL = CallRuntime(OnnxruntimeModel, "onnxruntime_model", "onnxruntime")

BACKEND = whole_model("onnxruntime", "ONNX Runtime", check_onnxruntime, _CALL)

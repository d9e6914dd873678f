"""An exported model as a module that OpenVINO runs on the CPU, and which of its layers run as integers there.

OpenVINO decides by itself what runs as integers; `kernels` asks the compiled model, not the file. The rest runs in
float32: bfloat16, OpenVINO's default on processors with AMX, would move codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.errors import BackendError, MissingExtraError
from fxquant.graph.output_tree import Output

_PRODUCTS = {"FullyConnected": "linear", "MatMul": "matmul", "Convolution": "convolution"}
_BYTES = ("i8", "u8")
# What is not on bytes in float32: no bfloat16, no quantization that the model does not ask for.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def check_openvino() -> None:
    """Raises MissingExtraError without OpenVINO."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the backend needs OpenVINO: pip install 'fxquant[openvino]'") from error


class OpenvinoModel(nn.Module):
    """Runs an ONNX model, on `torch.get_num_threads()` threads. content: its bytes.

    Raises MissingExtraError without OpenVINO, BackendError where it cannot read or compile the model.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content
        # OpenVINO's own objects can neither be copied nor saved: made on first use, and for each number of threads.
        self._compiled: tuple[int, Any] | None = None

    def compiled(self) -> Any:
        """OpenVINO's compiled model for the present number of threads."""
        threads = torch.get_num_threads()
        if self._compiled is None or self._compiled[0] != threads:
            check_openvino()
            import openvino

            settings = {"INFERENCE_NUM_THREADS": threads, **_EXACT}
            core = openvino.Core()
            try:
                self._compiled = threads, core.compile_model(core.read_model(self.content), "CPU", settings)
            except RuntimeError as error:
                raise BackendError(f"OpenVINO cannot compile the model: {reason_of(error)}") from error
        return self._compiled[1]

    def forward(self, images_bchw: Tensor) -> Output:
        """float32 images (B, C, H, W) on the CPU to what the model returns, float32 where it is floating point."""
        if images_bchw.dtype != torch.float32 or images_bchw.device.type != "cpu":
            raise BackendError(
                f"images are {images_bchw.dtype} on {images_bchw.device}; OpenVINO reads torch.float32 on the CPU"
            )
        results = self.compiled()(images_bchw.detach().contiguous().numpy())
        found = tuple(torch.from_numpy(np.array(results[place])) for place in range(len(results)))
        return found[0] if len(found) == 1 else found

    def kernels(self) -> dict[str, str]:
        """By layer, for those whose product OpenVINO runs on bytes: "linear openvino", "matmul openvino", ..."""
        found = {}
        for operation in self.compiled().get_runtime_model().get_ops():
            about = {key: value.astype(str) for key, value in operation.get_rt_info().items()}
            kind = _PRODUCTS.get(about["layerType"])
            # The kernel's name ends in the type it computes with; `runtimePrecision` would be that of the weight alone.
            if kind is not None and about["primitiveType"].lower().endswith(_BYTES):
                # The nodes that were fused, the product first; they are called <layer>/<operator>.
                found[about["originalLayersNames"].partition("/")[0]] = f"{kind} openvino"
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


def reason_of(error: RuntimeError) -> str:
    """What OpenVINO says, in one line, without the places in its sources that it names first."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("Exception from ")]
    return " ".join(told or lines)

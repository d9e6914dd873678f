"""An exported model as a module that ONNX Runtime runs on the CPU, and which of its layers run as integers there.

ONNX Runtime decides by itself what runs as integers: `kernels` asks the model as it has optimized it, not the file. On
x86 processors without VNNI its products of 8-bit weights saturate in 16 bits (its option `session.x64quantprecision`
avoids that, and fails on weights with a scale per channel): the check of lowering refuses a model whose answers move.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import BackendError, MissingExtraError
from fxquant.graph.output_tree import Output

_PRODUCTS = {
    "MatMulIntegerToFloat": "linear",
    "QLinearMatMul": "linear",
    "QGemm": "linear",
    "QLinearConv": "convolution",
}


def check_onnxruntime() -> None:
    """Raises MissingExtraError without ONNX Runtime."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime is not installed: pip install 'fxquant[onnxruntime]'") from error


def session_of(content: bytes, optimized: Path | None = None) -> Any:
    """A session of ONNX Runtime for a file's bytes, on the CPU and on `torch.get_num_threads()` threads.

    optimized: where the model is written as it runs. Raises whatever ONNX Runtime raises.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def results_of(session: Any, images_bchw: Tensor) -> Output:
    """What a session gives for images, float32 (B, C, H, W) on the CPU: its one output, or all."""
    (given,) = session.get_inputs()
    pixels = images_bchw.detach().contiguous().numpy()
    found = tuple(torch.from_numpy(each) for each in session.run(None, {given.name: pixels}))
    return found[0] if len(found) == 1 else found


class OnnxruntimeModel(nn.Module):
    """Runs an ONNX model, on `torch.get_num_threads()` threads. content: its bytes.

    Raises MissingExtraError without ONNX Runtime, BackendError where it cannot read or run the model.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content
        # A session can neither be copied nor saved: made on first use, and for each number of threads.
        self._session: tuple[int, Any] | None = None

    def session(self, optimized: Path | None = None) -> Any:
        """ONNX Runtime's session for the present number of threads. optimized: where one that is made is written."""
        threads = torch.get_num_threads()
        if self._session is None or self._session[0] != threads:
            check_onnxruntime()
            try:
                self._session = threads, session_of(self.content, optimized)
            except Exception as error:  # ONNX Runtime's errors have no common class
                raise BackendError(f"ONNX Runtime cannot read the model: {str(error).splitlines()[0]}") from error
        return self._session[1]

    def forward(self, images_bchw: Tensor) -> Output:
        """float32 images (B, C, H, W) on the CPU to what the model returns, float32 where it is floating point."""
        if images_bchw.dtype != torch.float32 or images_bchw.device.type != "cpu":
            raise BackendError(
                f"images are {images_bchw.dtype} on {images_bchw.device}; ONNX Runtime reads torch.float32 on the CPU"
            )
        return results_of(self.session(), images_bchw)

    def kernels(self) -> dict[str, str]:
        """By layer, for those whose product ONNX Runtime runs on bytes: "linear onnxruntime", ..."""
        import onnx

        self._session = None  # one that has been made does not say what it runs
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "optimized.onnx"
            self.session(written)
            graph = onnx.load(written).graph
        constants = {initializer.name for initializer in graph.initializer}
        found = {}
        for node in graph.node:
            kind = _PRODUCTS.get(node.op_type)
            if kind is not None:
                right = node.input[3 if node.op_type.startswith("QLinear") else 1]
                kind = kind if right in constants else "matmul"
                found[node.name.partition("/")[0]] = f"{kind} onnxruntime"
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

"""An exported model in ONNX Runtime, held against the known answers of the model that it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError, MissingExtraError
from fxquant.runtime.known_answers import KnownAnswers


def check_onnxruntime() -> None:
    """Raises MissingExtraError without ONNX Runtime."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "a check of the exported file needs ONNX Runtime: pip install onnxruntime, or leave the check out"
        ) from error


def check_in_onnxruntime(content: bytes, answers: KnownAnswers, images_bchw: Tensor) -> float:
    """Run a file's bytes on `images_bchw`, those of the known answers; returns the relative difference.

    Args:
        content: the bytes of an ONNX file.
        answers: what the model gave for these images.
        images_bchw: float32 (2, C, H, W), the images of the known answers.

    Raises MissingExtraError without ONNX Runtime; ExportError where it cannot run the file, or gives other answers.
    """
    check_onnxruntime()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        output = _run(session, images_bchw)
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise ExportError(f"ONNX Runtime cannot run the exported model: {str(error).splitlines()[0]}") from error
    found = answers.difference(output)
    if not found <= answers.tolerance:
        raise ExportError(
            answers.described(output, found, "ONNX Runtime, running the exported model,")
            + ": export again with weight_type='int8', and try another version of onnxruntime"
        )
    return found


def _run(session: Any, images_bchw: Tensor) -> Tensor:
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: images_bchw.numpy()})[0])

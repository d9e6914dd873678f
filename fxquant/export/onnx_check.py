"""An exported model in ONNX Runtime, held against the known answers of the model that it was made from."""

from __future__ import annotations

from torch import Tensor

from fxquant.errors import ExportError
from fxquant.export.onnxruntime_model import check_onnxruntime, results_of, session_of
from fxquant.runtime.known_answers import KnownAnswers


def check_in_onnxruntime(content: bytes, answers: KnownAnswers, images_bchw: Tensor) -> float:
    """Run a file's bytes on `images_bchw`, those of the known answers; returns the relative difference.

    Args:
        content: the bytes of an ONNX file.
        answers: what the model gave for these images.
        images_bchw: float32 (2, C, H, W), the images of the known answers.

    Raises MissingExtraError without ONNX Runtime; ExportError where it cannot run the file, or gives other answers.
    """
    check_onnxruntime()
    try:
        output = results_of(session_of(content), images_bchw)
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise ExportError(f"ONNX Runtime cannot run the exported model: {str(error).splitlines()[0]}") from error
    found = answers.difference(output)
    if not found <= answers.tolerance:
        raise ExportError(
            answers.described(output, found, "ONNX Runtime, running the exported model,")
            + ": export again with weight_type='int8', and try another version of onnxruntime"
        )
    return found

"""The one call for detectors: a detector, a budget and pictures in, a quantized detector out.

quantized = fxquant.compile_detector(detector, "W6A6", calibration=pictures)
quantized([picture])                    # [{"boxes": ..., "labels": ..., "scores": ...}]
quantized.save("detector.fxq")
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from allocators.allocator import Allocator
from fxquant.checks.arguments import whole
from fxquant.checks.hints import checked
from fxquant.detection.compiled_detector import REGIONS, CompiledDetector
from fxquant.detection.composite import Composite, Parts, objective_of, packed_images
from fxquant.errors import BY_ARGUMENT, CalibrationError, OptionError
from fxquant.graph.nodes import device_of
from fxquant.sensitivity.objective import AUTO
from fxquant.session.options import SessionOptions
from fxquant.session.session import Session
from passes.options import documented


class DetectorSession:
    """A detector with its calibration pictures and a recipe, to be compiled for any number of budgets."""

    @checked(OptionError, **BY_ARGUMENT)
    @documented(SessionOptions)
    def __init__(
        self, detector: nn.Module, calibration: Sequence[Tensor], regions: int = REGIONS,
        **options: Unpack[SessionOptions],
    ) -> None:  # fmt: skip
        """Find the regions in the pictures, with the float detector; nothing is traced before `compile`.

        Args:
            detector: a GeneralizedRCNN of torchvision, such as FasterRCNN or MaskRCNN; it is not changed.
            calibration: pictures (C, H, W), float from 0 to 1, each of its own size, on any device; 32 are usual. The
                detector's own transform resizes and normalises them; they are padded to the largest height and width
                among them.
            regions: how many regions of an image calibrate the box head, and are counted in what an image costs.
        {options}

        Raises ModelError for another model, CalibrationError, OptionError, PipelineError.
        """
        whole("regions", regions, OptionError, least=1, most=1000)
        self.parts = Parts.of(detector, regions)
        if isinstance(calibration, Tensor) or not len(calibration):
            raise CalibrationError("a detector is calibrated on a list of pictures (C, H, W); 32 are usual")
        dtype = next((weight.dtype for weight in detector.parameters() if weight.is_floating_point()), torch.float32)
        pictures = self.parts.checked_pictures(calibration, dtype, CalibrationError)
        pictures = [picture.to(device_of(detector)) for picture in pictures]
        self.detector, self.regions = detector, regions
        runs = copy.deepcopy(detector).eval()  # pools of torchvision keep something of the first picture they see
        planes = packed_images(runs, self.parts, pictures)
        model = Composite(runs, self.parts).eval()
        with torch.no_grad():
            output = model(planes[:1])
        if options.get("objective", AUTO) == AUTO:
            options["objective"] = objective_of(output)
        options["card"] = {"regions": regions, **(options.get("card") or {})}
        self.session = Session(model, planes, **options)

    def compile(self, budget: Any, allocator: Allocator | None = None) -> CompiledDetector:
        """The detector quantized within one budget; calibrates and searches on the first call only.

        Args:
            budget: what `fxquant.compile` takes, for all parts together.
            allocator: what chooses the bits; None takes the recipe's own.

        Raises as `fxquant.compile` does.
        """
        return CompiledDetector(self.detector, self.session.compile(budget, allocator), self.regions)


@checked(OptionError, **BY_ARGUMENT)
@documented(SessionOptions)
def compile_detector(
    detector: nn.Module,
    budget: Any,
    *,
    calibration: Sequence[Tensor],
    allocator: Allocator | None = None,
    regions: int = REGIONS,
    **options: Unpack[SessionOptions],
) -> CompiledDetector:
    """Quantize a detector, with backbone, proposal network and heads as one model under one budget.

    Args:
        detector: a GeneralizedRCNN of torchvision, such as FasterRCNN or MaskRCNN; it is not changed.
        budget: what `fxquant.compile` takes, for all parts together; of one image with its regions.
        calibration: pictures (C, H, W), float from 0 to 1, each of its own size; 32 are usual.
        allocator: what chooses bits; None for the recipe's own.
        regions: how many regions of an image calibrate the box head, and are counted in what an image costs.
        {options}

    Raises ModelError for another model, and as `fxquant.compile` does.
    """
    return DetectorSession(detector, calibration, regions, **options).compile(budget, allocator)

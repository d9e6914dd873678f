"""A contact sheet, so that a person can look at calibration images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fxquant.artefact.container import write_file

_GAP = 2


def write_sheet(path: Path, images_bchw: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """All images side by side in one PNG. images: float (B, 1 or 3, H, W), normalised with mean and std.

    Args:
        path: where the PNG is written.
        images_bchw: float (B, 1 or 3, H, W), normalised.
        mean, std: per channel, what the images were normalised with.

    Raises ArtefactError where the file cannot be written.
    """
    scale, shift = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (std, mean))
    pixels = ((images_bchw.float().cpu() * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    height, width = pixels.shape[1] + _GAP, pixels.shape[2] + _GAP
    columns = math.ceil(math.sqrt(len(pixels)))
    sheet = Image.new("RGB", (columns * width - _GAP, math.ceil(len(pixels) / columns) * height - _GAP), "white")
    for index, picture in enumerate(pixels.numpy()):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(picture), (column * width, row * height))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_file(path, content.getvalue())

"""Devices that torch computes on, by the names that it gives them: cpu, cuda:0."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.checks.arguments import text
from fxquant.errors import OptionError


def device_named(name: Any) -> torch.device:
    """The device of this name, with its number where it has one. Raises OptionError where it is none, or not here."""
    try:
        # Statistics are summed in float64, which not every device has.
        device = torch.empty(0, dtype=torch.float64, device=text("device", name, OptionError)).device
    except Exception as error:  # torch raises AssertionError, RuntimeError, TypeError or NotImplementedError
        if isinstance(error, OptionError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(f"device {name!r:.40} cannot be used: {reason}; there are {', '.join(devices())}") from error
    if device.type == "meta":
        raise OptionError(f"device 'meta' has no values to compute with; there are {', '.join(devices())}")
    return device


def devices() -> dict[str, str]:
    """What there is here: by name, what it is."""
    found = {"cpu": "the processor"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory >> 30} GiB"
    return found

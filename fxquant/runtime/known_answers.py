"""Known answers: what a model gave, in float and simulated, for images that anybody can make again.

The images are smooth noise from a seed, by numpy's legacy generator, whose numbers are frozen, and additions and
multiplications alone: no version of any library and no machine changes them. They are coarse random grids of two sizes,
interpolated, so that they have shapes of several sizes and scores differ between them. Where the model was calibrated
on images, they are clamped to the range of those, since a model that begins with a logarithm takes no others.

Whatever else runs the model (integer kernels, another runtime, another machine) is held against the simulated answers:

    sqrt(mean (found - expected)^2)  <=  tolerance (root mean square of expected, less its mean over classes)

(of one number per image, less nothing: there is no other to compare it with). Of a model that returns several tensors,
every tensor of floating-point numbers is held against its own answers so, and the one that is furthest off counts.

Codes at the edge between two levels fall either way with the rounding of float32, and what comes after them moves with
them. How far depends on the model: one code in 100,000 that falls the other way moves scores of a ViT at 3 bits by a
tenth. So that is measured with the answers, `rounding`, by a run in which every node's output is off by JITTER, and the
tolerance is MARGIN times as much, at least TOLERANCE and at most LOOSEST. A kernel, a weight or a shape that is wrong
is off by as much as two different images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.checks.finite import is_finite
from fxquant.checks.torch_modes import usual
from fxquant.checks.untrusted import field
from fxquant.errors import ArtefactError, CalibrationError
from fxquant.graph.nodes import device_of, image_of
from fxquant.graph.output_tree import Output, leaves

SEED = 15
COUNT = 2
TOLERANCE, MARGIN, LOOSEST = 0.05, 2.0, 0.7
# Of a tensor's root mean square. Float32 rounds ten to a hundred times finer; with this much, enough codes fall the
# other way that every draw gives nearly the same figure, where a finer one often meets none and a kernel then one.
JITTER = 1e-5
LARGEST = 1024  # numbers that are kept of one image's output
_GRIDS = ((3, 1.2), (8, 0.8))  # points along a side, and the height of the noise


Range = tuple[float, float]
"""The least and the largest value that pixels of an image may have."""


def answer_images(image_shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """Two images of a shape (C, H, W), float32 (2, C, H, W), about as large as normalised pictures are."""
    random = np.random.RandomState(seed)
    channels, height, width = image_shape
    images = np.zeros((COUNT, channels, height, width))
    for points, amplitude in _GRIDS:
        grid = random.random_sample((COUNT, channels, points, points)) * 2 - 1
        images += 2 * amplitude * _between(_between(grid, height, 2), width, 3)
    return torch.from_numpy(images.astype(np.float32))


def _between(grid: np.ndarray[Any, Any], size: int, axis: int) -> np.ndarray[Any, Any]:
    """The grid at `size` places along an axis, linearly between its points."""
    places = np.arange(size) * (grid.shape[axis] - 1) / max(size - 1, 1)
    low = np.minimum(places.astype(np.int64), grid.shape[axis] - 2)
    share = (places - low).reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
    found: np.ndarray[Any, Any] = grid.take(low, axis) * (1 - share) + grid.take(low + 1, axis) * share
    return found


class _Jittered(Interpreter):
    """Runs a graph with every node's output off by random numbers of JITTER, as coarse rounding would have it."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.generator = torch.Generator().manual_seed(SEED)

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if not (node.op.startswith("call") and isinstance(result, Tensor) and result.is_floating_point()):
            return result
        noise = torch.randn(result.shape, generator=self.generator, dtype=result.dtype).to(result.device)
        return result + JITTER * result.square().mean().sqrt() * noise


@dataclass(frozen=True)
class KnownAnswers:
    """Outputs for `answer_images`, float32 (2, n), n at most LARGEST: of larger outputs evenly spaced numbers.

    Args:
        simulated: the answers of the quantized model, simulated.
        float_model: of the model that was compiled; None where it is not known.
        seed: what `answer_images` made the images from.
        rounding: how far the quantized model's outputs move, relative, where every node's output moves by JITTER.
        pixels: what the images are clamped to, None where they are not.
        parts: how many of the n numbers are of each tensor that the model returns; empty: all are of one.
    """

    simulated: Tensor
    float_model: Tensor | None = None
    seed: int = SEED
    rounding: float = 0.0
    pixels: Range | None = None
    parts: tuple[int, ...] = ()

    @classmethod
    @usual()
    @torch.no_grad()
    def measured(
        cls, simulated: GraphModule, float_output: Output | None = None, pixels: Range | None = None
    ) -> KnownAnswers:
        """Run a simulated graph on the images, where it is, once as it is and once with every node off by JITTER.

        Args:
            simulated: the graph; it is not changed.
            float_output: of the model that was compiled, for `answer_images_for(simulated, pixels=pixels)`.
            pixels: what the images are clamped to.

        Raises CalibrationError where the output is not finite: nothing could be held against it.
        """
        images = answer_images_for(simulated, pixels=pixels).to(device_of(simulated))
        found = replace(cls.of(simulated(images), float_output), pixels=pixels)
        if not is_finite(found.simulated):
            raise CalibrationError(
                "the quantized model gives NaN or infinite numbers for smooth noise in the range of the calibration "
                "images, so nothing could prove that it is lowered, saved and exported right: let its forward take "
                "every image (clamp before a logarithm or a root)"
            )
        rounding = found.difference(_Jittered(simulated).run(images))
        return replace(found, rounding=min(rounding, LOOSEST))

    @property
    def tolerance(self) -> float:
        """Relative difference up to which something gives these answers."""
        return min(max(TOLERANCE, MARGIN * self.rounding), LOOSEST)

    @classmethod
    def of(cls, simulated_output: Output, float_output: Output | None = None) -> KnownAnswers:
        """From whole outputs for `answer_images()`."""
        simulated, parts = _kept(simulated_output)
        return cls(simulated, None if float_output is None else _kept(float_output)[0], parts=parts)

    def images_for(self, graph_module: GraphModule) -> Tensor:
        """The images (2, C, H, W) in the shape and dtype that a graph takes."""
        return answer_images_for(graph_module, self.seed, self.pixels)

    def difference(self, output: Any) -> float:
        """How far an output for the images is from the simulated answer, relative; infinite where nothing fits."""
        try:
            found, parts = _kept(output)
        except (TypeError, ValueError):
            return math.inf
        if found.shape != self.simulated.shape or parts != self.parts:
            return math.inf
        sizes = list(parts) or [found.shape[1]]
        pairs = zip(torch.split(found.double(), sizes, 1), torch.split(self.simulated.double(), sizes, 1), strict=True)
        return max(_relative(*pair) for pair in pairs)

    def described(self, output: Any, found: float, what: str) -> str:
        """Found, expected and tolerance, in words.

        Args:
            output: what the model gave for the images.
            found: its relative difference from the known answers.
            what: the model, as the subject of the sentence.
        """
        tensor = next((leaf for leaf in leaves(output) if isinstance(leaf, Tensor)), None)
        shown = type(output).__name__ if tensor is None else _first(tensor)
        return (
            f"{what} does not give the model's known answers: relative difference {found:.3g}, tolerance "
            f"{self.tolerance:.3g}; for the first image it gives {shown}, expected {_first(self.simulated)}"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        known = None if self.float_model is None else self.float_model.tolist()
        return {
            "seed": self.seed,
            "rounding": self.rounding,
            "pixels": None if self.pixels is None else list(self.pixels),
            "simulated": self.simulated.tolist(),
            "float": known,
            **({"parts": list(self.parts)} if self.parts else {}),
        }

    @classmethod
    def from_json(cls, document: Any) -> KnownAnswers:
        """Inverse of `to_json`; raises ArtefactError for anything else."""
        where = "the known answers"
        seed = field(document, "seed", int, where)
        if not 0 <= seed < 2**32:
            raise ArtefactError(f"{where} have the seed {seed}, which is not from 0 to 2**32 - 1")
        rounding = field(document, "rounding", float, where)
        if not 0 <= rounding <= LOOSEST:
            raise ArtefactError(f"{where} move by {rounding} with rounding, which is not from 0 to {LOOSEST}")
        pixels = document.get("pixels")
        is_range = type(pixels) is list and len(pixels) == 2 and all(type(end) is float for end in pixels)
        if pixels is not None and not (is_range and -math.inf < pixels[0] <= pixels[1] < math.inf):
            raise ArtefactError(f"{where} have pixels from {pixels!s:.80}, which is no range of two numbers")
        simulated = _rows(field(document, "simulated", list, where), where)
        given = document.get("float")
        known = None if given is None else _rows(given, where)
        if known is not None and known.shape != simulated.shape:
            raise ArtefactError(f"{where} of the float model have another shape than those of the simulated one")
        parts = document.get("parts", [])
        if type(parts) is not list or not all(type(part) is int and part > 0 for part in parts):
            raise ArtefactError(f"{where} have parts that are no whole numbers over 0")
        if parts and sum(parts) != simulated.shape[1]:
            raise ArtefactError(f"{where} have {simulated.shape[1]} numbers, and their parts have {sum(parts)}")
        return cls(simulated, known, seed, rounding, None if pixels is None else (pixels[0], pixels[1]), tuple(parts))


def answer_images_for(graph_module: GraphModule, seed: int = SEED, pixels: Range | None = None) -> Tensor:
    """`answer_images` in the shape and dtype that a graph takes, (2, C, H, W).

    Args:
        graph_module: the graph.
        seed: the seed that the noise is drawn from.
        pixels: what the images are clamped to; None: they are not.
    """
    image = image_of(graph_module).meta["tensor_meta"]
    images = answer_images(tuple(image.shape[1:]), seed).to(image.dtype)
    return images if pixels is None else images.clamp(*pixels)


def range_of(images_bchw: Tensor) -> Range | None:
    """The least and the largest pixel of some images; None where all are equal, since answers need two images."""
    least, largest = float(images_bchw.min()), float(images_bchw.max())
    return (least, largest) if least < largest else None


def _kept(output: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The numbers that are kept, and how many are of each tensor where there are several.

    Raises TypeError for what is no tensor, ValueError for tensors that are not of `COUNT` images.
    """
    tensors = leaves(output)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"a {type(output).__name__} has no answers")
    floats = [tensor for tensor in tensors if tensor.is_floating_point()] or list(tensors)
    by_image = [tensor for tensor in floats if tensor.numel() % COUNT == 0 and (tensor.numel() or len(floats) == 1)]
    if not by_image:
        raise ValueError(f"no tensor has as many numbers for each of {COUNT} images")
    most = max(LARGEST // len(by_image), 1)
    rows = [tensor.detach().cpu().float().reshape(COUNT, -1) for tensor in by_image]
    rows = [part[:, :: -(-part.shape[1] // most)] if part.shape[1] else part for part in rows]
    parts = tuple(part.shape[1] for part in rows) if len(tensors) > 1 else ()
    return torch.cat(rows, 1).contiguous(), parts


def _relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference of (2, n), relative to what differs between the n numbers."""
    middle = expected.mean(1, keepdim=True) if expected.shape[1] > 1 else 0
    spread = float((expected - middle).square().mean().sqrt())
    spread = max(spread, 1e-4 * float(expected.abs().max()), 1e-12)  # of outputs that are all equal
    relative = float((found - expected).square().mean().sqrt()) / spread
    return relative if math.isfinite(relative) else math.inf


def _rows(values: Any, where: str) -> Tensor:
    is_rows = type(values) is list and len(values) == COUNT and all(type(row) is list for row in values)
    if not is_rows or not 0 < len(values[0]) <= LARGEST or len({len(row) for row in values}) > 1:
        raise ArtefactError(f"{where} are not {COUNT} rows of 1 to {LARGEST} numbers")
    numbers = [number for row in values for number in row]
    if not all(type(number) is float and math.isfinite(number) for number in numbers):
        raise ArtefactError(f"{where} have values that are no finite numbers")
    return torch.tensor(values, dtype=torch.float32)


def _first(output: Tensor) -> str:
    return "[" + ", ".join(f"{float(value):.4g}" for value in output.flatten()[:4]) + ", ...]"

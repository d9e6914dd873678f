"""The border of a quantized model: what it is called with, checked before anything runs, alike for every backend.

- Images that are no tensor, or of another shape, dtype, layout or device than the model takes, are refused.
- An image with a pixel that is NaN or infinite has NaN as its scores, as in a float model: codes cannot say that there
  was no number. The other images of its batch have the scores they have without it.
- A batch of no images has no scores, a tensor (0, classes).
- Autocast has no say: codes are of the numbers that the model was calibrated in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from fxquant.checks.torch_modes import without_autocast
from fxquant.errors import InputError
from fxquant.graph.nodes import image_of, shape_of
from fxquant.graph.output_tree import Output, leaves

_ONE_THREAD = 32_767  # elements of which torch (at::internal::GRAIN_SIZE) makes no parts for several threads


@dataclass(frozen=True)
class Border:
    """What a graph takes and gives.

    Args:
        image_shape: channels, height and width of one image.
        dtype: the dtype that images must have.
        by_image: of every tensor of the result, whether its first dimension is the batch.
        constant: of every tensor of the result, whether it is the same for all images.
        others: in words, what other sizes graphs beside this one take; for messages.
    """

    image_shape: tuple[int, ...]
    dtype: torch.dtype
    by_image: tuple[bool, ...]
    constant: tuple[bool, ...]
    others: str = ""

    @classmethod
    def of(cls, graph_module: GraphModule, others: str = "") -> Border:
        """The border of a traced graph. others: sizes that graphs beside it take, in words."""
        image = image_of(graph_module).meta["tensor_meta"]
        results: Any = leaves(graph_module.graph.output_node().args[0])
        shapes = [shape_of(result) for result in results]
        constant = tuple(result.op == "get_attr" for result in results)
        by_image = tuple(
            shape is not None and shape[:1] == image.shape[:1] and not same
            for shape, same in zip(shapes, constant, strict=True)
        )
        return cls(tuple(image.shape[1:]), image.dtype, by_image, constant, others)

    def run(self, model: Callable[[Tensor], Output], images_bchw: Any, device: torch.device | None) -> Output:
        """What the model gives for checked images; see the module for NaN and for no images.

        Args:
            model: the function from images to what the graph returns.
            images_bchw: (B, C, H, W), of the border's dtype; anything else is refused.
            device: where the images have to be; None: anywhere.

        Raises InputError, also a TypeError for what is no tensor.
        """
        self.check(images_bchw, device)
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or isinstance(images_bchw, FakeTensor):
            return model(images_bchw)  # without numbers there is nothing to look at
        with without_autocast():
            return self._run(model, images_bchw.contiguous())

    def _run(self, model: Callable[[Tensor], Output], images: Tensor) -> Output:
        is_whole = all(batched or same for batched, same in zip(self.by_image, self.constant, strict=True))
        if len(images) == 0 and is_whole:
            return self._by_image(model(images.new_zeros((1, *self.image_shape))), lambda result: result[:0])
        # One sum is finite only if all pixels are; it takes a hundredth of the time that looking at each of them does.
        if math.isfinite(_sum(images.detach())):
            return model(images)
        is_finite = torch.isfinite(images).flatten(1).all(1)
        if bool(is_finite.all()):  # the sum was too large
            return model(images)
        refusal = f"image {int((~is_finite).nonzero()[0])} has NaN or infinite pixels"
        if not is_whole:
            raise InputError(refusal)
        output = model(torch.where(is_finite.view(-1, 1, 1, 1), images, 0))

        def without(result: Tensor) -> Tensor:
            if not result.is_floating_point():
                raise InputError(refusal)
            return torch.where(is_finite.view(-1, *[1] * (result.ndim - 1)), result, math.nan)

        return self._by_image(output, without)

    def _by_image(self, output: Output, change: Callable[[Tensor], Tensor]) -> Output:
        """The output with what depends on the images changed."""
        if isinstance(output, Tensor):
            return change(output)
        pairs = zip(output, self.constant, strict=True)
        return tuple(result if same else change(result) for result, same in pairs)

    def check(self, images_bchw: Any, device: torch.device | None) -> None:
        """Raise InputError unless images are as the model takes them; values are not looked at."""
        wanted = f"a tensor (B, {', '.join(map(str, self.image_shape))}) of {self.dtype}"
        if not isinstance(images_bchw, Tensor):
            raise InputError.for_type(
                f"the model takes images, {wanted}, not a {type(images_bchw).__name__}: make a "
                "tensor of an array with torch.from_numpy(array)"
            )
        if images_bchw.layout != torch.strided:
            raise InputError(
                f"images are of layout {images_bchw.layout}; the model takes {wanted}: give images.to_dense()"
            )
        if images_bchw.ndim != 4 or tuple(images_bchw.shape[1:]) != self.image_shape:
            one = ": add the batch, images[None]" if tuple(images_bchw.shape) == self.image_shape else ""
            wanted += f", and images of {self.others}" if self.others else ""
            resize = one or ": resize the images, or compile with image_sizes=[(height, width)] that name this size too"
            raise InputError(f"images have shape {tuple(images_bchw.shape)}; the model takes {wanted}{resize}")
        if images_bchw.dtype != self.dtype:
            raise InputError(
                f"images are {images_bchw.dtype}; the model takes {wanted}: preprocess them as for calibration, then "
                f"images.to({self.dtype})"
            )
        if device is not None and images_bchw.device != device:
            raise InputError(
                f"images are on {images_bchw.device}, and the model is on {device}: give images.to('{device}')"
            )


def images_of(given: Any, named: Mapping[str, Any], name: str) -> Any:
    """The images of a call: its first argument, or what it gives by the name of the images.

    Args:
        given: the first argument, None where there is none.
        named: what is given by name.
        name: what the original model calls the images.

    Raises InputError, which is a TypeError too, for anything else by name.
    """
    if given is None and list(named) == [name]:
        return named[name]
    if named:
        raise InputError.for_type(
            f"the model takes images alone, as its first argument or as '{name}', and was given "
            f"{', '.join(map(repr, named))} by name: what is the same for all images is said when a model is compiled, "
            f"inputs={{...}}"
        )
    return given


def _sum(images: Tensor) -> float:
    """Sum of all pixels. On a processor by parts that torch adds up on one thread: threads of its own would look for
    more to do for milliseconds afterwards, and keep those of the kernels from running."""
    parts = torch.split(images.view(-1), _ONE_THREAD) if images.is_cpu else (images,)
    return sum(float(part.sum()) for part in parts)

"""A detector as one graph: maps, proposals' scores and all heads, on regions that the float detector has found.

A detector of torchvision (GeneralizedRCNN) cannot be traced whole: which boxes survive is decided by values. What is
worth quantizing can: backbone and pyramid, the proposal network's convolutions, and the heads that read regions. The
module here calls these on one tensor, images with regions (`fxquant.detection.regions`), and returns all that a
detector's own code reads. So it is one model for every pass, recipe, allocator and budget, and what a wrong map does to
boxes, classes and masks is known to all that ask what an error costs.

`Parts` names the modules in the detector's own tree, finds the regions, and says where in the output what stands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fxquant.checks.finite import is_finite
from fxquant.detection.cascade import CascadeRoIHeads
from fxquant.detection.regions import Planes, RegionPool
from fxquant.errors import CalibrationError, FxQuantError, ModelError
from fxquant.graph.output_tree import flatten
from fxquant.sensitivity.objective import FEATURES, Objective, Outputs

BOX, MASK, KEYPOINT = "box", "mask", "keypoint"
_DETECTED = 8  # regions of masks and key points in an image: where boxes were found


@dataclass(frozen=True)
class Head:
    """What a detector does with regions.

    Args:
        kind: "box", "mask" or "keypoint".
        pool: path of the module that is called with the regions.
        modules: paths of what reads their features, one after another.
        count: how many regions of an image calibrate it.
    """

    kind: str
    pool: str
    modules: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Parts:
    """The parts of a detector that are quantized.

    Args:
        heads: what reads regions; the first makes boxes.
        colours: channels of an image.
    """

    heads: tuple[Head, ...]
    colours: int

    @classmethod
    def of(cls, detector: nn.Module, regions: int) -> Parts:
        """The parts of a GeneralizedRCNN.

        regions: how many regions of an image calibrate the box head. Raises ModelError for any other model.
        """
        if not isinstance(detector, GeneralizedRCNN):
            raise ModelError(
                f"a {type(detector).__name__} is no detector of torchvision's GeneralizedRCNN, such as FasterRCNN or "
                f"MaskRCNN: compile its backbone, fxquant.compile(detector.backbone, ...), and put the result in its "
                f"place"
            )
        heads = detector.roi_heads
        paths = heads.paths() if isinstance(heads, CascadeRoIHeads) else _paths(heads)
        found = tuple(Head(*row, regions if row[0] == BOX else _DETECTED) for row in paths)
        return cls(found, len(detector.transform.image_mean))

    @property
    def planes(self) -> Planes:
        """How regions ride along with images."""
        return Planes(self.colours, tuple(head.count for head in self.heads))

    def checked_pictures(
        self, pictures: Any, dtype: torch.dtype, error: type[FxQuantError], device: torch.device | None = None
    ) -> list[Tensor]:
        """The pictures as a list.

        Args:
            pictures: each (C, H, W), of its own size.
            dtype: that they must have.
            error: what is raised for anything else, and for pictures without pixels or with values that are not finite.
            device: where they must be; None: anywhere.
        """
        wanted = f"a detector takes a list of finite pictures ({self.colours}, H, W) of {dtype}"
        if not isinstance(pictures, Sequence | Tensor):
            raise error.for_type(f"{wanted}, not a {type(pictures).__name__}")
        for index, picture in enumerate(pictures):
            if not isinstance(picture, Tensor):
                raise error.for_type(f"{wanted}, and picture {index} is a {type(picture).__name__}")
            if picture.ndim != 3 or len(picture) != self.colours or not picture.numel() or picture.dtype != dtype:
                raise error(f"{wanted}, and picture {index} is {tuple(picture.shape)} of {picture.dtype}")
            if device is not None and picture.device != device:
                raise error(
                    f"picture {index} is on {picture.device}, and the detector is on {device}: give "
                    f"picture.to('{device}')"
                )
            if not is_finite(picture):
                raise error(f"{wanted}, and picture {index} has NaN or infinite pixels")
        return list(pictures)

    @torch.no_grad()
    def found_by(self, detector: nn.Module, picture: Tensor) -> list[Tensor]:
        """For each head (count, 4), the regions that the detector cuts from a picture, the most certain first.

        Fewer than there are places are taken again from the start; where a head is given none, it has the first one's.

        picture: float (C, H, W), as the detector is called with. Raises CalibrationError where it proposes nothing.
        """
        called: dict[str, Tensor] = {}

        def keep(path: str, given: tuple[Any, ...]) -> None:
            called[path] = given[1][0]

        with ExitStack() as hooks:
            for path in {head.pool for head in self.heads}:
                module = detector.get_submodule(path)
                hook = module.register_forward_pre_hook(lambda _, given, path=path: keep(path, given))
                hooks.callback(hook.remove)
            detector([picture])
        proposed = called[self.heads[0].pool]
        if not len(proposed):
            raise CalibrationError("the detector proposes no region in a calibration picture: check its weights")
        chosen = [called[head.pool] if len(called[head.pool]) else proposed for head in self.heads]
        pairs = zip(chosen, self.heads, strict=True)
        return [found[torch.arange(head.count) % len(found)] for found, head in pairs]


def _paths(heads: nn.Module) -> list[tuple[str, str, tuple[str, ...]]]:
    """Of torchvision's RoIHeads: each head's kind, its pool, and what reads its features."""
    found = []
    for kind in (BOX, MASK, KEYPOINT):
        pool, *modules = (f"{kind}_{part}" for part in ("roi_pool", "head", "predictor"))
        if all(getattr(heads, name, None) is not None for name in (pool, *modules)):
            found.append((kind, f"roi_heads.{pool}", tuple(f"roi_heads.{name}" for name in modules)))
    return found


def maps_of(output: Any) -> dict[str, Tensor]:
    """Maps by name; a backbone of one map gives it without."""
    return OrderedDict([("0", output)]) if isinstance(output, Tensor) else output


class Composite(nn.Module):
    """A detector's parts, called on images with regions; see the module.

    Args:
        detector: its modules are this module's own.
        parts: which they are.

    forward: planes (B, colours + 1, H, W) to a dict: "maps", by name (B, C, h, w), finest first; "scores" and "deltas",
    lists of what the proposal network says of each map; "features", of each head's regions (B K, C, h, w); "heads",
    what each of them gives.
    """

    takes_pictures: ClassVar[bool] = False  # but planes: a crop of one would have the regions of another

    def __init__(self, detector: Any, parts: Parts) -> None:
        super().__init__()
        self.backbone, self.rpn_head = detector.backbone, detector.rpn.head
        self.heads = nn.ModuleList(
            nn.Sequential(OrderedDict((path.replace(".", "_"), detector.get_submodule(path)) for path in head.modules))
            for head in parts.heads
        )
        self.planes = parts.planes
        self.pools = [RegionPool.of(detector.get_submodule(head.pool)) for head in parts.heads]

    def forward(self, planes_bchw: Tensor) -> dict[str, Any]:
        """See the class."""
        maps = maps_of(self.backbone(self.planes.images(planes_bchw)))
        scores, deltas = self.rpn_head(list(maps.values()))
        size = (planes_bchw.shape[2], planes_bchw.shape[3])
        pairs = zip(self.pools, self.planes.regions(planes_bchw), strict=True)
        features = [pool.features(maps, corners, size) for pool, corners in pairs]
        outputs = [head(found) for head, found in zip(self.heads, features, strict=True)]
        return {"maps": dict(maps), "scores": scores, "deltas": deltas, "features": features, "heads": outputs}


def objective_of(output: dict[str, Any]) -> Objective:
    """What quantization must keep of a composite: the features' loss of what a detector's own code reads.

    Scores and deltas of all maps together count once, then each tensor that a head gives; maps and regions' features
    are there for the sake of these, and do not count.

    output: of a `Composite`, which says what stands where.
    """
    names = flatten(output)[0].names
    heads = sorted({name for name in names if name.startswith("heads.")}, key=names.index)
    groups = [[i for i, name in enumerate(names) if name.startswith(f"{kind}.")] for kind in ("scores", "deltas")]
    groups += [[names.index(name)] for name in heads]
    images = groups[0][0]

    def tensors(found: Any) -> Outputs:
        leaves = flatten(found)[1]
        batch = len(leaves[images])
        return tuple(torch.cat([leaves[i].reshape(batch, -1) for i in group], 1) for group in groups)

    return replace(
        FEATURES,
        name="detections",
        unit="relative squared error of a detector's outputs per image",
        needs="the output of a detector's parts",
        remedy="compile the detector, fxquant.compile_detector(detector, ...)",
        why_not=lambda graph_module: None,
        tensors=tensors,
    )


def packed_images(detector: Any, parts: Parts, pictures: Sequence[Tensor]) -> Tensor:
    """Calibration pictures with the regions that the float detector finds in them, (N, colours + 1, H, W).

    Args:
        detector: in inference mode; it resizes and normalises pictures. H and W hold the largest of them, as multiples
            of what its maps need.
        parts: of it.
        pictures: each of its own size, float (C, h, w).
    """
    images = [detector.transform([picture])[0] for picture in pictures]
    sizes = [each.image_sizes[0] for each in images]
    divisor = int(detector.transform.size_divisible)
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))
    found = []
    for picture, image, (own_height, own_width) in zip(pictures, images, sizes, strict=True):
        padded = image.tensors.new_zeros(1, image.tensors.shape[1], height, width)
        padded[0, :, :own_height, :own_width] = image.tensors[0, :, :own_height, :own_width]
        found.append(parts.planes.packed(padded, [corners[None] for corners in parts.found_by(detector, picture)]))
    return torch.cat(found)

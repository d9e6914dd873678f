"""A quantized detector: called like the one it was made from, a list of pictures in, a list of dicts out.

The quantized graph (`fxquant.detection.composite`) is cut where the detector's own code reads it: images to maps, maps
to the proposal network's outputs, features of regions to what each head says of them. The cuts take the places of the
modules they come from, in a copy of the detector that has none of their weights; anchors, box coding, suppression and
pasting of masks are the detector's own. That the cuts compute what the graph does is checked when they are made.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fxquant.checks.hints import checked
from fxquant.detection.composite import Parts
from fxquant.errors import ArtefactError, BackendError, InputError, ModelError, VerificationError
from fxquant.graph.nodes import device_of, image_of
from fxquant.graph.output_tree import Tree, leaves
from fxquant.graph.structure.blocks import extract_part
from fxquant.report.tables import Report
from fxquant.runtime.known_answers import answer_images_for
from fxquant.session.compiled import Compiled, load

Size = tuple[int, int]

REGIONS = 32
"""Regions of an image that calibrate the box head, where nothing else is said."""


class CompiledDetector(nn.Module):
    """A quantized detector.

    Args:
        detector: the float one, or one built like it; it is not changed, and of its parts no weight is kept.
        compiled: the quantized graph of its parts.
        regions: how many regions of an image calibrated the box head.

    Raises ModelError where the graph is not of such a detector's parts.
    """

    def __init__(self, detector: nn.Module, compiled: Compiled, regions: int) -> None:
        super().__init__()
        self.parts, self.regions = Parts.of(detector, regions), regions
        self._skeleton = [_without_parts(detector, self.parts)]  # no child: what it is given are the graph's modules
        self.compiled = compiled
        self._plug()
        self.eval()

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Pictures (C, H, W), float, each of its own size, to what the detector gives for each of them.

        Pictures are resized and normalised by the detector's own transform, and padded with zeros to the smallest of
        the sizes that it was compiled for. Raises InputError for anything else, and for pictures that fit none.
        """
        dtype, device = self.compiled.border.dtype, device_of(self.compiled)
        pictures = self.parts.checked_pictures(images, dtype, InputError, device)
        return self._runs[0](pictures) if pictures else []

    def report(self) -> Report:
        """Tables per layer and in total, of all parts; of one image with its regions."""
        return self.compiled.report()

    def __repr__(self) -> str:
        return f"detector of {self.compiled!r}"

    @checked(BackendError)
    def lowered(self, backend: str = "auto") -> CompiledDetector:
        """This detector with integer kernels, see `Compiled.lowered`."""
        return CompiledDetector(self._skeleton[0], self.compiled.lowered(backend), self.regions)

    @checked(ArtefactError)
    def save(self, path: str | PathLike[str]) -> None:
        """Write the quantized parts as one artefact. `load_detector` puts them into a detector built like this one."""
        self.compiled.save(path)

    def train(self, mode: bool = True) -> CompiledDetector:
        """Nothing: a quantized model stays in inference mode, as it was compiled."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledDetector:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._plug()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledDetector:
        return CompiledDetector(
            copy.deepcopy(self._skeleton[0], memo), copy.deepcopy(self.compiled, memo), self.regions
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledDetector, (self._skeleton[0], self.compiled, self.regions)

    def _plug(self) -> None:
        """Put the graph's cuts into the places of the detector's parts."""
        graphs = _graphs(self.compiled)
        cuts = {size: Cuts(graph, self.compiled.tree, self.parts) for size, graph in graphs.items()}
        for graph_cuts, graph in zip(cuts.values(), graphs.values(), strict=True):
            graph_cuts.check(graph)
        detector: Any = copy.deepcopy(self._skeleton[0])
        detector.backbone = _Backbone(detector.backbone, self.parts, cuts)
        detector.rpn.head = _ProposalHead(list(cuts.values()))
        main = next(iter(cuts.values()))
        for index, head in enumerate(self.parts.heads):
            *before, last = head.modules
            for path in before:
                _put(detector, path, nn.Identity())
            _put(detector, last, _Head(main, index))
        detector.transform = SizedTransform(detector.transform, list(cuts))
        self._runs = [detector.eval()]


class Cuts:
    """One graph, cut where a detector's own code reads it.

    Args:
        graph_module: of a `Composite`, quantized.
        tree: how its tensors are arranged.
        parts: of the detector.

    Raises ModelError where it is not of these parts.
    """

    def __init__(self, graph_module: GraphModule, tree: Tree, parts: Parts) -> None:
        nodes = leaves(graph_module.graph.output_node().args[0])
        found = tree.build(nodes)
        is_fitting = isinstance(found, dict) and list(found) == ["maps", "scores", "deltas", "features", "heads"]
        if not is_fitting or len(found["heads"]) != len(parts.heads):
            kinds = ", ".join(head.kind for head in parts.heads)
            raise ModelError(f"the quantized model is not made of a detector's parts with heads for {kinds}")
        image = image_of(graph_module)
        self.names, self.places = list(found["maps"]), tree.build(range(len(nodes)))
        self.head_trees = dict(zip(tree.keys, tree.children, strict=True))["heads"].children
        maps = list(found["maps"].values())
        self.map_size = tuple(maps[0].meta["tensor_meta"].shape[2:])
        try:
            self.backbone = extract_part(graph_module, [image], tuple(maps))
            self.proposals = extract_part(graph_module, maps, (*found["scores"], *found["deltas"]))
            pairs = zip(found["features"], found["heads"], strict=True)
            self.heads = [extract_part(graph_module, [features], _in_order(output)) for features, output in pairs]
        except ValueError as error:
            raise ModelError(f"the quantized graph cannot be cut into a detector's parts: {error}") from error

    @torch.no_grad()
    def check(self, graph_module: GraphModule) -> None:
        """Hold the cuts against the whole graph. Raises VerificationError where they compute something else."""
        device = next((tensor.device for tensor in (*graph_module.parameters(), *graph_module.buffers())), None)
        images = answer_images_for(graph_module).to(device)
        whole = graph_module(images)
        places = self.places
        maps = self.backbone(images)
        expected = [(maps, places["maps"].values()), (self.proposals(*maps), (*places["scores"], *places["deltas"]))]
        for head, features, output in zip(self.heads, places["features"], places["heads"], strict=True):
            expected.append((head(whole[features]), _in_order(output)))
        for found, indices in expected:
            for tensor, index in zip(found, indices, strict=True):
                if not torch.equal(tensor, whole[index]):
                    raise VerificationError("a part of the quantized detector computes something else than the whole")


def _in_order(output: Any) -> tuple[Any, ...]:
    """What a head gives, tensor by tensor."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return tuple(output) if isinstance(output, tuple | list) else (output,)


class _Backbone(nn.Module):
    """Images to maps, by the graph of their size."""

    def __init__(self, original: Any, parts: Parts, cuts: Mapping[Size, Cuts]) -> None:
        super().__init__()
        self.out_channels, self._parts, self._cuts = getattr(original, "out_channels", None), parts, dict(cuts)

    def forward(self, images_bchw: Tensor) -> OrderedDict[str, Tensor]:
        cuts = self._cuts[images_bchw.shape[2], images_bchw.shape[3]]
        maps = cuts.backbone(self._parts.planes.without(images_bchw))
        return OrderedDict(zip(cuts.names, maps, strict=True))


class _ProposalHead(nn.Module):
    """Maps to what the proposal network says of them."""

    def __init__(self, cuts: Sequence[Cuts]) -> None:
        super().__init__()
        self._cuts = {each.map_size: each for each in cuts}

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = list(self._cuts[tuple(maps[0].shape[2:])].proposals(*maps))
        return found[: len(maps)], found[len(maps) :]


class _Head(nn.Module):
    """Features of regions to what one head says of them."""

    def __init__(self, cuts: Cuts, index: int) -> None:
        super().__init__()
        self._cuts, self._index = cuts, index

    def forward(self, features: Tensor) -> Any:
        cut = self._cuts.heads[self._index]
        some = features if len(features) else features.new_zeros(1, *features.shape[1:])
        found = tuple(tensor[: len(features)] for tensor in cut(some))
        return self._cuts.head_trees[self._index].build(found)


class SizedTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """A detector's own transform; batches are padded to the smallest of some sizes that holds them.

    Args:
        transform: the detector's own.
        sizes: height and width of each.
    """

    def __init__(self, transform: GeneralizedRCNNTransform, sizes: Sequence[Size]) -> None:
        super().__init__(transform.min_size, transform.max_size, transform.image_mean, transform.image_std)
        self.__dict__.update(transform.__dict__)
        self.sizes = sorted(sizes, key=lambda size: size[0] * size[1])

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """One tensor (B, C, H, W). Raises InputError where no size holds them."""
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        fitting = next((size for size in self.sizes if size[0] >= height and size[1] >= width), None)
        if fitting is None:
            listed = ", ".join(f"{each[0]} x {each[1]}" for each in self.sizes)
            raise InputError(
                f"pictures of {height} x {width}, as the detector resizes them, fit none of the sizes that it was "
                f"compiled for, {listed}: compile with image_sizes=[({height}, {width})] or larger"
            )
        batch = images[0].new_zeros(len(images), images[0].shape[0], *fitting)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch


def _without_parts(detector: nn.Module, parts: Parts) -> nn.Module:
    """A copy of a detector with nothing in the places of its parts."""
    paths = ["backbone", "rpn.head", *(path for head in parts.heads for path in head.modules)]
    memo: dict[int, Any] = {}
    for path in paths:
        part = detector.get_submodule(path)
        empty = memo[id(part)] = nn.Identity()
        if hasattr(part, "out_channels"):
            empty.out_channels = part.out_channels
    return copy.deepcopy(detector, memo).eval()


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(root.get_submodule(owner), name, module)


def _graphs(compiled: Compiled) -> dict[Size, GraphModule]:
    """By size, the main one first."""
    height, width = compiled.border.image_shape[1:]
    return {(height, width): compiled.graph_module, **(compiled.sizes.graphs if compiled.sizes else {})}


@checked(ArtefactError, detector=ModelError, backend=BackendError)
def load_detector(
    path: str | PathLike[str], detector: nn.Module, backend: str = "simulated", regions: int | None = None
) -> CompiledDetector:
    """Put an artefact of `CompiledDetector.save` into a detector; outputs equal the saved one's bit for bit.

    Args:
        path: of the artefact.
        detector: built like the one that was compiled; its parts' weights are not read, so they may be random. All else
            of it (transform, anchors, thresholds) is used as it is.
        backend: how the parts run, see `fxquant.load`.
        regions: left out, as many as the artefact says.

    Raises ArtefactError, BackendError, ModelError where the artefact is not of such a detector.
    """
    compiled = load(path, backend)
    known = compiled.card.get("regions", REGIONS) if regions is None else regions
    return CompiledDetector(detector, compiled, int(known))

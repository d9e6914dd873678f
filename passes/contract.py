"""What a pass is, what it is given and what it leaves behind."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.fx import GraphModule

from fxquant.cache import Cache, code_signature, signature
from fxquant.errors import CalibrationError
from fxquant.graph.annotation import Fact


@dataclass(frozen=True)
class JournalEntry:
    """One pass as it ran: its repr, nodes changed, wall seconds, peak resident memory of the process in MiB, notes."""

    step: str
    nodes_changed: int
    seconds: float
    peak_mib: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Journal:
    """What happened: one entry per pass, in order. Passes add notes through `PassContext.note`."""

    entries: list[JournalEntry] = field(default_factory=list)
    pending: dict[str, Any] = field(default_factory=dict)

    def close_step(self, step: str, nodes_changed: int, seconds: float, peak_mib: float) -> None:
        """Append the entry of a pass that has ended, with the notes it left."""
        self.entries.append(JournalEntry(step, nodes_changed, seconds, peak_mib, self.pending))
        self.pending = {}


class ProgressReporter(Protocol):
    """How long steps show that they advance; `fxquant.report.progress` has the rich one."""

    def track(self, label: str, total: int) -> ProgressTask:
        """Begin a step of `total` units."""


class ProgressTask(Protocol):
    """One running step."""

    def advance(self, units: int = 1) -> None:
        """Say that `units` more are done."""

    def close(self) -> None:
        """End the step."""


class SilentTask:
    """A step nobody watches."""

    def advance(self, units: int = 1) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class SilentProgress:
    """Shows nothing; the default."""

    def track(self, label: str, total: int) -> SilentTask:
        """Begin a step nobody watches."""
        return SilentTask()


@dataclass(frozen=True)
class PassContext:
    """What every pass is given.

    Args:
        images_bchw: calibration images, float (B, C, H, W), on the CPU; None for passes that need no data.
        batch_size: images per forward where outputs are compared (divergences, corrections, training's checks); bounds
            memory, does not change results beyond float rounding. Statistics are gathered image by image.
        seed: of every random draw.
        cache: where scores are kept, in memory unless it has a folder.
        progress: where long steps report.
        journal: where notes go.
        ahead: the passes that follow, which the pipeline says.
    """

    images_bchw: torch.Tensor | None = None
    batch_size: int = 8
    seed: int = 0
    cache: Cache = field(default_factory=Cache, compare=False, repr=False)
    progress: ProgressReporter = field(default_factory=SilentProgress, compare=False, repr=False)
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)
    ahead: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        """Raise CalibrationError for a batch size that is no whole number, or below 1."""
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise CalibrationError(f"batch_size is {self.batch_size!r}, and a batch has at least one image, whole")

    @property
    def images(self) -> torch.Tensor:
        """The calibration images; raises CalibrationError when the context has none."""
        if self.images_bchw is None:
            raise CalibrationError(
                "this pass needs calibration images and the context has none: PassContext(images_bchw=...)"
            )
        if len(self.images_bchw) == 0:
            raise CalibrationError("this pass needs calibration images and the context has 0; 32 are usual")
        return self.images_bchw

    def each_image(self, label: str) -> Iterator[torch.Tensor]:
        """Calibration images one by one, (1, C, H, W), with progress shown under `label`.

        Statistics are gathered so: the activations (and gradients) of one image only are alive at a time, and sums are
        formed in one order, so that no batch size has a say in them.
        """
        task = self.progress.track(label, len(self.images))
        for image in torch.split(self.images, 1):
            yield image
            task.advance()
        task.close()

    def signature(self, graph_module: GraphModule, *settings: Any) -> str:
        """What a result depends on: the graph with its weights, the images, the seed, versions and settings."""
        versions = [*(importlib.metadata.version(name) for name in ("torch", "timm", "fxquant")), code_signature()]
        return signature(graph_module, graph_module.code, self.images, self.seed, versions, *settings)

    def note(self, **notes: Any) -> None:
        """Leave notes (JSON values) in the journal entry of the running pass."""
        self.journal.pending.update(notes)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    requires: facts that must hold before; provides: facts that hold after; breaks: facts that no longer hold after.
    """

    @property
    def requires(self) -> frozenset[Fact]:
        """Facts that must hold before the pass runs."""

    @property
    def provides(self) -> frozenset[Fact]:
        """Facts that hold after the pass has run."""

    @property
    def breaks(self) -> frozenset[Fact]:
        """Facts that no longer hold after the pass has run."""

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Change the graph module in place and return the number of nodes changed."""


def check_images(images: torch.Tensor, minimum: int = 1) -> None:
    """Raise CalibrationError unless images are a finite float (N, C, H, W) tensor with N >= minimum."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        shape = f"shape {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise CalibrationError(f"calibration images must be a tensor (N, C, H, W), found {shape}")
    if not images.is_floating_point():
        raise CalibrationError(
            f"calibration images are {images.dtype}: convert to float and apply the model's preprocessing first"
        )
    if len(images) < minimum:
        raise CalibrationError(f"{len(images)} calibration images, at least {minimum} needed; 32 are usual")
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bool(bad.any()):
        raise CalibrationError(f"calibration image {int(bad.nonzero()[0])} has NaN or infinite pixels")

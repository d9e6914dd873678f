"""What a pass is, what it is given and what it leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.checks import untrusted
from fxquant.checks.arguments import methods, whole
from fxquant.checks.hints import check_fields
from fxquant.checks.untrusted import OBJECT, POSITIVE, TEXT, record
from fxquant.errors import CalibrationError, OptionError, PipelineError
from fxquant.graph.facts import Fact
from fxquant.graph.nodes import device_of
from fxquant.graph.output_tree import Output
from fxquant.runtime.known_answers import KnownAnswers
from fxquant.sensitivity.objective import CLASSES, Objective
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.gathering import Gathered, in_shards

_LOGGER = logging.getLogger("fxquant")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class JournalEntry:
    """One pass as it ran: its repr, nodes changed, wall seconds, peak resident memory of the process in MiB, notes.

    Args:
        step: the repr of the pass.
        nodes_changed: how many nodes it changed.
        seconds: how long the pass took by the clock.
        peak_mib: largest resident memory of the process so far, in MiB.
        notes: what the pass says of its run, JSON values.
    """

    step: str
    nodes_changed: int
    seconds: float
    peak_mib: float
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> JournalEntry:
        """From the fields by name, as a file has them. Raises ArtefactError for anything else."""
        return cls(**record(values, _ENTRY, "a journal entry", {"notes": OBJECT}))


_ENTRY = {"step": TEXT, "nodes_changed": untrusted.whole(), "seconds": POSITIVE, "peak_mib": POSITIVE}


@dataclass
class Journal:
    """What happened: one entry per pass, in order. Passes add notes through `PassContext.note`."""

    entries: list[JournalEntry] = field(default_factory=list)
    pending: dict[str, Any] = field(default_factory=dict)

    def close_step(self, step: str, nodes_changed: int, seconds: float, peak_mib: float) -> None:
        """Append the entry of a pass that has ended, with the notes it left, and log it.

        Args:
            step: the repr of the pass.
            nodes_changed: how many nodes it changed.
            seconds: how long the pass took by the clock.
            peak_mib: largest resident memory of the process so far, in MiB.
        """
        self.entries.append(JournalEntry(step, nodes_changed, seconds, peak_mib, self.pending))
        self.pending = {}
        _LOGGER.info("%s: %d nodes changed, %.2f s", step, nodes_changed, seconds)


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
class CheckedProgress:
    """A reporter of the caller's whose steps are checked, so that a wrong one is named at once.

    reporter: the caller's. Raises OptionError where a step has no `advance` or no `close`.
    """

    reporter: ProgressReporter

    def track(self, label: str, total: int) -> ProgressTask:
        """Begin a step of `total` units, which the first of several ranks shows."""
        if not ranks.is_first():
            return SilentTask()
        task = self.reporter.track(label, total)
        methods("what the `track` of progress returns", task, ProgressTask, OptionError)
        return task


def reporter_of(progress: ProgressReporter | None) -> ProgressReporter:
    """Where steps are reported: to nobody for None."""
    return SilentProgress() if progress is None else CheckedProgress(progress)


@dataclass(frozen=True)
class SizedModel:
    """The same model at another image size.

    Args:
        graph_module: traced at that size, with roles; its layers hold no weights.
        images_bchw: two images, float (2, C, H, W).
        expected: what the model gives for them.
        padded: names of LayerNorm nodes behind which zeros are padded in at this size.
    """

    graph_module: GraphModule
    images_bchw: torch.Tensor
    expected: Output
    padded: frozenset[str] = frozenset()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images_bchw.shape[2], self.images_bchw.shape[3]


@dataclass(frozen=True)
class PassContext:
    """What every pass is given.

    Args:
        images_bchw: calibration images, float (B, C, H, W); None for passes that need no data. They may stay in host
            memory: passes move a few at a time to where the graph is.
        batch_size: images per forward where outputs are compared (divergences, corrections, training's checks); bounds
            memory, does not change results beyond float rounding. Statistics are gathered image by image.
        seed: the seed of every random draw.
        cache: where scores are kept, in memory unless it has a folder.
        progress: what long steps report their progress to.
        journal: takes what passes note of their runs.
        expected: what the model that was traced gives for the first two images (one of them twice where there is one),
            which the graph is held against (`passes.pipeline.proof`); None: what the graph itself gives before the
            first exact pass.
        objective: what quantization must keep of the output, which gradients and divergences are of.
        answers: known answers of a quantized graph, which a lowered one is held against; None: made before it is
            lowered.
        sized: the model at other image sizes, for which AddSizes makes graphs.
    """

    images_bchw: torch.Tensor | None = None
    batch_size: int = 8
    seed: int = 0
    cache: Cache = field(default_factory=Cache, compare=False, repr=False)
    progress: ProgressReporter = field(default_factory=SilentProgress, compare=False, repr=False)
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)
    objective: Objective = CLASSES
    expected: Output | None = field(default=None, compare=False, repr=False)
    answers: KnownAnswers | None = field(default=None, compare=False, repr=False)
    sized: tuple[SizedModel, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise CalibrationError for images, a batch size and a seed that are none, OptionError for other fields."""
        check_fields(self, OptionError, images_bchw=CalibrationError, batch_size=CalibrationError)
        check_draws(self.seed, self.batch_size)

    @property
    def images(self) -> torch.Tensor:
        """The calibration images; raises CalibrationError when the context has none."""
        if self.images_bchw is None:
            raise CalibrationError(
                "this pass needs calibration images and the context has none: give it some, "
                "PassContext(images_bchw=...)"
            )
        if len(self.images_bchw) == 0:
            raise CalibrationError(
                "this pass needs calibration images and the context has 0: give it some; 32 are usual"
            )
        return self.images_bchw

    @property
    def padded(self) -> frozenset[str]:
        """Names of LayerNorm nodes behind which zeros are padded in at one of the other sizes."""
        return frozenset().union(*(sized.padded for sized in self.sized))

    def gather(
        self, label: str, gathered: Gathered, graph_module: GraphModule, *settings: Any, together: int = 1
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Calibration images a few at a time, (B, C, H, W), where the graph is, with the index of the first.

        For a pass that gathers. The activations (and gradients) of few images only are alive at a time, and sums are
        formed in one order: no batch size has a say in them, and no number of ranks (`passes.pipeline.gathering`).
        Progress is shown under `label`. When all images have been given, `gathered` holds what was gathered of all.

        Where the cache has a folder, what is gathered is kept as the pass goes on; a process that takes the place of
        one that was killed is given that state and the images that are left.

        Args:
            label: shown with the progress.
            gathered: what the caller updates with every image.
            graph_module: what the images run through.
            settings: JSON values that what is gathered depends on as well, such as the pass's repr.
            together: images at a time; matrix products of several cost less than one by one, and take more memory.
        """
        key = "" if self.cache.folder is None else self.signature(graph_module, label, *settings)
        task = self.progress.track(label, len(self.images))
        device = device_of(graph_module)
        yield from in_shards(label, self.images, device, together, gathered, Checkpoint(self.cache, key), task.advance)
        task.close()

    def deal(
        self,
        label: str,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        costs: Sequence[float] | None = None,
    ) -> list[Result]:
        """The results for all items, in their order; several ranks share them out (`fxquant.ranks.dealt`).

        Args:
            label: shown with the progress.
            function: what one item gives; what it changes elsewhere is lost where another rank computes it.
            items: such as nodes.
            costs: how long each takes, in any unit; None: all alike.
        """
        task = self.progress.track(label, len(items))
        found = ranks.dealt(label, function, items, costs, task.advance)
        task.close()
        return found

    def signature(self, graph_module: GraphModule, *settings: Any) -> str:
        """What a result depends on: the graph, images, seed, objective, versions and settings."""
        padded = [sorted(self.padded)] if self.padded else []  # nothing else of the other sizes has a say
        return signature(
            graph_module,
            graph_module.code,
            self.images,
            self.seed,
            self.objective.key,
            code_signature(),
            *padded,
            *settings,
        )

    def note(self, **notes: Any) -> None:
        """Leave notes (JSON values) in the journal entry of the running pass."""
        self.journal.pending.update(notes)


class Effect(StrEnum):
    """What a pass does to what the graph computes; a pass says so by a ClassVar `effect`.

    EXACT: nothing, which is proven on two images right after it has run (folds, rewrites). WEIGHTS: it gives tensors
    other values and changes nothing else; the last proof puts the float ones back. FUNCTION: it is meant to compute
    something else; from then on the graph is held against what it computes after the pass. A pass that says nothing
    (one that writes annotations) is held to the last proof, with all others. See `passes.pipeline.proof`.
    """

    EXACT = "exact"
    WEIGHTS = "weights"
    FUNCTION = "function"


def effect_of(step: Pass) -> Effect | None:
    """What the pass declares; None where it says nothing. Raises PipelineError for what is no Effect."""
    found = getattr(step, "effect", None)
    if found is not None and not isinstance(found, Effect):
        raise PipelineError(f"{step!r} has the effect {found!r}: write Effect.EXACT, Effect.WEIGHTS or Effect.FUNCTION")
    return found


@runtime_checkable
class FixedPass(Protocol):
    """A pass whose facts are class variables, as most have them.

    requires: facts that must hold before; provides: facts that hold after; breaks: facts that no longer hold after.
    """

    requires: ClassVar[frozenset[Fact]]
    provides: ClassVar[frozenset[Fact]]
    breaks: ClassVar[frozenset[Fact]]

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Change the graph module in place and return the number of nodes changed."""


@runtime_checkable
class OptionPass(Protocol):
    """A pass whose facts follow from its options: all three are properties."""

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


Pass = FixedPass | OptionPass
"""A frozen dataclass whose fields are its options; it may also have an `effect: ClassVar[Effect]`. There are two
protocols because a type checker does not take a class variable for a property."""


@runtime_checkable
class Dependent(Protocol):
    """A pass some of whose fields follow from the others of its pipeline."""

    def among(self, passes: Sequence[Pass]) -> Pass:
        """The pass as it is among these. A pipeline asks when it is built, so an edited one is never out of date."""


def check_draws(seed: Any, batch_size: Any) -> tuple[int, int]:
    """Both as int. Raises OptionError unless 0 <= seed < 2**32, CalibrationError unless 1 <= batch_size < 2**31."""
    return (
        whole("seed", seed, OptionError, least=0, most=2**32 - 1),
        whole("batch_size", batch_size, CalibrationError, least=1, most=2**31 - 1),
    )


def check_images(images: torch.Tensor, minimum: int = 1) -> None:
    """Raise CalibrationError unless images are a finite float (N, C, H, W) tensor with N >= minimum."""
    if not isinstance(images, torch.Tensor):
        raise CalibrationError.for_type(
            f"calibration images must be a tensor (N, C, H, W), found {type(images).__name__}: torch.from_numpy, or "
            f"torch.stack"
        )
    if images.ndim != 4:
        raise CalibrationError(f"calibration images must be a tensor (N, C, H, W), found shape {tuple(images.shape)}")
    if images.is_meta or images.layout is not torch.strided or images.is_quantized:
        found = "one on the meta device" if images.is_meta else str(images.layout)
        raise CalibrationError(f"calibration images must be a plain tensor with values, found {found}")
    if not images.is_floating_point():
        raise CalibrationError(
            f"calibration images are {images.dtype}: convert to float and apply the model's preprocessing first"
        )
    if len(images) and not images.numel():
        raise CalibrationError(f"calibration images have no pixels: their shape is {tuple(images.shape)}")
    if len(images) < minimum:
        raise CalibrationError(
            f"there are {len(images)} calibration images, and at least {minimum} are needed; 32 are usual"
        )
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bool(bad.any()):
        raise CalibrationError(
            f"calibration image {int(bad.nonzero()[0])} has NaN or infinite pixels: leave it out, or read it again"
        )

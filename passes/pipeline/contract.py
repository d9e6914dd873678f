"""What a pass is, what it is given and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.checks.arguments import whole
from fxquant.checks.finite import is_finite
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError, OptionError, PipelineError
from fxquant.graph.facts import Fact
from fxquant.graph.nodes import device_of
from fxquant.graph.output_tree import Output
from fxquant.runtime.known_answers import KnownAnswers
from fxquant.sensitivity.objective import CLASSES, Objective
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.gathering import Gathered, in_shards
from passes.pipeline.journal import Journal
from passes.pipeline.progress import ProgressReporter, SilentProgress

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        pictures: whether the images are pictures, so that a crop or the mirror image of one is a picture too. Those of
            a detector are not: its regions ride along with them.
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
    pictures: bool = True

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
        self,
        label: str,
        gathered: Gathered,
        graph_module: GraphModule,
        *settings: Any,
        together: int = 1,
        in_place: bool = False,
        owners: Sequence[int] | None = None,
        rounds: int = 1,
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
            in_place: whether a batch changes what is gathered by the same bits as merging what it gives from zero
                does; then one process takes less memory.
            owners: of every piece of what is gathered, by number, the rank that alone holds its sums in the end, and
                keeps them. None: every rank holds all.
            rounds: how often all images are given, one time after another; indices go on.
        """
        key = "" if self.cache.folder is None else self.signature(graph_module, label, *settings)
        task = self.progress.track(label, len(self.images) * rounds)
        device = device_of(graph_module)
        checkpoint = Checkpoint(self.cache, key, of_each=owners is not None)
        options: Any = {"in_place": in_place, "owners": owners, "rounds": rounds}
        yield from in_shards(label, self.images, device, together, gathered, checkpoint, task.advance, **options)
        task.close()

    def deal(
        self,
        label: str,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        costs: Sequence[float] | None = None,
        owners: Sequence[int] | None = None,
    ) -> list[Result]:
        """The results for all items, in their order; several ranks share them out (`fxquant.ranks.dealt`).

        Args:
            label: shown with the progress.
            function: what one item gives; what it changes elsewhere is lost where another rank computes it.
            items: such as nodes.
            costs: how long each takes, in any unit; None: all alike.
            owners: the rank that does each; None: as costs say.
        """
        task = self.progress.track(label, len(items))
        found = ranks.dealt(label, function, items, costs, task.advance, owners)
        task.close()
        return found

    def signature(self, graph_module: GraphModule, *settings: Any) -> str:
        """What a result depends on: the graph, images, seed, objective, versions and settings."""
        padded = [sorted(self.padded)] if self.padded else []  # nothing else of the other sizes has a say
        others = [] if self.pictures else ["no pictures"]
        return signature(
            graph_module,
            graph_module.code,
            self.images,
            self.seed,
            self.objective.key,
            code_signature(),
            *padded,
            *others,
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
    if not is_finite(images):
        bad = ~torch.isfinite(images).flatten(1).all(1)
        raise CalibrationError(
            f"calibration image {int(bad.nonzero()[0])} has NaN or infinite pixels: leave it out, or read it again"
        )

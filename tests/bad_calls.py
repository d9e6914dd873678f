"""Calls with one or two arguments that are no good, made at random: every one has to be refused by a typed error.

    outcome = Outcome()
    for call in bad_calls(Workplace.make(folder), count=100, seed=0):
        outcome.add(call)
    print(outcome.untyped, outcome.accepted)

Every entry point is a function with valid arguments; each argument has values that are no good: of every type that does
not fit it, and of the right type but out of range. Calibration is replaced by an error of its own, so that no call
takes long and one that is refused too late counts as accepted.
"""

from __future__ import annotations

import copy
import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import fxquant
from allocators.budget import Budget
from allocators.greedy import Greedy
from allocators.milp import Milp
from allocators.pareto import Pareto
from allocators.quadratic import Interaction, Quadratic
from allocators.swaps import Swaps
from allocators.uniform import Uniform
from fxquant.arguments import shown
from fxquant.cli import app
from fxquant.data import ImageData, Preprocessing, load_images
from fxquant.errors import FxQuantError
from fxquant.evaluation import evaluate
from fxquant.hints import fitted
from fxquant.latency import measure
from fxquant.models import load_model, load_weights
from fxquant.sweep import Prepared, Results
from fxquant.synthesis.synthesize import Synthesis, synthesize
from passes.allocate_bits import AllocateBits
from passes.augment import Augment
from passes.balance_heads import BalanceHeads
from passes.calibrate import Calibrate
from passes.compensate_weights import CompensateWeights
from passes.contract import PassContext, SilentProgress
from passes.correct_weights import CorrectWeights
from passes.distil import Distil
from passes.fold_sqb import FoldSqb
from passes.insert_observers import InsertObservers
from passes.lower import Lower
from passes.measure_latency import MeasureLatency
from passes.metrics import FisherTrace, NuclearNorm, TypeAwareFisher
from passes.pipeline import Pipeline
from passes.recipes import RECIPES
from passes.reconstruct import Reconstruct
from passes.relevance_sensitivity import RelevanceSensitivity
from passes.score_layers import ScoreLayers
from passes.search_scales import SearchScales
from passes.update_bits import UpdateBits
from tests.passes.models import images, vit

_WRONG_SIZE = torch.zeros(2, 3, 4, 4)
ANYTHING: tuple[Any, ...] = (
    None, True, 3, -1, 2.5, math.nan, math.inf, 10**400, 1j, "", "x", "W4A4", b"x", [], [1], {}, {"a": 1}, {1: 2},
    (1, 2), {3}, object(), int, len, torch.zeros(2), _WRONG_SIZE, np.zeros(3), np.int64(-5), Path("missing/x"),
)  # fmt: skip
"""Values of every type; which of them an argument takes, its annotation says."""

Make = Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """A function to call.

    valid: an argument's good value, made anew. bad: values that are refused, by argument. may_pass: damaged files, of
    which some are as good as before.
    """

    name: str
    function: Callable[..., Any]
    valid: Mapping[str, Make]
    bad: Mapping[str, Sequence[Any]]
    may_pass: bool = False


@dataclass(frozen=True)
class Call:
    """One call that has to be refused."""

    entry: Entry
    replaced: Mapping[str, Any]

    def __str__(self) -> str:
        """`compile(seed='x' (str))`."""
        return f"{self.entry.name}({', '.join(f'{name}={shown(value)}' for name, value in self.replaced.items())})"

    def run(self) -> Any:
        """Make the call."""
        good = {name: make() for name, make in self.entry.valid.items() if name not in self.replaced}
        return self.entry.function(**good, **self.replaced)


@dataclass
class Outcome:
    """What became of calls: counts of typed errors, by kind, and the faults."""

    typed: dict[str, int] = field(default_factory=dict)
    untyped: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    harmless: int = 0

    def add(self, call: Call) -> None:
        """Make a call and note how it ended."""
        try:
            call.run()
        except FxQuantError as error:
            self.typed[type(error).__name__] = self.typed.get(type(error).__name__, 0) + 1
        except CalibrationHasBegun:
            self.accepted.append(f"{call}: calibration has begun")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            self.untyped.append(f"{call}: {type(error).__name__}: {str(error)[:80]} at {place}")
        else:
            if call.entry.may_pass:
                self.harmless += 1
            else:
                self.accepted.append(str(call))


class CalibrationHasBegun(BaseException):
    """A call that should have been refused got as far as calibration."""


def bad_calls(entries: Sequence[Entry], count: int, seed: int) -> Iterator[Call]:
    """Calls, entry points in turn; which arguments are bad, and how, is drawn."""
    draw = random.Random(seed)
    for index in range(count):
        entry = entries[index % len(entries)]
        names = draw.sample(list(entry.bad), min(len(entry.bad), 1 + (draw.random() < 0.3)))
        yield Call(entry, {name: draw.choice(entry.bad[name]) for name in names})


def all_entries(folder: Path) -> list[Entry]:
    """The entry points, with files in a folder to write to and read from."""
    good = _Good(folder)
    return [*_one_call(good), *_passes(), *_recipes(), *_pipelines(), *_files(good), *_models(good),
            *_commands(good), *_damaged(good)]  # fmt: skip


class _Good:
    """Valid arguments that take a while to make, once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = vit(embed_dim=16, depth=1, num_heads=2, img_size=16, num_classes=4)
        self.images = images(2, 16)
        self.prepared = Prepared(self.model, self.images, recipe="naive_min_max")
        self.compiled = fxquant.compile(self.model, "W8A8", calibration=self.images, recipe="naive_min_max")
        self.traced = fxquant.trace(self.model, self.images)
        self.preprocessing = Preprocessing((3, 16, 16))
        self.data = ImageData("two", 2, lambda index: self.images[index], torch.tensor([0, 1]))
        np.savez(folder / "good.npz", images=self.images.numpy(), labels=np.array([0, 1]))
        self.compiled.save(folder / "good.fxq")
        torch.save(self.model.state_dict(), folder / "good.pt")
        save_file(self.model.state_dict(), folder / "good.safetensors")
        noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm"):
            Image.fromarray(noise).save(folder / f"good.{suffix}")
        np.savez_compressed(folder / "packed.npz", images=noise[None], labels=np.array([1]))
        (folder / "names.json").write_text('{"0": "ant", "1": "bee"}')
        (folder / "labels.csv").write_text("image,label\ngood.png,ant\ngood.jpg,bee\n")


class _Endless:
    """Reports no progress: it has no `track`."""


def _unfit(annotation: Any, *more: Any, but: Sequence[Any] = ()) -> list[Any]:
    """What does not fit an annotation, and more; without the objects in `but`."""
    found = list(more)
    for value in ANYTHING:
        try:
            fitted("it", value, annotation, UnfitError)
        except UnfitError:
            if not any(value is each for each in but):
                found.append(value)
    return found


class UnfitError(FxQuantError):
    """What `_unfit` has values refused by."""

    @classmethod
    def for_type(cls, message: str) -> FxQuantError:
        return cls(message)


def _endless() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["itself"] = found
    return found


def _shared(good: _Good) -> dict[str, tuple[Make, list[Any]]]:
    """Arguments that many entry points have: a valid value, and bad ones."""
    strange = torch.full((2, 3, 16, 16), math.nan)
    bad_images: list[Any] = [
        torch.zeros(0, 3, 16, 16), torch.zeros(2, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), strange,
        torch.zeros(2, 3, 16, 16).to("meta"), torch.zeros(2, 3, 16, 16).to_sparse(), torch.zeros(2, 3, 0, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.complex64), good.images.numpy(), list(good.images), [good.images],
    ]  # fmt: skip
    no_images = [value for value in ANYTHING if value is not None]
    models = [nn.ReLU(), nn.Linear, good.compiled, good.model.state_dict(), "vit_tiny_patch16_224"]
    pathless = [value for value in ANYTHING if not isinstance(value, str | Path) and value is not None]
    return {
        "model": (lambda: good.model, [*_unfit(nn.Module), *models]),
        "budget": (lambda: "W4A4", [
            "W", "W4W4", "0MB", "-3", "MP0", "MP" + "9" * 5000, "W1A1", "1B", "5ms", "4 potatoes", "W4A4, 5ms", "²MB",
            {"mean_weight_bits": "4"}, {"bits": 4}, {"weight_bytes": -1}, {1: 4}, {"mean_weight_bits": None},
            *[value for value in ANYTHING if not _is_budget(value)],
        ]),
        "calibration": (lambda: good.images, [*no_images, *bad_images]),
        "images": (lambda: good.images, [*no_images, *bad_images]),
        "recipe": (lambda: "naive_min_max", [*_unfit(str), "x", "", "BEST", Pipeline([]), RECIPES["best"]]),
        "allocator": (Uniform, ["greedy", Greedy, *[value for value in ANYTHING if value is not None]]),
        "overrides": (dict, [
            {"head": 11}, {"head": "8"}, {"head": (8,)}, {"head": True}, {"nothing": 8}, {3: 8}, {"head": (8, 8, 8)},
            {"head": None}, {"head": 2.5}, [("head", 8)], *_unfit(Mapping[str, int], but=(None,)),
        ]),
        "first_last_bits": (lambda: 8, [1, 9, 0, "8", True, *_unfit(int | None)]),
        "fully_quantized": (lambda: False, [0, 1, *_unfit(bool)]),
        "backend": (lambda: "simulated", ["gpu", "", "CUDA", *_unfit(str)]),
        "latency": (MeasureLatency, [MeasureLatency, *[value for value in ANYTHING if value is not None]]),
        "seed": (lambda: 0, ["0", -1, 2**32, True, *_unfit(int)]),
        "batch_size": (lambda: 2, ["2", 0, -1, 2**63, True, *_unfit(int)]),
        "progress": (SilentProgress, [_Endless(), SilentProgress, *[v for v in ANYTHING if v is not None]]),
        "cache": (lambda: str(good.folder / "cache"), [
            "", "a\0b", str(good.folder / "good.npz" / "below"), *pathless,
        ]),
        "card": (dict, [
            {"a": {1, 2}}, {"a": math.nan}, {"a": good.images}, {"a": {1: 2}}, _endless(), {1: 2},
            *[value for value in ANYTHING if value is not None and not isinstance(value, dict)],
        ]),
    }  # fmt: skip


def _is_budget(value: Any) -> bool:
    """Whether a budget can be read from this, though it may be met by no model."""
    try:
        Budget.parse(value)
    except FxQuantError:
        return False
    return True


def _entry(name: str, function: Callable[..., Any], arguments: Mapping[str, tuple[Make, Sequence[Any]]]) -> Entry:
    valid = {name: pair[0] for name, pair in arguments.items()}
    return Entry(name, function, valid, {name: pair[1] for name, pair in arguments.items() if pair[1]})


def _one_call(good: _Good) -> list[Entry]:
    """compile, Prepared and its methods, frontier, synthesize, trace."""
    shared = _shared(good)

    def of(*names: str) -> dict[str, tuple[Make, list[Any]]]:
        return {name: shared[name] for name in names}

    common = of("model", "calibration", "recipe", "seed", "batch_size", "progress", "cache")
    options = of("first_last_bits", "fully_quantized", "backend", "overrides")
    point = of("budget", "allocator")
    limits = [[], "34", [0], ["x"], [math.nan], [True], 3, {3: 4}, [1.0], np.zeros((2, 2)), [10**400]]
    axis = ["bits", "", "latency_ms", *_unfit(str)]
    synthesis = [value for value in ANYTHING if not isinstance(value, Synthesis)]
    shares = ["0.5", -0.1, 1.5, math.nan, *_unfit(float)]
    unread = [value for value in shared["budget"][1] if not _is_budget(value)]
    example = [value for value in shared["calibration"][1] if value is not None]
    # Prepared looks at images and at names of layers when it is first asked for something.
    later = ({"head": 11}, {"nothing": 8}, {"head": (8, 8, 8)})
    overrides = [value for value in shared["overrides"][1] if not isinstance(value, dict) or value not in later]
    lazy = of("model", "recipe", "seed", "batch_size", "progress", "cache", "card")
    lazy["calibration"] = (
        lambda: good.images,
        [value for value in shared["calibration"][1] if value is not _WRONG_SIZE],
    )
    prepared = lazy | options | {"overrides": (dict, overrides)}
    return [
        _entry("compile", fxquant.compile, common | options | of("budget", "allocator", "latency", "card")),
        _entry("Prepared", Prepared, prepared),
        _entry("Prepared.compile", good.prepared.compile, point),
        _entry("Prepared.check", good.prepared.check, point),
        _entry("Prepared.cost_table", good.prepared.cost_table, {
            "budget": (lambda: "W4A4", [value for value in shared["budget"][1] if not isinstance(value, str)]),
            "lowest": (lambda: None, [value for value in ANYTHING if value is not None]),
        }),
        _entry("frontier", fxquant.frontier, common | {
            "axis": (lambda: "mean_bits", axis), "limits": (lambda: [4.0], limits),
            "exact": (lambda: False, [0, *_unfit(bool)]), "realised": (lambda: None, ["loss", 3, [len], True]),
            "images": (lambda: None, [value for value in shared["images"][1] if value is not _WRONG_SIZE]),
        }),
        _entry("synthesize", synthesize, of("model", "seed", "batch_size", "progress", "cache") | {
            "options": (lambda: Synthesis(1, 1), synthesis)
        }),
        _entry("trace", fxquant.trace, of("model") | {
            "example_bchw": (lambda: good.images, example), "minimum_coverage": (lambda: 0.9, shares),
        }),
        _entry("Budget.parse", Budget.parse, {"value": (lambda: 4, unread)}),
    ]  # fmt: skip


def _passes() -> list[Entry]:
    """Every class of options: passes, metrics, allocators, contexts."""
    required: dict[type, dict[str, Make]] = {
        AllocateBits: {"budget": lambda: "W4A4"},
        Budget: {"mean_weight_bits": lambda: 4},
        ScoreLayers: {"metric": NuclearNorm},
        Interaction: {"first": lambda: ("a", "weight"), "second": lambda: ("b", "weight"), "correlation": lambda: 0.5},
        Quadratic: {"interactions": tuple},
        Preprocessing: {"input_size": lambda: (3, 16, 16)},
    }
    classes: tuple[Any, ...] = (
        AllocateBits, Augment, BalanceHeads, Budget, Calibrate, CompensateWeights, CorrectWeights, Distil, FisherTrace,
        FoldSqb, Greedy, InsertObservers, Interaction, Lower, MeasureLatency, Milp, Pareto, PassContext, Preprocessing,
        Quadratic, Reconstruct, RelevanceSensitivity, ScoreLayers, SearchScales, Swaps, Synthesis, TypeAwareFisher,
        UpdateBits,
    )  # fmt: skip
    found = []
    for each in classes:
        hints = get_type_hints(each)
        bad = {option.name: _unfit(hints[option.name]) for option in fields(each) if option.init}
        if each in (AllocateBits,):
            bad["budget"] = [value for value in bad["budget"] if not _is_budget(value)]
        known = {name: values for name, values in bad.items() if values}
        found.append(Entry(each.__name__, each, required.get(each, {}), known))
    return found


def _recipes() -> list[Entry]:
    """Every recipe by its own name."""
    tables: dict[str, Sequence[Any]] = {
        "fully_quantized": [0, *_unfit(bool)], "fold": [FoldSqb, "none", *[v for v in ANYTHING if v is not None]],
        "bits": [(9,), (4, 3), (), (4, 4), ("4",), 4, "4", [2.5], (1, 4)], "backend": ["gpu", *_unfit(str)],
        "first_last_bits": [1, 9, "8", True], "overrides": [{"head": "8"}, [("head", 8)], {3: 8}, 3],
        "latency": [3, "x", MeasureLatency], "allocator": ["greedy", Greedy, 3], "nonsense": [1, None],
        "budget": ["W", "", b"x", [], {}, True, -1, math.nan],
    }  # fmt: skip
    return [Entry(name, recipe, {"budget": lambda: "W4A4"}, tables) for name, recipe in RECIPES.items()]


def _pipelines() -> list[Entry]:
    """Building and editing pipelines."""
    pipeline = RECIPES["naive_min_max"]("W4A4")
    kinds = [value for value in ANYTHING if not isinstance(value, type)] + [int, FoldSqb, Calibrate()]
    news = [Calibrate, *ANYTHING]
    return [
        Entry("Pipeline", Pipeline, {"passes": list}, {
            "passes": [3, None, "x", [3], [Calibrate], Calibrate(), [Calibrate()], {"a": 1}],
            "assumes": [3, None, ["x"], "traced", [3]],
        }),
        Entry("Pipeline.position", pipeline.position, {}, {"kind": kinds}),
        Entry("Pipeline.without", pipeline.without, {}, {"kind": kinds}),
        Entry("Pipeline.replace", pipeline.replace, {"kind": lambda: Calibrate, "new": Calibrate},
              {"kind": kinds, "new": news}),
        Entry("Pipeline.changed", lambda **given: pipeline.changed(**given), {"kind": lambda: Calibrate},
              {"kind": kinds, "draws": ["x", 0, 2.5, None], "typo": [1]}),
        Entry("Pipeline[]", pipeline.__getitem__, {}, {"index": ["x", 99, -99, 2.5, None, True, (1, 2), []]}),
        Entry("Pipeline.run", pipeline.run, {}, {"graph_module": [*ANYTHING, nn.ReLU()], "context": [3, None, {}]}),
    ]  # fmt: skip


def _files(good: _Good) -> list[Entry]:
    """What reads and writes files."""
    folder = good.folder
    pathless = [value for value in ANYTHING if not isinstance(value, str | Path)]
    missing = [*pathless, "", "a\0b", "x" * 300, folder / "missing" / "x", folder]
    unwritable = [*pathless, "", "a\0b", folder / "missing" / "m.svg", folder]
    sizes = ["2", 0, -1, True, 2.5, None, 99]
    return [
        Entry("load", fxquant.load, {"path": lambda: folder / "good.fxq"}, {
            "path": [*missing, folder / "good.npz"], "backend": ["gpu", *_unfit(str)]}),
        Entry("Compiled.save", good.compiled.save, {}, {"path": unwritable}),
        Entry("Compiled.draw", good.compiled.draw, {}, {"path": [*unwritable, folder / "picture.png"]}),
        Entry("Compiled.lowered", good.compiled.lowered, {}, {"backend": ["gpu", "", *_unfit(str)]}),
        Entry("Compiled.export_onnx", good.compiled.export_onnx, {"path": lambda: folder / "m.onnx"}, {
            "weight_type": ["int2", "", *_unfit(str)]}),
        Entry("ImageData.open", ImageData.open,
              {"path": lambda: folder / "good.npz", "preprocessing": lambda: good.preprocessing}, {
                  "path": [*missing[:-1], folder / "good.fxq"], "preprocessing": [*ANYTHING, Preprocessing],
                  "classes": [3, ["a", 3], [], ["a", "a"], folder / "missing.txt", "a\0b", True, [""]],
                  "labels": [3, folder / "missing.txt", "", ["a"], True]}),
        Entry("load_images", load_images,
              {"path": lambda: folder / "good.npz", "count": lambda: 1, "preprocessing": lambda: good.preprocessing}, {
                  "path": missing[:-1], "count": sizes, "seed": ["x", -1, 2**64, True, 2.5, None]}),
        Entry("load_weights", load_weights, {"model": lambda: good.model, "file": lambda: folder / "good.pt"}, {
            "file": missing, "model": [nn.Linear(2, 2), *_unfit(nn.Module)]}),
        Entry("load_model", load_model, {"name": lambda: "vit_tiny_patch16_224"}, {
            "name": ["vit", "", *_unfit(str)], "weights": [value for value in missing if value is not None],
            "num_classes": [0, -1, "3", True, 2.5, 10**12], "pretrained": [True], "checkpoint_path": ["x"]}),
        Entry("Results", Results, {}, {"path": [*[v for v in pathless if v is not None], folder / "good.npz", folder]}),
    ]  # fmt: skip


def _commands(good: _Good) -> list[Entry]:
    """The command line, with options as texts."""
    files = ["", str(good.folder), "x" * 300, "missing/x", str(good.folder / "good.npz" / "x")]
    numbers = ["x", "0", "-1", "2.5", "9" * 400, "nan", ""]
    shared: dict[str, list[str]] = {
        "--recipe": ["x", "", "BEST"], "--backend": ["gpu", ""], "--first-last-bits": ["1", "9", "x", "9" * 400],
        "--seed": ["x", "-1", "9" * 30, "2.5"], "--batch-size": numbers, "--images": [*numbers, "100000"],
        "--calibration": [*files, str(good.folder / "good.fxq")], "--weights": files[1:], "--mean": ["a", "1,2", "nan"],
        "--std": ["0", "-1", "inf", "1,,2"], "--image-size": ["0", "-3", "x", "9" * 9], "--crop-pct": ["0", "2", "nan"],
        "--interpolation": ["best", ""], "--model-option": ["x", "=3", "a b=3", "pretrained=true", "num_classes=3"],
        "--num-classes": ["-1", "0", "x", "3"], "--override": ["head", "head=x", "head=9", "=3", "head=\u00b2", "zz=4"],
        "--nonsense": ["1"],
    }  # fmt: skip
    budgets = ["W", "", "W1A1", "-4", "0B", "W4A4, 5ms", "MP" + "9" * 5000]
    both = [option for option in shared if option not in ("--override", "--first-last-bits")]
    return [
        Entry("fxquant compile", _command("compile", "embedded"), {"budget": lambda: "W4A4"}, {
            "budget": budgets, **shared, "--out": files, "--report": files, "--picture": [*files, "x.png"],
            "--allocator": ["x", ""], "--cache": [str(good.folder / "good.npz" / "x")],
            "--latency-batch": numbers, "--synthesis-steps": numbers}),
        Entry("fxquant evaluate", _command("evaluate", "embedded"), {}, {
            "--data": files[1:], "--classes": files[1:], "--labels": files[1:], "--limit": ["x", "0", "-1", "2.5", ""],
            **{name: shared[name] for name in ("--batch-size", "--weights", "--mean", "--image-size")}}),
        Entry("fxquant sweep", _command("sweep", "embedded"), {"--budgets": lambda: "W4A4", "--limit": lambda: "1"}, {
            "--budgets": budgets, **{name: shared[name] for name in both if name != "--images"},
            "--results": files[1:], "--plot": [*files[1:], "x.gif"]}),
        Entry("fxquant frontier", _command("frontier", "embedded"), {"--limits": lambda: "4"}, {
            **shared, "--limits": ["x", "", "1", "nan", "4,x"], "--axis": ["x", "", "bits"],
            "--plot": [*files, "x.gif"]}),
        Entry("fxquant synthesize", _command("synthesize", "embedded"), {"--out": lambda: "x.npz"}, {
            "--out": [*files, "x.png"], "--sheet": [*files[1:], "x.gif"], "--count": numbers, "--steps": numbers,
            "--learning-rate": ["x", "0", "-1", "nan", "inf"],
            **{name: shared[name] for name in ("--seed", "--mean")}}),
        Entry("fxquant inspect", _command("inspect"), {"artefact": lambda: str(good.folder / "good.fxq")}, {
            "artefact": [*files, str(good.folder / "good.npz")], "--picture": [*files, "x.png"]}),
        Entry("fxquant export", _command("export"), {
            "artefact": lambda: str(good.folder / "good.fxq"), "out": lambda: "m.onnx"}, {
                "artefact": [*files, str(good.folder / "good.npz")], "out": files, "--weight-type": ["int2", ""]}),
        Entry("fxquant benchmark", _command("benchmark"), {
            "artefact": lambda: str(good.folder / "good.fxq"), "--seconds": lambda: "0"}, {
                "artefact": files, "--backend": ["gpu", ""], "--batch-size": numbers, "--threads": numbers,
                "--seconds": ["x", "-1", "nan"], "--plot": [*files, "x.gif"]}),
    ]  # fmt: skip


class RefusedError(FxQuantError):
    """A command ended with exit code 2, as it does after one line on stderr."""


def _command(*first: str) -> Callable[..., None]:
    """A function that runs a command; what has no dashes stands for itself."""

    def run(**options: str) -> None:
        words = list(first)
        for name, value in options.items():
            words += [name, value] if name.startswith("--") else [value]
        result = CliRunner().invoke(app, words)
        if isinstance(result.exception, Exception):
            raise result.exception
        if result.exit_code == 2:
            raise RefusedError

    return run


def _damaged(good: _Good) -> list[Entry]:
    """Files of which bytes are changed, lost or in the wrong place; some of them are as good as before."""
    seeds = range(10**6)

    def read_images(file: Path) -> None:
        list(ImageData.open(file, good.preprocessing).batches())

    def read_picture(file: Path) -> None:
        folder = file.parent / "pictures"
        folder.mkdir(exist_ok=True)
        file.replace(folder / file.name)
        try:
            list(ImageData.open(folder, good.preprocessing).batches())
        finally:
            (folder / file.name).unlink()

    def read_labels(file: Path) -> None:
        ImageData.open(good.folder, good.preprocessing, labels=file, classes=good.folder / "names.json")

    def read_classes(file: Path) -> None:
        labels = good.folder / "labels.csv"
        ImageData.open(good.folder, good.preprocessing, labels=labels, classes=file)

    def read_weights(file: Path) -> None:
        load_weights(copy.deepcopy(good.model), file)

    readers: dict[str, Callable[[Path], Any]] = {
        "good.npz": read_images, "packed.npz": read_images, "good.pt": read_weights, "good.safetensors": read_weights,
        "labels.csv": read_labels, "names.json": read_classes,
        **{f"good.{suffix}": read_picture for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm")},
    }  # fmt: skip

    def of(name: str, reader: Callable[[Path], Any]) -> Callable[[int], None]:
        content = (good.folder / name).read_bytes()

        def run(damage: int) -> None:
            file = good.folder / f"damaged_{name}"
            file.write_bytes(_changed(content, random.Random(damage)))
            reader(file)

        return run

    return [
        Entry(f"damaged {name}", of(name, reader), {}, {"damage": seeds}, may_pass=True)
        for name, reader in readers.items()
    ]


def _changed(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one to four changes, most of them near the beginning or the end, where formats have their headers."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        near = min(len(found), draw.choice((64, 256, len(found))))
        place = draw.randrange(near) if draw.random() < 0.6 else len(found) - 1 - draw.randrange(near)
        kind = draw.choice(("flip", "set", "cut", "insert", "numbers"))
        if kind == "flip":
            found[place] ^= 1 << draw.randrange(8)
        elif kind == "set":
            found[place] = draw.choice((0, 255, 32, 45, 57))
        elif kind == "cut":
            del found[place : place + draw.choice((1, 16, len(found)))]
        elif kind == "insert":
            found[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8))))
        else:
            found[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"))
        if not found:
            break
    return bytes(found)


def _models(good: _Good) -> list[Entry]:
    """What runs models."""
    count = ["2", 0, -1, True, 2.5, None]
    model = [*_unfit(nn.Module), nn.Conv2d(5, 1, 1), nn.Flatten(0)]
    progress = [_Endless(), SilentProgress, *[value for value in ANYTHING if value is not None]]
    unlabelled = ImageData("one", 1, lambda index: good.images[index])
    beyond = ImageData("one", 1, lambda index: good.images[index], torch.tensor([99]))
    return [
        Entry("evaluate", evaluate, {"model": lambda: good.model, "data": lambda: good.data}, {
            "model": model, "data": [*ANYTHING, unlabelled, beyond, ImageData], "batch_size": count,
            "limit": count[:-1], "progress": progress}),
        Entry("measure", measure,
              {"variants": lambda: {"a": good.model}, "images_bchw": lambda: good.images, "seconds": lambda: 0.0}, {
                  "variants": [{}, {"a": 3}, {3: good.model}, 3, None, [good.model]], "images_bchw": list(ANYTHING),
                  "threads": count, "seconds": ["1", -1, math.nan, None, True], "progress": progress}),
    ]  # fmt: skip

"""Over a hundred architectures, each compiled by the default recipe, saved, loaded on integer kernels and exported.

    python -m benchmarks.conformance                     # all that are not in the results yet, or not exported
    python -m benchmarks.conformance --only "timm: vit"  # those whose names contain this, anew

Architectures: benchmarks/conformance_models/, small instances with random weights of which all count. What is checked
of each is `Found`; what is right is whole, what raises one of fxquant's errors is refused, and everything else is a
fault. Twenty architectures share a process, and each has a limit of time. Results go to
benchmarks/results/conformance.json, after every architecture; conformance_table.py makes a page of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import queue
import re
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

import fxquant
from benchmarks.conformance_models import other_models, timm_models, transformers_models
from benchmarks.conformance_models.case import Case, rescaled, with_noisy_inputs
from fxquant.errors import FxQuantError
from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.nodes import elements_of
from fxquant.graph.output_tree import flatten
from fxquant.graph.structure.kind import Kind, kind_of
from fxquant.session.compiled import Compiled

IMAGES, AT_A_TIME, LIMIT_S = 8, 20, 120.0
LEAST_COSINE, NOISES = 0.99, 8
RESULTS = Path(__file__).parent / "results" / "conformance.json"
_FOLDERS, _LONGEST = re.compile(r"(?:/[\w.+-]+)+/"), 500
WHOLE, REFUSED, FAULT = "whole", "refused", "fault"


@dataclass
class Found:
    """What was found of one architecture.

    Args:
        status: "whole", "refused" by a typed error, or "fault".
        stage: what ran last: "model", "compile", "outputs", "save", "load", "export".
        message: of the error, or what is wrong.
        captured_by: "tracing" or "torch.export".
        cosine: of outputs simulated at W8A8 with those in float, the least over the tensors of the tree.
        plain_cosine: the same of the float model with noise of an 8-bit step at every layer's input, the mean over
            NOISES draws; where `cosine` is low.
        plain_deviation: of those draws, the standard deviation.
        difference: relative, of outputs on integer kernels from simulated ones; the largest over the tensors.
        tolerance: what this may be, that of the known answers.
        attentions: how many softmaxes and fused attentions are in the graph, which is proven to be the model.
        attentions_found: of how many softmaxes the product with the values is quantized.
        misses: softmaxes that the journal names as no attention, with the reason.
        float_share: of multiply-accumulates that do not have both operands quantized, 0 to 1.
        integer_share: of those that run on integer kernels.
        cpu_s: seconds of the processor.
    """

    status: str = FAULT
    stage: str = "model"
    message: str = ""
    captured_by: str = ""
    cosine: float | None = None
    plain_cosine: float | None = None
    plain_deviation: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    attentions: int | None = None
    attentions_found: int | None = None
    misses: tuple[str, ...] = ()
    float_share: float | None = None
    integer_share: float | None = None
    cpu_s: float = 0.0


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise TimeoutError after LIMIT_S seconds of the processor, however many others share it."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"it took more than {LIMIT_S:.0f} s of the processor")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def check(case: Case, folder: Path, export: bool = True) -> Found:
    """Build, compile, save, load and export one architecture; nothing is raised.

    Args:
        case: the architecture.
        folder: where its files are written.
        export: whether it is exported too, which takes most of the time.
    """
    found, start = Found(), time.process_time()
    try:
        with contextlib.redirect_stdout(None), _limited():
            _check(case, folder, found, export)
        found.status = FAULT if found.message else WHOLE
    except FxQuantError as error:
        found.status, found.message = REFUSED, f"{type(error).__name__}: {error}"
    except Exception as error:
        found.status, found.message = FAULT, f"{type(error).__name__}: {error}"
    found.message = _FOLDERS.sub("", " ".join(found.message.split()))[:_LONGEST]  # folders are of this machine
    found.cpu_s = round(time.process_time() - start, 1)
    return found


@torch.no_grad()
def _check(case: Case, folder: Path, found: Found, export: bool) -> None:
    """The stages, one after the other, until something is wrong."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, *case.size, generator=torch.Generator().manual_seed(1))
    model = rescaled(case.build(), images, case.inputs)
    expected = model(images, **case.inputs)
    found.stage = "compile"
    compiled = fxquant.compile(model, "W8A8", calibration=images, inputs=case.inputs or None, progress=False)
    found.stage = "outputs"
    found.message = _outputs(compiled, compiled(images), expected, found)
    if found.cosine is not None and found.cosine < LEAST_COSINE:
        noisy = [_cosine(with_noisy_inputs(model, images, case.inputs, seed), expected) for seed in range(NOISES)]
        found.plain_cosine, found.plain_deviation = statistics.mean(noisy), statistics.stdev(noisy)
        beside = f"with noise of a step at the inputs of layers {found.plain_cosine:.4f} +- {found.plain_deviation:.4f}"
        is_as_near = found.cosine >= found.plain_cosine - found.plain_deviation
        found.message = "" if is_as_near else f"{found.message}, {beside}"
    found.message = found.message or _attentions(compiled, found)
    if found.message:
        return
    found.stage = "save"
    compiled.save(folder / "model.fxq")
    found.stage = "load"
    loaded = fxquant.load(folder / "model.fxq", backend="auto")
    found.message = _integers(compiled, loaded, images, found)
    if found.message:
        return
    if not export:
        return
    found.stage = "export"
    compiled.export_onnx(folder / "model.onnx", check=True)


def _outputs(compiled: Compiled, output: Any, expected: Any, found: Found) -> str:
    """What is wrong with the tree of an output, or with its numbers."""
    shares = compiled.card["multiply_accumulates"]
    found.float_share = shares["float_share"]
    found.captured_by = compiled.card.get("captured_by", "tracing")
    (tree, tensors), (wanted, references) = flatten(output), flatten(expected)
    if tree != wanted or type(output) is not type(expected):
        return f"the output is another tree: {tree.names} in place of {wanted.names}"
    pairs = [(a, b) for a, b in zip(tensors, references, strict=True) if b.is_floating_point() and bool(b.any())]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return "a tensor of the output has another shape or dtype"
    found.cosine = _cosine(output, expected)
    return "" if found.cosine >= LEAST_COSINE else f"the cosine to the float model is {found.cosine:.4f}"


def _cosine(output: Any, expected: Any) -> float:
    """The least over the float tensors of a tree, but for those that are all 0."""
    pairs = zip(flatten(output)[1], flatten(expected)[1], strict=True)
    cosines = [
        torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0)
        for a, b in pairs
        if b.is_floating_point() and bool(b.any())
    ]
    return min(map(float, cosines))


def _attentions(compiled: Compiled, found: Found) -> str:
    """Every softmax is an attention's, or the journal names it as none."""
    graph_module = compiled.graph_module
    softmaxes = [node for node in graph_module.graph.nodes if kind_of(graph_module, node) is Kind.SOFTMAX]
    fused = [node for node in graph_module.graph.nodes if node.target is functional.scaled_dot_product_attention]
    found.attentions = len(softmaxes) + len(fused)
    found.attentions_found = sum(map(_weighs_values, softmaxes))
    noted = next(entry.notes["unmatched"] for entry in compiled.journal.entries if "unmatched" in entry.notes)
    found.misses = tuple(f"{miss['node']}: {miss['reason']}" for miss in noted if "softmax" in miss["reason"])
    missing = found.attentions - found.attentions_found
    return f"{missing} attentions are neither found nor reported" if missing > len(found.misses) else ""


def _weighs_values(softmax: Node) -> bool:
    """Whether a quantized product with values reads a softmax, itself, blended with others or its heads mixed."""
    waiting, seen = list(softmax.users), set[Node]()
    while waiting:
        node = waiting.pop()
        if annotation_of(node).role is Role.AV:
            return True
        if node not in seen and (not annotation_of(node).has_bits or _mixes_heads(node, softmax)):
            waiting += node.users
        seen.add(node)
    return False


def _mixes_heads(node: Node, softmax: Node) -> bool:
    """Whether a layer is of no block's MLP or attention, and gives as many numbers as the softmax."""
    return annotation_of(node).role is Role.LINEAR and elements_of(node) == elements_of(softmax)


def _integers(compiled: Compiled, loaded: Compiled, images: Tensor, found: Found) -> str:
    """What is wrong with the model on integer kernels, on images that it was calibrated on."""
    found.integer_share = loaded.card["multiply_accumulates"].get("integer_share")
    found.tolerance = compiled.answers.tolerance if compiled.answers else 0.0
    tree, tensors = flatten(loaded(images))
    wanted, references = flatten(compiled(images))
    if tree != wanted:
        return f"the output on integer kernels is another tree: {tree.names} in place of {wanted.names}"
    pairs = [(a.double(), b.double()) for a, b in zip(tensors, references, strict=True) if b.is_floating_point()]
    found.difference = max(
        float((a - b).norm() / b.std(correction=0).clamp_min(1e-12) / b.numel() ** 0.5) for a, b in pairs
    )
    is_near = found.difference <= found.tolerance
    return "" if is_near else f"integer kernels differ by {found.difference:.3g}, tolerance {found.tolerance:.3g}"


def all_cases() -> dict[str, Case]:
    """By name."""
    return {case.name: case for module in (timm_models, transformers_models, other_models) for case in module.cases()}


def _work(names: list[str], export: bool, results: Any) -> None:
    """Of a process: check the architectures of these names, and hand on what is found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = all_cases()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            results.put(asdict(check(cases[name], Path(folder), export)))


def _run(names: list[str], path: Path, export: bool) -> None:
    """Check these, some at a time, each in its time; results are kept as they come.

    Args:
        names: of the architectures.
        path: the file of all results, to which these are added.
        export: whether they are exported too.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(names)
    while waiting:
        results = context.Queue()
        process = context.Process(target=_work, args=(waiting[:AT_A_TIME], export, results))
        process.start()
        for name in waiting[:AT_A_TIME]:
            found = _next(process, results)
            _keep(path, name, found)
            waiting.remove(name)
            print(f"{found['status']:8} {found['cpu_s']:5.1f} s  {name}  {found['message'][:300]}", flush=True)
            if not process.is_alive() and results.empty():
                break
        process.kill()
        process.join()


def _next(process: Any, results: Any) -> dict[str, Any]:
    """What the process finds next, or that it has ended before."""
    while True:
        try:
            found: dict[str, Any] = results.get(timeout=5)
            return found
        except queue.Empty:
            if not process.is_alive():
                return asdict(Found(message=f"its process ended with code {process.exitcode}"))


def _kept(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    return document


def _keep(path: Path, name: str, found: dict[str, Any]) -> None:
    document = _kept(path)
    document["versions"] = {
        package: importlib.metadata.version(package)
        for package in ("torch", "timm", "transformers", "torchvision", "open_clip_torch", "vit-pytorch", "onnxruntime")
    }
    document["listed"] = len(all_cases())
    document["models"][name] = found
    document["models"] = {key: document["models"][key] for key in all_cases() if key in document["models"]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="names that contain this, anew")
    parser.add_argument("--part", default="1/1", help="every n-th architecture, such as 2/3")
    parser.add_argument("--without-export", action="store_true", help="all stages but the last, which is the longest")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = _kept(options.out)["models"]
    names = [name for name in all_cases() if any(part in name for part in options.only)]
    if not options.only:
        last = "load" if options.without_export else "export"
        names = [
            name
            for name in all_cases()
            if name not in done or (done[name]["status"] == WHOLE and done[name]["stage"] not in (last, "export"))
        ]
    part, parts = map(int, options.part.split("/"))
    _run(names[part - 1 :: parts], options.out, not options.without_export)


if __name__ == "__main__":
    main()

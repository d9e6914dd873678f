"""What `compile` and `load` return: a model that is called like the original, with its report and its file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import Tensor
from torch.fx import GraphModule

from allocators.allocation import Allocation
from fxquant.artefact import artefact
from fxquant.artefact.container import write_file
from fxquant.checks.hints import checked
from fxquant.checks.torch_modes import exact
from fxquant.errors import ArtefactError, BackendError, ExportError, VerificationError
from fxquant.export.onnx_check import check_in_onnxruntime
from fxquant.export.onnx_file import to_onnx
from fxquant.export.onnxruntime_model import check_onnxruntime
from fxquant.export.program_file import to_program
from fxquant.graph.facts import QUANTIZED
from fxquant.graph.nodes import on_cpu
from fxquant.graph.notes import execution_of
from fxquant.graph.output_tree import Tree, leaves, tree_of
from fxquant.graph.structure import pattern
from fxquant.report import summary
from fxquant.report.picture import write_picture
from fxquant.report.tables import Report
from fxquant.runtime.border import images_of
from fxquant.runtime.known_answers import KnownAnswers
from fxquant.runtime.layer_row import LayerRow
from fxquant.runtime.mac_shares import checked_shares, with_execution
from fxquant.session.fixed_module import FixedModule
from fxquant.session.sized_graphs import SizedGraphs, share_tensors
from passes.lower.lower import SIMULATED, Lower, execution_summary
from passes.pipeline.contract import PassContext
from passes.pipeline.journal import Journal
from passes.pipeline.pipeline import Pipeline

IMAGE_ARGUMENT = "image_argument"
"""In a card: what the forward of the model that was compiled calls the images."""


class Compiled(FixedModule):
    """A quantized model: call it like the original.

    Args:
        graph_module: the annotated graph that runs.
        allocation: bits by layer and how they were found.
        journal: what each pass did, one entry per pass.
        layers: one row per quantized layer.
        card: the protocol (data, policies, what stays float, versions).
        answers: what the model gave for images from a seed, which whatever runs it is held against; None: not known.
        tree: how the tensors are arranged that it returns; by default as the graph says, in plain tuples, lists and
            dicts.
        sizes: by (height, width), graphs for images of other sizes, which call the same modules.

    It stays in inference mode and in the dtype it was compiled in, under autocast too. `state_dict` holds all its
    numbers and fits models compiled alike; a lowered model has none. It can be copied, and pickled as its artefact.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        allocation: Allocation | None,
        journal: Journal,
        layers: list[LayerRow],
        card: dict[str, Any],
        answers: KnownAnswers | None = None,
        tree: Tree | None = None,
        sizes: Mapping[tuple[int, int], GraphModule] | None = None,
    ) -> None:
        super().__init__(graph_module, sizes or {})
        self.tree, self.answers = tree or tree_of(graph_module), answers
        self.allocation, self.journal, self.layers, self.card = allocation, journal, layers, card
        self.register_load_state_dict_post_hook(_answer_anew)  # type: ignore[no-untyped-call]

    def forward(self, images_bchw: Tensor | None = None, **named: Any) -> Any:
        """Float (B, C, H, W) images to what the original model returns for them: a tensor, or tensors in the same tree.

        Images may be given by the name that the original has for them too, `model(pixel_values=images)`.
        An image with a NaN or infinite pixel gives NaN, and leaves the others as they are; no images give (0, ...).
        Images are of the size it was calibrated on or one of `image_sizes`, all of a batch alike.
        Raises InputError for images of another shape, dtype, layout or device, a TypeError too for what is no tensor.
        """
        images = images_of(images_bchw, named, str(self.card.get(IMAGE_ARGUMENT, "images_bchw")))
        at_size = None if self.sizes is None else self.sizes.at(images)
        graph_module, border = at_size or (self.graph_module, self.border)
        output = border.run(graph_module, images, self._device())
        return output if self.tree.is_bare else self.tree.build(leaves(output))

    def report(self) -> Report:
        """Tables per layer and in total; print it, or take `.to_dict()`."""
        return Report(self.layers, self.allocation, self.journal, self.card)

    def __repr__(self) -> str:
        return summary.line_of(self.report())

    def _repr_html_(self) -> str:
        return summary.html_of(self.report())

    def to_networkx(self) -> networkx.DiGraph[str]:
        """The annotated graph, one networkx node per graph node."""
        return pattern.to_networkx(self.graph_module)

    @checked(ArtefactError)
    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the bits: blocks by roles as `.svg`, the graph as Graphviz `.dot`. Raises ArtefactError."""
        write_picture(path, self.graph_module, title=str(self.card.get("model", "")))

    @checked(BackendError)
    def lowered(self, backend: str = "auto") -> Compiled:
        """This model with integer kernels, weights packed in memory; this one stays as it is.

        backend: see `passes.lower.lower.Lower`. Outputs equal this model's but for the rounding of float32, which is
        proven on two images (`passes.lower.prove_lowering`); `.report()` lists the kernel of each layer. The result is
        where its kernels run, wherever this model is: on the CPU, or with "cuda" on a GPU. Raises
        BackendError where the backend cannot run here, or computes something else, naming the first layer that differs;
        MissingExtraError without its extra.
        """
        return lowered_by(Pipeline([Lower(backend)], assumes=[QUANTIZED]), self, PassContext())

    def _answers_at(self, graph_module: GraphModule) -> KnownAnswers:
        """Known answers of the graph of another size, which no file holds."""
        return KnownAnswers.measured(graph_module, pixels=self.answers.pixels if self.answers else None)

    def check_answers(self) -> float:
        """Hold this model against its known answers; returns the relative difference, 0 where it has none.

        Raises VerificationError beyond the answers' tolerance.
        """
        if self.answers is None:
            return 0.0
        with torch.no_grad(), exact():
            output = self.graph_module(self.answers.images_for(self.graph_module).to(self._device()))
        found = self.answers.difference(output)
        if not found <= self.answers.tolerance:
            what = f"the model, which runs {self.card.get('execution', SIMULATED)},"
            raise VerificationError(
                self.answers.described(output, found, what) + ": load it with another backend; if it is simulated "
                "already, compile it again with the versions that are installed here, or install those of its card"
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """As its artefact; raises ArtefactError where that cannot be written, before anything is."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.fxq"
            self.save(path)
            return _from_content, (path.read_bytes(),)

    @checked(ArtefactError)
    def save(self, path: str | PathLike[str]) -> None:
        """Write the artefact: one file, packed weights, no code. Raises ArtefactError, also for a lowered model."""
        if execution_of(self.graph_module):
            raise ArtefactError(
                "a lowered model belongs to the machine it was lowered on: save the model it was lowered from, and "
                "lower again where it is loaded, fxquant.load(path, backend='auto')"
            )
        card = {**self.card, "layers": [row.to_dict() for row in self.layers]}
        journal = [asdict(entry) for entry in self.journal.entries]
        allocation = None if self.allocation is None else self.allocation.to_json()
        artefact.save(
            path,
            self.graph_module,
            card=card,
            allocation_json=allocation,
            journal=journal,
            answers=self.answers,
            sizes=self.sizes.graphs if self.sizes else {},
        )

    @checked(ExportError, path=ArtefactError)
    def export_onnx(
        self,
        path: str | PathLike[str],
        *,
        weight_type: str = "int8",
        runtime: str = "any",
        check: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, str]:
        """Write an ONNX model (opset 21) with QuantizeLinear and DequantizeLinear, for other runtimes.

        Input "images", float32 (B, C, H, W) with any B, output "scores"; the card is in its metadata.

        Args:
            path: where the file is written.
            weight_type: "int8"; "int4" for INT4 where no channel of a weight has more than 4 bits; or "packed", every
                weight in as many bits as it has, taken apart by the runtime when it loads the file.
            runtime: "any", or "onnxruntime" for what ONNX Runtime runs fastest; the values are the same.
            check: before the file is written, ONNX Runtime runs it and is held against the model's known answers.
            image_size: (height, width), the main size or one of `image_sizes`; a file takes one. None: the main size.

        Returns, by layer, "int8" or "simulated" (float operators); what runs as int8 is up to the runtime. Raises
        MissingExtraError without onnx and onnxscript, or, where a check is asked for, without onnxruntime; ExportError
        for a lowered model, an unknown weight_type or runtime, operations that torch cannot export, and a file that
        does not give the model's answers; ArtefactError where the file cannot be written.
        """
        if check:
            check_onnxruntime()
        at_size = self._graph_at(image_size)
        graph_module = on_cpu(at_size)
        found = to_onnx(graph_module, weight_type=weight_type, runtime=runtime, card=self.card)
        if check:
            known = self.answers if at_size is self.graph_module else None
            answers = known or self._answers_at(graph_module)
            check_in_onnxruntime(found.content, answers, answers.images_for(graph_module))
        write_file(Path(path), found.content)
        return found.layers

    @checked(ArtefactError)
    def export_program(self, path: str | PathLike[str]) -> int:
        """Write the program that `libfxquant` runs without Python (docs/how_to/c_library.md); returns its bytes.

        Its outputs equal those of `lowered("cpu-native")` bit for bit, which is checked on two images before the file
        is written. Raises ExportError, naming the layer, for what torch computes and not the integer kernels;
        BackendError without kernels; ArtefactError where the file cannot be written.
        """
        model = self if self._is_lowered else self.lowered("cpu-native")
        content = to_program(model.graph_module, self.card)
        write_file(Path(path), content)
        return len(content)

    def _graph_at(self, size: tuple[int, int] | None) -> GraphModule:
        sizes = self.sizes or SizedGraphs(self.graph_module, {})
        height, width = self.border.image_shape[1:]
        other = None if size is None else sizes.named(size, (height, width))
        return self.graph_module if other is None else other


def lowered_by(pipeline: Pipeline, model: Compiled, context: PassContext) -> Compiled:
    """A simulated model lowered, with what it says of itself; see `Compiled.lowered`, which this is but for the passes.

    Args:
        pipeline: passes on a quantized graph that lower it.
        model: stays as it is.
        context: images and seed for the passes; the journal and the known answers are the model's.
    """
    journal = Journal(list(model.journal.entries))
    given = replace(context, journal=journal, answers=model.answers, expected=None)
    graph_module = pipeline.run(on_cpu(model.graph_module), given)
    sizes: dict[tuple[int, int], GraphModule] = {}
    for size, graph in (model.sizes.graphs if model.sizes else {}).items():
        sizes[size] = pipeline.run(on_cpu(graph), PassContext(answers=model._answers_at(graph)))
        share_tensors(graph_module, sizes[size])
    kernels = execution_of(graph_module)
    layers = [replace(row, execution=kernels.get(row.layer, row.execution)) for row in model.layers]
    shares = with_execution(checked_shares(model.card.get("multiply_accumulates")), layers)
    execution = execution_summary(kernels)
    if (in_float := shares.get("float_share", 0.0)) > 0:
        execution += f"; {in_float:.1%} of all multiply-accumulates stay in float"
    card = {**model.card, "execution": execution, "multiply_accumulates": shares}
    return Compiled(graph_module, model.allocation, journal, layers, card, model.answers, model.tree, sizes)


def _answer_anew(model: Compiled, incompatible_keys: object) -> None:
    """After another state was loaded: its answers take the place of those known; the float model's are not its own."""
    if model.sizes is not None:
        model.sizes.point(model.graph_module)
    if model.answers is not None:
        model.answers = KnownAnswers.measured(model.graph_module, pixels=model.answers.pixels)


def _from_content(content: bytes) -> Compiled:
    """The model of an artefact's bytes: what pickles hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fxq"
        path.write_bytes(content)
        return load(path)


@checked(ArtefactError, backend=BackendError)
def load(path: str | PathLike[str], backend: str = "simulated") -> Compiled:
    """Read an artefact written by `Compiled.save`; outputs equal the saved model's bit for bit.

    backend: "simulated", or how to run it as integers, see `Compiled.lowered`: "auto", "cpu-native", "cpu-onednn",
    "cuda", "openvino"; a backend is held against the answers that the file holds. Runs nothing the file says. Raises
    ArtefactError for a file that is damaged, foreign or of another version, BackendError where the backend cannot run
    here or gives other answers, MissingExtraError without its extra.
    """
    found = artefact.load(path)
    report = Report.of_texts(found, str(path))
    compiled = Compiled(
        found.graph_module, report.allocation, report.journal, report.layers, dict(report.card), found.answers,
        sizes=found.sizes,
    )  # fmt: skip
    return compiled if backend == SIMULATED else compiled.lowered(backend)

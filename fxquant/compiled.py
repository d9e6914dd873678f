"""What `compile` and `load` return: a model that is called like the original, with its report and its file."""

from __future__ import annotations

from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from allocators.allocation import Allocation
from fxquant.errors import ArtefactError, BackendError, ExportError, VerificationError
from fxquant.export.onnx_check import check_in_onnxruntime, check_onnxruntime
from fxquant.export.onnx_file import to_onnx
from fxquant.graph import pattern
from fxquant.graph.annotation import Fact
from fxquant.hints import checked
from fxquant.report.picture import write_picture
from fxquant.report.tables import Report
from fxquant.runtime import artefact
from fxquant.runtime.container import write_file
from fxquant.runtime.known_answers import TOLERANCE, KnownAnswers, answer_images_for
from fxquant.runtime.layer_row import LayerRow
from fxquant.runtime.mac_shares import checked_shares, with_execution
from passes.contract import Journal, JournalEntry, PassContext
from passes.lower import SIMULATED, Lower, execution_of, execution_summary
from passes.pipeline import Pipeline


class Compiled(nn.Module):
    """A quantized model: call it like the original.

    graph_module: the annotated graph that runs. allocation: bits by layer and how they were found. journal: one entry
    per pass. layers: one row per quantized layer. card: the protocol (data, policies, what stays float, versions).
    answers: what the model gave for images from a seed, which whatever runs it is held against; None: not known.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        allocation: Allocation | None,
        journal: Journal,
        layers: list[LayerRow],
        card: dict[str, Any],
        answers: KnownAnswers | None = None,
    ) -> None:
        super().__init__()
        self.graph_module, self.answers = graph_module, answers
        self.allocation, self.journal, self.layers, self.card = allocation, journal, layers, card
        self.eval()

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Float (B, C, H, W) images to what the original model returns for them."""
        result: Tensor = self.graph_module(images_bchw)
        return result

    def report(self) -> Report:
        """Tables per layer and in total; print it, or take `.to_dict()`."""
        return Report(self.layers, self.allocation, self.journal, self.card)

    def to_networkx(self) -> networkx.DiGraph:
        """The annotated graph, one networkx node per graph node."""
        return pattern.to_networkx(self.graph_module)

    @checked(ArtefactError)
    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the bits: blocks by roles as `.svg`, the graph as Graphviz `.dot`. Raises ArtefactError."""
        write_picture(path, self.graph_module, title=str(self.card.get("model", "")))

    @checked(BackendError)
    def lowered(self, backend: str = "auto") -> Compiled:
        """This model with integer kernels, weights packed in memory; this one stays as it is.

        backend: see `passes.lower.Lower`. Outputs equal this model's but for the rounding of float32, which is proven
        on two images (`passes.prove_lowering`); `.report()` lists the kernel of each layer. Raises BackendError where
        the backend cannot run here, or computes something else, naming the first layer that differs;
        MissingExtraError without its extra.
        """
        pipeline = Pipeline([Lower(backend)], assumes=[Fact.QUANTIZED])
        journal = Journal(list(self.journal.entries))
        graph_module = pipeline.run(self.graph_module, PassContext(journal=journal, answers=self.answers))
        kernels = execution_of(graph_module)
        layers = [replace(row, execution=kernels.get(row.layer, row.execution)) for row in self.layers]
        shares = with_execution(checked_shares(self.card.get("multiply_accumulates")), layers)
        summary = execution_summary(kernels)
        if (in_float := shares.get("float_share", 0.0)) > 0:
            summary += f"; {in_float:.1%} of all multiply-accumulates stay in float"
        card = {**self.card, "execution": summary, "multiply_accumulates": shares}
        return Compiled(graph_module, self.allocation, journal, layers, card, self.answers)

    def check_answers(self) -> float:
        """Hold this model against its known answers; returns the relative difference, 0 where it has none.

        Raises VerificationError beyond `known_answers.TOLERANCE`.
        """
        if self.answers is None:
            return 0.0
        with torch.no_grad():
            output = self.graph_module(self.answers.images_for(self.graph_module))
        found = self.answers.difference(output)
        if not found <= TOLERANCE:
            what = f"the model, which runs {self.card.get('execution', SIMULATED)},"
            raise VerificationError(
                self.answers.described(output, found, what) + ": load it with another backend; if it is simulated "
                "already, compile it again with the versions that are installed here, or install those of its card"
            )
        return found

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
        )

    @checked(ExportError, path=ArtefactError)
    def export_onnx(
        self, path: str | PathLike[str], *, weight_type: str = "int8", check: bool = False
    ) -> dict[str, str]:
        """Write an ONNX model (opset 21) with QuantizeLinear and DequantizeLinear, for other runtimes.

        Input "images", float32 (B, C, H, W) with any B, output "scores"; the card is in its metadata. weight_type:
        "int8", or "int4" for INT4 where a weight has at most 4 bits. Returns, by layer, "int8" or "simulated" (float
        operators); what runs as int8 is up to the runtime. check: before the file is written, ONNX Runtime runs it and
        is held against the model's known answers.

        Raises MissingExtraError without onnx and onnxscript, or, where a check is asked for, without onnxruntime;
        ExportError for a lowered model, an unknown weight_type, operations that torch cannot export, and a file that
        does not give the model's answers; ArtefactError where the file cannot be written.
        """
        if check:
            check_onnxruntime()
        found = to_onnx(self.graph_module, weight_type=weight_type, card=self.card)
        if check:
            with torch.no_grad():
                answers = self.answers or KnownAnswers.of(self.graph_module(answer_images_for(self.graph_module)))
            check_in_onnxruntime(found.content, answers, answers.images_for(self.graph_module))
        write_file(Path(path), found.content)
        return found.layers


@checked(ArtefactError, backend=BackendError)
def load(path: str | PathLike[str], backend: str = "simulated") -> Compiled:
    """Read an artefact written by `Compiled.save`; outputs equal the saved model's bit for bit.

    backend: "simulated", or how to run it as integers, see `Compiled.lowered`: "auto", "cpu-native", "cpu-onednn",
    "cuda", "openvino"; a backend is held against the answers that the file holds. Runs nothing the file says. Raises
    ArtefactError for a file that is damaged, foreign or of another version, BackendError where the backend cannot run
    here or gives other answers, MissingExtraError without its extra.
    """
    found = artefact.load(path)
    card = dict(found.card)
    rows = card.pop("layers", None)
    if not isinstance(rows, list):
        raise ArtefactError(f"{path} has no list of layers in its card")
    try:
        entries = [JournalEntry(**entry) for entry in found.journal]
    except TypeError as error:
        raise ArtefactError(f"the journal of {path} does not fit: {error}") from error
    allocation = None if found.allocation_json is None else Allocation.from_json(found.allocation_json)
    layers = [LayerRow.from_dict(row) for row in rows]
    compiled = Compiled(found.graph_module, allocation, Journal(entries), layers, card, found.answers)
    return compiled if backend == SIMULATED else compiled.lowered(backend)

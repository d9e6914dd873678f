"""Observers as JSON values and tensors, and back: where they stand, what for, and their Gram matrices.

Deliberately not kept: histograms and ranges, which nothing needs once scales are searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxquant.artefact.operand_json import families_from_json
from fxquant.checks.untrusted import FLAG, TEXT, choice, record
from fxquant.errors import ArtefactError
from fxquant.graph.annotation import Source
from fxquant.quantizers.families import text_of
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.statistics.gram import Gram
from fxquant.quantizers.statistics.output_gram import OutputGram

_OBSERVER = {"class": TEXT, "families": TEXT, "source": choice(*map(str, Source)), "gram": FLAG}
_OUTPUT_GRAM = {"sum": (3, True), "squares": (0, True), "images": (0, False)}  # dimensions, and whether float


def observer_to_json(observer: Observer, path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and tensors by name.

    Raises ArtefactError for an observer with other statistics than the matrices, and for one that a rank alone owns.
    """
    if observer.owner is not None:
        raise ArtefactError(f"observer '{path}' has left what it gathered to rank {observer.owner}: collect it first")
    if observer.images:
        raise ArtefactError(f"observer '{path}' has statistics, which a file does not keep: release it first")
    settings = {"families": text_of(observer.families), "source": str(observer.source), "gram": observer.keeps_gram}
    spec = {"class": "Observer", **settings}
    tensors = {} if observer.gram is None else {f"{path}.gram": observer.gram.matrix()}
    outputs = {} if observer.output_gram is None else observer.output_gram.state()
    return spec, tensors | {f"{path}.output_gram.{name}": tensor for name, tensor in outputs.items()}


def observer_from_json(spec: Any, path: str, tensors: Mapping[str, Tensor]) -> Observer:
    """The observer. Raises ArtefactError for anything that does not fit together.

    Args:
        spec: the observer's JSON value, as a file has it.
        path: the path that its tensors are named after.
        tensors: the tensors of the file, by name.
    """
    read = record(spec, _OBSERVER, f"observer '{path}'")
    families = families_from_json(read["families"], f"observer '{path}'")
    observer = Observer(families, Source(read["source"]), read["gram"])
    gram = tensors.get(f"{path}.gram")
    if gram is not None and (gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.is_floating_point()):
        raise ArtefactError(f"'{path}.gram' is no Gram matrix: {gram.dtype}, shape {tuple(gram.shape)}")
    observer.gram = None if gram is None else Gram.of(gram)
    observer.output_gram = _output_gram(f"{path}.output_gram", tensors)
    return observer


def _output_gram(path: str, tensors: Mapping[str, Tensor]) -> OutputGram | None:
    """What was gathered of gradients at a layer's output; None where nothing was."""
    found = OutputGram()
    state = {name: tensors[f"{path}.{name}"] for name in found.state() if f"{path}.{name}" in tensors}
    if not state:
        return None
    shapes = {name: (tensor.ndim, tensor.is_floating_point()) for name, tensor in state.items()}
    is_square = "sum" in state and state["sum"].shape[1:2] == state["sum"].shape[2:]
    if shapes != _OUTPUT_GRAM or not is_square or int(state["images"]) < 1:
        raise ArtefactError(f"'{path}' is no Gram matrix of gradients: {shapes}")
    found.restore(state)
    return found

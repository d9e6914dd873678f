"""Observers as JSON values and tensors, and back: where they stand, what for, and their Gram matrix.

Deliberately not kept: histograms and ranges, which nothing needs once scales are searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxquant.checks.untrusted import FLAG, NOTHING, TEXT, choice, either, record
from fxquant.errors import ArtefactError
from fxquant.quantizers.observers import Edge, Observer

_OBSERVER = {"class": TEXT, "family": either(NOTHING, TEXT), "edge": choice(*map(str, Edge)), "gram": FLAG}


def observer_to_json(observer: Observer, path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON values and tensors by name. Raises ArtefactError for an observer with other statistics than the matrix."""
    if observer.images:
        raise ArtefactError(f"observer '{path}' has statistics, which a file does not keep: release it first")
    spec = {"class": "Observer", "family": observer.family, "edge": str(observer.edge), "gram": observer.keeps_gram}
    return spec, {} if observer.gram is None else {f"{path}.gram": observer.gram}


def observer_from_json(spec: Any, path: str, tensors: Mapping[str, Tensor]) -> Observer:
    """The observer. Raises ArtefactError for anything that does not fit together.

    Args:
        spec: the observer's JSON value, as a file has it.
        path: the path that its tensors are named after.
        tensors: the tensors of the file, by name.
    """
    read = record(spec, _OBSERVER, f"observer '{path}'")
    observer = Observer(read["family"], Edge(read["edge"]), read["gram"])
    gram = tensors.get(f"{path}.gram")
    if gram is not None and (gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.is_floating_point()):
        raise ArtefactError(f"'{path}.gram' is no Gram matrix: {gram.dtype}, shape {tuple(gram.shape)}")
    observer.gram = gram
    return observer

"""A searched graph as texts and tensors, and back: what is known of a model before any budget is.

The graph is written as in an artefact (`graph_json`); besides, every operand's candidates, with their quantizers as
settings and tensors, and scores. Tensors that the traced model has under the same name are left out: whoever reads
has that model. Nothing is pickled. Of what observers have gathered only Gram matrices are kept; a graph that still has
more is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.artefact.container import compress, decompress
from fxquant.artefact.graph_json import graph_from_json, graph_to_json
from fxquant.artefact.module_json import quantizer_from_json, quantizer_to_json
from fxquant.checks.untrusted import LIST, NUMBER, OBJECT, checked, field, from_json, listed, to_json
from fxquant.errors import ArtefactError
from fxquant.graph.annotation import Candidate, annotate_operands, annotation_of, planned_nodes
from fxquant.graph.facts import Fact, declare, facts_of
from fxquant.graph.nodes import device_of
from fxquant.graph.notes import COVERAGE, FACTS, IMAGE_SHAPE
from fxquant.graph.output_tree import TREE

_OPERANDS = listed(LIST, longest=2)
_WRITTEN_APART = (COVERAGE.key, IMAGE_SHAPE.key, TREE.key, FACTS.key)


def searched_to_file(graph_module: GraphModule, traced: GraphModule) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and tensors from which `searched_from_file` makes the same graph, given the same traced model.

    Raises ArtefactError, naming it, for what a file cannot hold.
    """
    document, tensors = graph_to_json(graph_module)
    writer = _Writer()
    operands = {
        node.name: [[writer.value(o.candidates), list(o.scores)] for o in annotation_of(node).operands]
        for node in planned_nodes(graph_module)
    }
    meta = {key: value for key, value in graph_module.meta.items() if key not in _WRITTEN_APART}
    if json.loads(to_json(meta, "the graph's meta")) != meta:
        raise ArtefactError(f"the graph's meta {sorted(meta)} are not JSON values, and cannot be kept")
    known = traced.state_dict()
    new = {n: t for n, t in tensors.items() if n not in known or not _is_equal(t, known[n])}
    facts = sorted(map(str, facts_of(graph_module)))
    content = {"graph": document, "operands": operands, "facts": facts, "meta": meta}
    return {"searched": compress(to_json(content, "the searched graph"))}, new | writer.tensors


def searched_from_file(
    texts: Mapping[str, str], tensors: Mapping[str, Tensor], traced: GraphModule, facts: Iterable[Fact]
) -> GraphModule:
    """The graph that was written.

    Args:
        texts: as `searched_to_file` gave them.
        tensors: by name, as `searched_to_file` gave them.
        traced: the traced model, which has the tensors and shapes that were left out.
        facts: those that the graph may have, such as all that a pipeline's passes provide; the file has their names.

    Raises ArtefactError for anything that does not fit together, and for a fact of another name.
    """
    what, device = "the searched graph", device_of(traced)
    content = from_json(decompress(texts.get("searched", ""), what), dict, what)
    state = {**traced.state_dict(), **{name: tensor.to(device) for name, tensor in tensors.items()}}
    graph_module = graph_from_json(field(content, "graph", dict, what), state)
    operands = field(content, "operands", dict, what)
    known = {fact.name: fact for fact in facts}
    named = field(content, "facts", list, what)
    if unknown := [name for name in named if name not in known]:
        raise ArtefactError(f"{what} has the fact {unknown[0]!r}, which no pass of this pipeline provides")
    shapes = {node.name: node.meta["tensor_meta"] for node in traced.graph.nodes if "tensor_meta" in node.meta}
    for node in graph_module.graph.nodes:
        # Shapes are the traced model's; a node it does not have is an observer, which passes its input on.
        source = next(iter(node.all_input_nodes), node)
        shape = shapes.get(node.name, source.meta.get("tensor_meta") if node.op == "call_module" else None)
        if shape is not None:
            node.meta["tensor_meta"] = shape
        if node.name in operands:
            pairs = checked(operands[node.name], _OPERANDS, f"operands of node {node.name}")
            if len(pairs) != len(annotation_of(node).operands) or any(len(pair) != 2 for pair in pairs):
                raise ArtefactError(f"node {node.name} has candidates of {len(pairs)} operands, or no scores with them")
            candidates = [_read(group, tensors, device) for group, _ in pairs]
            annotate_operands(node, candidates=candidates, scores=[_scores(values) for _, values in pairs])
    graph_module.meta.update(field(content, "meta", dict, what))
    declare(graph_module, [known[name] for name in named])
    return graph_module


def candidates_to_file(groups: Iterable[tuple[Candidate, ...]]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and tensors of one layer's candidates, operand by operand. Raises ArtefactError as `searched_to_file`."""
    writer = _Writer()
    found = [writer.value(group) for group in groups]
    return {"candidates": to_json(found, "the candidates")}, writer.tensors


def candidates_from_file(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[tuple[Candidate, ...], ...]:
    """The candidates that were written. Raises ArtefactError for anything that does not fit together."""
    what = "the candidates"
    return tuple(_read(group, tensors) for group in from_json(texts.get("candidates", ""), list, what))


class _Writer:
    """Candidates as JSON; the candidates' tensors are gathered."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._count = 0

    def value(self, candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
        """JSON of candidates."""
        return [self._candidate(candidate) for candidate in candidates]

    def _candidate(self, value: Candidate) -> dict[str, Any]:
        path = f"candidates.{self._count}"
        self._count += 1
        settings, state = quantizer_to_json(value.quantizer, path)
        self.tensors |= state
        numbers = {"bits": value.bits, "loss": value.loss, "noise": value.noise, "signal": value.signal}
        return {**numbers, "path": path, "quantizer": settings}


def _read(candidates: Any, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> tuple[Candidate, ...]:
    found = (_candidate(item, tensors) for item in checked(candidates, listed(OBJECT), "candidates"))
    return tuple(replace(candidate, quantizer=candidate.quantizer.to(device)) for candidate in found)


def _scores(values: Any) -> tuple[float, ...]:
    return tuple(checked(values, listed(NUMBER), "scores"))


def _candidate(value: dict[str, Any], tensors: Mapping[str, Tensor]) -> Candidate:
    given = dict(value)
    path = field(given, "path", str, "a candidate")
    quantizer = quantizer_from_json(given.pop("quantizer", None), given.pop("path"), tensors)
    if quantizer is None or set(given) != {"bits", "loss", "noise", "signal"}:
        raise ArtefactError(f"{path} is no candidate: {sorted(given)}")
    return Candidate(quantizer=quantizer.eval(), **given)


def _is_equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)

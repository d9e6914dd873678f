"""One file that holds a quantized model: graph, packed weights, scales, and how it came about; no pickle, no code.

The file is safetensors; its metadata are JSON texts: the card, readable with any safetensors tool, and graph, journal
and allocation, compressed (base64 of zlib). Weights are packed at their bits, so the payload is what the allocation
claims, and the loaded model's outputs equal the saved one's bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxquant.errors import ArtefactError
from fxquant.runtime import untrusted
from fxquant.runtime.container import compress, decompress, pack_file, read_file, read_texts, stored_bytes, write_file
from fxquant.runtime.graph_json import graph_from_json, graph_to_json
from fxquant.runtime.known_answers import KnownAnswers
from fxquant.runtime.module_json import CODES, claimed_bits


@dataclass(frozen=True)
class LoadedArtefact:
    """What an artefact holds.

    graph_module: in inference mode, on the CPU. card: protocol, data, accuracy, as saved. allocation_json: the
    Allocation as JSON text, None where none was saved. journal: one JSON object per pass. answers: what the model gave
    for images from a seed, None where none were saved.
    """

    graph_module: GraphModule
    card: dict[str, Any]
    allocation_json: str | None = None
    journal: list[dict[str, Any]] = field(default_factory=list)
    answers: KnownAnswers | None = None


def save(
    path: str | PathLike[str],
    graph_module: GraphModule,
    *,
    card: dict[str, Any],
    allocation_json: str | None = None,
    journal: list[dict[str, Any]] | None = None,
    answers: KnownAnswers | None = None,
) -> None:
    """Write one file, in one step; an existing file is replaced, and kept as it was if anything fails.

    card, journal: JSON values. allocation_json: a JSON text. The model is rebuilt from what was written before the
    file is put in place, so what was saved can be loaded.

    Raises ArtefactError for a folder or a missing parent folder, for values that are not JSON, and, naming the node or
    module, for what a file cannot hold.
    """
    document, tensors = graph_to_json(graph_module)
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    graph_text = untrusted.to_json(document, "the graph")
    texts = {
        "card": untrusted.to_json(_of_type(card, dict, "card"), "the card"),
        "graph": compress(graph_text),
        "journal": compress(untrusted.to_json(_of_type(journal or [], list, "journal"), "the journal")),
    }
    if allocation_json is not None:
        texts["allocation"] = compress(_checked_json(allocation_json))
    if answers is not None:
        texts["answers"] = compress(untrusted.to_json(answers.to_json(), "the known answers"))
    graph_from_json(json.loads(graph_text), tensors)
    write_file(Path(path), pack_file(texts, tensors))


def load(path: str | PathLike[str]) -> LoadedArtefact:
    """Read a file written by `save`; runs nothing that the file says.

    Raises ArtefactError, saying what is wrong, for every file that is not a whole artefact of this version.
    """
    texts, tensors = read_file(Path(path))
    graph_module = graph_from_json(_parsed(texts, "graph", dict, path), tensors)
    allocation = decompress(texts["allocation"], f"the allocation of {path}") if "allocation" in texts else None
    return LoadedArtefact(
        graph_module,
        _card(texts, path),
        None if allocation is None else _checked_json(allocation),
        _parsed(texts, "journal", list, path),
        KnownAnswers.from_json(_parsed(texts, "answers", dict, path)) if "answers" in texts else None,
    )


def inspect_card(path: str | PathLike[str]) -> dict[str, Any]:
    """The card alone, without reading tensors. Raises ArtefactError where the file is not an artefact."""
    return _card(read_texts(Path(path)), path)


def size_breakdown(path: str | PathLike[str]) -> dict[str, int]:
    """Where the bytes of an artefact go, without reading tensors.

    Keys: `packed_weight_bytes`; `scale_bytes` (scales and zero-points of weights and activations);
    `other_tensor_bytes` (biases, norms, embeddings, float weights); `metadata_bytes` (graph, card, tensor names);
    `total_bytes`, their sum; `claimed_weight_bits`, elements times bits of the packed weights.
    Raises ArtefactError where the file is not an artefact.
    """
    file = Path(path)
    specs = untrusted.field(_parsed(read_texts(file), "graph", dict, path), "modules", dict, "the graph")
    stored = stored_bytes(file)
    packed = sum(size for name, size in stored.items() if name.endswith(f".{CODES}"))
    scales = sum(size for name, size in stored.items() if name.endswith(("_quantizer.scale", "_quantizer.zero_point")))
    total = file.stat().st_size
    return {
        "packed_weight_bytes": packed,
        "scale_bytes": scales,
        "other_tensor_bytes": sum(stored.values()) - packed - scales,
        "metadata_bytes": total - sum(stored.values()),
        "total_bytes": total,
        "claimed_weight_bits": sum(claimed_bits(spec, p) for p, spec in specs.items() if f"{p}.{CODES}" in stored),
    }


def _of_type(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ArtefactError(f"the {what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _card(texts: dict[str, str], path: str | PathLike[str]) -> dict[str, Any]:
    card: dict[str, Any] = untrusted.from_json(texts.get("card", ""), dict, f"the card of {path}")
    return card


def _parsed(texts: dict[str, str], key: str, kind: type, path: str | PathLike[str]) -> Any:
    what = f"the {key} of {path}"
    return untrusted.from_json(decompress(texts.get(key, ""), what), kind, what)


def _checked_json(text: str) -> str:
    try:
        json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(f"the allocation is not a JSON text: {error}") from error
    return text

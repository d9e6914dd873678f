"""One file that holds a quantized model: graph, packed weights, scales, and how it came about; no pickle, no code.

An artefact comes from somebody else, so loading bounds what it takes: texts, tensors and what is derived from them by
multiples of the file's size, and what runs by `shape_check`.

The file is safetensors; its metadata are JSON texts: the card, readable with any safetensors tool, and graph, journal
and allocation, compressed (base64 of zlib). Weights are packed at their bits, so the payload is what the allocation
claims, and the loaded model's outputs equal the saved one's bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxquant.artefact.container import compress, decompress, pack_file, read_file, read_texts, stored_bytes, write_file
from fxquant.artefact.graph_json import Size, graph_to_json, graphs_from_json
from fxquant.artefact.module_json import CODES, claimed_bits, unpacked_bytes
from fxquant.artefact.shape_check import check_shapes
from fxquant.checks import untrusted
from fxquant.checks.torch_modes import usual
from fxquant.errors import ArtefactError
from fxquant.runtime.known_answers import KnownAnswers

_COMPRESSED = ("graph", "journal", "allocation", "answers")
# All texts together: this many bytes, and besides one for so many of the file. A parsed text takes up to 25 times its
# length; a ViT-tiny's texts have 107 KB, ten times what they take in the file.
_TEXT_FLOOR, _TEXT_SHARE = 2**22, 8
# What tensors take in memory: a weight of 2 bits becomes codes of 8, four times what the file has of it.
_TENSOR_FLOOR, _TENSOR_FACTOR = 2**25, 6


@dataclass(frozen=True)
class LoadedTexts:
    """What an artefact says.

    Args:
        card: protocol, data, accuracy, as saved.
        allocation_json: the Allocation as JSON text, None where none was saved.
        journal: one JSON object per pass.
    """

    card: dict[str, Any]
    allocation_json: str | None = None
    journal: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class LoadedArtefact(LoadedTexts):
    """What an artefact holds.

    Args:
        graph_module: in inference mode, on the CPU.
        answers: what the model gave for images from a seed, None where none were saved.
        sizes: by (height, width), graphs for images of other sizes, which call the same modules.
    """

    graph_module: GraphModule = field(kw_only=True)
    answers: KnownAnswers | None = field(default=None, kw_only=True)
    sizes: dict[Size, GraphModule] = field(default_factory=dict, kw_only=True)


@usual()
def save(
    path: str | PathLike[str],
    graph_module: GraphModule,
    *,
    card: dict[str, Any],
    allocation_json: str | None = None,
    journal: list[dict[str, Any]] | None = None,
    answers: KnownAnswers | None = None,
    sizes: Mapping[Size, GraphModule] | None = None,
) -> None:
    """Write one file, in one step; an existing file is replaced, and kept as it was if anything fails.

    Args:
        path: where the file is written.
        graph_module: the simulated graph that the file is made of.
        card, journal: the protocol and the entries of all passes, as JSON values.
        allocation_json: a JSON text. The model is rebuilt from what was written before the file is put in place, so
            what was saved can be loaded.
        answers: what the model gives for images from a seed; None: not known.
        sizes: by (height, width), graphs for images of other sizes, which call the same modules.

    Raises ArtefactError for a folder or a missing parent folder, for values that are not JSON, and, naming the node or
    module, for what a file cannot hold.
    """
    document, tensors = graph_to_json(graph_module, sizes)
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
    content = pack_file(texts, tensors)
    _Texts(texts, len(content), path)
    _graphs(json.loads(graph_text), tensors, len(content), path)
    write_file(Path(path), content)


@usual()
def load(path: str | PathLike[str]) -> LoadedArtefact:
    """Read a file written by `save`; runs nothing that the file says.

    Raises ArtefactError, saying what is wrong, for every file that is not a whole artefact of this version.
    """
    file = Path(path)
    texts, tensors = read_file(file)
    found = _Texts(texts, file.stat().st_size, path)
    graph_module, sizes = _graphs(found.parsed("graph", dict), tensors, found.file_bytes, path)
    return LoadedArtefact(
        found.card(),
        found.allocation(),
        found.parsed("journal", list),
        graph_module=graph_module,
        answers=KnownAnswers.from_json(found.parsed("answers", dict)) if "answers" in texts else None,
        sizes=sizes,
    )


def load_texts(path: str | PathLike[str]) -> LoadedTexts:
    """What a file says besides its model, which is not rebuilt. Raises ArtefactError, also for a damaged file."""
    file = Path(path)
    found = _Texts(read_file(file)[0], file.stat().st_size, path)
    return LoadedTexts(found.card(), found.allocation(), found.parsed("journal", list))


def inspect_card(path: str | PathLike[str]) -> dict[str, Any]:
    """The card alone, without reading tensors. Raises ArtefactError where the file is not an artefact."""
    file = Path(path)
    texts = read_texts(file)
    return _Texts(texts, file.stat().st_size, path).card()


def size_breakdown(path: str | PathLike[str]) -> dict[str, int]:
    """Where the bytes of an artefact go, without reading tensors.

    Keys: `packed_weight_bytes`; `scale_bytes` (scales and zero-points of weights and activations);
    `other_tensor_bytes` (biases, norms, embeddings, float weights); `metadata_bytes` (graph, card, tensor names);
    `total_bytes`, their sum; `claimed_weight_bits`, elements times bits of the packed weights.
    Raises ArtefactError where the file is not an artefact.
    """
    file = Path(path)
    texts = read_texts(file)
    total = file.stat().st_size
    specs = untrusted.field(_Texts(texts, total, path).parsed("graph", dict), "modules", dict, "the graph")
    stored = stored_bytes(file)
    packed = sum(size for name, size in stored.items() if name.endswith(f".{CODES}"))
    scales = sum(size for name, size in stored.items() if name.endswith(("_quantizer.scale", "_quantizer.zero_point")))
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


class _Texts:
    """The texts of a file, unfolded within a multiple of its size, whatever they claim."""

    def __init__(self, texts: Mapping[str, str], file_bytes: int, path: str | PathLike[str]) -> None:
        self.file_bytes, self._path, self._texts = file_bytes, path, texts
        self._left = _TEXT_FLOOR + file_bytes // _TEXT_SHARE
        self._kept = {key: decompress(texts[key], self._what(key), self._left) for key in _COMPRESSED if key in texts}
        self._kept["card"] = texts.get("card", "")
        if (found := sum(map(len, self._kept.values()))) > self._left:
            raise ArtefactError(f"the texts of {path} have {found} characters, which no model of its size needs")

    def parsed(self, key: str, kind: type) -> Any:
        """The value of a JSON text that must be there."""
        if key not in self._kept:
            raise ArtefactError(f"{self._what(key)} is missing")
        return untrusted.from_json(self._kept[key], kind, self._what(key))

    def card(self) -> dict[str, Any]:
        """The card."""
        card: dict[str, Any] = self.parsed("card", dict)
        return card

    def allocation(self) -> str | None:
        """The allocation as JSON text, None where there is none."""
        text = self._kept.get("allocation")
        return None if text is None else _checked_json(text)

    def _what(self, key: str) -> str:
        return f"the {key} of {self._path}"


def _graphs(
    document: Any, tensors: Mapping[str, Tensor], file_bytes: int, path: str | PathLike[str]
) -> tuple[GraphModule, dict[Size, GraphModule]]:
    """The graph modules, once each is known to be no larger than a file of this size makes one, and to run."""
    modules = untrusted.field(document, "modules", dict, "the graph")
    held = sum(tensor.nbytes for tensor in tensors.values())
    held += sum(unpacked_bytes(spec, name) for name, spec in modules.items())
    if held > (limit := _TENSOR_FLOOR + _TENSOR_FACTOR * file_bytes):
        raise ArtefactError(
            f"the model in {path} takes {held >> 20} MiB, and a file of {file_bytes} bytes may take {limit >> 20} MiB: "
            "many of its tensors are one, under several names"
        )
    graph_module, sizes = graphs_from_json(document, tensors)
    for each in (graph_module, *sizes.values()):
        check_shapes(each, file_bytes)
    return graph_module, sizes


def _checked_json(text: str) -> str:
    try:
        untrusted.from_json(text, dict, "the allocation")
    except (TypeError, ArtefactError) as error:
        raise ArtefactError(f"the allocation is not a JSON text: {error}") from error
    return text

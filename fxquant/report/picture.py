"""Pictures of an annotated graph: an SVG of blocks by roles, and Graphviz DOT of the graph itself; text only.

Neither needs anything installed; `dot -Tsvg model.dot` lays the DOT out where Graphviz is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from xml.sax.saxutils import escape

import networkx
from torch.fx import GraphModule

from fxquant.artefact.container import write_file
from fxquant.errors import ArtefactError
from fxquant.graph.annotation import Annotation, annotation_of
from fxquant.graph.structure.kind import Kind
from fxquant.graph.structure.pattern import to_networkx
from fxquant.report.grid import Tile, grid_of, mean_activation_bits, mean_weight_bits, tiles_of
from fxquant.report.palette import FLOAT, colour, legend, text_colour
from fxquant.runtime.layer_row import LayerRow

_LEFT, _TOP, _HEADER, _WIDTH, _HEIGHT, _GAP, _LEGEND = 130, 64, 24, 84, 30, 4, 44
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_picture(path: str | PathLike[str], source: GraphModule | Sequence[LayerRow], title: str = "") -> None:
    """Write `.svg` or `.dot`, as the suffix says, in one step.

    Args:
        path: of the file; its suffix says what it becomes.
        source: an annotated graph, or the rows of a report, of which no DOT can be made.
        title: the text above the picture.

    Raises ArtefactError for another suffix, for DOT without a graph, and where the file cannot be written.
    """
    if check_picture(path) == ".svg":
        text = to_svg(source, title)
    elif isinstance(source, GraphModule):
        text = to_dot(source)
    else:
        raise ArtefactError(f"{path}: a DOT picture needs the graph module, rows hold no edges; write .svg")
    write_file(Path(path), text.encode())


def check_picture(path: str | PathLike[str]) -> str:
    """The suffix; raises ArtefactError unless it is .svg or .dot."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".dot"):
        raise ArtefactError(f"{path}: a picture ends in .svg or .dot, not in {suffix or 'nothing'!r}")
    return suffix


def to_svg(source: GraphModule | Sequence[LayerRow], title: str = "") -> str:
    """An SVG picture: blocks as rows, roles as columns; a cell's left half is the weight, its right the activation."""
    tiles = tiles_of(source)
    grid = grid_of(tiles)
    columns = max(len(grid.roles), 1)
    before, after = _around(tiles)
    width = max(_LEFT + columns * (_WIDTH + _GAP) + 16, _LEFT + len(legend()) * _LEGEND + 130)
    rows = len(grid.blocks) + len(before) + len(after)
    height = _TOP + _HEADER + rows * (_HEIGHT + _GAP) + 72
    parts = [_text(16, 28, f"{title}: {_means(tiles)}" if title else _means(tiles), size=16)]
    parts.append(_text(16, 47, "each cell: weight bits | activation bits", size=11, fill="#57606a"))
    y = float(_TOP)
    for tile in before:
        parts += _row(y, tile.layer, [[tile]])
        y += _HEIGHT + _GAP
    y += _HEADER
    for index, role in enumerate(grid.roles):
        parts.append(_text(_x(index) + _WIDTH / 2, y - 8, role, anchor="middle"))
    for block in grid.blocks:
        parts += _row(y, f"block {block}", [grid.at(block, role) for role in grid.roles])
        y += _HEIGHT + _GAP
    y += _GAP * 2 if after else 0
    for tile in after:
        parts += _row(y, tile.layer, [[tile]])
        y += _HEIGHT + _GAP
    parts += _legend(y + 18)
    body = "\n".join(parts)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    sheet = '<rect width="100%" height="100%" fill="#ffffff"/>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, sans-serif">'
    return f"{opening}\n{sheet}\n{body}\n</svg>\n"


def _around(tiles: Sequence[Tile]) -> tuple[list[Tile], list[Tile]]:
    """Tiles outside blocks: those before the first block, and all others."""
    first = next((i for i, tile in enumerate(tiles) if tile.block is not None), len(tiles))
    outside = [(i, tile) for i, tile in enumerate(tiles) if tile.block is None]
    return [tile for i, tile in outside if i < first], [tile for i, tile in outside if i >= first]


def _means(tiles: Sequence[Tile]) -> str:
    means = (("weight", mean_weight_bits(tiles)), ("activation", mean_activation_bits(tiles)))
    return ", ".join(f"mean {name} bits {mean:.2f}" for name, mean in means if mean is not None) or "no bits"


def _row(y: float, label: str, cells: list[list[Tile]]) -> list[str]:
    parts = [_text(_LEFT - 10, y + _HEIGHT / 2 + 4, _shortened(label), anchor="end")]
    for column, tiles in enumerate(cells):
        for index, tile in enumerate(tiles):
            width = _WIDTH / len(tiles)
            parts += _cell(_x(column) + index * width, y, width - (1 if len(tiles) > 1 else 0), tile)
    return parts


def _cell(x: float, y: float, width: float, tile: Tile) -> list[str]:
    parts = [f"<g><title>{_escaped(f'{tile.layer}: weight/activation bits {tile.label}')}</title>"]
    for index, (bits, label) in enumerate(zip(tile.shade, tile.labels, strict=True)):
        fill, left = colour(bits), x + index * width / 2
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{width / 2:.1f}" height="{_HEIGHT}" fill="{fill}" '
            f'stroke="#ffffff"/>'
        )
        parts.append(_text(left + width / 4, y + _HEIGHT / 2 + 4, label, anchor="middle", fill=text_colour(fill)))
    return [*parts, "</g>"]


def _legend(y: float) -> list[str]:
    parts = [_text(_LEFT - 10, y + 14, "bits", anchor="end")]
    for index, (label, fill) in enumerate(legend()):
        x = _LEFT + index * _LEGEND
        parts.append(f'<rect x="{x}" y="{y:.1f}" width="{_LEGEND - 4}" height="20" fill="{fill}"/>')
        parts.append(_text(x + _LEGEND / 2 - 2, y + 14, label, size=11, anchor="middle", fill=text_colour(fill)))
    return [*parts, _text(_LEFT + len(legend()) * _LEGEND, y + 14, "float, or no weight", size=11)]


def _x(column: int) -> float:
    return _LEFT + column * (_WIDTH + _GAP)


def _shortened(label: str, longest: int = 17) -> str:
    """With its middle left out; the cell's tooltip has the whole name."""
    half = longest // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[-half:]}"


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "start", fill: str = "#1b1f24") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}">{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return escape(_NOT_XML.sub("?", text))


def to_dot(graph_module: GraphModule) -> str:
    """Graphviz DOT: nodes with a role, images, residual sums and outputs; edges pass over everything else.

    The graph must have roles; nodes are coloured by weight bits, or activation bits where there is no weight.
    """
    graph = to_networkx(graph_module)
    kept = [name for name in graph if _is_shown(graph, name)]
    lines = ["digraph fxquant {", "  rankdir=TB;", '  node [shape=box, style="filled,rounded", fontname="Helvetica"];']
    by_block: dict[int | None, list[str]] = {}
    for name in kept:
        by_block.setdefault(annotation_of(graph.nodes[name]["node"]).block, []).append(name)
    for block, names in by_block.items():
        nodes = [_dot_node(name, annotation_of(graph.nodes[name]["node"]), graph.nodes[name]["kind"]) for name in names]
        if block is None:
            lines += [f"  {node}" for node in nodes]
        else:
            lines += [f"  subgraph cluster_{block} {{", f'    label="block {block}";', '    color="#8c959f";']
            lines += [*(f"    {node}" for node in nodes), "  }"]
    for name in kept:
        lines += [f"  {_quoted(source)} -> {_quoted(name)};" for source in _sources(graph, name, set(kept))]
    return "\n".join([*lines, "}", ""])


def _is_shown(graph: networkx.DiGraph, name: str) -> bool:
    is_structural = graph.nodes[name]["kind"] in (Kind.IMAGE, Kind.OUTPUT, Kind.SUM)
    return is_structural or annotation_of(graph.nodes[name]["node"]).role is not None


def _sources(graph: networkx.DiGraph, name: str, kept: set[str]) -> list[str]:
    """The nearest shown nodes above, in graph order."""
    found: dict[str, int] = {}
    queue, seen = list(graph.predecessors(name)), set()
    while queue:
        source = queue.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in kept:
            found[source] = graph.nodes[source]["position"]
        else:
            queue += graph.predecessors(source)
    return sorted(found, key=found.__getitem__)


def _dot_node(name: str, annotation: Annotation, kind: Kind) -> str:
    if annotation.role is None:
        label = {Kind.SUM: "+", Kind.IMAGE: "image", Kind.OUTPUT: "output"}[kind]
        return f'{_quoted(name)} [label="{label}", fillcolor="#ffffff"];'
    tile = Tile.of(annotation)
    pairs = zip("wa", tile.labels, strict=True)
    bits = "".join(f"{letter}{label}" for letter, label in pairs if label != "-")
    weight, activation = tile.shade
    fill = FLOAT if not bits else colour(weight if weight is not None else activation)
    label = f"{annotation.role} {bits}".strip()
    return (
        f"{_quoted(name)} [label={_quoted(label)}, tooltip={_quoted(annotation.layer)}, fillcolor={_quoted(fill)}, "
        f"fontcolor={_quoted(text_colour(fill))}];"
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

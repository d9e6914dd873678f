"""Blocks by roles: the shape in which a transformer's bits are read at one glance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule

from fxquant.graph.annotation import Annotation, Role, annotation_of, input_label, nodes_with_role
from fxquant.runtime.layer_row import LayerRow


@dataclass(frozen=True, slots=True)
class Tile:
    """One layer in the grid: its name, where it stands, and of each operand its bits (None where float) and elements.

    Args:
        layer: the layer's public name.
        role: what the layer is for, which is its column in the grid.
        block: the index of its block, which is its row in the grid; None outside blocks.
        weight: bits (None where float) and elements; None where the layer has none.
        inputs: the same for each input of the layer.
    """

    layer: str
    role: str
    block: int | None
    weight: tuple[int | None, int] | None
    inputs: tuple[tuple[int | None, int], ...]

    @classmethod
    def of(cls, found: Annotation | LayerRow) -> Tile:
        """The tile of a row, or of a node's annotation."""
        weight = None if found.weight is None else (found.weight.bits, found.weight.elements)
        inputs = tuple((operand.bits, operand.elements) for operand in found.inputs)
        return cls(found.layer, str(found.role), found.block, weight, inputs)

    @property
    def weight_bits(self) -> int | None:
        """Width of the weight; None where there is none, or it stays float."""
        return None if self.weight is None else self.weight[0]

    @property
    def input_bits(self) -> tuple[int | None, ...]:
        """Widths of the inputs; None where one stays float."""
        return tuple(bits for bits, _ in self.inputs)

    @property
    def has_bits(self) -> bool:
        """Whether anything of the layer is quantized."""
        return any(bits is not None for bits in (self.weight_bits, *self.input_bits))

    @property
    def labels(self) -> tuple[str, str]:
        """Bits of the weight and of the inputs: `-` for what the layer does not have, `2x4` for inputs that differ."""
        return "-" if self.weight_bits is None else str(self.weight_bits), input_label(self.input_bits)

    @property
    def label(self) -> str:
        """Both in one: `4/5`, `-/2x4`."""
        return "/".join(self.labels)

    @property
    def shade(self) -> tuple[int | None, int | None]:
        """The widths by which the weight and the inputs are coloured: the narrowest of the inputs."""
        return self.weight_bits, min((bits for bits in self.input_bits if bits is not None), default=None)


@dataclass(frozen=True)
class Grid:
    """Tiles by (block, role); several where a block has several layers of a role; `outside`: layers of no block.

    Args:
        blocks: indices of the blocks, one row each.
        roles: of the layers in blocks, one column each.
        tiles: by block and role; several where a block has several layers of a role.
        outside: the tiles of layers that are in no block.
    """

    blocks: tuple[int, ...]
    roles: tuple[str, ...]
    tiles: dict[tuple[int, str], list[Tile]] = field(default_factory=dict)
    outside: tuple[Tile, ...] = ()

    def at(self, block: int, role: str) -> list[Tile]:
        """The tiles of one cell, in graph order; empty where the block has no such layer."""
        return self.tiles.get((block, role), [])


def tiles_of(source: GraphModule | Sequence[LayerRow]) -> list[Tile]:
    """Tiles of an annotated graph or of its rows, in graph order; layers without bits are left out."""
    if isinstance(source, GraphModule):
        tiles = [Tile.of(annotation_of(node)) for node in nodes_with_role(source)]
    else:
        tiles = [Tile.of(row) for row in source]
    return [tile for tile in tiles if tile.has_bits]


def grid_of(tiles: Iterable[Tile]) -> Grid:
    """Arrange tiles; roles are columns in the order in which they first appear."""
    tiles = list(tiles)
    cells: dict[tuple[int, str], list[Tile]] = {}
    for tile in tiles:
        if tile.block is not None:
            cells.setdefault((tile.block, tile.role), []).append(tile)
    return Grid(
        blocks=tuple(sorted({block for block, _ in cells})),
        roles=tuple(dict.fromkeys(role for _, role in cells)),
        tiles=cells,
        outside=tuple(tile for tile in tiles if tile.block is None),
    )


def mean_weight_bits(tiles: Iterable[Tile]) -> float | None:
    """Mean bits per quantized weight; None without any."""
    return _mean(tile.weight for tile in tiles if tile.weight is not None)


def mean_activation_bits(tiles: Iterable[Tile]) -> float | None:
    """Mean bits per quantized activation, None without any; the image is not counted, it comes in 8 bits."""
    return _mean(pair for tile in tiles if tile.role != Role.PATCH_EMBED for pair in tile.inputs)


def _mean(pairs: Iterable[tuple[int | None, int]]) -> float | None:
    found = [(bits, elements) for bits, elements in pairs if bits is not None]
    elements = sum(count for _, count in found)
    return sum(bits * count for bits, count in found) / elements if elements else None

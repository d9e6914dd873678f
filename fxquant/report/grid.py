"""Blocks by roles: the shape in which a transformer's bits are read at one glance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from torch.fx import GraphModule

from fxquant.graph.annotation import Annotation, Role, annotation_of, input_label, nodes_with_role
from fxquant.runtime.layer_row import LayerRow


@dataclass(frozen=True, slots=True)
class Tile:
    """One layer in the grid: its name, where it stands, its bits (None where float or absent) and its elements."""

    layer: str
    role: str
    block: int | None
    weight_bits: int | None
    activation_bits: int | None
    parameters: int = 0
    activation_elements: int = 0
    left_bits: int | None = None
    left_elements: int = 0

    @classmethod
    def of(cls, found: Annotation | LayerRow) -> Tile:
        """The tile of a row, or of a node's annotation."""
        values = {item.name: getattr(found, item.name) for item in fields(cls)}
        return cls(**values | {"role": str(found.role)})

    @property
    def has_bits(self) -> bool:
        """Whether anything of the layer is quantized."""
        return self.weight_bits is not None or self.activation_bits is not None

    @property
    def label(self) -> str:
        """`4/5` for weight and activation bits, `-` for what the layer does not have."""
        weight = "-" if self.weight_bits is None else str(self.weight_bits)
        return f"{weight}/{self.input_label}"

    @property
    def input_label(self) -> str:
        """The second half of `label`; `2x4` for a matmul's left and right input where they differ."""
        return input_label(self.activation_bits, self.left_bits)


@dataclass(frozen=True)
class Grid:
    """Tiles by (block, role); several where a block has several layers of a role; `outside`: layers of no block."""

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
    return _mean((tile.weight_bits, tile.parameters) for tile in tiles)


def mean_activation_bits(tiles: Iterable[Tile]) -> float | None:
    """Mean bits per quantized activation, None without any; the image is not counted, it comes in 8 bits."""
    pairs = []
    for tile in tiles:
        if tile.role != Role.PATCH_EMBED:
            left = 0 if tile.left_bits is None else tile.left_elements
            pairs += [(tile.activation_bits, tile.activation_elements - left), (tile.left_bits, left)]
    return _mean(pairs)


def _mean(pairs: Iterable[tuple[int | None, int]]) -> float | None:
    found = [(bits, elements) for bits, elements in pairs if bits is not None]
    elements = sum(count for _, count in found)
    return sum(bits * count for bits, count in found) / elements if elements else None

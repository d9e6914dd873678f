"""Where training starts: of two closed forms the one that is closer on held-out images, block by block.

The quantized network comes with one rounding of all weights. From the first block on, each block is corrected on top of
the blocks before it as they have become, and the rest of the network stays as it came; the correction stays where it
brings the network's output closer to the float one's on the images held out, and is taken back elsewhere. So the whole
is never further from the float network there than the network that came.

Ridge regression is ahead where inputs are wide, and breaks where they have few bits: which, no rule says beforehand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxquant.artefact.cache import signature
from fxquant.graph.structure.blocks import remainder
from fxquant.runtime.simulated import QuantizedWeightModule
from passes.correct.block_pairs import BlockPair, BlockPairs
from passes.correct.correct_weights import CorrectWeights
from passes.correct.held_out import HeldOut


def correct_where_it_pays(
    pairs: BlockPairs, closed_form: CorrectWeights, train: Tensor, held: HeldOut, key: str
) -> dict[str, Tensor]:
    """Correct the blocks of the quantized network, in place, wherever that is closer on the images held out.

    Notes, of every block, the divergence without and with its correction (None where it is not finite) and whether it
    was kept (`starts`); and of the whole network as it came and with what was kept (`rounded`, `corrected`).

    Args:
        pairs: both networks.
        closed_form: what corrects a block.
        train: indices of the images to correct it on, int64 (N,).
        held: measures on those held out.
        key: signature of all that corrections depend on besides the block.

    Returns:
        By layer of the blocks that stay corrected, the float weight before rounding, (out, ...).
    """
    wanted: dict[str, Tensor] = {}
    notes: list[dict[str, Any]] = []
    context = pairs.context
    task = context.progress.track("correcting weights", len(pairs.blocks))

    def measured(name: str, *given: Any) -> float:
        """The divergence of a network; a process that takes the place of a killed one has it."""

        def measure() -> dict[str, Tensor]:
            return {"found": torch.tensor(held.divergence(*given), dtype=torch.float64)}

        return float(context.cache.recall_tensors(signature(key, name), measure)["found"])

    came = measured("as it came", pairs.quantized)
    replaced = []
    for pair, ahead in zip(pairs.over(context.images[train]), pairs.over(held.images), strict=True):
        rest = remainder(pairs.quantized, pair.block.source)
        before = _state(pair)
        # Both on the inputs that the block has here, from the prefix as it has become.
        without = measured(f"{pair.index} without", rest, ahead.quantized_input)
        corrections = closed_form.recalled(pair, pairs, key)
        found = measured(f"{pair.index} with", rest, ahead.quantized_input)
        is_kept = found < without
        notes.append({"block": pair.block.name, "without": finite(without), "with": finite(found), "kept": is_kept})
        if is_kept:
            replaced += before
            wanted |= {correction.layer: correction.weight for correction in corrections}
        else:
            _restore(before)
        task.advance()
    task.close()
    became = measured("as it became", pairs.quantized)
    if became > came:
        _restore(replaced)
        wanted = {}
    context.note(starts=notes, rounded=finite(came), corrected=finite(became))
    return wanted


def finite(divergence: float) -> float | None:
    """For a note: None in place of what JSON does not have."""
    return divergence if math.isfinite(divergence) else None


def _state(pair: BlockPair) -> list[tuple[QuantizedWeightModule, Tensor | None, Tensor | None]]:
    """The block's layers, with their codes and biases, which a correction replaces and does not write into."""
    return [(module, module.weight_codes, module.bias) for _, module, _ in pair.layers()]


def _restore(state: list[tuple[QuantizedWeightModule, Tensor | None, Tensor | None]]) -> None:
    for module, codes, bias in state:
        module.weight_codes, module.bias = codes, bias
        module.refresh()

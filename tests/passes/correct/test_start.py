"""Which closed form training starts from: decided block by block, on images held out, and never for the worse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from allocators.uniform import Uniform
from fxquant.graph.capture.tracing import trace
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.block_pairs import BlockPair, BlockPairs
from passes.correct.correct_weights import Correction, CorrectWeights
from passes.correct.held_out import HeldOut, held_out
from passes.correct.start import correct_where_it_pays
from passes.pipeline.contract import PassContext
from passes.recipes import mptq_vit
from tests.models import images, vit

IMAGES = images(32)


@dataclass(frozen=True)
class Zeroes(CorrectWeights):
    """A closed form that destroys what it is given."""

    def correct(self, pair: BlockPair, pairs: BlockPairs, images: Tensor | None = None) -> list[Correction]:
        """Nothing is left of any weight or bias."""
        found = []
        for node, module, layer in pair.layers():
            module.requantize(torch.zeros_like(module.weight))
            module.bias = None if module.bias is None else torch.zeros_like(module.bias)
            found.append(Correction(str(node.target), None, 1.0, layer.weight))
        return found


@pytest.fixture(scope="module")
def allocated() -> GraphModule:
    pipeline = mptq_vit("W2A8", allocator=Uniform(), bits=(2, 8))
    before = pipeline[: pipeline.position(AllocateBits) + 1]
    return before.run(trace(vit(depth=1), IMAGES[:2]), PassContext(IMAGES))


def started(
    graph_module: GraphModule, closed_form: CorrectWeights
) -> tuple[BlockPairs, HeldOut, dict[str, Tensor], dict[str, Any]]:
    context = PassContext(IMAGES)
    pairs = BlockPairs(graph_module, context)
    train, others = held_out(len(IMAGES))
    held = HeldOut(pairs, others, 8)
    wanted = correct_where_it_pays(pairs, closed_form, train, held, "key")
    return pairs, held, wanted, context.journal.pending


def codes(pairs: BlockPairs) -> dict[str, Tensor]:
    found: Iterable[tuple[str, Tensor]] = pairs.quantized.state_dict().items()
    return dict(found)


def test_a_closed_form_that_pays_is_kept(allocated: GraphModule) -> None:
    pairs, held, wanted, notes = started(allocated, CorrectWeights())
    kept = [note for note in notes["starts"] if note["kept"]]
    assert kept
    assert all(note["with"] < note["without"] for note in kept)
    assert notes["corrected"] < notes["rounded"]
    assert held.divergence(pairs.quantized) == notes["corrected"]
    paths = {str(node.target) for pair in pairs for node, _, _ in pair.layers()}
    assert wanted.keys() <= paths
    assert wanted


def test_blocks_in_which_it_does_not_are_as_they_came(allocated: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = len(BlockPairs(allocated, PassContext(IMAGES)).blocks)
    told = iter([0.5, *[0.4, 0.3], *[0.3, 0.4] * (blocks - 1), 0.3])
    monkeypatch.setattr(HeldOut, "divergence", lambda *_: next(told))
    pairs, _, wanted, notes = started(allocated, Zeroes())
    assert [note["kept"] for note in notes["starts"]] == [True] + [False] * (blocks - 1)
    before, after = codes(BlockPairs(allocated, PassContext(IMAGES))), codes(pairs)
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == wanted.keys() == {"patch_embed.proj"}


def test_blocks_that_pay_one_by_one_are_taken_back_where_all_of_them_do_not(
    allocated: GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = len(BlockPairs(allocated, PassContext(IMAGES)).blocks)
    told = iter([0.5, *[0.4, 0.3] * blocks, 0.6])
    monkeypatch.setattr(HeldOut, "divergence", lambda *_: next(told))
    pairs, _, wanted, notes = started(allocated, Zeroes())
    assert all(note["kept"] for note in notes["starts"])
    assert (notes["rounded"], notes["corrected"], wanted) == (0.5, 0.6, {})
    before = BlockPairs(allocated, PassContext(IMAGES))
    assert all(torch.equal(codes(pairs)[name], tensor) for name, tensor in codes(before).items())

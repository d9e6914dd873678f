from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxquant
from fxquant.artefact.searched_graph import searched_from_file, searched_to_file
from fxquant.errors import ArtefactError, InfeasibleBudgetError, OverrideError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.capture.tracing import trace
from fxquant.graph.facts import Fact, facts_of
from fxquant.session.session import Session
from passes.correct.distil import Distil
from passes.pipeline.contract import PassContext
from passes.prepare.fold_sqb import FoldSqb
from passes.prepare.folds import FOLDED
from passes.recipes import RECIPES, best, mptq_vit, recipe
from passes.search.calibrate import Calibrate
from passes.search.search_cache import split
from passes.search.search_scales import SearchScales
from tests.models import SWIN, images, timm_model, vit
from tests.operands import input_candidates, weight_candidates

FEW: dict[str, Any] = {"bits": (2, 4, 8)}


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, calibrating, folding or searching fails the test."""

    def unreachable(*_: object) -> int:
        raise AssertionError("done again")

    for kind in (Calibrate, FoldSqb, SearchScales):
        monkeypatch.setattr(kind, "apply", unreachable)


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "vit": lambda: (vit(depth=1), 32),
    "swin that pads": lambda: (timm_model("swin_tiny_patch4_window7_224", **SWIN), 56),
    "double": lambda: (vit(depth=1).double(), 32),
}


SAME_PASSES = {
    "mptq_vit", "ptq4vit", "fq_vit", "psaq_vit", "lrp_qvit", "optq", "erq", "brecq", "qdrop", "fima_q"
}  # fmt: skip
"""Recipes of which all passes are in others, too."""


@pytest.mark.parametrize(
    ("recipe_name", "name"),
    [
        *(("mptq_vit", name) for name in MODELS),
        *((name, "vit") for name in RECIPES if name not in SAME_PASSES),
    ],
)
def test_a_second_budget_is_as_without_a_cache_and_only_allocates(
    name: str, recipe_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two steps train as well as hundreds, where only what is kept matters.
    monkeypatch.setattr(sys.modules["passes.recipes.best"], "Distil", partial(Distil, steps=2, checks=1))
    model, size = MODELS[name]()
    x = images(3, size).to(next(model.parameters()).dtype)
    expected = fxquant.compile(model, None, calibration=x, recipe=recipe(recipe_name)("W4A4", **FEW))
    fxquant.compile(model, None, calibration=x, recipe=recipe(recipe_name)("W8A8", **FEW), cache=tmp_path)
    refuse(monkeypatch)
    found = fxquant.compile(model, None, calibration=x, recipe=recipe(recipe_name)("W4A4", **FEW), cache=tmp_path)
    assert torch.equal(found(x), expected(x))
    assert found.allocation == expected.allocation
    assert found.layers == expected.layers
    assert found.card == expected.card
    assert [entry.step for entry in found.journal.entries] == [entry.step for entry in expected.journal.entries]
    searched = next(e for e in found.journal.entries if e.step.startswith("SearchScales"))
    assert searched.notes["recalled"]
    session = Session(model, x, recipe=recipe_name, cache=tmp_path, **FEW)
    assert torch.equal(session.compile("W4A4")(x), expected(x))


SECOND_PROCESS = """
import sys, torch, fxquant
from passes.search.calibrate import Calibrate
from passes.recipes import mptq_vit
from tests.models import images, vit
Calibrate.apply = lambda *_: 1 / 0
torch.set_num_threads(1)
x = images(2)
pipeline = mptq_vit("W3A4", bits=(2, 4, 8))
compiled = fxquant.compile(vit(depth=1), None, calibration=x, recipe=pipeline, cache=sys.argv[1])
torch.save(compiled(x), sys.argv[2])
"""


def test_another_process_recalls_the_same(tmp_path: Path) -> None:
    x, cache, out = images(2), tmp_path / "cache", tmp_path / "scores.pt"
    made = fxquant.compile(vit(depth=1), None, calibration=x, recipe=mptq_vit("W3A4", bits=(2, 4, 8)), cache=cache)
    subprocess.run([sys.executable, "-c", SECOND_PROCESS, str(cache), str(out)], check=True)
    assert torch.equal(torch.load(out, weights_only=True), made(x))


def one_pixel(x: torch.Tensor) -> torch.Tensor:
    changed = x.clone()
    changed[1, 0, 5, 5] += 1e-3
    return changed


def one_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 1e-3  # type: ignore[index,union-attr]
    return model


def test_whatever_changes_the_result_changes_the_key(tmp_path: Path) -> None:
    model, x = vit(depth=1), images(3)

    def files_after(
        model: nn.Module = model, x: torch.Tensor = x, bits: tuple[int, ...] = (4, 8), **options: Any
    ) -> int:
        pipeline = mptq_vit("W8A8", bits=bits, fully_quantized=options.pop("fully_quantized", False))
        fxquant.compile(model, None, calibration=x, recipe=pipeline, cache=tmp_path, **options)
        return len(cached_files(tmp_path))

    assert files_after() == files_after() == 1
    assert files_after(x=one_pixel(x)) == 2
    assert files_after(x=x[:2]) == 3
    assert files_after(bits=(3, 4, 8)) == 4
    assert files_after(seed=1) == 5
    assert files_after(fully_quantized=True) == 6
    assert files_after(batch_size=2) == 7
    assert files_after(model=one_weight(vit(depth=1))) == 8
    assert files_after() == 8


@pytest.mark.parametrize("damage", ["foreign", "truncated", "one byte", "another pipeline's"])
def test_a_file_that_is_not_right_counts_as_absent(damage: str, tmp_path: Path) -> None:
    model, x = vit(depth=1), images(2)
    pipeline = mptq_vit("W8A4", **FEW)

    def compiled() -> torch.Tensor:
        return fxquant.compile(model, None, calibration=x, recipe=pipeline, cache=tmp_path)(x)

    expected = compiled()
    (file,) = cached_files(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "foreign":
        file.write_bytes(b"not ours")
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "one byte":
        content[-9] ^= 1
        file.write_bytes(content)
    else:
        other = tmp_path / "other"
        fxquant.compile(model, None, calibration=x, recipe=mptq_vit("W8A4", bits=(4, 8)), cache=other)
        file.write_bytes(cached_files(other)[0].read_bytes())
    before = file.read_bytes()
    assert torch.equal(compiled(), expected)
    (again,) = cached_files(tmp_path)
    assert again.name == file.name
    assert again.read_bytes() != before


def test_a_gram_matrix_that_is_none_counts_as_absent(tmp_path: Path) -> None:
    model, x = vit(depth=1), images(2)
    traced = trace(model, x[:2])
    searched = split(best("W4A4", **FEW))[0].run(traced, PassContext(x))
    texts, tensors = searched_to_file(searched, traced)
    grams = [name for name in tensors if name.endswith(".gram")]
    assert len(grams) == 6
    for wrong in (tensors[grams[0]][1:], tensors[grams[0]].int()):
        with pytest.raises(ArtefactError, match="no Gram matrix"):
            searched_from_file(texts, {**tensors, grams[0]: wrong}, traced, facts_of(searched))
    ours = next(name for name in tensors if name.endswith(".output_gram.sum")).removesuffix(".sum")
    wrongs = {"sum": tensors[f"{ours}.sum"][:, 1:], "squares": torch.zeros(2), "images": torch.tensor(0)}
    for name, wrong in wrongs.items():
        with pytest.raises(ArtefactError, match="no Gram matrix of gradients"):
            searched_from_file(texts, {**tensors, f"{ours}.{name}": wrong}, traced, facts_of(searched))
    without = {name: tensor for name, tensor in tensors.items() if name != f"{ours}.images"}
    with pytest.raises(ArtefactError, match="no Gram matrix of gradients"):
        searched_from_file(texts, without, traced, facts_of(searched))


@dataclass(frozen=True)
class Foreign:
    """A pass whose code we do not know."""

    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        return 0


def test_a_pipeline_with_a_pass_from_outside_is_not_kept(tmp_path: Path) -> None:
    pipeline = mptq_vit("W8A8", **FEW).after(FoldSqb, Foreign())
    fxquant.compile(vit(depth=1), None, calibration=images(2), recipe=pipeline, cache=tmp_path)
    assert not cached_files(tmp_path)


def test_a_budget_is_still_checked(tmp_path: Path) -> None:
    model, x = vit(depth=1), images(2)

    def compiled(budget: str, **options: Any) -> None:
        fxquant.compile(model, None, calibration=x, recipe=mptq_vit(budget, **FEW, **options), cache=tmp_path)

    compiled("W8A8")
    with pytest.raises(InfeasibleBudgetError):
        compiled("W1A4")
    with pytest.raises(OverrideError):
        compiled("W4A4", overrides={"nothing": 4})


def test_every_annotation_field_survives() -> None:
    model, x = vit(depth=1), images(3)
    traced = trace(model, x[:2])
    prefix, rest = split(mptq_vit("W4A4", **FEW))
    assert [type(step).__name__ for step in rest] == ["AllocateBits", "SubstituteQuantizers"]
    searched = prefix.run(traced, PassContext(x))
    texts, tensors = searched_to_file(searched, traced)
    again = searched_from_file(texts, tensors, traced, facts_of(searched))
    assert facts_of(again) == facts_of(searched)
    with pytest.raises(ArtefactError, match="the fact 'folded', which no pass of this pipeline provides"):
        searched_from_file(texts, tensors, traced, facts_of(searched) - {FOLDED})
    assert again.code == searched.code, "signatures of what is scored and timed depend on it"
    for before, after in zip(searched.graph.nodes, again.graph.nodes, strict=True):
        one, other = annotation_of(before), annotation_of(after)
        for field in ("role", "layer", "block", "macs"):
            assert getattr(one, field) == getattr(other, field)
        for o, p in zip(one.operands, other.operands, strict=True):
            assert replace(o, candidates=()) == replace(p, candidates=())
        groups = zip((weight_candidates(one), *input_candidates(one)),
                     (weight_candidates(other), *input_candidates(other)), strict=True)  # fmt: skip
        for first, second in groups:
            for c, d in zip(first, second, strict=True):
                assert (c.bits, c.loss, c.noise, c.signal) == (d.bits, d.loss, d.noise, d.signal)
                assert c.quantizer.settings() == d.quantizer.settings()
                states = c.quantizer.state_dict(), d.quantizer.state_dict()
                assert states[0].keys() == states[1].keys()
                assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert sum(len(weight_candidates(annotation_of(node))) for node in again.graph.nodes) == 6 * len(FEW["bits"])
    assert "blocks.0.attn.qkv.weight" in tensors, "folding has changed it"
    assert "blocks.0.attn.proj.weight" not in tensors, "what the traced model has is not written again"

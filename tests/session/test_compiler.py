from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.data import embedded
from fxquant.errors import (
    BudgetError,
    CalibrationError,
    FxQuantError,
    InfeasibleBudgetError,
    InputError,
    ModelError,
    OptionError,
    OverrideError,
    PipelineError,
    TraceError,
)
from fxquant.graph.annotation import Role
from fxquant.session.compiled import Compiled
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes import best, mptq_vit, naive_min_max
from passes.search.calibrate import Calibrate
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.passes.models import SWIN, VIT, images, timm_model, vit


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")  # type: ignore[index,union-attr]
    return model


def pixel(value: float) -> Tensor:
    x = images(4)
    x[2, 1, 3, 3] = value
    return x


class Unsized(nn.Module):
    """Says nothing of its images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def quantized_by_torch() -> nn.Module:
    model = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what it quantizes with
        model.head = torch.ao.nn.quantized.dynamic.Linear(24, 7)  # type: ignore[assignment]
    return model


BAD_INPUTS: dict[str, tuple[dict[str, Any], type[FxQuantError], str]] = {
    "no images": ({"calibration": images(0)}, CalibrationError, "0 calibration images"),
    "uint8 images": (
        {"calibration": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)},
        CalibrationError,
        "convert to float",
    ),
    "NaN in an image": ({"calibration": pixel(float("nan"))}, CalibrationError, "image 2 has NaN"),
    "infinite pixel": ({"calibration": pixel(float("inf"))}, CalibrationError, "image 2 has NaN or infinite"),
    "one image without a batch": ({"calibration": images(1)[0]}, CalibrationError, "N, C, H, W"),
    "a list": ({"calibration": [1, 2]}, CalibrationError, "must be a Tensor"),
    "nothing, and no image size": ({"model": Unsized(), "calibration": None}, CalibrationError, "image_shape="),
    "wrong size": ({"calibration": images(4, 48)}, CalibrationError, "32"),
    "wrong channels": ({"calibration": images(4, 32, 1)}, CalibrationError, "3"),
    "double images, float model": ({"calibration": images(4).double()}, CalibrationError, "float64"),
    "batch size": ({"batch_size": 0}, CalibrationError, "batch_size"),
    "recipe": ({"recipe": "mptq"}, PipelineError, "mptq_vit"),
    "pipeline and options": ({"recipe": mptq_vit(4), "overrides": {"head": 8}}, PipelineError, "brings its own"),
    "pipeline without quantizers": (
        {"budget": None, "recipe": mptq_vit(4).without(SubstituteQuantizers)},
        PipelineError,
        "SubstituteQuantizers()",
    ),
    "a list of passes": ({"recipe": [FoldSqb()]}, PipelineError, "recipe must be text or a Pipeline"),
    "allocator by name": ({"allocator": "greedy"}, BudgetError, "must be an Allocator"),
    "overrides as a list": ({"overrides": ["head"]}, OverrideError, "must be a mapping"),
    "half a batch": ({"batch_size": 2.5}, CalibrationError, "whole"),
    "budget": ({"budget": "four bits"}, BudgetError, "four bits"),
    "budget 0": ({"budget": 0}, BudgetError, ""),
    "infeasible": ({"budget": "W1A4"}, InfeasibleBudgetError, "minimum reachable"),
    "infeasible bytes": ({"budget": "10B"}, InfeasibleBudgetError, "minimum reachable"),
    "infeasible by an override": ({"overrides": {"*": 8}}, InfeasibleBudgetError, "pinned"),
    "override": ({"overrides": {"blocks.9.mlp.fc1": 8}}, OverrideError, "blocks.1.mlp.fc1"),
    "override bits": ({"overrides": {"head": 11}}, OverrideError, "11"),
    "NaN weight": ({"model": with_nan(vit())}, ModelError, "blocks.1.mlp.fc1.weight"),
    "bfloat16": ({"model": vit().bfloat16(), "calibration": images(4).bfloat16()}, ModelError, "model.float()"),
    "float16, no images": ({"model": vit().half(), "calibration": None}, ModelError, "model.float()"),
    "quantized by torch": ({"model": quantized_by_torch()}, ModelError, "quantized already"),
    "no model": ({"model": "vit"}, ModelError, "str"),
    "no parameters": ({"model": nn.ReLU()}, ModelError, "no parameters"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_before_any_calibration(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> int:
        raise AssertionError("calibration has begun")

    monkeypatch.setattr(Calibrate, "apply", unreachable)
    monkeypatch.setattr(FoldSqb, "apply", unreachable)
    changes, error, text = BAD_INPUTS[case]
    arguments = {"model": vit(), "budget": "W4A4", "calibration": images(4)} | changes
    model, budget = arguments.pop("model"), arguments.pop("budget")
    with pytest.raises(error) as caught:
        fxquant.compile(model, budget, **arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("calibration", [images(4), None], ids=["images", "no images"])
def test_a_quantized_model_is_refused(small: Compiled, tmp_path: Path, calibration: Tensor | None) -> None:
    small.save(tmp_path / "small.fxq")
    for model in (small, small.graph_module, fxquant.load(tmp_path / "small.fxq"), nn.Sequential(small)):
        with pytest.raises(ModelError, match="quantized already: give the float model"):
            fxquant.compile(model, 8, calibration=calibration)


class Tokens(nn.Module):
    """Gives a value of its head at every place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).flatten(2).transpose(1, 2))


def test_output_without_class_scores_is_held_to_its_features_and_the_report_says_so() -> None:
    quantized = fxquant.compile(Tokens(), 4, calibration=images(4))
    assert quantized.card["objective"] == {"name": "features", "unit": "relative squared error per image"}
    assert "features, in relative squared error per image" in str(quantized.report())
    close = fxquant.compile(Tokens(), 8, calibration=images(4))
    x = images(8)[4:]
    errors = [float((each(x) - Tokens()(x)).square().sum()) for each in (quantized, close)]
    assert errors[1] < errors[0] / 20


def test_class_scores_asked_of_another_output_say_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r'needs class scores.*objective="features"'):
        fxquant.compile(Tokens(), 8, calibration=images(4), objective="classes")
    with pytest.raises(CalibrationError, match=r"vectors.*an output has shape"):
        fxquant.compile(Tokens(), 8, calibration=images(4), objective="embeddings")
    with pytest.raises(OptionError, match="'auto', 'classes', 'features', 'embeddings'"):
        fxquant.compile(Tokens(), 8, calibration=images(4), objective="tokens")


def test_data_dependent_code_is_a_trace_error() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))

    with pytest.raises(TraceError, match="test_compiler"):
        fxquant.compile(Decides(), 8, calibration=images(4))


@pytest.fixture(scope="module")
def small() -> Compiled:
    return fxquant.compile(vit(), "W4A5", calibration=images())


class TestCompiled:
    def test_rows(self, small: Compiled) -> None:
        rows = {row.layer: row for row in small.layers}
        assert list(rows)[:2] == ["patch_embed.proj", "blocks.0.attn.qkv"]
        assert len(rows) == 1 + 2 * 6 + 1
        for row in rows.values():
            assert (row.weight_bits is None) == (row.role in ("qk", "av"))
            assert (row.weight_sqnr_db is None) == (row.weight_bits is None)
            assert row.activation_bits in (2, 3, 4, 5, 6, 7, 8)
            assert row.macs > 0
            assert row.predicted_loss >= 0
            assert row.execution == "simulated"
            assert not row.pinned
        assert rows["blocks.0.mlp.fc2"].activation_quantizer == "codebook"
        assert rows["blocks.0.attn.av"].activation_quantizer == "row-log x codebook"
        assert rows["patch_embed.proj"].activation_bits == 8
        weights = [row for row in rows.values() if row.weight_bits]
        total = sum(row.parameters for row in weights)
        assert sum(row.parameters * row.weight_bits for row in weights) <= 4 * total
        counted = [row for row in rows.values() if row.role != "patch_embed"]
        elements = sum(row.activation_elements for row in counted)
        assert sum(row.activation_elements * row.activation_bits for row in counted) <= 5 * elements

    def test_allocation_and_rows_agree(self, small: Compiled) -> None:
        for row in small.layers:
            assert small.allocation.weight_bits.get(row.layer) == row.weight_bits
            if row.role != "patch_embed":
                assert small.allocation.activation_bits[row.layer] == row.activation_bits

    def test_card_and_journal(self, small: Compiled) -> None:
        assert small.card["calibration_images"] == 6
        assert small.card["image_shape"] == [3, 32, 32]
        assert small.card["stays_float"] == ["softmax", "gelu", "layer_norm", "residual additions"]
        assert small.card["labels_used"] is False
        assert len(small.journal.entries) == len(small.card["pipeline"]) == len(best(4))

    def test_any_batch_size_and_no_other_image_size(self, small: Compiled) -> None:
        x = images(5)
        assert torch.allclose(small(x)[:1], small(x[:1]), atol=1e-4)
        with pytest.raises(InputError, match="3, 32, 32"):
            small(images(1, 48))

    def test_saved_and_loaded(self, small: Compiled, tmp_path: Path) -> None:
        small.save(tmp_path / "small.fxq")
        loaded = fxquant.load(tmp_path / "small.fxq")
        x = images(3, seed=8)
        assert torch.equal(loaded(x), small(x))
        assert loaded.layers == small.layers
        assert loaded.allocation == small.allocation
        assert loaded.card == small.card
        assert [entry.step for entry in loaded.journal.entries] == [entry.step for entry in small.journal.entries]

    def test_to_networkx(self, small: Compiled) -> None:
        nodes = set(small.to_networkx().nodes)
        assert {"blocks_0_attn_qkv", "blocks_1_mlp_fc2", "head"} <= {str(node) for node in nodes}


def test_the_callers_model_is_unmodified() -> None:
    model = vit(depth=1).train()
    model.blocks[0].norm1.eval()
    modes = [module.training for module in model.modules()]
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    before, x = copy.deepcopy(model.state_dict()), images(4)
    kept = x.clone()
    fxquant.compile(model, "W4A4", calibration=x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(model.state_dict()) == set(before)
    assert [module.training for module in model.modules()] == modes
    assert [getattr(module, "fused_attn", None) for module in model.modules()] == fused
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, kept)
    assert not x.requires_grad


def test_same_seed_same_result_in_every_grad_mode() -> None:
    model, x = vit(depth=1), images(4)
    reference = fxquant.compile(model, "W4A4", calibration=x)(x)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            found = fxquant.compile(model, "W4A4", calibration=x)(x)
        assert torch.equal(found, reference), mode.__name__
    assert torch.is_grad_enabled()


def test_no_batch_size_has_a_say_in_best() -> None:
    model, x = vit(depth=1), images(5)
    one, other = (fxquant.compile(model, "W4A4", calibration=x, batch_size=size) for size in (2, 5))
    assert one.allocation == other.allocation
    assert torch.equal(one(x), other(x))
    of_other = other.state_dict()
    assert all(
        torch.equal(value, of_other[name]) for name, value in one.state_dict().items() if isinstance(value, Tensor)
    )


def test_global_random_state_is_left_alone() -> None:
    model = vit(depth=1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fxquant.compile(model, "W4A4", calibration=images(4))
    assert torch.equal(torch.rand(3), expected)


def test_one_image_is_enough() -> None:
    compiled = fxquant.compile(vit(depth=1), "W4A4", calibration=images(1))
    assert bool(torch.isfinite(compiled(images(3))).all())


def test_double_models() -> None:
    compiled = fxquant.compile(vit(depth=1).double(), "W8A8", calibration=images(4).double())
    assert compiled(images(2).double()).dtype == torch.float64


def test_options_reach_the_graph() -> None:
    compiled = fxquant.compile(
        vit(depth=1),
        "W8A6",
        calibration=images(4),
        first_last_bits=8,
        overrides={Role.FC1: (3, 4)},
        card={"data": "noise"},
    )
    rows = {row.role: row for row in compiled.layers}
    assert rows["head"].weight_bits == rows["patch_embed"].weight_bits == 8
    assert (rows["fc1"].weight_bits, rows["fc1"].activation_bits) == (3, 4)
    assert rows["fc1"].pinned
    assert compiled.card["data"] == "noise"
    assert compiled.card["first_last_weight_bits"] == {"patch_embed": [8], "head": [8]}


def test_fully_quantized() -> None:
    compiled = fxquant.compile(vit(depth=1), "W6A6", calibration=images(4), fully_quantized=True)
    assert {"softmax", "layer_norm"} <= {row.role for row in compiled.layers}
    assert compiled.card["stays_float"] == ["gelu", "residual additions"]


MODELS = {
    "swin that pads": lambda: (timm_model("swin_tiny_patch4_window7_224", **SWIN), 56),
    "deit distilled": lambda: (timm_model("deit_tiny_distilled_patch16_224", **VIT), 32),
    "siglip with an attention pool": lambda: (
        timm_model("vit_base_patch16_siglip_224", img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=7), 32
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_end_to_end(name: str) -> None:
    model, size = MODELS[name]()
    x = images(8, size)
    expected = model(x).detach()

    def error(budget: str) -> float:
        return float((fxquant.compile(model, budget, calibration=x)(x) - expected).square().mean() / expected.var())

    assert error("W8A8") < 0.05
    assert error("W8A8") < error("W4A4") < 2


class TestEmbeddedModel:
    """Accuracy on 300 real test images, 8 images for calibration."""

    @staticmethod
    def correct(model: nn.Module) -> float:
        pictures, labels = embedded.test_images(300)
        with torch.no_grad():
            return float((model(pictures).argmax(1) == labels).float().mean()) * 100

    def test_eight_bits_cost_nothing_and_four_beat_min_max(self) -> None:
        model, x = embedded.load_model(), embedded.calibration_images(8)
        exact = self.correct(model)
        assert exact > 85
        assert self.correct(fxquant.compile(model, "W8A8", calibration=x)) >= exact - 1
        four = self.correct(fxquant.compile(model, "W4A4", calibration=x))
        naive = self.correct(fxquant.compile(model, "W4A4", calibration=x, recipe="naive_min_max"))
        assert four > naive + 1
        assert four > exact - 5

    def test_a_pipeline_as_recipe(self) -> None:
        pipeline = naive_min_max("W8A8", bits=(4, 8))
        compiled = fxquant.compile(
            embedded.load_model(), None, calibration=embedded.calibration_images(2), recipe=pipeline
        )
        assert len(compiled.journal.entries) == len(pipeline)

"""One call: what it returns, what it leaves alone, and how close it comes to the float model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.data import embedded
from fxquant.errors import InputError, OptionError
from fxquant.graph.annotation import Role
from fxquant.session.compiled import Compiled
from fxquant.session.protocol_card import _OF_THE_CALL
from passes.lower.lower import Lower
from passes.pipeline.pipeline import Pipeline
from passes.recipes import best, naive_min_max
from tests.models import SWIN, VIT, embedded_compiled, images, timm_model, vit


class TestCompiled:
    def test_rows(self, small: Compiled) -> None:
        rows = {row.layer: row for row in small.layers}
        assert list(rows)[:2] == ["patch_embed.proj", "blocks.0.attn.qkv"]
        assert len(rows) == 1 + 2 * 6 + 1
        for row in rows.values():
            assert (row.weight_bits is None) == (row.role in ("qk", "av"))
            assert all(operand.bits in range(2, 9) and operand.sqnr_db is not None for operand in row.operands)
            assert row.macs > 0
            assert row.predicted_loss >= 0
            assert row.execution == "simulated"
            assert not row.pinned
        assert rows["blocks.0.mlp.fc2"].input_quantizers == "codebook"
        assert rows["blocks.0.attn.av"].operands[0].quantizer == "row-log"
        assert rows["patch_embed.proj"].activation_bits == 8
        weights = [row for row in rows.values() if row.weight_bits]
        total = sum(row.parameters for row in weights)
        assert sum(row.parameters * row.weight_bits for row in weights) <= 4 * total
        counted = [row for row in rows.values() if row.role != "patch_embed"]
        inputs = [operand for row in counted for operand in row.inputs]
        assert sum(o.elements * o.bits for o in inputs) <= 5 * sum(o.elements for o in inputs)

    def test_allocation_and_rows_agree(self, small: Compiled) -> None:
        for row in small.layers:
            assert small.allocation.weight_bits.get(row.layer) == row.weight_bits
            if row.role != "patch_embed":
                names = (
                    [f"{row.layer}.left", f"{row.layer}.right"] if row.role == "av" else [row.layer] * len(row.inputs)
                )
                assert tuple(small.allocation.activation_bits[name] for name in names) == row.input_bits

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
    model, x = vit(depth=1), images(2)
    reference = fxquant.compile(model, "W4A4", calibration=x)(x)
    for mode in (torch.no_grad, torch.inference_mode):
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


def test_a_recipe_that_lowers_reports_what_it_has_lowered() -> None:
    """Kernels take the place of layers in the graph; the report, the journal and the answers are of all layers."""
    model, x, pipeline = vit(depth=1), images(4), naive_min_max("W6A6")
    alone = fxquant.compile(model, None, calibration=x, recipe=pipeline)
    lowered = fxquant.compile(model, None, calibration=x, recipe=Pipeline([*pipeline, Lower("cpu-native")]))
    assert torch.equal(lowered(x), alone.lowered("cpu-native")(x))
    assert lowered.card["execution"] == alone.lowered("cpu-native").card["execution"]
    assert lowered.card["execution"].startswith("integer: 8 of 8 layers")
    assert lowered.report().totals.to_dict() == alone.report().totals.to_dict()
    assert [row.layer for row in lowered.layers] == [row.layer for row in alone.layers]
    assert len(lowered.journal.entries) == len(pipeline) + 1
    assert lowered.card["pipeline"][-1] == repr(Lower("cpu-native"))


@pytest.mark.quick
def test_one_image_is_enough() -> None:
    compiled = fxquant.compile(vit(depth=1), "W4A4", calibration=images(1))
    assert bool(torch.isfinite(compiled(images(3))).all())


def test_positions_that_all_images_share_are_not_the_images_own_where_there_is_one() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(192, 16), nn.LayerNorm(16), nn.Linear(16, 5)
            self.positions = nn.Parameter(torch.randn(1, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            patches = x.reshape(-1, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 192)
            return self.head(self.norm(self.embed(patches) + self.positions).mean(1))

    compiled = fxquant.compile(Patches().eval(), "W8A8", calibration=images(1), recipe="naive_min_max")
    assert (compiled.lowered("cpu-native")(images(3)) - compiled(images(3))).abs().max() < 1e-5


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


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ({"execution": "very fast"}, "the card's 'execution' is what the compile finds out"),
        ({"versions": {"torch": "9"}}, "'versions' is what the compile finds out"),
        ({"recipe": 3}, "the card's 'recipe' is 3, not a text: give your entry another name"),
    ],
)
def test_entries_of_the_card_that_nobody_else_knows_are_refused(card: dict[str, object], text: str) -> None:
    """They would make the report false, and some of them a file that cannot be loaded."""
    with pytest.raises(OptionError, match=text):
        fxquant.Session(vit(depth=1), images(2), card=card)


def test_the_call_alone_writes_what_it_finds_out() -> None:
    card = embedded_compiled().card
    assert card.keys() - _OF_THE_CALL == {"model", "calibration"}


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

    session = fxquant.Session(model, x)

    def error(budget: str) -> float:
        return float((session.compile(budget)(x) - expected).square().mean() / expected.var())

    eight, four = error("W8A8"), error("W4A4")
    assert eight < 0.05
    assert eight < four < 2


class TestEmbeddedModel:
    """Accuracy on 300 real test images, 8 images for calibration."""

    @staticmethod
    def correct(model: nn.Module) -> float:
        pictures, labels = embedded.test_images(300)
        with torch.no_grad():
            return float((model(pictures).argmax(1) == labels).float().mean()) * 100

    def test_eight_bits_cost_nothing_and_four_beat_min_max(self) -> None:
        exact = self.correct(embedded.load_model())
        assert exact > 85
        assert self.correct(embedded_compiled("W8A8")) >= exact - 1
        four, naive = (self.correct(embedded_compiled("W4A4", recipe)) for recipe in ("best", "naive_min_max"))
        assert four > naive + 1
        assert four > exact - 5

    def test_a_pipeline_as_recipe(self) -> None:
        pipeline = naive_min_max("W8A8", bits=(4, 8))
        compiled = fxquant.compile(
            embedded.load_model(), None, calibration=embedded.calibration_images(2), recipe=pipeline
        )
        assert len(compiled.journal.entries) == len(pipeline)

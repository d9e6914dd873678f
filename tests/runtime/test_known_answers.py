"""Known answers: the same images everywhere, kept in the file, and whatever runs the model is held against them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.artefact.container import pack_file, read_file
from fxquant.errors import ArtefactError, BackendError, CalibrationError, VerificationError
from fxquant.runtime.known_answers import LARGEST, LOOSEST, MARGIN, TOLERANCE, KnownAnswers, answer_images
from passes.recipes import mptq_vit
from tests.models import images, vit
from tests.quantized_by_hand import quantize_by_hand


@pytest.fixture(scope="module")
def compiled() -> fxquant.Compiled:
    return fxquant.compile(vit(depth=1), None, calibration=images(4), recipe=mptq_vit("W6A6", bits=(4, 6)))


@pytest.fixture(scope="module")
def saved(compiled: fxquant.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "small.fxq"
    compiled.save(path)
    return path


def with_answers(compiled: fxquant.Compiled, path: Path, answers: KnownAnswers | None) -> Path:
    given, compiled.answers = compiled.answers, answers
    try:
        compiled.save(path)
    finally:
        compiled.answers = given
    return path


def wrong(answers: KnownAnswers | None) -> KnownAnswers:
    assert answers is not None
    return replace(answers, simulated=answers.simulated + torch.linspace(-1, 1, answers.simulated.shape[1]))


def test_the_images_are_these_for_ever() -> None:
    found = answer_images((3, 20, 24))
    assert found.shape == (2, 3, 20, 24)
    assert found.dtype == torch.float32
    text = hashlib.sha256(found.numpy().tobytes()).hexdigest()
    assert text == "6747bdc8adb3f8b78e6e9f2228dae49a3eef078cd98ec1030bd5eb2e297639bc"
    assert 0.5 < float(found.std()) < 1.5
    assert float((found[0] - found[1]).std()) > 0.5
    assert answer_images((1, 1, 1)).isfinite().all()


def test_scores_of_both_models_are_kept(compiled: fxquant.Compiled, saved: Path) -> None:
    answers = compiled.answers
    assert answers is not None
    assert answers.float_model is not None
    with torch.no_grad():
        assert torch.equal(answers.simulated, compiled(answer_images((3, 32, 32))))
        torch.testing.assert_close(answers.float_model, vit(depth=1)(answer_images((3, 32, 32))))
    loaded = fxquant.load(saved)
    assert loaded.answers is not None
    assert torch.equal(loaded.answers.simulated, answers.simulated)
    assert torch.equal(loaded.answers.float_model, answers.float_model)  # type: ignore[arg-type]
    assert loaded.check_answers() == 0.0
    spread = answers.simulated - answers.simulated.mean(1, keepdim=True)
    assert float((answers.simulated[0] - answers.simulated[1]).std() / spread.std()) > 0.05, "they differ by image"


def test_a_backend_is_held_against_them(compiled: fxquant.Compiled, saved: Path, tmp_path: Path) -> None:
    assert fxquant.load(saved, backend="auto").check_answers() <= TOLERANCE
    path = with_answers(compiled, tmp_path / "wrong.fxq", wrong(compiled.answers))
    fxquant.load(path)
    with pytest.raises(BackendError, match=r"known answers: relative difference .*, tolerance .*expected \["):
        fxquant.load(path, backend="auto")
    with pytest.raises(VerificationError, match=r"known answers.*compile it again"):
        fxquant.load(path).check_answers()


def test_a_file_without_them_loads(compiled: fxquant.Compiled, tmp_path: Path) -> None:
    loaded = fxquant.load(with_answers(compiled, tmp_path / "none.fxq", None), backend="auto")
    assert loaded.answers is None
    assert loaded.check_answers() == 0.0
    assert loaded.journal.entries[-1].notes["proof"]["difference"] <= TOLERANCE


@pytest.mark.parametrize("bits", [3, 8])
def test_rounding_inside_the_model_counts_where_codes_of_the_image_stay(bits: int) -> None:
    graph_module = quantize_by_hand(vit(depth=2), (3, 32, 32), bits, bits)
    answers = KnownAnswers.measured(graph_module)
    moved = graph_module(answers.images_for(graph_module) * (1 + 1e-7))
    assert answers.difference(moved) < answers.rounding < LOOSEST


def test_the_tolerance_follows_what_rounding_does_to_the_model(compiled: fxquant.Compiled) -> None:
    answers = compiled.answers
    assert answers is not None
    assert answers.rounding == KnownAnswers.measured(compiled.graph_module).rounding
    assert replace(answers, rounding=0.0).tolerance == TOLERANCE
    assert replace(answers, rounding=0.1).tolerance == pytest.approx(MARGIN * 0.1)
    assert replace(answers, rounding=0.6).tolerance == LOOSEST


def test_large_outputs_are_thinned() -> None:
    output = torch.arange(2 * 5000.0).reshape(2, 50, 100)
    answers = KnownAnswers.of(output)
    assert answers.simulated.shape[1] <= LARGEST
    assert answers.difference(output) == 0
    assert answers.difference(output * 1.2) > TOLERANCE
    assert answers.difference(output[:, :5]) == answers.difference(output / 0) == answers.difference(3) == float("inf")


def test_outputs_may_have_the_batch_anywhere() -> None:
    output = torch.rand(2, 5)
    answers = KnownAnswers.of(output.t())
    assert KnownAnswers.from_json(answers.to_json()) is not None
    assert answers.difference(output.t()) == 0
    assert answers.difference(output.t() + output.std()) > TOLERANCE


def test_outputs_of_one_number_are_held_against_its_size() -> None:
    answers = KnownAnswers.of(torch.tensor([4.0, 5.0]))
    assert answers.difference(torch.tensor([4.0, 5.1])) < TOLERANCE, "a code that falls to the other side"
    assert answers.difference(torch.tensor([4.0, 6.0])) > TOLERANCE


class Logarithm(nn.Module):
    """A model of images without pixels below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit(depth=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.log())


def test_the_images_are_ones_that_the_model_takes(tmp_path: Path) -> None:
    calibration = images(4).sigmoid()
    recipe = mptq_vit("W6A6", bits=(4, 6))
    compiled = fxquant.compile(Logarithm(), None, calibration=calibration, recipe=recipe)
    assert compiled.answers is not None
    assert compiled.answers.simulated.isfinite().all()
    given = compiled.answers.images_for(compiled.graph_module)
    assert calibration.min() <= given.min() < given.max() <= calibration.max()
    compiled.save(tmp_path / "logarithm.fxq")
    loaded = fxquant.load(tmp_path / "logarithm.fxq", backend="auto")
    assert loaded.check_answers() <= TOLERANCE
    compiled.load_state_dict(compiled.state_dict())
    assert compiled.answers.pixels == loaded.answers.pixels  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match=r"NaN or infinite.*clamp"):
        KnownAnswers.measured(compiled.graph_module)


GOOD: dict[str, Any] = {
    "seed": 1, "rounding": 0.01, "pixels": [0.0, 1.0], "simulated": [[1.0, 2.0], [0.5, 1.0]], "float": None,
}  # fmt: skip


@pytest.mark.parametrize("change", [
    {"seed": -1}, {"seed": 2**40}, {"seed": "1"}, {"simulated": []}, {"simulated": [[1.0], [1.0, 2.0]]},
    {"simulated": [[1.0, "2"], [0.5, 1.0]]}, {"simulated": [[], []]}, {"simulated": [[0.0] * 2000] * 2},
    {"float": [[1.0], [2.0]]}, {"float": 3}, {"rounding": -0.1}, {"rounding": 2.0}, {"rounding": 1},
    {"simulated": [3, 4]}, {"pixels": [1.0]}, {"pixels": [1, 2]}, {"pixels": [1.0, 0.0]}, {"pixels": "01"},
    {"pixels": [float("nan"), 1.0]}, {"pixels": [0.0, float("inf")]},
])  # fmt: skip
def test_what_is_no_answers(change: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    assert KnownAnswers.from_json(GOOD).to_json() == GOOD
    with pytest.raises(ArtefactError, match="known answers"):
        KnownAnswers.from_json(GOOD | change)


def test_a_damaged_entry_is_an_artefact_error(saved: Path, tmp_path: Path) -> None:
    texts, tensors = read_file(saved)
    kept = {key: text for key, text in texts.items() if key not in ("format", "version", "aliases", "digest")}
    path = tmp_path / "bad.fxq"
    path.write_bytes(pack_file(kept | {"answers": "nonsense"}, tensors))
    with pytest.raises(ArtefactError, match="answers"):
        fxquant.load(path)

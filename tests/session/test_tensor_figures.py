"""Figures of tensors: drawn of a small model, and refused for what it does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.errors import OptionError
from fxquant.graph.annotation import Source
from fxquant.session.tensor_figures import figure_of_boxes, figure_of_layers, figure_of_means, figure_of_tensor
from tests.report.small_pages import small_session

PNG = b"\x89PNG"


@pytest.mark.parametrize(
    ("layer", "place"), [("blocks.1.mlp.fc2", "input"), ("blocks.0.attn.av", "left"), ("head", "weight")]
)
def test_histograms_of_every_kind_of_operand(tmp_path: Path, layer: str, place: str) -> None:
    figure_of_tensor(small_session(), tmp_path / "a.png", layer, 4, place)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_boxes_means_and_single_layers(tmp_path: Path) -> None:
    figure_of_boxes(small_session(), tmp_path / "boxes.png", Source.POST_GELU, 4)
    figure_of_means(small_session(), tmp_path / "means.svg")
    figure_of_layers(small_session(), tmp_path / "layers.png", 3)
    assert "mean (SQ-b)" in (tmp_path / "means.svg").read_text()
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("boxes", "layers"))


def test_what_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    session, path = small_session(), tmp_path / "a.png"
    for layer, bits, place, text in (
        ("blocks.9", 4, "input", "there is no layer 'blocks.9'"),
        ("head", 9, "input", "no quantizer of 9 bits"),
        ("head", 4, "left", "no quantized operand 'left'; it has weight, input"),
    ):
        with pytest.raises(OptionError, match=text):
            figure_of_tensor(session, path, layer, bits, place)
    with pytest.raises(OptionError, match="holds layer norm input"):
        figure_of_boxes(session, path, Source.LAYER_NORM_INPUT, 4)
    assert not path.exists()

"""Pictures of relevance are drawn, from what they should show."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fxquant.data import embedded
from fxquant.errors import ArtefactError
from fxquant.report import relevance_plots
from fxquant.report.relevance_plots import plot_importance, plot_relevance
from fxquant.sensitivity.relevance import Relevance
from tests.models import traced


def test_importance_and_relevance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = embedded.calibration_images(3)
    graph_module = traced(embedded.load_model(), images)
    relevance = Relevance(graph_module)
    importance = relevance.importance([images])
    figures: list[Any] = []
    write = relevance_plots.write_figure

    def keep(path: Any, figure: Any) -> None:
        figures.append(figure)
        write(path, figure)

    monkeypatch.setattr(relevance_plots, "write_figure", keep)
    plot_importance(tmp_path / "importance.svg", graph_module, importance)
    ElementTree.parse(tmp_path / "importance.svg")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "patch_embed", "qkv", "qk", "av", "proj", "fc1", "fc2", "head"
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["patch_embed.\nproj", *"012345", "head"]
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)
    plot_relevance(tmp_path / "map.png", images, relevance.of(images)["patch_embed.proj"], ["a", "b", "c"])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figures[1].axes] == ["a", "b", "c", "", "", ""]


def test_importance_of_another_graph_is_refused(tmp_path: Path) -> None:
    graph_module = traced(embedded.load_model(), embedded.calibration_images(2))
    with pytest.raises(ArtefactError, match="measured on another"):
        plot_importance(tmp_path / "importance.png", graph_module, {"layers.0": 1.0})

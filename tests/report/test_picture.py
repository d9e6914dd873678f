"""Pictures: valid XML and DOT, colours by bits, names that try to break out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch

from fxquant.errors import ArtefactError
from fxquant.graph.annotation import annotate_operands, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.report.palette import colour
from fxquant.report.picture import to_dot, to_svg, write_picture
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles
from passes.search.plan_operands import PlanOperands
from tests.report.small_report import ROWS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def graph_module() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, num_heads=2, depth=2, num_classes=5, qkv_bias=False
    )
    found = trace(model, torch.rand(2, 3, 8, 8))
    AssignRoles().apply(found, PassContext())
    PlanOperands().apply(found, PassContext())
    for node in nodes_with_role(found):
        role = node.meta["fxquant"].role
        if role.has_weight:
            annotate_operands(node, bits=(4, 5))
        elif role.is_matmul:
            annotate_operands(node, bits=(6, 6))
    return found


def test_svg_of_rows() -> None:
    root = ElementTree.fromstring(to_svg(ROWS, "a <model> & more"))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a <model> & more: mean weight bits 4.33, mean activation bits 5.20" in texts
    assert {"qkv", "qk", "fc1", "block 0", "block 1", "patch_embed.proj", "head"} <= set(texts)
    fills = [element.get("fill") for element in root.iter(f"{SVG}rect")]
    assert fills.count(colour(3)) == 1 + 1, "one weight, and the legend"
    assert len(list(root.iter(f"{SVG}g"))) == len(ROWS)


def test_svg_of_a_graph(graph_module: torch.fx.GraphModule) -> None:
    root = ElementTree.fromstring(to_svg(graph_module))
    titles = {element.text for element in root.iter(f"{SVG}title")}
    assert "blocks.1.mlp.fc2: weight/activation bits 4/5" in titles
    assert "blocks.0.attn.qk: weight/activation bits -/6" in titles


def test_svg_without_rows_and_with_strange_names() -> None:
    ElementTree.fromstring(to_svg([]))
    strange = replace(ROWS[0], layer='<b>&"\x00\x1b\ud800')
    assert "<b>" not in to_svg([strange])
    ElementTree.fromstring(to_svg([strange], "]]>\x07"))


def test_two_layers_in_one_cell_share_it() -> None:
    twins = [replace(ROWS[1], layer=f"blocks.0.{name}") for name in "qkv"]
    root = ElementTree.fromstring(to_svg(twins))
    widths = [float(e.get("width", "0")) for g in root.iter(f"{SVG}g") for e in g.iter(f"{SVG}rect")]
    assert len(widths) == 6
    assert max(widths) < 15


def test_dot(graph_module: torch.fx.GraphModule) -> None:
    text = to_dot(graph_module)
    assert text.count("{") == text.count("}")
    nodes = set(re.findall(r'^\s*"([^"]+)" \[', text, re.MULTILINE))
    edges = re.findall(r'^\s*"([^"]+)" -> "([^"]+)";', text, re.MULTILINE)
    assert {name for edge in edges for name in edge} == nodes, "no loose ends"
    assert 'label="fc1 w4a5"' in text
    assert f'fillcolor="{colour(4)}"' in text
    assert 'label="block 1"' in text
    assert ("blocks_0_norm1", "blocks_0_attn_qkv") in edges
    assert ("blocks_0_mlp_act", "blocks_0_mlp_fc2") in edges


def test_writing(graph_module: torch.fx.GraphModule, tmp_path: Path) -> None:
    for name in ("bits.svg", "bits.dot", "BITS.SVG"):
        write_picture(tmp_path / name, graph_module)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BITS.SVG", "bits.dot", "bits.svg"]
    with pytest.raises(ArtefactError, match=r"ends in \.svg or \.dot, not in '\.png'"):
        write_picture(tmp_path / "bits.png", graph_module)
    with pytest.raises(ArtefactError, match="needs the graph module"):
        write_picture(tmp_path / "rows.dot", ROWS)
    with pytest.raises(ArtefactError, match="no folder"):
        write_picture(tmp_path / "missing" / "bits.svg", ROWS)

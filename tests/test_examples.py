"""Every example runs as a script, on fewer images than it asks for."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
PRINTS = {
    "one_call": ["bit operations G", "loaded gives the same outputs: True", "quantized 9"],
    "inspect_graph": ["coverage: 100%", "%blocks_0_attn_qkv = qkv(%blocks_0_norm1)", "%blocks_0_attn_qkv = qkv[w"],
    "own_pipeline": ["8 KeepHigh", "blocks.5.attn.proj: ", "refused: pass 1 KeepHigh(role=<Role.PROJ"],
    "own_detector": ["bit operations G", "images with the same points: "],
    "segmenter": ["bit operations G", "mIoU against the float model: 9"],
    "budgets_and_overrides": ["W4A5, 700MBOPs", "integer program", "refused: override 'blocks.9.*' matches no layer"],
}
WRITES = {"one_call": ["bits.svg", "model.fxq"], "inspect_graph": ["graph.dot"]}


def test_all_are_tested() -> None:
    assert {path.stem for path in EXAMPLES} == set(PRINTS)


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert [text for text in PRINTS[path.stem] if text not in printed] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == WRITES.get(path.stem, [])


def test_docstrings_say_how_to_run_them() -> None:
    for path in EXAMPLES:
        assert f"python examples/{path.name}" in path.read_text()

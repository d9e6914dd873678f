"""Notes: typed values about a whole graph."""

from __future__ import annotations

import pytest
from torch import nn
from torch.fx import symbolic_trace

from fxquant.errors import ModelError
from fxquant.graph.notes import COVERAGE, Note

pytestmark = pytest.mark.quick


def test_a_note_is_what_was_written_last() -> None:
    graph_module = symbolic_trace(nn.Identity())
    COVERAGE.write(graph_module, 0.5)
    COVERAGE.write(graph_module, 0.75)
    assert COVERAGE.get(graph_module) == COVERAGE.of(graph_module) == 0.75


def test_what_is_missing_or_of_another_class_is_refused_with_a_remedy() -> None:
    graph_module = symbolic_trace(nn.Identity())
    assert COVERAGE.get(graph_module) is None
    with pytest.raises(ModelError, match=r"says nothing of its coverage: make it with fxquant\.trace"):
        COVERAGE.of(graph_module)
    graph_module.meta["kept"] = "text"
    assert Note("kept", int).get(graph_module) is None

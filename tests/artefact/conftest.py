"""A saved model, and files edited behind the digest's back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fxquant.artefact import artefact, container
from tests.quantized_by_hand import SmallNet, quantize_by_hand


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small() -> GraphModule:
    """SmallNet at 5 weight bits and 4 activation bits; not to be changed."""
    return quantize_by_hand(SmallNet(), (3, 8, 8), 5, 4)


@pytest.fixture(scope="session")
def small_bytes(small: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A saved SmallNet."""
    path = tmp_path_factory.mktemp("small") / "small.fxq"
    artefact.save(path, small, card={"protocol": "test"}, allocation_json='{"bits":5}', journal=[{"pass": "Trace"}])
    return path.read_bytes()


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor], dict[str, str]], None]


@pytest.fixture
def edited(small_bytes: bytes, tmp_path: Path) -> Callable[[Edit], Path]:
    """Change graph, tensors or texts of the saved SmallNet in place, seal the file again, and give its path."""

    def write(edit: Edit) -> Path:
        path = tmp_path / "edited.fxq"
        path.write_bytes(small_bytes)
        texts, tensors = container.read_file(path)
        graph = json.loads(container.decompress(texts["graph"], "graph"))
        edit(graph, tensors, texts)
        if "graph" in texts:
            texts["graph"] = container.compress(json.dumps(graph))
        path.write_bytes(container.pack_file(texts, tensors))
        return path

    return write

"""State dicts, copies and pickles of quantized models: right, or refused before anything is changed or written."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ArtefactError, StateError
from fxquant.runtime.known_answers import KnownAnswers, answer_images_for
from fxquant.runtime.native import library
from passes.pipeline.journal import Journal
from tests.quantized_by_hand import SmallNet, quantize_by_hand

BACKEND = "cpu-native" if library.why_absent() is None else "simulated"


def quantized(bits: int = 5, scale: float = 1.0) -> fxquant.Compiled:
    """The same network each time; scale: of its weights."""
    torch.manual_seed(0)
    model = SmallNet()
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    graph_module = quantize_by_hand(model, (3, 8, 8), bits, 4)
    answers = KnownAnswers.of(graph_module(answer_images_for(graph_module)))
    return fxquant.Compiled(graph_module, None, Journal(), [], {}, answers)


@pytest.fixture(scope="module")
def first() -> fxquant.Compiled:
    return quantized()


@pytest.fixture
def second() -> fxquant.Compiled:
    return quantized(scale=2.0)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 8, 8)


def test_a_loaded_state_is_what_runs_is_saved_and_is_lowered(
    first: fxquant.Compiled, second: fxquant.Compiled, x: Tensor, tmp_path: Path
) -> None:
    expected = first(x)
    assert not torch.allclose(second(x), expected)
    second.load_state_dict(first.state_dict())
    assert second.check_answers() == 0, "the answers it is held against are the loaded state's"
    second.save(tmp_path / "second.fxq")
    assert torch.equal(second(x), expected)
    assert torch.equal(fxquant.load(tmp_path / "second.fxq")(x), expected)
    assert torch.equal(second.lowered(BACKEND)(x), first.lowered(BACKEND)(x))


def test_a_state_survives_torch_save_and_reaches_a_model_inside_another(
    first: fxquant.Compiled, second: fxquant.Compiled, x: Tensor
) -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(first).state_dict(), file)
    file.seek(0)
    nn.Sequential(second).load_state_dict(torch.load(file))
    assert torch.equal(second(x), first(x))


def test_the_graph_alone_follows_a_loaded_state(first: fxquant.Compiled, second: fxquant.Compiled, x: Tensor) -> None:
    second.graph_module.load_state_dict(first.graph_module.state_dict())
    assert torch.equal(second(x), first(x))
    with pytest.raises(StateError, match=r"codes of .* are of another width"):
        quantized(bits=3).graph_module.load_state_dict(first.graph_module.state_dict())


def changed(state: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**state, name: value}


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


SCALE, CODES = "graph_module.fc.input_quantizer.scale", "graph_module.fc.weight_codes"
BIAS = "graph_module.fc.bias"
REFUSED: dict[str, Any] = {
    "of another width": (lambda s: quantized(bits=4).state_dict(), "has other settings for the quantizer"),
    "of a float model": (lambda s: SmallNet().state_dict(), "the state lacks '_extra_state'"),
    "of a graph alone": (lambda s: without(s, "_extra_state"), "the state lacks '_extra_state'"),
    "without a tensor": (lambda s: without(s, SCALE), "lacks 'graph_module.fc.input_quantizer.scale'"),
    "with another tensor": (lambda s: changed(s, "more", torch.zeros(1)), "has 'more', which the model does not have"),
    "with another shape": (lambda s: changed(s, CODES, s[CODES][:1]), r"is torch.int8 \(1, 6\), not torch.int8"),
    "with another dtype": (lambda s: changed(s, CODES, s[CODES].float()), "is torch.float32"),
    "with codes beyond the width": (lambda s: changed(s, CODES, s[CODES] * 0 + 100), "are of another width"),
    "with a scale of NaN": (lambda s: changed(s, SCALE, s[SCALE] * torch.nan), "NaN, infinite or not positive"),
    "with a bias of NaN": (lambda s: changed(s, BIAS, s[BIAS] * torch.nan), "bias' of the state has NaN or infinite"),
    "without values": (lambda s: {name: each.to("meta") for name, each in s.items()}, "on the meta device"),
    "with no tensor": (lambda s: changed(s, SCALE, 3.0), "is float, not torch.float32"),
    "no mapping": (lambda s: list(s), "not a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_state_is_refused_and_changes_nothing(name: str, second: fxquant.Compiled, x: Tensor) -> None:
    make, reason = REFUSED[name]
    expected = second(x)
    with pytest.raises(StateError, match=reason) if name != "no mapping" else pytest.raises(TypeError, match=reason):
        second.load_state_dict(make(quantized().state_dict()))
    assert torch.equal(second(x), expected)


def test_part_of_a_state_is_taken_where_that_is_asked_for(
    first: fxquant.Compiled, second: fxquant.Compiled, x: Tensor
) -> None:
    state = first.state_dict()
    part = {name: state[name] for name in ("_extra_state", CODES)}
    assert len(second.load_state_dict(part, strict=False).missing_keys) == len(state) - 2
    assert torch.equal(second.graph_module.get_submodule("fc").weight_codes, state[CODES])
    with pytest.raises(StateError, match="not one of a quantized model"):
        second.load_state_dict({CODES: state[CODES]}, strict=False)


def test_copies_and_pickles_compute_the_same(first: fxquant.Compiled, x: Tensor) -> None:
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    copies = [copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for model in (*copies, torch.load(file, weights_only=False), copy.deepcopy(first.lowered(BACKEND))):
        torch.testing.assert_close(model(x), first(x))
    copies[1].graph_module.get_submodule("fc").bias.add_(1)
    assert torch.equal(copies[0](x), first(x))


def test_a_lowered_model_has_no_state_and_no_pickle(first: fxquant.Compiled) -> None:
    lowered = first.lowered(BACKEND)
    with pytest.raises(ArtefactError, match="save the model it was lowered from"):
        pickle.dumps(lowered)
    with pytest.raises(ArtefactError, match="save the model it was lowered from"):
        torch.save(lowered, io.BytesIO())
    with pytest.raises(StateError, match="take the model it was lowered from"):
        lowered.state_dict()
    with pytest.raises(StateError, match="takes no state dict"):
        lowered.load_state_dict(first.state_dict())

"""Weights of few bits in ONNX files: as small as their bits say, and equal when a runtime has loaded them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxquant.export.narrow_weights import packed_bytes
from fxquant.export.onnx_file import to_onnx
from fxquant.export.onnxruntime_model import results_of, session_of
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.quantizers.uniform_channels import UniformChannelsQuantizer
from tests.quantized_by_hand import quantize_by_hand

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.sampled_from([1, 2, 4]))
def test_packed_bytes_can_be_taken_apart(codes: list[int], width: int) -> None:
    given = np.array(codes, dtype=np.uint8)
    packed = packed_bytes(given, width)
    assert len(packed) == -(-len(codes) // 8) * width
    apart = (packed[:, None] >> np.arange(0, 8, width, dtype=np.uint8)) & (2**width - 1)
    assert apart.reshape(-1)[: len(codes)].tolist() == [code & (2**width - 1) for code in codes]


class TwoLayers(nn.Module):
    """The second has a number of weights that fills no whole byte."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 33), nn.Linear(33, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x.flatten(1))))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_packed_weights_give_equal_scores_and_take_their_bits(bits: int) -> None:
    graph_module = quantize_by_hand(TwoLayers(), (3, 2, 4), bits, 8)
    second = graph_module.get_submodule("second")
    weight = second.weight
    second.weight_quantizer = UniformQuantizer(bits, (weight.amax() - weight.amin()) / (2**bits - 1), 1)
    second.requantize(weight)
    x = torch.rand(4, 3, 2, 4)
    written = {kind: to_onnx(graph_module, weight_type=kind).content for kind in ("int8", "packed")}
    found = {kind: results_of(session_of(content), x) for kind, content in written.items()}
    assert torch.equal(found["packed"], found["int8"])
    model = onnx.load_model_from_string(written["packed"])
    onnx.checker.check_model(model, full_check=True)
    packed = sum(len(i.raw_data) for i in model.graph.initializer if ".values.packed" in i.name)
    assert packed == bits * 24 * 33 / 8 + bits * -(-33 * 5 // 8)
    assert not [i.name for i in model.graph.initializer if i.name.endswith(".values")]


def test_channels_of_several_widths_are_packed_at_their_own() -> None:
    graph_module = quantize_by_hand(TwoLayers(), (3, 2, 4), 4, 8)
    widths_of = {"first": [3, 4, 5] * 11, "second": [5, 4, 3, 4, 4]}
    for name, widths in widths_of.items():
        layer = graph_module.get_submodule(name)
        weight, width_o1 = layer.weight, torch.tensor(widths)[:, None]
        scale = weight.abs().amax(1, keepdim=True) / 2.0 ** (width_o1 - 1)
        layer.weight_quantizer = UniformChannelsQuantizer(4, scale, width_o1)
        layer.requantize(weight)
    x = torch.rand(4, 3, 2, 4)
    written = {kind: to_onnx(graph_module, weight_type=kind).content for kind in ("int8", "packed", "int4")}
    found = {kind: results_of(session_of(content), x) for kind, content in written.items()}
    assert torch.equal(found["packed"], found["int8"])
    assert torch.equal(found["int4"], found["int8"])
    torch.testing.assert_close(found["int8"], graph_module(x), rtol=1e-4, atol=1e-4)
    model = onnx.load_model_from_string(written["packed"])
    onnx.checker.check_model(model, full_check=True)
    packed = sum(len(i.raw_data) for i in model.graph.initializer if ".packed" in i.name)
    narrow = onnx.load_model_from_string(written["int4"]).graph.initializer
    assert not [i.name for i in narrow if i.data_type == onnx.TensorProto.INT4]  # channels of 5 bits
    first, second = (3 + 4 + 5) * 11 * 24 / 8, 4 * 5 * 33 / 8
    assert first + second <= packed <= first + second + 12  # the last bytes of every width

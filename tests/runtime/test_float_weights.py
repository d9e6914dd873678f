"""Float weights of simulated models are derived from codes when they are read, and held only by models that run so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

import fxquant
from fxquant.artefact import artefact
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedLinear, QuantizedWeightModule
from passes.lower.compare_layers import first_difference
from passes.lower.lower import Lower
from tests.models import compiled, images, vit
from tests.quantized_by_hand import quantize_by_hand


def layer() -> QuantizedLinear:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    return QuantizedLinear(weight, torch.zeros(8), UniformQuantizer(4, weight.abs().amax(1, keepdim=True) / 7), None)


def holding(graph_module: GraphModule) -> list[bool]:
    return [m.has_weight for m in graph_module.modules() if isinstance(m, QuantizedWeightModule)]


def test_a_loaded_model_of_two_bits_holds_four_times_its_codes_until_it_runs(tmp_path: Path) -> None:
    graph_module = quantize_by_hand(vit(embed_dim=96, depth=2), (3, 32, 32), 2, 8)
    artefact.save(tmp_path / "a.fxq", graph_module, card={})
    loaded = artefact.load(tmp_path / "a.fxq").graph_module
    sizes = artefact.size_breakdown(tmp_path / "a.fxq")
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert held <= 4 * sizes["packed_weight_bytes"] + sizes["scale_bytes"] + sizes["other_tensor_bytes"] + 1024
    assert not any(holding(loaded))
    x = images(2)
    assert torch.equal(loaded(x), graph_module(x))
    assert all(holding(loaded))


def test_lowering_derives_no_float_weight_that_stays(tmp_path: Path) -> None:
    if library.why_absent() is not None:
        pytest.skip(str(library.why_absent()))
    x = images(2)
    compiled("vit").save(tmp_path / "a.fxq")
    loaded = fxquant.load(tmp_path / "a.fxq")
    lowered = loaded.lowered("cpu-native")
    first_difference(loaded.graph_module, Lower("cpu-native", chains=False), x)  # where a proof asks for every layer
    assert not any(holding(loaded.graph_module))
    assert not any(holding(lowered.graph_module))
    assert torch.equal(lowered(x), compiled("vit").lowered("cpu-native")(x))


@pytest.mark.quick
def test_the_weight_follows_codes_and_casts() -> None:
    early, late = layer(), layer()
    assert early.weight.dtype == torch.float32  # derived before it is cast
    assert torch.equal(early.double().weight, late.double().weight)
    late.weight_codes = late.weight_codes // 2
    late.refresh()
    assert late.weight.dtype == torch.float64
    assert torch.equal(late.weight, late.weight_codes * late.weight_quantizer.scale)
    assert late.weight_like.shape == late.weight.shape
    assert late.weight_like.dtype == late.weight.dtype


@pytest.mark.quick
def test_a_run_of_any_kind_leaves_a_weight_to_train_with() -> None:
    module: nn.Module = layer()
    x = torch.randn(2, 6, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.empty(2, 6))
    assert not module.has_weight  # there was nothing to keep
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert torch.equal(x.grad, module.weight.sum(0).expand(2, 6))
    assert torch.equal(copy.deepcopy(layer())(x), module(x))

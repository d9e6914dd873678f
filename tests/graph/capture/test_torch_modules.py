"""torch's own attention modules are written out, with every role, and compute what they computed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from fxquant.graph.annotation import Role, annotation_of
from fxquant.graph.capture.tracing import trace
from fxquant.graph.notes import EXPORTED
from tests.models import images, scrambled, traced

WIDTH, HEADS, SIDE, TOKENS = 12, 2, 16, 16
IMAGES = images(2, SIDE)
CAUSAL = torch.ones(TOKENS, TOKENS).triu(1).bool()
PADDED = torch.arange(TOKENS) >= TOKENS - 3


class Tower(nn.Module):
    """A patch embedding, what mixes the tokens (B, N, E), and a head."""

    def __init__(self, mixer: nn.Module, mix) -> None:
        super().__init__()
        self.embed, self.mixer, self.head = nn.Conv2d(3, WIDTH, 4, 4), mixer, nn.Linear(WIDTH, 5)
        self.norm, self.mix = nn.LayerNorm(WIDTH), mix

    def forward(self, image):
        x = self.embed(image).flatten(2).transpose(1, 2)
        return self.head(self.mix(self.mixer, self.norm(x)).mean(1))


def layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, activation="gelu", **options)


def encoder(layers: int = 1, **options) -> nn.Module:
    is_nested = options.get("batch_first", False) and not options.get("norm_first", False)
    return nn.TransformerEncoder(layer(**options), layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=is_nested)


def attention(**options) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})


def with_mask(module: nn.Module) -> nn.Module:
    module.register_buffer("causal", CAUSAL)
    return module


def padded(m, x):
    return m(x, src_key_padding_mask=PADDED.repeat(x.shape[0], 1))[:, : TOKENS - 3]


class LearnedQuery(nn.Module):
    """Attention that pools: a learned query reads all tokens."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.probe, self.attention = nn.Parameter(torch.randn(1, 1, WIDTH)), attention(**options)

    def forward(self, x):
        return self.attention(self.probe.expand(x.shape[0], -1, -1), x, x)[0]


class OwnMask(nn.MultiheadAttention):
    """A subclass that calls the forward it inherits."""

    def forward(self, x):
        return super().forward(x, x, x, attn_mask=CAUSAL, need_weights=False)[0]


class OwnCall(nn.MultiheadAttention):
    """What CLIP's attention pool does: the function, with weights put together from three layers."""

    def forward(self, x):
        x = x.transpose(0, 1)
        q, k, v = self.in_proj_weight.chunk(3)
        return functional.multi_head_attention_forward(
            x[:1], x, x, WIDTH, HEADS, None, self.in_proj_bias, None, None, False, 0.1, self.out_proj.weight,
            self.out_proj.bias, training=self.training, use_separate_proj_weight=True, q_proj_weight=q,
            k_proj_weight=k, v_proj_weight=v,
        )[0].transpose(0, 1)  # fmt: skip


def swapped(m, x):
    return m(*3 * [x.transpose(0, 1)])[0].transpose(0, 1)


MODELS = {
    "encoder": (encoder(2, batch_first=True), lambda m, x: m(x)),
    "encoder, norms first": (encoder(batch_first=True, norm_first=True), lambda m, x: m(x)),
    "encoder, tokens first": (encoder(), lambda m, x: m(x.transpose(0, 1)).transpose(0, 1)),
    "encoder, causal": (encoder(batch_first=True), lambda m, x: m(x, mask=CAUSAL, is_causal=True)),
    "encoder, causal by a buffer": (with_mask(encoder(batch_first=True)), lambda m, x: m(x, mask=m.causal)),
    "attention, causal by a buffer": (with_mask(attention()), lambda m, x: m(x, x, x, attn_mask=m.causal)[0]),
    "encoder, padded": (encoder(batch_first=True), padded),
    "layer without biases": (layer(batch_first=True, bias=False), lambda m, x: m(x)),
    "attention": (attention(), lambda m, x: x + m(x, x, x, need_weights=False)[0]),
    "attention, tokens first": (attention(batch_first=False), swapped),
    "attention with a float mask": (attention(), lambda m, x: m(x, x, x, attn_mask=CAUSAL * -2.0)[0]),
    "attention with a mask of each head": (
        attention(),
        lambda m, x: m(x, x, x, attn_mask=CAUSAL.repeat(x.shape[0] * HEADS, 1, 1))[0],
    ),
    "attention with both masks": (
        attention(),
        lambda m, x: m(x, x, x, attn_mask=CAUSAL, key_padding_mask=PADDED.repeat(x.shape[0], 1))[0],
    ),
    "attention whose probabilities are read": (attention(), lambda m, x: (lambda y, p: y * p[:, :1].mT)(*m(x, x, x))),
    "attention of other widths": (attention(kdim=WIDTH, vdim=6), lambda m, x: m(x, x, x[:, :, :6])[0]),
    "cross attention": (attention(), lambda m, x: m(x[:, :4], x[:, 4:], x[:, 4:])[0]),
    "a learned query": (LearnedQuery(), lambda m, x: m(x)),
    "a subclass": (OwnMask(WIDTH, HEADS, batch_first=True), lambda m, x: m(x)),
    "the function": (OwnCall(WIDTH, HEADS), lambda m, x: m(x)),
}


def roles(graph_module) -> Counter:
    return Counter(annotation_of(node).role for node in graph_module.graph.nodes if annotation_of(node).role)


@pytest.mark.parametrize("name", MODELS)
def test_attention_of_torch_is_traced_with_its_products(name) -> None:
    mixer, mix = MODELS[name]
    found = roles(traced(scrambled(Tower(mixer, mix)), IMAGES))
    depth = len(mixer.layers) if isinstance(mixer, nn.TransformerEncoder) else 1
    expected = (Role.QK, Role.AV, Role.SOFTMAX, Role.PROJ)
    assert {role: found[role] for role in expected} == dict.fromkeys(expected, depth)
    assert found[Role.QKV] >= depth


def test_torchvisions_vit_has_every_role() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)
    found = roles(traced(scrambled(model), images(2, 32)))
    blocks = (Role.QKV, Role.QK, Role.SOFTMAX, Role.AV, Role.PROJ, Role.FC1, Role.FC2)
    assert {role: found[role] for role in blocks} == dict.fromkeys(blocks, 2)


def test_one_tensor_as_query_key_and_value_is_one_linear_layer() -> None:
    graph_module = trace(scrambled(Tower(*MODELS["attention"])), IMAGES)
    linears = {path for path, module in graph_module.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"mixer.in_proj", "mixer.out_proj", "head"}


def test_probabilities_that_nobody_reads_leave_the_graph() -> None:
    graph_module = trace(scrambled(Tower(attention(), lambda m, x: m(x, x, x)[0])), IMAGES)
    softmax = next(node for node in graph_module.graph.nodes if "softmax" in str(node.target))
    assert len(softmax.users) == 1


@pytest.mark.parametrize("option", ["add_zero_attn", "add_bias_kv"])
def test_keys_that_come_from_no_token_are_left_to_torch_export(option) -> None:
    model = scrambled(Tower(attention(**{option: True}), lambda m, x: m(x, x, x, need_weights=False)[0]))
    graph_module = traced(model, IMAGES)
    assert f"{option}=True appends a key that comes from no token" in EXPORTED.of(graph_module)
    found = roles(graph_module)
    assert [found[role] for role in (Role.QKV, Role.QK, Role.SOFTMAX, Role.AV, Role.PROJ)] == [1] * 5


def test_tracing_leaves_torchs_settings_and_the_callers_modules_alone() -> None:
    model = scrambled(Tower(*MODELS["encoder, padded"]))
    before = torch.backends.mha.get_fastpath_enabled()
    trace(model, IMAGES)
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert model.mixer.use_nested_tensor
    assert all("forward" not in vars(module) for module in model.modules())

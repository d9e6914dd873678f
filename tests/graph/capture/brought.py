"""What models bring besides their forward, as people write it: what the graph takes over and what it refuses."""

from __future__ import annotations

import functools
import threading
import types
from abc import ABC
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from fxquant.errors import ModelError, TraceError
from fxquant.graph.capture.tracing import trace

IMAGES_BCHW = torch.rand(3, 3, 8, 8)


LINEARS = {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_traced(model: nn.Module) -> torch.fx.GraphModule:
    """The graph computes what the model does, now and after the model was called, and shares nothing with it."""
    before, kinds = state_of(model), [type(module) for module in model.modules()]
    random_state = torch.get_rng_state()
    graph_module = trace(model, IMAGES_BCHW)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = model(IMAGES_BCHW)
        torch.testing.assert_close(graph_module(IMAGES_BCHW), expected, rtol=1e-4, atol=1e-5)
        for tensor in (*graph_module.parameters(), *graph_module.buffers()):
            tensor.zero_()
        torch.testing.assert_close(model(IMAGES_BCHW), expected)
    return graph_module


def linears_of(graph_module: torch.fx.GraphModule) -> set[str]:
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {path for path in called if isinstance(graph_module.get_submodule(path), nn.Linear)}


class Lora(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self.load_state_dict(inner.state_dict())
        self.down, self.up = nn.Linear(inner.in_features, 2, bias=False), nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Doubling(nn.Identity):
    def forward(self, x):
        return x * 2


class SharpGelu(nn.GELU):
    def forward(self, x):
        return super().forward(x * 1.5)


class CoolSoftmax(nn.Softmax):
    def forward(self, x):
        return super().forward(x / 2)


class ShiftedNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 0.5


class PaddedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 0.5)


class Reflecting(nn.Conv2d):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


class Noting(nn.Identity):
    @torch.inference_mode()
    def forward(self, x):
        return x * 1.5


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Registry(type):
    """A metaclass that keeps a register, as plug-in systems do."""

    known: ClassVar[list[str]] = []

    def __init__(cls, name, bases, namespace) -> None:
        super().__init__(name, bases, namespace)
        Registry.known.append(name)


class Abstract(ABC, nn.Module):
    """ABC first: its instances have another layout."""

    def forward(self, x):
        return x - 1


class Registered(nn.Identity, metaclass=Registry):
    def __init_subclass__(cls, *, option: int) -> None:
        """Subclasses have to give an option."""

    def forward(self, x):
        return x + 1


def patch_forward(model: nn.Module) -> None:
    layer, down, up = model.blocks[0].mlp.fc1, torch.randn(12, 2), torch.randn(2, 48)
    old = layer.forward
    layer.forward = lambda x: old(x) + x @ down @ up


def patch_method(model: nn.Module) -> None:
    layer = model.blocks[0].mlp.fc1

    def forward(self, x, old=layer.forward):
        return old(x) * 2

    layer.forward = types.MethodType(forward, layer)


def patch_root(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda images: old(images * 2)


def patch_with_partial(model: nn.Module) -> None:
    layer = model.blocks[0].mlp.act
    layer.forward = functools.partial(torch.nn.functional.gelu, approximate="tanh")


def hook_with_keywords(model: nn.Module) -> None:
    model.blocks[0].mlp.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)


def hook_on_root(model: nn.Module) -> None:
    model.register_forward_hook(lambda m, i, o: o.softmax(-1))
    model.register_forward_pre_hook(lambda m, i: (i[0] * 3,))


def hook_that_ends_backward(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1.register_full_backward_hook(lambda m, i, o: None)
    model.blocks[0].register_full_backward_pre_hook(lambda m, o: None)


def tied_pruning(model: nn.Module) -> None:
    attention = model.blocks[0].attn
    attention.norm = nn.Linear(12, 12)
    attention.norm.weight = attention.proj.weight
    prune.l1_unstructured(attention.proj, "weight", 0.5)


def spectral(model: nn.Module) -> None:
    spectral_norm(model.train().blocks[0].mlp.fc1)
    model(IMAGES_BCHW)
    model.eval()


def replace(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.set_submodule(path, make(model.get_submodule(path)).eval())

    return change


def set_lock(model: nn.Module) -> None:
    model.lock, model.state = threading.Lock(), {"lock": threading.Lock(), "calls": 0}


def set_attribute(name: str, value: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, value(model))


HANDLED: dict[str, Callable[[nn.Module], object]] = {
    "forward hook of a linear": lambda m: m.blocks[0].mlp.fc1.register_forward_hook(lambda mod, i, o: o * 2),
    "forward hook of a GELU": lambda m: m.blocks[0].mlp.act.register_forward_hook(lambda mod, i, o: o + 1),
    "forward hook of a dropout": lambda m: m.blocks[0].mlp.drop1.register_forward_hook(lambda mod, i, o: o + 1),
    "forward hook of a norm": lambda m: m.norm.register_forward_hook(lambda mod, i, o: o + 1),
    "pre-hook of a convolution": lambda m: m.patch_embed.proj.register_forward_pre_hook(lambda mod, i: (i[0] * 2,)),
    "hook with keywords": hook_with_keywords,
    "hooks of the whole model": hook_on_root,
    "backward hooks": hook_that_ends_backward,
    "LoRA by patching forward": patch_forward,
    "forward as a bound method": patch_method,
    "forward of the whole model": patch_root,
    "forward as a partial": patch_with_partial,
    "LoRA as a subclass": replace("blocks.0.mlp.fc1", Lora),
    "subclass of Identity": replace("blocks.0.attn.q_norm", lambda old: Doubling()),
    "subclass of GELU": replace("blocks.0.mlp.act", lambda old: SharpGelu()),
    "subclass of LayerNorm": replace("norm", lambda old: ShiftedNorm(12)),
    "subclass of Conv2d": replace("patch_embed.proj", lambda old: PaddedConv(3, 12, 4, 4)),
    "subclass of Softmax": replace("head_drop", lambda old: CoolSoftmax(-1)),
    "class laid out otherwise": replace("head_drop", lambda old: Abstract()),
    "class with a register": replace("head_drop", lambda old: Registered()),
    "pruning": lambda m: prune.l1_unstructured(m.blocks[0].mlp.fc1, "weight", 0.5),
    "pruning twice": lambda m: [prune.random_unstructured(m.head, "weight", 0.3) for _ in range(2)],
    "pruning of a tied weight": tied_pruning,
    "old weight_norm": lambda m: weight_norm(m.blocks[0].mlp.fc1),
    "old spectral_norm": spectral,
    "weight_norm": lambda m: parametrizations.weight_norm(m.blocks[0].mlp.fc1),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.head),
    "orthogonal": lambda m: parametrizations.orthogonal(m.blocks[0].attn.proj),
    "parametrized norm": lambda m: parametrize.register_parametrization(m.norm, "weight", Halved()),
    "compiled submodule": replace("blocks.0.mlp", lambda old: torch.compile(old, backend="eager")),
    "compiled forward of a class": replace(
        "patch_embed.proj", lambda old: Reflecting(3, 12, 4, 4, padding=1, padding_mode="reflect")
    ),
    "forward in inference mode": replace("head_drop", lambda old: Noting()),
    "compiled in place": lambda m: m.blocks[0].mlp.compile(backend="eager"),
    "lock": set_lock,
    "computed tensor as attribute": set_attribute("cached", lambda m: m.head.weight * 2),
    "compiled function, by torch.export": replace("head_drop", lambda old: Compiled()),
}


def scripted(model: nn.Module) -> None:
    model.head = torch.jit.script(nn.Linear(12, 5))


def set_weight(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.head.weight = nn.Parameter(make(model.head.weight.detach()), requires_grad=False)

    return change


def hook_that_decides(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, o: o * 2 if o.sum() > 0 else o)


def running_statistics(model: nn.Module) -> None:
    model.register_buffer("mean", torch.zeros(5))
    model.register_buffer("variance", torch.ones(5))
    model.norm.register_forward_hook(
        lambda m, i, o: o + 0 * nn.functional.batch_norm(o, model.mean, model.variance, training=True, momentum=0.5)
    )


class Compiled(nn.Identity):
    def forward(self, x):
        return twice(x)


@torch.compile(backend="eager")
def twice(x):
    return x * 2


class Singleton(nn.Identity):
    def __deepcopy__(self, memo):
        return self


def not_copyable(model: nn.Module) -> None:
    def refuse(memo: object) -> None:
        raise RuntimeError("one of a kind")

    model.blocks[0].mlp.__deepcopy__ = refuse


REFUSED: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "meta": (lambda m: m.to("meta"), ModelError, r"'cls_token' is on the meta device.*to_empty"),
    "one layer on meta": (lambda m: m.head.to("meta"), ModelError, r"'head\.weight' is on the meta device"),
    "lazy": (replace("head", lambda old: nn.LazyLinear(5)), ModelError, r"'head\.weight' has no shape yet.*one image"),
    "scripted part": (scripted, ModelError, r"'head' in VisionTransformer is scripted.*nn\.Module"),
    "complex": (
        set_weight(lambda w: w.to(torch.complex64)),
        ModelError,
        r"'head\.weight' is torch\.complex64: complex",
    ),
    "integers": (set_weight(lambda w: w.to(torch.int8)), ModelError, r"'head\.weight' is torch\.int8, not float"),
    "flags": (set_weight(lambda w: w > 0), ModelError, r"'head\.weight' is torch\.bool, not float.*register_buffer"),
    "half": (set_weight(lambda w: w.half()), ModelError, r"'head\.weight' is torch\.float16.*model\.float\(\)"),
    "sparse": (set_weight(lambda w: w.to_sparse()), ModelError, r"'head\.weight' has the layout.*to_dense"),
    "hook that decides": (hook_that_decides, TraceError, r"in 'blocks\.0\.mlp\.fc1' \(Linear, which has hooks"),
    "running statistics": (running_statistics, TraceError, r"changes 'mean', and a quantized model keeps no state"),
    "singleton": (replace("head_drop", lambda old: Singleton()), ModelError, "does not copy 'head_drop'.*__deepcopy__"),
    "one of a kind": (not_copyable, ModelError, "cannot be copied.*one of a kind.*copy.deepcopy"),
}

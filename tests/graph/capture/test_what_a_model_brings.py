"""What a model brings besides its forward is in the graph, or refused with the remedy; the model stays the caller's."""

from __future__ import annotations

import copy
import functools
import threading
import types
from abc import ABC
from collections.abc import Callable
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules import module as module_file
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from fxquant.errors import CalibrationError, CoverageError, ModelError, TraceError
from fxquant.graph.capture.plain_model import copy_of
from fxquant.graph.capture.tracing import trace

IMAGES_BCHW = torch.rand(3, 3, 8, 8)
LINEARS = {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"}


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, num_heads=2, depth=1, num_classes=5, proj_drop_rate=0.1
    ).eval()


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
}


@pytest.mark.parametrize("name", HANDLED)
def test_graph_computes_what_the_given_model_does(name: str, plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    HANDLED[name](model)
    linears = linears_of(check_traced(model))
    assert len(linears) >= len(LINEARS)
    assert {path.removesuffix(".linear") for path in linears} >= LINEARS
    assert "blocks.0.mlp.fc1" in linears or "LoRA" in name
    assert Registry.known == ["Registered"]


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_are_taken_off(wrap, plain: nn.Module) -> None:
    assert linears_of(trace(wrap(plain), IMAGES_BCHW)) == LINEARS
    wrapped = wrap(plain)
    wrapped.register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(ModelError, match="has hooks: register them on the model inside, a VisionTransformer"):
        trace(wrapped, IMAGES_BCHW)


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
    "compiled function": (replace("head_drop", lambda old: Compiled()), TraceError, "in 'head_drop'.*dynamo-optimized"),
    "singleton": (replace("head_drop", lambda old: Singleton()), ModelError, "does not copy 'head_drop'.*__deepcopy__"),
    "one of a kind": (not_copyable, ModelError, "cannot be copied.*one of a kind.*copy.deepcopy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_with_the_remedy(name: str, plain: nn.Module) -> None:
    change, error, message = REFUSED[name]
    model = copy.deepcopy(plain)
    change(model)
    with pytest.raises(error, match=message):
        trace(model, IMAGES_BCHW)


def test_a_scripted_model_and_images_without_values_are_refused(plain: nn.Module) -> None:
    with pytest.raises(ModelError, match="the model is scripted or traced by torch"):
        trace(torch.jit.trace(nn.Linear(3, 2), torch.rand(1, 3)), IMAGES_BCHW)
    with pytest.raises(CalibrationError, match=r"on meta, and models are compiled on the CPU: images\.cpu\(\)"):
        trace(plain, IMAGES_BCHW.to("meta"))


def test_inference_mode_parameters_are_taken() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2))
        inside = trace(model, IMAGES_BCHW)
        expected = model(IMAGES_BCHW)
    for graph_module in (inside, trace(model, IMAGES_BCHW)):
        torch.testing.assert_close(graph_module(IMAGES_BCHW), expected)
        assert not any(parameter.is_inference() for parameter in graph_module.parameters())


def test_hooks_of_the_whole_process_are_kept_or_refused(plain: nn.Module) -> None:
    called = []
    hooks = [
        module_file.register_module_forward_hook(lambda module, inputs, output: called.append(1)),
        module_file.register_module_forward_pre_hook(lambda module, inputs: None),
    ]
    try:
        assert linears_of(trace(plain, IMAGES_BCHW)) == LINEARS
        hooks.append(module_file.register_module_forward_hook(lambda module, inputs, output: output * 1.01))
        with pytest.raises(TraceError, match="hooks are registered for all modules of the process, remove them"):
            trace(plain, IMAGES_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    assert called


class Stateful(nn.Module):
    """Counts its calls, follows its activations and keeps them, in every way a module can."""

    def __init__(self, uses_state: bool) -> None:
        super().__init__()
        self.embed, self.head, self.uses_state = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 2), uses_state
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("latest", torch.zeros(6))
        self.count, self.kept = 0, []

    def forward(self, images):
        x = self.embed(images).flatten(2).mean(2)
        self.calls += 1
        self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        self.latest = x.mean(0)
        self.count += 1
        self.kept.append(x)
        return self.head(x + self.mean if self.uses_state else x)


def test_state_that_forward_changes_stays_the_callers() -> None:
    model = Stateful(uses_state=False).eval()
    before = state_of(model)
    graph_module = trace(model, IMAGES_BCHW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.count, model.kept) == (0, [])
    with torch.no_grad():
        torch.testing.assert_close(graph_module(IMAGES_BCHW), model(IMAGES_BCHW))
    with pytest.raises(TraceError, match=r"the same image.*keeps a state"):
        trace(Stateful(uses_state=True), IMAGES_BCHW)


def test_what_a_hook_collects_stays_the_callers(plain: nn.Module) -> None:
    collected: list[object] = []
    model = copy.deepcopy(plain)
    model.norm.register_forward_hook(lambda module, inputs, output: collected.append(output))
    trace(model, IMAGES_BCHW)
    assert collected == []


def test_other_threads_are_not_touched(plain: nn.Module) -> None:
    """Two traces at once, and a third thread whose model has nothing to do with them."""
    other, stop = nn.Linear(2, 2), threading.Event()
    kinds: set[type] = set()
    failures: list[BaseException] = []

    def serve() -> None:
        while not stop.is_set():
            kinds.add(type(other(torch.ones(1, 2))))

    def compile_model() -> None:
        try:
            for _ in range(2):
                trace(plain, IMAGES_BCHW)
        except BaseException as error:
            failures.append(error)

    server = threading.Thread(target=serve)
    compilers = [threading.Thread(target=compile_model) for _ in range(2)]
    server.start()
    for thread in compilers:
        thread.start()
    for thread in compilers:
        thread.join()
    stop.set()
    server.join()
    assert failures == []
    assert kinds == {torch.Tensor}


class OddNames(nn.Module):
    """Submodules named after what the code of a graph uses, and an argument too."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("self", "torch", "graph", "meta", "code", "x", "operator", "getattr", "recompile_"):
            setattr(self, name, nn.Linear(4, 4))
        self.shape_env = nn.Parameter(torch.rand(4))

    def forward(self, torch):
        y = torch.flatten(2).mean(-1)
        for name in ("self", "torch", "graph", "meta", "code", "x", "operator", "getattr", "recompile_"):
            y = getattr(self, name)(y)
        return y * self.shape_env


def test_names_of_submodules_and_arguments_do_not_matter() -> None:
    model, images = OddNames().eval(), torch.rand(2, 4, 3, 3)
    graph_module = copy.deepcopy(trace(model, images))
    with torch.no_grad():
        torch.testing.assert_close(graph_module(images), model(images))
    assert len(linears_of(graph_module)) == 9


def test_weights_hidden_in_attention_are_refused_with_a_remedy_that_exists(plain: nn.Module) -> None:
    class Attention(nn.MultiheadAttention):
        """Its own class, so that it is traced through."""

        def forward(self, x, **options):
            return super().forward(x, x, x, need_weights=False)[0]

    model = copy.deepcopy(plain)
    model.blocks[0].attn = Attention(12, 2, batch_first=True)
    with pytest.raises(CoverageError, match=r"'blocks\.0\.attn'.*minimum_coverage=0\.\d+\)$") as refused:
        trace(model, IMAGES_BCHW)
    assert "lower minimum_coverage" not in str(refused.value)
    share = float(str(refused.value).rpartition("=")[2].rstrip(")"))
    trace(model, IMAGES_BCHW, minimum_coverage=share)


def test_several_arguments_are_refused_before_anything_runs() -> None:
    class Two(nn.Linear):
        def forward(self, images, mask):
            raise AssertionError

    class Keyword(nn.Linear):
        def forward(self, *, images):
            raise AssertionError

    with pytest.raises(TraceError, match=r"Two\.forward needs 2 arguments \(images, mask\): wrap it"):
        trace(Two(2, 2), IMAGES_BCHW)
    with pytest.raises(TraceError, match=r"Keyword\.forward takes 'images' by keyword only: wrap it"):
        trace(Keyword(2, 2), IMAGES_BCHW)


class After(nn.Module):
    """A function around a model's input or output."""

    def __init__(self, body: nn.Module, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.body(x))


def test_a_model_that_takes_no_negative_pixels_is_traced(plain: nn.Module) -> None:
    model = nn.Sequential(After(nn.Identity(), torch.sqrt), plain)
    with torch.no_grad():
        torch.testing.assert_close(trace(model, IMAGES_BCHW)(IMAGES_BCHW), model(IMAGES_BCHW), rtol=1e-4, atol=1e-5)


def test_outputs_that_are_no_numbers_or_not_of_each_image_are_refused(plain: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite numbers for the example"):
        trace(After(plain, lambda scores: scores / 0), IMAGES_BCHW)
    with pytest.raises(TraceError, match="gives 1 numbers for one image and 1 for 3"):
        trace(After(plain, lambda scores: scores.sum()), IMAGES_BCHW)
    with pytest.raises(TraceError, match="gives 5 numbers for one image and 5 for 3"):
        trace(After(plain, lambda scores: scores.mean(0)), IMAGES_BCHW)


def test_methods_of_a_copy_are_bound_to_it(plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    model.head.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, model.head)
    copied = copy_of(model)
    assert copied.head.forward.__self__ is copied.head
    check_traced(model)


def test_modules_that_hooks_hold_in_any_way_are_not_touched(plain: nn.Module) -> None:
    norm = nn.BatchNorm1d(5)

    def keyword(module: nn.Module, args: object, scores: torch.Tensor, *, norm: nn.Module = norm) -> torch.Tensor:
        return norm(scores)

    hooks = (
        keyword,
        functools.partial(lambda first, module, args, scores: norm(scores), 1),
        functools.partial(keyword, norm=norm),
    )
    for hook in hooks:
        model = copy.deepcopy(plain)
        model.head.register_forward_hook(hook)
        before = state_of(norm)
        copy_of(model)(IMAGES_BCHW)
        assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


class Functions(nn.Module):
    """Calls its layers through functions that it keeps in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.listed = [lambda scores: self.layer(scores), lambda scores: self.norm(scores)]
        self.named = {"again": (self.again,)}

    def again(self, scores: torch.Tensor) -> torch.Tensor:
        return self.layer(scores) + 1

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        for function in (*self.listed, *self.named["again"]):
            scores = function(scores)
        return scores


def test_functions_in_lists_call_the_layers_of_the_copy(plain: nn.Module) -> None:
    model = nn.Sequential(plain, Functions())
    before = state_of(model.train())
    graph_module = trace(model, IMAGES_BCHW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {"1.layer", "1.norm"} <= {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    check_traced(model.eval())

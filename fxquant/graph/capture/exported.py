"""Exported programs as models: the second way to a graph, where the model's own Python cannot be traced.

`torch.export` runs a model on tensors without values and keeps the operations it met, down to `aten`. A
`ProgramModule` runs these one by one under their names in torch (`aten_operations`), inside the modules that they came
from, so that tracing, normal forms and every pass see what they see of any model. Its parameters stand at their paths.

What comes out is held against the model: a program against itself as torch runs it, when it is read; the graph of a
model that was exported here against the model, in `tracing`.

The program and its example are the caller's: tensors are copied, and a program that writes into its parameters, its
buffers or its images is refused.

Deliberately not done: programs of several inputs that vary, of a fixed batch, and such that change buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from fxquant.errors import FxQuantError, ModelError, TraceError
from fxquant.graph.capture.aten_operations import torch_operation
from fxquant.graph.capture.in_place import share_memory
from fxquant.graph.names import free_name
from fxquant.graph.nodes import tensor_named

_RELATIVE_TOLERANCE = 1e-4
_LEAVES: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "torch.nn.modules.activation.GELU": ("gelu", nn.GELU),
    "torch.nn.modules.activation.Softmax": ("softmax", lambda axis, *rest: nn.Softmax(axis)),
}
"""Modules without weights that stay modules, since passes and their authors know them by their paths: the class, its
one operation, and what makes it of that operation's further arguments."""
_KEPT = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Scope(nn.Module):
    """A place of parameters, and where the operations of a module are called from."""

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function gives; called here, it is recorded as this module's.

        Args:
            function: of torch.
            args, kwargs: what it is given.
        """
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Value:
    """Stands for what a step gave. name: of the step."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation of a program.

    Args:
        name: of its result.
        function: of torch.
        args, kwargs: what it is given, with a Value for each result of an earlier step.
        scope: path of the module that it came from.
    """

    name: str
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    scope: str

    @classmethod
    def of(cls, node: Node, scope: str) -> Step:
        """A node's step. Raises TraceError for an operation that is not read."""
        return cls(node.name, torch_operation(node.target), _named(node.args), _named(node.kwargs), scope)


def _named(arguments: Any) -> Any:
    mark: Any = lambda node: Value(node.name)  # noqa: E731 - annotated, since torch.fx expects a node here
    return map_arg(arguments, mark)


def _filled(arguments: Any, values: Mapping[str, Any]) -> Any:
    return map_aggregate(arguments, lambda item: values[item.name] if isinstance(item, Value) else item)


class ProgramModule(Scope):
    """A model that runs an exported program.

    program: of a model of images (B, C, H, W) in inference mode, exported with a batch of any size:
    `torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))`.

    Raises TraceError for a program that takes or gives something else, and for one with an operation that is not
    read; ModelError where it is no program.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        if not isinstance(program, ExportedProgram):
            raise ModelError.for_type(f"an ExportedProgram is read, not a {type(program).__name__}")
        signature = program.graph_signature
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
            raise TraceError("the exported program changes a buffer or an input, and a quantized model keeps no state")
        _check_no_writes(program)
        self._tree = program.call_spec.out_spec
        self._paths: dict[str, str] = {}
        images = []
        copies: dict[int, Any] = {}  # tensors that are one, and views of one memory, stay so
        for spec in signature.input_specs:
            if spec.kind in _KEPT and spec.target is not None:
                self._keep(spec.arg.name, spec.target, program, copies)
            elif spec.kind is InputKind.USER_INPUT and hasattr(spec.arg, "name"):
                images.append(spec.arg.name)
        self._image = _image_of(program, images)
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        for path, called in _by_scope(nodes).items():
            self._made(path, _leaf_of(called))
        self._steps = [Step.of(node, _call_of(node)[1]) for node in nodes]
        self._results = _named(program.graph.output_node().args[0])

    def forward(self, images_bchw: Any) -> Any:
        """Float (B, C, H, W) images to what the exported model returned."""
        values: dict[str, Any] = {self._image: images_bchw}
        values |= {name: tensor_named(self, path) for name, path in self._paths.items()}
        for step in self._steps:
            args, kwargs = _filled((step.args, step.kwargs), values)
            scope = self.get_submodule(step.scope)
            try:
                if scope is self:
                    values[step.name] = step.function(*args, **kwargs)
                elif isinstance(scope, Scope):
                    values[step.name] = scope(step.function, *args, **kwargs)
                else:
                    values[step.name] = scope(args[0])
            except Exception as error:
                error.add_note(f"at the operation '{step.name}'")
                raise
        return pytree.tree_unflatten(list(_filled(self._results, values)), self._tree)

    def _keep(self, name: str, path: str, program: ExportedProgram, copies: dict[int, Any]) -> None:
        """Hold a copy of a parameter, buffer or constant at its path.

        Args:
            name: of its placeholder.
            path: where the exported model had it.
            program: whose it is.
            copies: what has been copied, as `copy.deepcopy` remembers it.
        """
        given = program.state_dict[path] if path in program.state_dict else program.constants[path]
        tensor = copy.deepcopy(given, copies)
        owner_path, _, last = path.rpartition(".")
        owner = self._made(owner_path)
        if last in owner._modules or hasattr(type(owner), last):
            last = free_name(owner, last)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
        self._paths[name] = f"{owner_path}.{last}".lstrip(".")

    def _made(self, path: str, leaf: nn.Module | None = None) -> nn.Module:
        """The module at a path, which is there from now on; `leaf`, where there was none."""
        owner: nn.Module = self
        parts = path.split(".") if path else []
        for place, part in enumerate(parts):
            if part not in owner._modules:
                is_last = place == len(parts) - 1
                owner.add_module(part, leaf if is_last and leaf is not None else Scope())
            owner = owner._modules[part]  # type: ignore[assignment]
        return owner


def _call_of(node: Node) -> tuple[str, str, str]:
    """The call that an operation came from, the path of the module that was called, "" for the model, and its class."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    if not stack:
        return "", "", ""
    call, (path, kind) = stack[-1]
    return str(call), str(path).partition("@")[0], str(kind)


def _by_scope(nodes: list[Node]) -> dict[str, list[Node]]:
    """Operations by the path of the module that they came from."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        found.setdefault(_call_of(node)[1], []).append(node)
    return found


def _leaf_of(called: list[Node]) -> nn.Module | None:
    """The module of torch whose calls these operations of one path are; None where they are not its one operation."""
    first = called[0]
    kind = _call_of(first)[2]
    if kind not in _LEAVES or len({_call_of(node)[0] for node in called}) != len(called):
        return None
    operation, make = _LEAVES[kind]
    for node in called:
        is_it = isinstance(node.target, torch._ops.OpOverload) and node.target._opname == operation
        if not is_it or (node.args[1:], node.kwargs) != (first.args[1:], first.kwargs):
            return None
    return make(*first.args[1:], **first.kwargs)


def _check_no_writes(program: ExportedProgram) -> None:
    """Raise TraceError where an operation writes into what the program is given; no list of outputs has these."""
    given: list[Node] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            given.append(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for place, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write or node.target._opname == "detach_":
                continue
            written = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            value = written.meta.get("val") if isinstance(written, Node) else None
            changed = [one.name for one in given if isinstance(value, Tensor) and share_memory(one.meta["val"], value)]
            if changed:
                raise TraceError(
                    f"the exported program changes what it is given: {node.target} writes into '{changed[0]}'. A "
                    f"quantized model keeps no state and leaves images as they are: work on a copy (x = x.clone())"
                )


def _image_of(program: ExportedProgram, names: list[str]) -> str:
    if len(names) != 1:
        raise TraceError(
            f"the exported program takes {len(names)} tensors ({', '.join(names)}): a quantized model is called with "
            f"images alone, so wrap the model in a module that takes these only, and export that"
        )
    node = next(node for node in program.graph.nodes if node.name == names[0])
    shape = node.meta["val"].shape
    if len(shape) != 4:
        raise TraceError(f"the exported program takes a tensor of shape {tuple(shape)}; images are (B, C, H, W)")
    if isinstance(shape[0], int) or not all(isinstance(size, int) for size in shape[1:]):
        raise TraceError(
            f"the exported program takes images of shape {tuple(map(str, shape))}: export it with a batch of any size "
            f'and images of one, dynamic_shapes=({{0: torch.export.Dim("batch")}},)'
        )
    return names[0]


@torch.no_grad()
def module_of_program(program: ExportedProgram) -> ProgramModule:
    """The program as a model, held against the program on its own example. Raises as `ProgramModule`, and TraceError
    where the two differ."""
    found = ProgramModule(program).eval()
    if program.example_inputs is None:
        return found
    args, kwargs = copy.deepcopy(program.example_inputs)
    images = next(value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    try:
        given = pytree.tree_leaves(found(images.clone()))
    except FxQuantError:
        raise
    except Exception as error:
        where = " ".join(getattr(error, "__notes__", ()))
        raise TraceError(
            f"the exported program cannot be read {where}: {error}. Give the nn.Module that was exported"
        ) from error
    expected = pytree.tree_leaves(program.module()(*args, **kwargs))
    for one, other in zip(given, expected, strict=True):
        if isinstance(other, Tensor) and other.numel():
            apart, largest = float((one - other).abs().max()), float(other.abs().max())
            if not apart <= _RELATIVE_TOLERANCE * max(largest, 1e-6):
                raise TraceError(f"the exported program, read operation by operation, gives numbers {apart:.3g} apart")
    return found


def exported(root: nn.Module, images_bchw: Tensor) -> ProgramModule:
    """A model as torch.export sees it, which may take long and patches torch while it runs.

    Args:
        root: a copy of the caller's model, in inference mode.
        images_bchw: at least two images, float (B, C, H, W).

    Raises whatever torch.export raises, and as `ProgramModule`.
    """
    batch = torch.export.Dim("batch", min=1)
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation in which attention cannot be seen
    try:
        program = torch.export.export(root, (images_bchw,), dynamic_shapes=({0: batch},), strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
    return ProgramModule(program).eval()

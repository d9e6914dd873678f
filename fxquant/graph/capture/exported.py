"""Exported programs as models: the second way to a graph, where the model's own Python cannot be traced.

`torch.export` runs a model on tensors without values and keeps the operations it met, down to `aten`. A
`ProgramModule` runs these one by one under their names in torch (`aten_operations`), inside the modules that they came
from, so that tracing, normal forms and every pass see what they see of any model. Its parameters stand at their paths.

What comes out is held against the model: a program against itself as torch runs it, when it is read; the graph of a
model that was exported here against the model, in `tracing`.

Deliberately not done: programs of several inputs that vary, of a fixed batch, and such that change buffers.
"""

from __future__ import annotations

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

from fxquant.errors import ModelError, TraceError
from fxquant.graph.capture.aten_operations import torch_operation
from fxquant.graph.names import free_name

_RELATIVE_TOLERANCE = 1e-4
_LEAVES: dict[str, Any] = {"GELU": nn.GELU, "Softmax": lambda axis, *rest: nn.Softmax(axis)}
"""Modules without weights that stay modules: passes and their authors know them by their paths."""
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
        self._tree = program.call_spec.out_spec
        self._paths: dict[str, str] = {}
        images = []
        for spec in signature.input_specs:
            if spec.kind in _KEPT and spec.target is not None:
                self._keep(spec.arg.name, spec.target, program)
            elif spec.kind is InputKind.USER_INPUT and hasattr(spec.arg, "name"):
                images.append(spec.arg.name)
        self._image = _image_of(program, images)
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self._steps = [Step.of(node, self._scope_of(node)) for node in nodes]
        self._results = _named(program.graph.output_node().args[0])

    def forward(self, images_bchw: Any) -> Any:
        """Float (B, C, H, W) images to what the exported model returned."""
        values: dict[str, Any] = {self._image: images_bchw}
        values |= {name: self._tensor_at(path) for name, path in self._paths.items()}
        for step in self._steps:
            args, kwargs = _filled((step.args, step.kwargs), values)
            scope = self.get_submodule(step.scope)
            if scope is self:
                values[step.name] = step.function(*args, **kwargs)
            elif isinstance(scope, Scope):
                values[step.name] = scope(step.function, *args, **kwargs)
            else:
                values[step.name] = scope(args[0])
        return pytree.tree_unflatten(list(_filled(self._results, values)), self._tree)

    def _keep(self, name: str, path: str, program: ExportedProgram) -> None:
        """Hold a parameter, buffer or constant at its path."""
        tensor = program.state_dict[path] if path in program.state_dict else program.constants[path]
        owner_path, _, last = path.rpartition(".")
        owner = self._made(owner_path)
        if last in owner._modules or hasattr(type(owner), last):
            last = free_name(owner, last)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
        self._paths[name] = f"{owner_path}.{last}".lstrip(".")

    def _made(self, path: str) -> nn.Module:
        """The module at a path, which is there from now on."""
        owner: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, Scope())
            owner = owner._modules[part]  # type: ignore[assignment]
        return owner

    def _scope_of(self, node: Node) -> str:
        """Path of the module whose operation it was, "" for the model itself."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if not stack:
            return ""
        path, kind = str(stack[-1][0]).partition("@")[0], str(stack[-1][1]).rpartition(".")[2]
        owner_path, _, name = path.rpartition(".")
        owner = self._made(owner_path)
        if name and name not in owner._modules and kind in _LEAVES:
            owner.add_module(name, _LEAVES[kind](*node.args[1:], **node.kwargs))
        self._made(path)
        return path

    def _tensor_at(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        return getattr(self.get_submodule(owner), name)  # type: ignore[no-any-return]


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
    args, kwargs = program.example_inputs
    images = next(value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    expected = pytree.tree_leaves(program.module()(*args, **kwargs))
    for one, other in zip(pytree.tree_leaves(found(images)), expected, strict=True):
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

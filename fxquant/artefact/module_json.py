"""Leaf modules as JSON settings and named tensors, and back: a fixed table of classes, no pickle, no code.

Modules are rebuilt on the meta device, so settings alone never allocate memory, and then take their tensors from the
file, each checked against the shape that the settings imply. Quantized weights are tensors of packed codes; their
float values are derived again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.artefact.module_settings import BITS, BY_NAME, CLASSES, SETTINGS, settings_of
from fxquant.artefact.observer_json import observer_from_json, observer_to_json
from fxquant.artefact.packing import WIDTHS
from fxquant.artefact.weight_codes import packed_codes, unpacked_codes
from fxquant.checks.untrusted import (
    FLAG,
    FLOATS,
    NOTHING,
    OBJECT,
    SHAPE,
    TEXT,
    check_positive,
    dtype_named,
    either,
    element_count,
    field,
    record,
    sizes,
    take,
)
from fxquant.errors import ArtefactError
from fxquant.quantizers.observers import Observer
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_table import BITS as TABLE_BITS
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedInput, QuantizedLinear, QuantizedMatmul

_GEOMETRY = {name: SETTINGS[name] for name in ("stride", "padding", "dilation", "groups")}
_QUANTIZED_WEIGHT = {"QuantizedLinear": 2, "QuantizedConv2d": 4}  # dimensions of the weight
_OPTIONAL_OBJECT = either(NOTHING, OBJECT)
_WEIGHT = {"shape": SHAPE, "dtype": TEXT, "bias": FLAG, "weight": _OPTIONAL_OBJECT, "input": _OPTIONAL_OBJECT}
_CLASS = {"class": TEXT}
CODES = "weight_codes"

Spec = dict[str, Any]
State = dict[str, Tensor]


def module_to_json(module: nn.Module, path: str) -> tuple[Spec, State]:
    """Settings of a leaf module and its tensors, named below `path`.

    Raises ArtefactError, naming path and class, for a class that is not in the table and values that cannot be kept.
    """
    if isinstance(module, QuantizedLinear | QuantizedConv2d):
        return _quantized_weight_to_json(module, path)
    if isinstance(module, QuantizedMatmul):
        left, left_state = quantizer_to_json(module.left_quantizer, f"{path}.left_quantizer")
        right, right_state = quantizer_to_json(module.right_quantizer, f"{path}.right_quantizer")
        return {"class": "QuantizedMatmul", "left": left, "right": right}, left_state | right_state
    if isinstance(module, QuantizedInput):
        inner, inner_state = module_to_json(module.inner, f"{path}.inner")
        source, source_state = quantizer_to_json(module.input_quantizer, f"{path}.input_quantizer")
        return {"class": "QuantizedInput", "inner": inner, "input": source}, inner_state | source_state
    if type(module) is Observer:
        return observer_to_json(module, path)
    if type(module) not in CLASSES:
        raise ArtefactError(
            f"module '{path}' is a {type(module).__module__}.{type(module).__name__}, which artefacts do not know: "
            "write it out in forward with torch.nn modules and functions so that tracing goes through it, or add the "
            "class to fxquant/artefact/module_json.py"
        )
    return _plain_to_json(module, path)


def module_from_json(spec: Any, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module, in inference mode, with its own copies of the tensors.

    Args:
        spec: the module's JSON value, as a file has it.
        path: the module's path in the graph module; names its tensors.
        tensors: the tensors of the file, by name.

    Raises ArtefactError, naming `path`, for anything that does not fit together.
    """
    name = field(spec, "class", str, f"module '{path}'")
    try:
        return _build(name, spec, path, tensors).eval().requires_grad_(False)
    except ArtefactError as error:
        raise error if f"'{path}" in str(error) else ArtefactError(f"module '{path}': {error}") from error
    # Constructors are given settings that anybody may have written; whatever they object to, the file is at fault.
    except Exception as error:
        raise ArtefactError(f"module '{path}': settings do not make a {name}: {spec!r:.300}: {error}") from error


def claimed_bits(spec: Spec, path: str) -> int:
    """Bits that the module's packed weight has by its settings: elements times width, 0 where none is packed."""
    name = field(spec, "class", str, f"module '{path}'")
    if name not in _QUANTIZED_WEIGHT or spec.get("weight") is None:
        return 0
    return element_count(sizes(spec.get("shape"), f"module '{path}'")) * int(field(spec["weight"], "bits", int, path))


def unpacked_bytes(spec: Spec, path: str) -> int:
    """Bytes that the module's weight takes in memory, as codes of a byte; 0 where none is packed."""
    name = field(spec, "class", str, f"module '{path}'")
    if name not in _QUANTIZED_WEIGHT or spec.get("weight") is None:
        return 0
    return element_count(sizes(spec.get("shape"), f"module '{path}'"))


def _build(name: str, spec: Spec, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    if name in _QUANTIZED_WEIGHT:
        return _quantized_weight_from_json(name, spec, path, tensors)
    where = f"module '{path}'"
    if name == "QuantizedMatmul":
        read = record(spec, {**_CLASS, "left": _OPTIONAL_OBJECT, "right": _OPTIONAL_OBJECT}, where)
        quantizers = (quantizer_from_json(read[k], f"{path}.{k}_quantizer", tensors) for k in ("left", "right"))
        return QuantizedMatmul(*quantizers)
    if name == "QuantizedInput":
        read = record(spec, {**_CLASS, "input": OBJECT, "inner": OBJECT}, where)
        source: Any = quantizer_from_json(read["input"], f"{path}.input_quantizer", tensors)
        if (inner := read["inner"].get("class")) not in list(BY_NAME):
            raise ArtefactError(f"{where} has inside a {inner!r:.100}, which is not a plain module")
        return QuantizedInput(module_from_json(read["inner"], f"{path}.inner", tensors), source)
    if name == "Observer":
        return observer_from_json(spec, path, tensors)
    if name not in BY_NAME:
        raise ArtefactError(f"{where} has the unknown class {name!r:.100}")
    kind = BY_NAME[name]
    settings = record(spec, {**_CLASS, **settings_of(kind)}, where)
    with torch.device("meta"):
        module = kind(**{key: _from_list(value) for key, value in settings.items() if key != "class"})
    _assign(module, path, tensors)
    return module


def _plain_to_json(module: nn.Module, path: str) -> tuple[Spec, State]:
    spec: Spec = {"class": type(module).__name__}
    for key in CLASSES[type(module)].split():
        value = getattr(module, key)
        value = value is not None if key == "bias" else value
        if not _is_plain(value):
            raise ArtefactError(f"module '{path}' ({spec['class']}): setting {key} = {value!r} cannot be kept")
        spec[key] = value
    return spec, {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _from_list(value: Any) -> Any:
    return tuple(_from_list(item) for item in value) if type(value) is list else value


def _assign(module: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a module built on the meta device its tensors."""
    for name, placeholder in module.state_dict().items():
        tensor = take(tensors, f"{path}.{name}", placeholder).clone()
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor


def quantizer_to_json(quantizer: Quantizer | None, path: str) -> tuple[Spec | None, State]:
    """Settings of a quantizer and its tensors, named below `path`; None for none. Raises ArtefactError."""
    if quantizer is None:
        return None, {}
    Quantizer.rules_of(quantizer.kind)
    _check_width(quantizer.bits, path)
    state = {f"{path}.{name}": tensor for name, tensor in quantizer.state_dict().items()}
    _check_scales(state)
    return quantizer.settings(), state


def quantizer_from_json(settings: Any, path: str, tensors: Mapping[str, Tensor]) -> Quantizer | None:
    """The quantizer that `quantizer_to_json` wrote. Raises ArtefactError for what does not fit together.

    Args:
        settings: the quantizer's JSON value, as a file has it; None: there is none.
        path: the path that its tensors are named after.
        tensors: the tensors of the file, by name.
    """
    if settings is None:
        return None
    where = f"quantizer '{path}'"
    kind = field(settings, "kind", str, where)
    try:
        rules = Quantizer.rules_of(kind)
    except ArtefactError as error:
        raise ArtefactError(f"{where}: {error}") from error
    _check_width(field(settings, "bits", int, where), path)
    record(settings, {"kind": TEXT, "bits": BITS, **rules}, where)
    with torch.device("meta"):
        quantizer = Quantizer.from_settings(settings)
    state = quantizer.state_dict()
    for name, placeholder in state.items():
        found = tensors.get(f"{path}.{name}")
        if found is not None and found.dtype != placeholder.dtype:  # `take` lets floats of any width pass
            raise ArtefactError(f"tensor '{path}.{name}' is {found.dtype}, expected {placeholder.dtype}")
    _assign(quantizer, path, tensors)
    _check_scales({f"{path}.{name}": tensor for name, tensor in quantizer.state_dict().items()})
    try:
        quantizer.check_numbers()
    except ValueError as error:
        raise ArtefactError(f"{where}: {error}") from error
    return quantizer


def _check_width(bits: int, path: str) -> None:
    if bits not in WIDTHS and bits != TABLE_BITS:
        raise ArtefactError(
            f"quantizer '{path}' has {bits} bits; there are {WIDTHS.start} to {WIDTHS.stop - 1} and {TABLE_BITS}"
        )


def _check_scales(state: State) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point():
            check_positive(tensor, name)


def _quantized_weight_to_json(module: QuantizedLinear | QuantizedConv2d, path: str) -> tuple[Spec, State]:
    weight_settings, weight_state = quantizer_to_json(module.weight_quantizer, f"{path}.weight_quantizer")
    input_settings, input_state = quantizer_to_json(module.input_quantizer, f"{path}.input_quantizer")
    spec: Spec = {
        "class": type(module).__name__,
        "shape": list(module.weight_like.shape),
        "dtype": str(module.weight_dtype).removeprefix("torch."),
        "bias": module.bias is not None,
        "weight": weight_settings,
        "input": input_settings,
        **module.settings(),
    }
    state = weight_state | input_state
    if module.bias is not None:
        state[f"{path}.bias"] = module.bias
    quantizer = module.weight_quantizer
    if quantizer is None or module.weight_codes is None:
        state[f"{path}.weight"] = module.weight
    elif isinstance(quantizer, UniformQuantizer):
        try:
            state[f"{path}.{CODES}"] = packed_codes(module.weight_codes, quantizer)
        except ArtefactError as error:
            raise ArtefactError(f"module '{path}': {error}") from error
    else:
        raise ArtefactError(
            f"module '{path}': weights of a {quantizer.kind!r} quantizer cannot be packed; use 'uniform'"
        )
    return spec, state


def _quantized_weight_from_json(name: str, spec: Spec, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    where = f"module '{path}'"
    is_linear = name == "QuantizedLinear"
    read = record(spec, {**_CLASS, **_WEIGHT, **({} if is_linear else _GEOMETRY)}, where)
    shape, dtype = tuple(read["shape"]), dtype_named(read["dtype"], where)
    if len(shape) != _QUANTIZED_WEIGHT[name] or dtype not in FLOATS or 0 in shape:
        raise ArtefactError(f"{where}: no weight of a {name} has shape {shape} and dtype {dtype}")
    input_quantizer = quantizer_from_json(read["input"], f"{path}.input_quantizer", tensors)
    weight_quantizer = quantizer_from_json(read["weight"], f"{path}.weight_quantizer", tensors)
    with torch.device("meta"):
        bias_like = torch.empty(shape[:1])
    bias = take(tensors, f"{path}.bias", bias_like) if read["bias"] else None
    geometry = [] if is_linear else [{key: _from_list(read[key]) for key in _GEOMETRY}]
    kind: Any = QuantizedLinear if name == "QuantizedLinear" else QuantizedConv2d
    if weight_quantizer is None:
        weight = take(tensors, f"{path}.weight")
        if weight.shape != shape or weight.dtype != dtype:
            raise ArtefactError(f"tensor '{path}.weight' is {weight.dtype} {tuple(weight.shape)}, not {dtype} {shape}")
        return kind(weight, bias, None, input_quantizer, *geometry)  # type: ignore[no-any-return]
    if not isinstance(weight_quantizer, UniformQuantizer):
        raise ArtefactError(f"{where}: weights of a {weight_quantizer.kind!r} quantizer are never packed")
    for number in (weight_quantizer.scale, weight_quantizer.zero_point):
        if number is not None and tuple(number.shape) not in ((), (1,), (1, 1), (shape[0], 1)):
            raise ArtefactError(f"{where}: scale of shape {tuple(number.shape)} does not fit a weight {shape}")
    packed = take(tensors, f"{path}.{CODES}")
    codes = unpacked_codes(packed, shape, weight_quantizer)
    # A weight of one column is enough to build with: the real one is derived from the codes when it is read.
    column = torch.zeros(shape[0], *[1] * (len(shape) - 1), dtype=dtype)
    module = kind(column, bias, weight_quantizer, input_quantizer, *geometry)
    module.weight_codes = codes.reshape(shape).to(torch.int8)
    return module  # type: ignore[no-any-return]

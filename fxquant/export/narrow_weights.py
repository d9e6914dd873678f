"""Weights of few bits in an ONNX model: as INT4, or packed by operators that every runtime computes when it loads.

INT4 is ONNX's own, for runtimes that have it. Packed codes take as many bits as they have: three bits are a part of two
and a part of one, and each part lies in bytes side by side. Channels that have widths of their own are packed width by
width. BitShift, BitwiseAnd, BitwiseOr and Cast take them apart.
All of their inputs are constants, so ONNX Runtime and OpenVINO fold them while they load the model, and what is left is
the same model with a byte for each weight, which they run as int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import GraphModule

from fxquant.export.qdq_values import Weight

WEIGHT_TYPES = ("int8", "int4", "packed")
_PARTS = (4, 2, 1)  # bits, of which a byte holds a whole number


def narrow_weights(model: Any, written: GraphModule, weight_type: str) -> None:
    """Write weights of a model of `onnx_ir` in less than a byte each.

    Args:
        model: the model, which is changed.
        written: the graph it was exported from; its `Weight` modules say how many bits codes have.
        weight_type: "int4": codes of at most 4 bits, and their zero-points, become INT4 or UINT4; "packed": codes of
            at most 7 bits are packed.
    """
    shared: dict[tuple[str, bytes], Any] = {}
    for path, weight in written.named_modules():
        if not isinstance(weight, Weight) or weight.bits is None:
            continue
        if weight_type == "int4" and weight.bits <= 4:
            for name in ("values", "zero"):
                _make_int4(model, f"{path}.{name}")
        elif weight_type == "packed" and weight.bits < 8:
            _pack(model, f"{path}.values", weight, shared)


def _make_int4(model: Any, name: str) -> None:
    import ml_dtypes
    import onnx_ir

    value = model.graph.initializers.get(name)
    if value is not None:
        numbers = value.const_value.numpy()
        kind = ml_dtypes.int4 if numbers.dtype.kind == "i" else ml_dtypes.uint4
        value.const_value = onnx_ir.tensor(numbers.astype(kind), name=value.name)
        value.dtype = value.const_value.dtype


def _pack(model: Any, name: str, weight: Weight, shared: dict[tuple[str, bytes], Any]) -> None:
    """Let nodes at the begin of the graph make what the initializer held.

    Args:
        model: the model, which is changed.
        name: of the initializer.
        weight: whose codes it holds.
        shared: constants that packed weights have in common, by type and content; it grows.
    """
    import onnx_ir
    from onnx_ir import tape

    value = model.graph.initializers.pop(name)
    codes = value.const_value.numpy()
    builder = tape.Tape()

    def constant(label: str, numbers: NDArray[Any]) -> Any:
        return builder.initializer(onnx_ir.tensor(numbers, name=f"{name}.{label}"))

    def common(numbers: NDArray[Any]) -> Any:
        key = (f"{numbers.dtype}{numbers.shape}", numbers.tobytes())
        if key not in shared:
            tensor = onnx_ir.tensor(numbers, name=f"unpacking.{len(shared)}")
            shared[key] = builder.initializer(tensor)
        return shared[key]

    def unpacked(numbers: NDArray[Any], bits: int, label: str) -> Any:
        """A flat value of the type of codes: these, in `bits` bits each."""
        lowest = -(2 ** (bits - 1)) if numbers.dtype == np.int8 else 0
        unsigned = (numbers.astype(np.int16) - lowest).astype(np.uint8).reshape(-1)
        whole, position = None, 0
        for width in (part for part in _PARTS if bits & part):
            packed = constant(
                f"{label}packed{width}", packed_bytes((unsigned >> position).astype(np.uint8), width)[:, None]
            )
            shifts = common(np.arange(0, 8, width, dtype=np.uint8))
            apart = builder.op("BitShift", [packed, shifts], {"direction": "RIGHT"})
            mask = common(np.array(2**width - 1, np.uint8))
            apart = builder.op("BitwiseAnd", [apart, mask])
            place = common(np.array(position, np.uint8))
            apart = builder.op("BitShift", [apart, place], {"direction": "LEFT"})
            apart = builder.op("Reshape", [apart, common(np.array([-1], np.int64))])
            whole = apart if whole is None else builder.op("BitwiseOr", [whole, apart])
            position += width
        if len(unsigned) % 8:
            ends = [common(np.array([0])), common(np.array([len(unsigned)]))]
            whole = builder.op("Slice", [whole, *ends])
        wide = builder.op("Cast", [whole], {"to": onnx_ir.DataType.INT32})
        signed = builder.op("Add", [wide, common(np.array(lowest, np.int32))])
        return builder.op("Cast", [signed], {"to": onnx_ir.DataType.from_numpy(codes.dtype)})

    def shaped(flat: Any, shape: tuple[int, ...]) -> Any:
        return builder.op("Reshape", [flat, common(np.array(shape, np.int64))])

    if weight.widths is None:
        assert weight.bits is not None  # a float weight is not packed
        result = shaped(unpacked(codes, weight.bits, ""), codes.shape)
    else:
        rows = np.moveaxis(codes, weight.axis, 0)
        kinds = np.unique(weight.widths).tolist()
        parts = [unpacked(rows[weight.widths == bits], bits, f"w{bits}.") for bits in kinds]
        # Channels of one width lie behind those of another, and go back to where they were.
        sorted_rows = shaped(builder.op("Concat", parts, {"axis": 0}), rows.shape)
        places = np.argsort(np.argsort(weight.widths, kind="stable"), kind="stable").astype(np.int32)
        result = builder.op("Gather", [sorted_rows, constant("places", places)], {"axis": 0})
        if weight.axis:
            result = builder.op("Transpose", [result], {"perm": [1, 0]})
    for place, node in enumerate(builder.nodes):
        node.name = f"{name}/{node.op_type}_{place}"
    result.name, result.type, result.shape = name, value.type, value.shape
    value.replace_all_uses_with(result)
    for part in builder.initializers:
        model.graph.register_initializer(part)
    model.graph.insert_before(model.graph[0], builder.nodes)


def packed_bytes(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The lowest `width` bits of each code, uint8 (n,), side by side, the first in the lowest bits of a byte.

    The last bytes are filled with zeros: their number is the same for every width, so that parts have equal lengths.
    """
    rows = np.pad(codes & (2**width - 1), (0, -len(codes) % 8)).reshape(-1, 8 // width)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(rows << np.arange(0, 8, width, dtype=np.uint8), axis=1)
    return packed

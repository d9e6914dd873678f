"""FuseLayerNorms: layer norm over the last dimension -> codes becomes one node, bytes of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import Fact
from fxquant.graph.names import exchange_module
from fxquant.graph.nodes import input_of, module_of, only_reader
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.lowered import LayerNormToCodes
from passes.lower.integer_plan import code_of, layer_of, set_dtype, shape_of
from passes.lower.rewrite import REQUIRES, Miss, note_misses
from passes.pipeline.contract import PassContext

NO_SHAPE = "no shape is noted of its input, float32: compile the model again, in float32"
"""Why a kernel does not run what reads a tensor that tracing has not seen as float32."""


@dataclass(frozen=True)
class FuseLayerNorms:
    """Let layer norms give codes, where nothing else reads them."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Fuse in place; returns how many norms."""
        misses, fused = [], 0
        for codes in list(graph_module.graph.nodes):
            norm = input_of(codes)
            module = module_of(graph_module, norm)
            if code_of(graph_module, codes) is None or norm is None or not isinstance(module, nn.LayerNorm):
                continue
            found = _match(graph_module, norm, module, codes)
            if isinstance(found, Miss):
                misses.append(found)
                continue
            exchange_module(graph_module, norm, LayerNormToCodes(module, found))
            codes.replace_all_uses_with(norm)
            graph_module.graph.erase_node(codes)
            set_dtype(norm, torch.uint8)
            fused += 1
        note_misses(context, self, misses)
        return fused


def _match(graph_module: GraphModule, norm: Node, module: nn.LayerNorm, codes: Node) -> ByteCode | Miss:
    code = code_of(graph_module, codes)
    assert code is not None  # the caller has asked
    if only_reader(norm) is not codes:
        return Miss(layer_of(norm), "what reads the norm has several quantizers, or reads it in float")
    if code.of_rows:
        return Miss(layer_of(norm), "row-log codes are for softmax")
    return norm_miss(norm, module) or code


def norm_miss(norm: Node, module: nn.LayerNorm) -> Miss | None:
    """Why no kernel runs a layer norm, whatever it gives; None where one does."""
    if len(module.normalized_shape) != 1:
        return Miss(layer_of(norm), "the kernel norms over the last dimension alone")
    if shape_of(input_of(norm)) is None:
        return Miss(layer_of(norm), NO_SHAPE)
    return None

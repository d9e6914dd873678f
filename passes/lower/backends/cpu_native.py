"""The kernels of `fxquant.runtime.native`: all layers whose codes are bytes, whole blocks in one call."""

from __future__ import annotations

from fxquant.errors import BackendError
from fxquant.quantizers.families import BYTE_FAMILIES
from fxquant.runtime.native import library
from passes.lower.backend import Backend
from passes.lower.batch_shapes import NoteBatchShapes
from passes.lower.exact_codes import integer_nodes
from passes.lower.rewrites.assemble_tokens import AssembleTokens
from passes.lower.rewrites.fuse_attention import FuseAttention
from passes.lower.rewrites.fuse_chains import FuseChains
from passes.lower.rewrites.fuse_epilogues import FuseEpilogues
from passes.lower.rewrites.fuse_heads import FuseHeads
from passes.lower.rewrites.fuse_layer_norms import FuseLayerNorms
from passes.lower.rewrites.order_rows import OrderRows
from passes.lower.rewrites.pack_layers import PackLayers
from passes.lower.rewrites.plan_integers import PlanIntegers
from passes.lower.rewrites.run_float_rows import RunFloatRows
from passes.lower.rewrites.select_tokens import SelectTokens


def _why_absent() -> BackendError | None:
    reason = library.why_absent()
    return None if reason is None else BackendError(reason)


BACKEND = Backend(
    name="cpu-native",
    summary="linear layers, convolutions and attention, by kernels of our own",
    families=BYTE_FAMILIES,
    edges=("post_gelu", "post_relu", "post_softmax", "other", "image"),
    finds=integer_nodes,
    why_absent=_why_absent,
    pipeline=(
        NoteBatchShapes(),
        PlanIntegers(),
        FuseAttention(),
        FuseHeads(),
        OrderRows(),
        FuseEpilogues(),
        FuseLayerNorms(),
        PackLayers(),
        SelectTokens(),
        AssembleTokens(),
        FuseChains(),
        RunFloatRows(),
    ),
    choice=0,
)

"""Linear layers through torch's oneDNN, for CPUs that have no kernels of ours."""

from __future__ import annotations

import torch

from fxquant.errors import BackendError
from fxquant.quantizers.families import UNIFORM_FAMILIES
from fxquant.runtime.integer.torch_linear import OnednnLinear
from passes.lower.backend import Backend
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, ExchangeLinears, uniform_linears


def _why_absent() -> BackendError | None:
    if torch.cpu._is_vnni_supported():
        return None
    return BackendError("oneDNN's int8 products are exact on CPUs with AVX512-VNNI only; use 'cpu-native'")


BACKEND = Backend(
    name="cpu-onednn",
    summary="linear layers, by torch's oneDNN",
    families=UNIFORM_FAMILIES,
    edges=("post_gelu", "post_relu", "other"),
    instead=UNIFORM_INSTEAD,
    finds=uniform_linears,
    why_absent=_why_absent,
    pipeline=(ExchangeLinears(OnednnLinear, "linear onednn"),),
    choice=1,
)

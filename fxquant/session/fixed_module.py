"""What torch offers for every module, for a quantized one, whose numbers and dtype are fixed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import BackendError, ModelError, StateError
from fxquant.graph.facts import LOWERED, facts_of
from fxquant.graph.nodes import device_of
from fxquant.graph.notes import execution_of
from fxquant.runtime.border import Border
from fxquant.runtime.state import check_names, check_state, description
from fxquant.session.sized_graphs import SizedGraphs, described


class FixedModule(nn.Module):
    """A module around a quantized graph; it stays in inference mode.

    Args:
        graph_module: the graph that runs.
        sizes: by (height, width), graphs for images of other sizes, which call the same modules.
    """

    def __init__(self, graph_module: GraphModule, sizes: Mapping[tuple[int, int], GraphModule]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.border = Border.of(graph_module, described(list(sizes)))
        self.sizes = SizedGraphs(graph_module, sizes) if sizes else None
        self._is_lowered = LOWERED in facts_of(graph_module)
        self._fetches_images = any("cuda" in kernel for kernel in execution_of(graph_module).values())
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Nothing: a quantized model stays in inference mode, as it was compiled."""
        return super().train(False)

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """Codes, scales and what else the model consists of, by name. Raises StateError for a lowered model."""
        self._refuse_lowered("has no state dict")
        return super().state_dict(*arguments, **keywords)

    def get_extra_state(self) -> Tensor:
        """What the tensors of the state belong to, see `fxquant.runtime.state`."""
        return description(self.graph_module, self.sizes.graphs.values() if self.sizes else ())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: it has been compared with this model's."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take the numbers of a model compiled alike, with the same quantizers; report and card stay as they are.

        Args:
            state_dict: as `state_dict` of a model compiled alike gave it.
            strict: whether all of them have to be there.
            assign: as torch has it, the state's own tensors become the model's.

        Raises StateError, and changes nothing, for every other state.
        """
        self._refuse_lowered("takes no state dict")
        if strict or not isinstance(state_dict, Mapping):
            check_names(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        self._refuse_lowered("takes no state dict")
        check_state(self.graph_module, f"{prefix}graph_module.", state_dict, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move to another device, of which a lowered model has one; refuse another dtype."""
        device = self._device()
        before = torch.empty(0, dtype=self.border.dtype, device=device)
        after = fn(before)
        if after.dtype != before.dtype:
            raise ModelError(
                f"a quantized model computes in {before.dtype}, as it was compiled, not in {after.dtype}: for a "
                "smaller or faster one take fewer bits or a backend"
            )
        if after.is_meta:
            raise BackendError("a quantized model cannot be moved to meta, where tensors have no values: leave it")
        if device is not None and after.device != device and self._is_lowered:
            raise BackendError(
                f"a lowered model cannot be moved to {after.device}: move the model it was lowered from, or lower that "
                "with backend='cuda'"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.sizes is not None:
            self.sizes.point(self.graph_module)
        return self

    def _refuse_lowered(self, what: str) -> None:
        if self._is_lowered:
            raise StateError(f"a lowered model {what}, it belongs to this machine: take the model it was lowered from")

    def _device(self) -> torch.device | None:
        """Where images have to be; None where the graph fetches them itself."""
        if self._fetches_images:
            return None
        return device_of(self.graph_module)

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

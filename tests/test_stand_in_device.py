"""The stand-in device refuses what CUDA refuses, and computes what the CPU does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxquant.runtime.native import operators  # noqa: F401 - which registers them
from tests.models import images, vit
from tests.stand_in_device import DeviceError, stand_in

pytestmark = pytest.mark.quick

REFUSED: dict[str, tuple[Callable[[Tensor], object], type[Exception]]] = {
    "a sum with the CPU": (lambda x: x + torch.ones(3), DeviceError),
    "a product with the CPU": (lambda x: x @ torch.ones(3, 2), DeviceError),
    "two put together": (lambda x: torch.cat([x, torch.ones(1, 3)]), DeviceError),
    "numbers stacked": (lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]), DeviceError),
    "limits of the CPU": (lambda x: x.clamp(torch.tensor(0.0), torch.tensor(1.0)), DeviceError),
    "a sum into the CPU": (lambda x: torch.ones(3).add_(x[0]), DeviceError),
    "the CPU indexed": (lambda x: torch.ones(3)[torch.tensor([1], device=x.device)], DeviceError),
    "a table of the CPU": (lambda x: torch.ones(3).index_select(0, torch.tensor([1], device=x.device)), DeviceError),
    "sums into the CPU": (lambda x: torch.zeros(3).scatter_add_(0, x[0].long(), x[0]), DeviceError),
    "random numbers": (lambda x: torch.rand_like(x), DeviceError),
    "a generator": (lambda x: torch.Generator(x.device), NotImplementedError),
    "numpy()": (lambda x: x.numpy(), TypeError),
    "numpy's functions": (lambda x: np.asarray(x), TypeError),
    "kernels for the CPU": (lambda x: torch.ops.fxquant.mean(x[None]), NotImplementedError),
}
ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": lambda x: x * torch.tensor(2.0, dtype=torch.float64) + 1,
    "an index": lambda x: x[torch.tensor([1, 0])],
    "a mask": lambda x: torch.where(x > 2, x, 0.0),
    "elements written": lambda x: x.index_put((torch.tensor([0]),), torch.tensor(7.0)),
    "a view written": lambda x: written(x),
    "a copy": lambda x: copy.deepcopy(x).add_(1),
    "integers": lambda x: x.to(torch.bfloat16).view(torch.int16).to(torch.int64).bitwise_and_(0xFFFF),
    "a factorisation": lambda x: torch.linalg.eigvalsh(x @ x.T),
    "another size": lambda x: torch.add(x, x, out=torch.empty(0, device=x.device)),
    "there and back": lambda x: torch.tensor(x.tolist()).to(x),
}


def written(x: Tensor) -> Tensor:
    changed = x.clone()
    changed[:, 1].mul_(3)
    changed[0] = torch.tensor([5.0, 6.0, 7.0])
    return changed


def numbers() -> Tensor:
    return torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name: str) -> None:
    use, error = REFUSED[name]
    with pytest.raises(error):
        use(numbers().to(stand_in()))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_gives_what_the_cpu_gives(name: str) -> None:
    found = ALLOWED[name](numbers().to(stand_in()))
    assert found.device == stand_in()
    assert torch.equal(found.cpu(), ALLOWED[name](numbers()))


def test_a_model_and_its_gradients_are_those_of_the_cpu() -> None:
    model, x = vit(depth=1), images(2)
    there = copy.deepcopy(model).to(stand_in())
    outputs = model(x), there(x.to(stand_in()))
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(outputs[1].cpu(), outputs[0])  # attention has another kernel there
    for (name, here), moved in zip(model.named_parameters(), there.parameters(), strict=True):
        assert here.grad is not None
        assert moved.grad is not None
        assert isinstance(moved, nn.Parameter)
        torch.testing.assert_close(moved.grad.cpu(), here.grad, rtol=1e-4, atol=1e-4, msg=name)

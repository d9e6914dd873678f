"""Operations in place: the graph has none, computes the same, and images stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxquant.errors import TraceError
from fxquant.graph.capture.tracing import trace

IMAGES_BCHW = torch.rand(2, 3, 8, 8)


class Body(nn.Module):
    """One function of the image, around it two layers."""

    def __init__(self, body) -> None:
        super().__init__()
        self.embed, self.head, self.body = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 2), body
        self.relu, self.silu = nn.ReLU(inplace=True), nn.SiLU(inplace=True)
        self.position = nn.Parameter(torch.rand(6, 2, 2))

    def forward(self, image):
        return self.head(self.body(self, self.embed(image), image).flatten(2).mean(2))


def on_image(m, x, image):
    image.mul_(0.5)
    return m.embed(image)


def on_image_by_operator(m, x, image):
    image -= 0.5
    image /= 0.25
    return m.embed(image) + x


def on_view_of_image(m, x, image):
    flat = image.view(image.shape[0], -1)
    flat.add_(1)
    return m.embed(flat.view(-1, 3, 8, 8))


def two_names(m, x, image):
    residual = x
    x += m.position
    return x * residual


def chain(m, x, image):
    return x.add_(1).mul_(2).clamp_(min=0.1).sqrt_().neg_()


def activations(m, x, image):
    kept = x
    x = functional.relu(m.relu(x), inplace=True)
    x = torch.relu_(x) + functional.leaky_relu(x - 0.3, 0.2, True)
    m.silu(x)
    return x + kept


def whole_contents(m, x, image):
    y, z = torch.empty_like(x), x.clone()
    y.copy_(x[:, :1])
    z.fill_(0.25)
    y[0:] += z
    z.zero_()
    return y + z


def out_argument(m, x, image):
    y = torch.zeros_like(x)
    torch.add(x, 1, out=y)
    return y


def slices(m, x, image):
    x = x * 1
    x[:, 1:] += m.position[1:]
    x[..., 0] = 2.0
    x[:, 0, 1] = x[:, 1, 1]
    return x


def parts_apart(m, x, image):
    first, second, third = x.chunk(3, dim=1)
    first *= 2
    return torch.cat([second, third, first], 1)


def shapes_changed(m, x, image):
    y = x.clone().unsqueeze_(1)
    y.squeeze_(1).transpose_(2, 3)
    return x + y


def other_dtype(m, x, image):
    return x.add_(torch.ones(2, 2, dtype=torch.float64))


BODIES = [
    on_image, on_image_by_operator, on_view_of_image, two_names, chain, activations, whole_contents, out_argument,
    slices, parts_apart, shapes_changed, other_dtype,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_graph_computes_the_same_and_changes_no_image(body) -> None:
    model = Body(body).eval()
    images = IMAGES_BCHW.clone()
    graph_module = trace(model, images)
    found = graph_module(images)
    assert torch.equal(images, IMAGES_BCHW)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images.clone()))
    assert model.relu.inplace
    methods = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_method"}
    assert not any(name.endswith("_") for name in methods)


def view_read_afterwards(m, x, image):
    y = x[:, :3]
    x.mul_(2)
    return torch.cat([y, y], 1)


def base_read_afterwards(m, x, image):
    x[:, 0].mul_(2)
    return x


def image_read_afterwards(m, x, image):
    image[:, 0].zero_()
    return m.embed(image)


@pytest.mark.parametrize("body", [view_read_afterwards, base_read_afterwards, image_read_afterwards])
def test_another_view_that_is_read_afterwards_is_refused(body) -> None:
    with pytest.raises(TraceError, match=r"is read after another view.*in place.*x\.clone\(\)"):
        trace(Body(body), IMAGES_BCHW)


def test_what_is_only_written_to_may_have_other_views() -> None:
    def body(m, x, image):
        y = x[:, :3]
        assert x.mul_(2).shape[1] == 2 * y.shape[1]
        return x

    model = Body(body).eval()
    with torch.no_grad():
        torch.testing.assert_close(trace(model, IMAGES_BCHW)(IMAGES_BCHW), model(IMAGES_BCHW))


def test_masks_are_not_assigned_through() -> None:
    def body(m, x, image):
        x[x > 0] = 0
        return x

    with pytest.raises(TraceError, match="assignment into a tensor can be traced where its index is made of slices"):
        trace(Body(body), IMAGES_BCHW)

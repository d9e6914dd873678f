"""A model that returns several tensors: quantized, lowered, saved, loaded and exported, it returns the same tree."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InputError, TraceError
from fxquant.export.onnx_file import to_onnx
from fxquant.graph.capture.tracing import trace
from fxquant.graph.output_tree import leaves
from fxquant.runtime.known_answers import KnownAnswers
from tests.models import images, vit

IMAGES = images(4)
Pair = namedtuple("Pair", ["scores", "tokens"])


@dataclass
class Features:
    tokens: Tensor
    maps: tuple[Tensor, ...]
    stride: int = 16


class Tree(nn.Module):
    """A ViT's scores and tokens, arranged by a function."""

    def __init__(self, arrange: Any) -> None:
        super().__init__()
        self.vit, self.arrange = vit(depth=1), arrange
        self.register_buffer("anchors", torch.arange(6.0).view(3, 2))

    def forward(self, image: Tensor) -> Any:
        tokens = self.vit.forward_features(image)
        return self.arrange(self, self.vit.forward_head(tokens), tokens)


ARRANGED = {
    "tuple": lambda m, scores, tokens: (scores, tokens),
    "list in dict": lambda m, scores, tokens: {"out": [tokens, None], "scores": scores, "patch": 16},
    "named tuple": lambda m, scores, tokens: Pair(scores, tokens),
    "ordered dict": lambda m, scores, tokens: OrderedDict([("1", tokens), ("0", scores)]),
    "dataclass": lambda m, scores, tokens: Features(tokens, (tokens[:, 1:].mT.unflatten(-1, (2, 2)), scores)),
    "one in a tuple": lambda m, scores, tokens: (scores,),
    "with anchors": lambda m, scores, tokens: {"boxes": tokens[:, :3, :2], "anchors": m.anchors},
    "with classes": lambda m, scores, tokens: (scores, scores.argmax(1)),
}


def shaped(output: Any) -> Any:
    """The output with shapes in the place of tensors."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        return type(output), {key: shaped(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return type(output), [shaped(value) for value in output]
    return (type(output), shaped(vars(output))) if isinstance(output, Features) else output


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    output = vars(output) if isinstance(output, Features) else output
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if isinstance(part, Tensor | tuple | list | dict) for tensor in tensors(part)]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: Tree(arrange).eval() for name, arrange in ARRANGED.items()}


@pytest.fixture(scope="module")
def compiled(models) -> dict[str, Any]:
    options: dict[str, Any] = {"recipe": "naive_min_max", "bits": (8,)}
    return {n: fxquant.compile(m, "W8A8", calibration=IMAGES, **options) for n, m in models.items()}


@pytest.mark.parametrize("name", ARRANGED)
def test_the_quantized_model_returns_the_models_own_tree(models, compiled, name) -> None:
    wanted, found = models[name](IMAGES), compiled[name](IMAGES)
    assert shaped(found) == shaped(wanted)
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        if one.is_floating_point():
            assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.99
    assert shaped(copy.deepcopy(compiled[name])(IMAGES)) == shaped(wanted)


@pytest.mark.parametrize("name", ARRANGED)
def test_from_a_file_it_has_plain_containers_and_the_same_numbers(compiled, name, tmp_path) -> None:
    compiled[name].save(tmp_path / "model.fxq")
    loaded = fxquant.load(tmp_path / "model.fxq")
    assert loaded.tree == compiled[name].tree
    found, wanted = loaded(IMAGES), compiled[name](IMAGES)
    assert all(map(torch.equal, leaves(loaded.graph_module(IMAGES)), leaves(compiled[name].graph_module(IMAGES))))
    plain = {Pair: tuple, OrderedDict: dict, Features: dict}
    assert type(found) is plain.get(type(wanted), type(wanted))
    assert loaded.check_answers() < 1e-6


@pytest.mark.parametrize("name", ["list in dict", "dataclass", "with anchors"])
def test_lowered_it_returns_the_same_tree(compiled, name) -> None:
    lowered = compiled[name].lowered("cpu-native")
    found, wanted = lowered(IMAGES), compiled[name](IMAGES)
    assert shaped(found) == shaped(wanted)
    assert lowered.check_answers() <= lowered.answers.tolerance


@pytest.mark.parametrize(
    ("name", "names"), [("list in dict", ["out.0", "scores"]), ("with anchors", ["boxes", "anchors"])]
)
def test_an_exported_model_names_its_outputs_by_their_keys(compiled, name, names) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    graph_module, answers = compiled[name].graph_module, compiled[name].answers
    options = onnxruntime.SessionOptions()  # without fusions: those saturate products of 8 bits on some processors
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_onnx(graph_module).content, options, ["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    found = session.run(None, {"images": answers.images_for(graph_module).numpy()})
    assert answers.difference(tuple(map(torch.from_numpy, found))) <= answers.tolerance


def test_no_images_give_no_rows_and_the_same_tree(compiled) -> None:
    found = compiled["list in dict"](IMAGES[:0])
    assert shaped(found) == (dict, {"out": (list, [(0, 5, 24), None]), "scores": (0, 7), "patch": 16})
    assert compiled["with anchors"](IMAGES[:0])["anchors"].shape == (3, 2)


def test_an_image_with_nan_gives_nan_in_every_tensor_and_leaves_the_others(compiled) -> None:
    broken = IMAGES.clone()
    broken[1, 0, 0, 0] = torch.nan
    found, wanted = compiled["with anchors"](broken), compiled["with anchors"](IMAGES)
    assert found["boxes"][1].isnan().all()
    assert torch.equal(found["boxes"][[0, 2, 3]], wanted["boxes"][[0, 2, 3]])
    assert torch.equal(found["anchors"], wanted["anchors"])
    with pytest.raises(InputError, match="image 1 has NaN"):
        compiled["with classes"](broken)


def test_a_pickled_model_is_its_artefact(compiled) -> None:
    assert shaped(pickle.loads(pickle.dumps(compiled["tuple"]))(IMAGES)) == shaped(compiled["tuple"](IMAGES))


def test_answers_tell_a_wrong_tensor_however_small_it_is_beside_another(compiled) -> None:
    answers = compiled["tuple"].answers
    images_bchw = answers.images_for(compiled["tuple"].graph_module)
    scores, tokens = compiled["tuple"].graph_module(images_bchw)
    assert answers.difference((scores, tokens)) == 0
    small = KnownAnswers.of((scores * 1e-6, tokens))
    assert small.difference((scores.flip(0) * 1e-6, tokens)) > 0.5
    assert small.difference((tokens, scores * 1e-6)) == float("inf")
    assert small.difference(scores) == float("inf")


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda m, scores, tokens: {"n": len(scores), "scores": scores}, "something else for 3 images than for one"),
        (lambda m, scores, tokens: {"of": m}, "at of a Tree"),
        (lambda m, scores, tokens: {"n": 3}, "without a tensor"),
        (lambda m, scores, tokens: (scores, tokens[: 2 * len(tokens) - 1]), "cannot be traced|numbers at 1"),
    ],
)
def test_what_is_no_tree_of_tensors_is_refused(arrange, message) -> None:
    with pytest.raises(TraceError, match=message):
        trace(Tree(arrange), IMAGES)

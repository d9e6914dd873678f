"""A model on another device is compiled there, and gives what the CPU gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import BackendError, InputError, ModelError
from fxquant.session.compiled import Compiled
from fxquant.session.session import Session
from fxquant.synthesis.pictures import Synthesis
from fxquant.synthesis.synthesize import synthesize
from passes.allocate.measure_losses import MeasureLosses
from passes.correct.distil import Distil
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.pipeline import Pipeline
from passes.recipes import recipe
from passes.substitute.substitute_quantizers import SubstituteQuantizers
from tests.models import SWIN, images, timm_model, vit
from tests.stand_in_device import stand_in

BITS = (4, 8)
IMAGES = images(2)


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(stand_in())


def thorough() -> Pipeline:
    return recipe("best_thorough")("W4A4", bits=BITS).changed(Distil, steps=2, checks=1, images=2)


def reconstructed() -> Pipeline:
    learned = Reconstruct(steps=2, images=2, checks=1, loss="fisher"), MeasureLosses()
    return recipe("naive_min_max")("W4A4", bits=BITS).before(SubstituteQuantizers, *learned)


COMPILED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "best": (lambda: vit(depth=1), "W4A4", {}),
    "best of windows": (
        lambda: timm_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 32, "depths": (1, 1)}), "W4A4", {}
    ),
    "mptq_vit": (lambda: vit(depth=1), "W4A4", {"recipe": "mptq_vit", "fully_quantized": True}),
    "lampq": (lambda: vit(depth=1), "W4A4", {"recipe": "lampq"}),
    "mix_qvit": (lambda: vit(depth=1), "MP4", {"recipe": "mix_qvit"}),
    "adalog": (lambda: vit(depth=1), "W4A4", {"recipe": "adalog"}),
    "embeddings": (lambda: vit(depth=1, num_classes=0), "W4A4", {"objective": "embeddings", "backend": "onnxruntime"}),
    "trained": (lambda: vit(depth=1), None, {"recipe": thorough}),
    "reconstructed": (lambda: vit(depth=1), None, {"recipe": reconstructed}),
    "two sizes": (lambda: vit(depth=1, dynamic_img_size=True), "W4A4", {"image_sizes": [(32, 48)]}),
    "a latency": (lambda: vit(depth=1), "W8A8, 900ms", {"recipe": "naive_min_max", "backend": "cpu-native"}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_what_is_compiled_on_a_device_is_what_the_cpu_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # the stand-in trains in float32
    build, budget, options = COMPILED[name]
    given = options.get("recipe", "best")
    options = {**options, "recipe": given()} if callable(given) else {**options, "bits": BITS}
    model = build()
    found, wanted = (fxquant.compile(m, budget, calibration=IMAGES, **options) for m in (there(model), model))
    assert_same(found, wanted)
    assert {tensor.device for tensor in (*found.parameters(), *found.buffers())} == {stand_in()}
    assert found(IMAGES.to(stand_in())).device == stand_in()
    assert next(model.parameters()).device.type == "cpu", "the caller's model stays where it was"


def assert_same(found: Compiled, wanted: Compiled) -> None:
    """The same bits for the layers, and the same numbers, known answers among them."""
    assert [row.operands for row in found.layers] == [row.operands for row in wanted.layers]
    here = wanted.state_dict()
    assert here.keys() == found.state_dict().keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor.cpu(), here[name].cpu()), name
    assert found.answers is not None
    assert wanted.answers is not None
    assert torch.equal(found.answers.simulated, wanted.answers.simulated)


@pytest.fixture(scope="module")
def session() -> Session:
    """On the device, with images there."""
    return Session(there(vit(depth=1)), IMAGES.to(stand_in()), bits=BITS)


@pytest.fixture(scope="module")
def model(session: Session) -> Compiled:
    return session.compile("W4A8")


def test_files_have_no_device(model: Compiled, tmp_path: Path) -> None:
    model.save(tmp_path / "m.fxq")
    loaded = fxquant.load(tmp_path / "m.fxq")
    assert torch.equal(loaded(IMAGES), model(IMAGES.to(stand_in())).cpu())
    assert model.check_answers() == loaded.to(stand_in()).check_answers() == 0
    assert torch.equal(loaded(IMAGES.to(stand_in())), model(IMAGES.to(stand_in())))
    model.export_program(tmp_path / "m.fxm")
    model.export_onnx(tmp_path / "m.onnx")


def test_a_lowered_model_is_where_its_kernels_run(model: Compiled) -> None:
    lowered = model.lowered("cpu-native")
    torch.testing.assert_close(lowered(IMAGES), model(IMAGES.to(stand_in())).cpu(), rtol=1e-3, atol=1e-3)
    with pytest.raises(BackendError, match="cannot be moved to standin"):
        lowered.to(stand_in())
    with pytest.raises(InputError, match="images are on cpu, and the model is on standin:0"):
        model(IMAGES)


def test_moving_a_compiled_model_leaves_its_session_as_it_was(session: Session, model: Compiled) -> None:
    moved = copy.copy(session.compile("W4A8")).cpu()
    assert torch.equal(moved(IMAGES), model(IMAGES.to(stand_in())).cpu())
    assert torch.equal(session.compile("W4A8")(IMAGES.to(stand_in())), model(IMAGES.to(stand_in())))


def test_what_one_device_has_kept_the_other_recalls(tmp_path: Path) -> None:
    plain, options = vit(depth=1), {"recipe": "mptq_vit", "bits": BITS, "cache": tmp_path}
    for model in (plain, there(plain)):
        first, second = (fxquant.compile(model, "W4A8", calibration=IMAGES, **options) for _ in range(2))
        assert_same(second, first)
        assert all(entry.notes["recalled"] for entry in second.journal.entries[:4])
    assert {tensor.device for tensor in second.buffers()} == {stand_in()}


def test_images_are_made_where_the_model_is() -> None:
    plain, options = vit(depth=1), Synthesis(count=2, steps=2)
    found = synthesize(there(plain), options)
    assert found.device == stand_in()
    assert torch.equal(found.cpu(), synthesize(plain, options))


def test_frontiers_are_measured_where_the_model_is() -> None:
    plain = vit(depth=1)
    options: dict[str, Any] = {"limits": [4, 8], "realised": "divergence", "recipe": "naive_min_max", "bits": BITS}
    found, wanted = (fxquant.frontier(m, IMAGES, **options).to_dict() for m in (there(plain), plain))
    assert [p["realised"] for p in found["points"]] == pytest.approx([p["realised"] for p in wanted["points"]])


@pytest.mark.quick
@pytest.mark.parametrize("part", ["head", "pos_embed"])
def test_a_model_on_two_devices_is_refused(part: str) -> None:
    mixed = vit(depth=1)
    if part == "head":
        mixed.head.to(stand_in())
    else:
        mixed.register_buffer("offset", torch.zeros(1, device=stand_in()))
    with pytest.raises(ModelError, match=r"'cls_token' is on cpu and '(head\.weight|offset)' is on standin:0"):
        fxquant.compile(mixed, "W4A4", calibration=IMAGES)


class NamesDevices(nn.Module):
    """Makes tensors where the images are, of one image and of all, and moves what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit(depth=1, img_size=32)

    def forward(self, images: Tensor) -> Tensor:
        lines = torch.arange(images.shape[-1], device=images.device).to(images)
        blank = torch.zeros(images.shape[0], 1, 1, 1, device=images.device)
        given = (images.double() + blank + lines / 100).to(device=images.device, dtype=torch.float32)
        return self.inner(given)


@pytest.mark.parametrize("first", ["cpu", "standin"])
def test_a_graph_computes_where_its_images_are(first: str) -> None:
    plain = NamesDevices().eval()
    model = plain if first == "cpu" else there(plain)
    graph_module = fxquant.trace(model, IMAGES)
    here, moved = (copy.deepcopy(graph_module).to(device) for device in ("cpu", stand_in()))
    torch.testing.assert_close(here(IMAGES), plain(IMAGES))
    torch.testing.assert_close(moved(IMAGES.to(stand_in())).cpu(), plain(IMAGES))

"""Images from disk: what is read, and what each bad input says."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fxquant.data.images import ImageData, load_images
from fxquant.data.preprocessing import EMBEDDED, Preprocessing
from fxquant.errors import DataError

SMALL = Preprocessing((3, 16, 16), crop_pct=0.8)


def picture(path: Path, shade: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: 'ant' with two pictures, one grey, and 'bee' with one."""
    picture(tmp_path / "set" / "bee" / "1.png", 30)
    picture(tmp_path / "set" / "ant" / "2.png", 20, mode="L")
    picture(tmp_path / "set" / "ant" / "1.JPG", 10)
    (tmp_path / "set" / "ant" / "notes.txt").write_text("no image")
    return tmp_path / "set"


def npz(tmp_path: Path, **arrays: object) -> Path:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "data.npz"


def test_class_folders_in_sorted_order(folder: Path) -> None:
    data = ImageData.open(folder, SMALL)
    assert (data.count, data.classes) == (3, 2)
    (images, labels), (last, last_label) = data.batches(2)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert torch.cat([labels, last_label]).tolist() == [0, 0, 1]  # type: ignore[list-item]
    assert last[0, 0].mean() == pytest.approx((30 / 255 - 0.5) / 0.5, abs=1e-5)
    assert torch.equal(images[1, 0], images[1, 2]), "grey becomes RGB"


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_preprocessing_is_timms(tmp_path: Path, crop_mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, pretrained_cfg_overlay={"crop_mode": crop_mode})
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config, is_training=False)(Image.fromarray(noise))
    found = load_images(tmp_path, 1, Preprocessing.of(model))
    assert torch.equal(found[0], expected)
    assert Preprocessing.from_dict(Preprocessing.of(model).to_dict()) == Preprocessing.of(model)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 5)
    assert load_images(tmp_path, 1, SMALL).shape == (1, 3, 16, 16)
    with pytest.raises(DataError, match="has no labels"):
        ImageData.open(tmp_path, SMALL).checked_labels()


def test_calibration_images_are_drawn_by_seed(tmp_path: Path) -> None:
    stored = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((10, 28, 28), dtype=np.uint8)
    path = npz(tmp_path, images=stored)
    first, again, other = (load_images(path, 5, EMBEDDED, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1)[:, 0].unique()) == 5, "without replacement"
    with pytest.raises(DataError, match="has 10 images, and 11 are asked for"):
        load_images(path, 11, EMBEDDED)


@pytest.mark.parametrize("shape", [(4, 20, 24), (4, 20, 24, 1), (4, 20, 24, 3)])
def test_npz_of_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = npz(tmp_path, images=np.full(shape, 51, dtype=np.uint8), labels=np.array([3, 1, 0, 2]))
    for preprocessing in (SMALL, Preprocessing((1, 16, 16), mean=(0.5,), std=(0.5,))):
        data = ImageData.open(path, preprocessing)
        ((images, labels),) = data.batches()
        assert images.shape == (4, *preprocessing.input_size)
        assert images.unique().tolist() == pytest.approx([-0.6])
        assert labels.tolist() == [3, 1, 0, 2]  # type: ignore[union-attr]


def test_npz_of_preprocessed_floats(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16))
    data = ImageData.open(npz(tmp_path, images=images), SMALL)
    assert np.array_equal(next(data.batches())[0].numpy(), images.astype(np.float32))


def test_limit_spreads_over_classes() -> None:
    data = ImageData("x", 100, lambda index: torch.tensor([index]), torch.arange(100) // 10)
    labels = torch.cat([labels for _, labels in data.batches(4, limit=10)])  # type: ignore[misc]
    assert labels.tolist() == list(range(10))
    assert sum(len(images) for images, _ in data.batches(64, limit=1000)) == 100


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros(3)}, "no array called 'images', only pictures"),
        ({"images": np.array([{}], dtype=object)}, "cannot be read as an .npz of plain arrays"),
        ({"images": np.zeros((2, 4, 4), dtype=np.int64)}, r"must be uint8 .* found int64 \(2, 4, 4\)"),
        ({"images": np.zeros((2, 4, 4, 2), dtype=np.uint8)}, "must be uint8"),
        ({"images": np.zeros((2, 3, 9, 9), dtype=np.float32)}, r"must be \(N, 3, 16, 16\); found \(2, 3, 9, 9\)"),
        ({"images": np.zeros((0, 4, 4), dtype=np.uint8)}, "has no images"),
        ({"images": np.zeros((2, 4, 4), dtype=np.uint8), "labels": np.zeros(3, dtype=int)}, "must be 2 integers"),
        ({"images": np.zeros((2, 4, 4), dtype=np.uint8), "labels": np.zeros(2)}, "found float64"),
        ({"images": np.zeros((2, 4, 4), dtype=np.uint8), "labels": np.array([0, -1])}, "integers from 0"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageData.open(npz(tmp_path, **arrays), SMALL)


def test_bad_places(tmp_path: Path, folder: Path) -> None:
    for path, message in (
        (tmp_path / "nothing", "does not exist"),
        (folder / "ant" / "notes.txt", "neither a folder nor an .npz"),
    ):
        with pytest.raises(DataError, match=message):
            ImageData.open(path, SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        ImageData.open(tmp_path / "empty", SMALL)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(DataError, match=r"cannot be read as an .npz"):
        ImageData.open(tmp_path / "broken.npz", SMALL)
    picture(folder / "stray.png", 1)
    with pytest.raises(DataError, match="beside class folders"):
        ImageData.open(folder, SMALL)


def test_a_class_without_images(folder: Path) -> None:
    (folder / "cat").mkdir()
    with pytest.raises(DataError, match="class folder 'cat'"):
        ImageData.open(folder, SMALL)


@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"])
def test_an_unreadable_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "bee" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png cannot be read as an image"):
        list(ImageData.open(folder, SMALL).batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "mean needs 3 numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be positive"),
        ({"interpolation": "best"}, "nearest, bilinear or bicubic"),
        ({"crop_mode": "middle"}, "center, squash or border"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"image_size": 0}, "input_size"),
    ],
)
def test_bad_preprocessing(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SMALL.with_options(**options)
    assert SMALL.with_options(image_size=32, mean=None).input_size == (3, 32, 32)


def npz_entry(path: Path, header: bytes, content: bytes, **options: object) -> Path:
    """An .npz whose `images` has this header."""
    with zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[arg-type]
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    return path


def test_an_npz_is_held_against_what_its_header_claims(tmp_path: Path) -> None:
    def written(shape: str, size: int, **options: object) -> Path:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n"
        return npz_entry(tmp_path / "a.npz", header.encode(), bytes(size), **options)

    assert ImageData.open(written("(1, 8, 8)", 64), SMALL).count == 1
    for shape, text in (
        ("(2, 8, 8)", "is not what its bytes hold"),
        ("(2000000, 9999, 9999)", "is not what its bytes hold"),
        ("(-1, 8, 8)", "is not what its bytes hold"),
        ("'x'", "cannot be read as an"),
        ("(1, 8, 8", "cannot be read as an"),
    ):
        with pytest.raises(DataError, match=text):
            ImageData.open(written(shape, 64), SMALL)
    bomb = written("(1, 20000, 15000)", 300_000_000, compression=zipfile.ZIP_DEFLATED, compresslevel=1)
    assert bomb.stat().st_size < 2_000_000
    with pytest.raises(DataError, match="would have 300,000,0"):
        ImageData.open(bomb, SMALL)


def test_a_damaged_npz_of_every_compression_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16, 16), }\n"
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = npz_entry(tmp_path / "a.npz", header, noise.tobytes(), compression=compression)
        content = bytearray(file.read_bytes())
        content[300:310] = b"\xff" * 10
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read as an \.npz of plain arrays"):
            ImageData.open(file, SMALL)
    file = npz_entry(tmp_path / "locked.npz", header, noise.tobytes())
    content = bytearray(file.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        ImageData.open(file, SMALL)


def test_arrays_in_the_order_of_fortran_and_values_that_are_not_finite(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16))
    data = ImageData.open(npz(tmp_path, images=np.asfortranarray(images)), SMALL)
    assert np.array_equal(next(data.batches())[0].numpy(), images.astype(np.float32))
    images[1, 0, 0, 0] = 1e300
    with pytest.raises(DataError, match="image 1 has values that are not finite"):
        list(ImageData.open(npz(tmp_path, images=images), SMALL).batches())
    with pytest.raises(DataError, match="has no images"):
        ImageData.open(npz(tmp_path, images=np.zeros((3, 0, 28), dtype=np.uint8)), SMALL)


def test_pictures_without_pixels_or_as_thin_as_a_thread(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "flat.ppm").write_bytes(b"P6 10 0 255\n")
    (tmp_path / "b").mkdir()
    Image.new("RGB", (1, 60_000)).save(tmp_path / "b" / "thread.png")
    wide = Preprocessing((3, 224, 224))
    thread = "a picture of 60000 x 1 is too narrow to be resized to 224 x 224"
    array = npz(tmp_path, images=np.zeros((1, 60_000, 1), dtype=np.uint8))
    for place, message in ((tmp_path / "a", "flat.ppm"), (tmp_path / "b", thread), (array, f"0: {thread}")):
        with pytest.raises(DataError, match=message):
            load_images(place, 1, wide)
    assert load_images(tmp_path / "b", 1, wide.with_options(crop_mode="squash")).shape == (1, 3, 224, 224)
    square = npz(tmp_path, images=np.zeros((1, 8, 8), dtype=np.uint8))
    with pytest.raises(DataError, match="too narrow to be resized to 16384 x 1"):
        load_images(square, 1, wide.with_options(input_size=(3, 16_384, 1)))

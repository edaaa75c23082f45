"""Pixels to the bit as timm makes them; every way in which a file can be bad ends in an error that names it."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest

from cswap_deploy.artifacts import CropMode, Image, ImageSet, InputSpec, sha256_of
from cswap_deploy.errors import DataError
from cswap_deploy.images import Pixels, batches, load, normalise, transform
from cswap_deploy.progress import Recording, reporting

PIL = pytest.importorskip("PIL.Image")
SPEC = InputSpec((3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 1.0)
GRAY = InputSpec((1, 8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0)


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_set(root: Path) -> ImageSet:
    paths = sorted(path for path in root.iterdir() if path.is_file())
    return ImageSet(tuple(Image(path.name, sha256_of(path), label) for label, path in enumerate(paths)), root)


def one(root: Path, spec: InputSpec = SPEC) -> Pixels:
    first: Pixels = load(image_set(root), spec)[0][0]
    return first


@pytest.fixture
def nine(tmp_path: Path) -> ImageSet:
    for number in range(9):
        PIL.fromarray(noise(10, 12, 3, seed=number)).save(tmp_path / f"{number}.png")
    return image_set(tmp_path)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0, 1.25])
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (24, 40), (40, 25)])
@pytest.mark.parametrize("crop_mode", get_args(CropMode))
def test_transform_is_timms(
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"],
    crop_pct: float,
    size: tuple[int, int],
    crop_mode: CropMode,
) -> None:
    data = pytest.importorskip("timm.data")
    spec = InputSpec((3, *size), SPEC.mean, SPEC.std, interpolation, crop_pct, crop_mode)
    reference = data.create_transform(
        input_size=spec.shape,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=spec.mean,
        std=spec.std,
        normalize=False,
    )
    for shape in [(32, 32), (50, 37), (37, 50), (28, 91), (20, 20), (45, 29), (113, 113)]:
        picture = PIL.fromarray(noise(*shape, 3, seed=shape[0]))
        got = np.asarray(transform(picture, spec)).transpose(2, 0, 1)
        np.testing.assert_array_equal(got, np.asarray(reference(picture)), err_msg=str(shape))


def test_normalised_pixels_are_timms(nine: ImageSet) -> None:
    data = pytest.importorskip("timm.data")
    spec = InputSpec((3, 9, 9), SPEC.mean, SPEC.std, "bicubic", 0.875)
    reference = data.create_transform(
        input_size=spec.shape, interpolation="bicubic", crop_pct=0.875, mean=spec.mean, std=spec.std
    )
    pixels, labels = load(nine, spec)
    values = normalise(pixels, spec)
    expected = np.stack([np.asarray(reference(PIL.open(nine.root / image.path))) for image in nine.images])
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
    assert values.dtype == np.float32 and values.flags.c_contiguous
    assert (pixels.dtype.name, labels.dtype.name, labels.tolist()) == ("uint8", "int64", list(range(9)))


def test_normalise_leaves_pixels_alone() -> None:
    pixels = noise(2, 1, 8, 8)
    values = normalise(pixels, GRAY)
    np.testing.assert_allclose(values, (pixels / 255 - 0.5) / 0.25, atol=1e-6)
    np.testing.assert_array_equal(pixels, noise(2, 1, 8, 8))


@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_batches_keep_order(nine: ImageSet, size: int) -> None:
    parts = [*batches(nine, SPEC, size, workers=3)]
    assert [len(labels) for _, labels in parts] == [min(size, 9 - start) for start in range(0, 9, size)]
    pixels, labels = load(nine, SPEC)
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), pixels)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), labels)


def test_load_reports_and_an_empty_set_is_empty(nine: ImageSet) -> None:
    with reporting(recording := Recording()):
        load(nine, SPEC)
    assert recording.events == [("advance", "images", "9/9")]
    assert load(ImageSet((), nine.root), SPEC)[0].shape == (0, 3, 8, 8)


def test_batches_left_early_leave_no_thread(nine: ImageSet) -> None:
    before = threading.active_count()
    stream = batches(nine, SPEC, 1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


# --- kinds of files --------------------------------------------------------------------------------------------------


def test_transparency_is_dropped(tmp_path: Path) -> None:
    PIL.fromarray(noise(8, 8, 4)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(one(tmp_path), noise(8, 8, 4)[..., :3].transpose(2, 0, 1))


def test_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    picture = PIL.fromarray(noise(8, 8, 3)).quantize(16)
    picture.save(tmp_path / "a.png", transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(one(tmp_path), np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


def test_cmyk_and_bilevel_become_rgb(tmp_path: Path) -> None:
    PIL.fromarray(noise(8, 8, 3)).convert("CMYK").save(tmp_path / "a.jpg")
    PIL.fromarray(noise(8, 8)).convert("1").save(tmp_path / "b.bmp")
    expected = [np.asarray(PIL.open(tmp_path / name).convert("RGB")) for name in ("a.jpg", "b.bmp")]
    np.testing.assert_array_equal(load(image_set(tmp_path), SPEC)[0], np.stack(expected).transpose(0, 3, 1, 2))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 1024).astype(np.uint16).reshape(8, 8)
    PIL.fromarray(values).save(tmp_path / "a.png")
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(one(tmp_path), np.stack([expected] * 3))
    np.testing.assert_array_equal(one(tmp_path, GRAY), expected[None])


def test_one_channel_is_gray(tmp_path: Path) -> None:
    picture = PIL.fromarray(noise(8, 8, 3))
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(one(tmp_path, GRAY), np.asarray(picture.convert("L"))[None])


def test_exif_turns_the_image(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6  # the camera was held so that a quarter turn clockwise puts the image upright
    PIL.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(one(tmp_path), np.rot90(noise(8, 8, 3), -1).transpose(2, 0, 1))


def test_broken_exif_is_no_exif(tmp_path: Path) -> None:
    PIL.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(one(tmp_path), noise(8, 8, 3).transpose(2, 0, 1))


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    PIL.fromarray(noise(8, 8, 3)).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(one(tmp_path), noise(8, 8, 3).transpose(2, 0, 1))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_changed_and_missing_files(nine: ImageSet) -> None:
    PIL.fromarray(noise(10, 12, 3, seed=99)).save(nine.root / "5.png")
    with pytest.raises(DataError, match=r"5\.png changed since it was indexed") as caught:
        load(nine, SPEC)
    assert "run again" in caught.value.hint
    (nine.root / "3.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*3\.png: No such file"):
        load(nine, SPEC)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    stream = BytesIO()
    PIL.fromarray(noise(64, 64, 3)).save(stream, format=suffix.replace("jpg", "jpeg"))
    (tmp_path / f"a.{suffix}").write_bytes(stream.getvalue()[: stream.tell() // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix} (cannot be decoded|is not a)"):
        load(image_set(tmp_path), SPEC)


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_what_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png is not a PNG, JPEG, WEBP, BMP, GIF image"):
        load(image_set(tmp_path), SPEC)


@pytest.mark.parametrize("limit", [1000, 3000])
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """64 x 64 pixels: Pillow warns above the limit and refuses above twice the limit."""
    PIL.fromarray(noise(64, 64, 3)).save(tmp_path / "a.png")
    images = image_set(tmp_path)
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"a\.png is too large to decode"):
        load(images, SPEC)


def test_a_line_of_pixels_is_not_blown_up(tmp_path: Path) -> None:
    PIL.fromarray(noise(1, 60_000, 3)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"60000 x 1 pixels would be resized to 13440000 x 224"):
        load(image_set(tmp_path), InputSpec((3, 224, 224), SPEC.mean, SPEC.std, "bilinear", 1.0))


def test_channels_that_files_do_not_have(nine: ImageSet) -> None:
    with pytest.raises(DataError, match="takes 4 channels"):
        load(nine, InputSpec((4, 8, 8), SPEC.mean, SPEC.std, "bilinear", 1.0))

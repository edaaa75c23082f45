"""Image files become pixels, as timm's evaluation transform makes them: decode, upright, resize, centre crop."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from io import BytesIO
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cswap_deploy import progress
from cswap_deploy.artifacts import Image, ImageSet, InputSpec
from cswap_deploy.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Pixels = NDArray[np.uint8]
"""(images, channels, height, width), or one image without the first axis; 0..255, RGB or gray."""
Labels = NDArray[np.int64]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def batches(images: ImageSet, spec: InputSpec, size: int, workers: int = 2) -> Iterator[tuple[Pixels, Labels]]:
    """Up to `size` images at a time, in order, decoded ahead by threads; the files are checked against their digests.

    DataError, with the file: gone, changed since it was indexed, corrupt, too large.
    """
    labels = np.array([image.label for image in images.images], np.int64)
    done = 0
    decoded = _decoded(images, spec, ahead=size + workers, workers=workers)
    try:
        while done < len(labels):
            pixels = np.stack([next(decoded) for _ in range(min(size, len(labels) - done))])
            yield pixels, labels[done : done + len(pixels)]
            done += len(pixels)
    finally:
        decoded.close()


def load(images: ImageSet, spec: InputSpec) -> tuple[Pixels, Labels]:
    """All images at once; a byte per value."""
    total, done = len(images.images), 0
    pixels = np.empty((total, *spec.shape), np.uint8)
    labels = np.empty(total, np.int64)
    for some, classes in batches(images, spec, size=32):
        pixels[done : done + len(some)], labels[done : done + len(some)] = some, classes
        done += len(some)
        progress.advance("images", done, total)
    return pixels, labels


def normalise(pixels: Pixels, spec: InputSpec) -> NDArray[np.float32]:
    """`(pixels / 255 - mean) / std` per channel, contiguous; a gray network takes the first mean and std."""
    channels = spec.shape[0]
    mean, std = (np.array(values[:channels], np.float32).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    values = np.array(pixels, np.float32, order="C")
    values /= 255
    values -= mean
    values /= std
    return values


def shifted(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Each image moved by its own random step of up to an eighth of height and width; what comes in is reflected at the border."""
    reach = [size // 8 for size in pixels.shape[2:]]
    wide = np.pad(pixels, [(0, 0), (0, 0), *((step, step) for step in reach)], mode="reflect")
    tops, lefts = (random.integers(0, 2 * step + 1, len(pixels)) for step in reach)
    height, width = pixels.shape[2:]
    places = zip(wide, tops, lefts, strict=True)
    return np.stack([image[:, top : top + height, left : left + width] for image, top, left in places])


def transform(picture: Picture, spec: InputSpec) -> Picture:
    """Resize, and centre crop or borders to the height and width of `spec`, to the bit as timm's `transforms_imagenet_eval`."""
    from PIL.Image import Resampling, new

    _, height, width = spec.shape
    size = resized(picture.size, spec)
    if size != picture.size:
        picture = picture.resize(size, Resampling[spec.interpolation.upper()])
    left, top = _offset(picture.width, width), _offset(picture.height, height)
    if spec.crop_mode != "border":
        return picture.crop((left, top, left + width, top + height))
    framed = new(picture.mode, (width, height), fill(spec)[0] if picture.mode == "L" else fill(spec))
    framed.paste(picture, (-left, -top))
    return framed


def fill(spec: InputSpec) -> tuple[int, ...]:
    """The colour of borders."""
    return tuple(round(255 * value) for value in spec.mean)


def resized(size: tuple[int, int], spec: InputSpec) -> tuple[int, int]:
    """(width, height) before the crop; torchvision truncates the longer side, timm rounds for targets not square."""
    wide, high = size
    height, width = (floor(side / spec.crop_pct) for side in spec.shape[1:])
    if spec.crop_mode == "squash":
        return width, height
    if spec.crop_mode == "border":
        ratio = max(high / height, wide / width)
        return round(wide / ratio), round(high / ratio)
    if height != width:
        ratio = min(high / height, wide / width)
        return round(wide / ratio), round(high / ratio)
    return (width, int(width * high / wide)) if wide <= high else (int(height * wide / high), height)


def _offset(have: int, want: int) -> int:
    """Where torchvision's CenterCrop begins; negative: that many pixels of border, or black ones, come first."""
    return -((want - have) // 2) if want > have else round((have - want) / 2)


# --- files -----------------------------------------------------------------------------------------------------------


def _decoded(images: ImageSet, spec: InputSpec, ahead: int, workers: int) -> Generator[Pixels, None, None]:
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Pixels]] = deque()
    try:
        for image in images.images:
            waiting.append(pool.submit(_pixels, images.root, image, spec))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def decoded(root: Path, image: Image, channels: int) -> Picture:
    """The picture as the transform gets it, but in the network's colours: decoded, upright, of its own size."""
    return _in_mode(_open(_checked(root / image.path, image.sha256), root / image.path), channels)


def _pixels(root: Path, image: Image, spec: InputSpec) -> Pixels:
    picture = _open(_checked(root / image.path, image.sha256), root / image.path)
    wide, high = resized(picture.size, spec)
    if _too_large(wide, high) or not (wide and high):
        raise DataError(
            f"{root / image.path} of {picture.width} x {picture.height} pixels would be resized to {wide} x {high}",
            hint="remove the image: it is too elongated",
        )
    values = np.asarray(transform(_in_mode(picture, spec.shape[0]), spec))
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))


def _checked(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise DataError(f"cannot read {path}: {fault.strerror}", hint="restore the image, or run again") from fault
    if sha256(data).hexdigest() != digest:
        raise DataError(f"{path} changed since it was indexed", hint="run again: the images will be divided anew")
    return data


def _open(data: bytes, path: Path) -> Picture:
    """Decode completely; pictures that Pillow takes for decompression bombs are refused before that."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(BytesIO(data), formats=_FORMATS)
        if _too_large(*picture.size):
            raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels")
        picture.load()
        return _upright(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        raise DataError(f"{path} is too large to decode: {fault}", hint="scale the image down, or remove it") from fault
    except UnidentifiedImageError as fault:
        raise DataError(f"{path} is not a {', '.join(_FORMATS)} image", hint="remove or convert the file") from fault
    except Exception as fault:  # on corrupt bytes Pillow's decoders raise almost anything
        raise DataError(f"{path} cannot be decoded: {fault}", hint="remove or replace the file") from fault


def _too_large(width: int, height: int) -> bool:
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS


def _upright(picture: Picture) -> Picture:
    """Turned as EXIF says; an EXIF block that cannot be read says nothing."""
    from struct import error

    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, LookupError, TypeError, error):
        return picture


def _in_mode(picture: Picture, channels: int) -> Picture:
    """RGB or gray as Pillow converts, transparency dropped as in torchvision; 16 bits are scaled to 8, not clipped."""
    from PIL import Image

    if channels not in (1, 3):
        raise DataError(
            f"the model takes {channels} channels; image files give 1 (gray) or 3 (RGB)",
            hint="choose a model with 1 or 3 input channels",
        )
    if picture.mode.startswith("I"):
        gray = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((gray * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # the same colours, without Pillow's warning about transparent palettes
    return picture.convert("RGB" if channels == 3 else "L")

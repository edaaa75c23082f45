"""Write the 1,797 digits that scikit-learn carries as 8x8 PNG files in class folders, split once and for all.

The folders are `digits/{train,scoring,holdout}/{0..9}/NNNN.png`; NNNN is the image's index in `load_digits()`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HOLDOUT, SCORING = 600, 400  # images; what is left is train
WHITE = 16  # brightest value in the source

Split = Mapping[str, NDArray[np.intp]]


def main() -> None:
    """Write the three splits under `--out`, replacing the ones there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    digits = load_digits()
    images = to_bytes(digits.images)
    split = split_by_class(digits.target, arguments.seed)
    refuse_shared_images(images, split)
    for name, indices in split.items():
        write(arguments.out / name, images, digits.target, indices)
        print(f"{name:8} {len(indices):4} images  per class {np.bincount(digits.target[indices]).tolist()}")
    print(f"distinct {len({image.tobytes() for image in images}):4} of {len(images)} images")
    print(f"sha256   {digest(arguments.out, split)}")


def to_bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Scale 0..16 to 0..255, to the nearest integer; no two source values meet."""
    return np.rint(values * (255 / WHITE)).astype(np.uint8)


def split_by_class(labels: NDArray[np.int_], seed: int) -> Split:
    """Indices of each split, sorted and disjoint; every class has about its overall share in each."""
    everything = np.arange(len(labels))
    rest, holdout = train_test_split(everything, test_size=HOLDOUT, stratify=labels, random_state=seed)
    train, scoring = train_test_split(rest, test_size=SCORING, stratify=labels[rest], random_state=seed)
    return {"train": np.sort(train), "scoring": np.sort(scoring), "holdout": np.sort(holdout)}


def refuse_shared_images(images: NDArray[np.uint8], split: Split) -> None:
    """Raise ValueError where bitwise-equal images lie in two splits."""
    seen: dict[bytes, tuple[str, int]] = {}
    for name, indices in split.items():
        for index in indices:
            other, twin = seen.setdefault(images[index].tobytes(), (name, int(index)))
            if other != name:
                raise ValueError(f"image {index} of {name} equals image {twin} of {other}; choose another --seed")


def write(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int_], indices: Iterable[int]) -> None:
    """Replace `folder` by one PNG file per index, in a folder per class."""
    shutil.rmtree(folder, ignore_errors=True)
    for index in indices:
        path = folder / str(labels[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Stored, not deflated: the bytes then do not depend on the zlib at hand.
        Image.fromarray(images[index]).save(path, compress_level=0)


def digest(out: Path, names: Iterable[str]) -> str:
    """SHA-256 over the relative path and the bytes of every PNG file, in path order."""
    total = hashlib.sha256()
    for path in sorted(path for name in names for path in (out / name).rglob("*.png")):
        total.update(path.relative_to(out).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()

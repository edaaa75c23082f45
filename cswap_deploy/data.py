"""An image folder becomes a split: which images shape the model, which make its choices, which only report."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from itertools import chain
from pathlib import Path
from unicodedata import normalize

from cswap_deploy import progress
from cswap_deploy.artifacts import Image, Network, Split, sha256_of
from cswap_deploy.digests import digest_of
from cswap_deploy.errors import DataError
from cswap_deploy.stage import stage

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_NOT_CLASSES = frozenset({"train", "training", "val", "valid", "validation", "test"})
_ARRANGE = "put the images of each class into a folder of its own: <calibration.images>/<class>/<image>"

LEARNED = 0.1
"""Top-1 below this part of the way from chance to perfect counts as near chance."""
Found = tuple[str, int]
"""Path relative to the folder of `calibration.images`, and label."""


@dataclass(frozen=True)
class Listing:
    """The images of a folder, sorted by path, none of them read; `holdout` None: one pool, still to be divided."""

    labels: tuple[str, ...]
    scoring: tuple[Found, ...]
    holdout: tuple[Found, ...] | None


def scan(folder: Path, labels: Path | None, outputs: int) -> Listing:
    """List the images below class folders; links are followed. Whatever is ambiguous or empty is a DataError."""
    top = _Folder.top(folder)
    parts = {child.path.name: child for child in top.children()[0] if child.path.name in ("scoring", "holdout")}
    if len(parts) == 1:
        raise DataError(
            f"{folder} has {next(iter(parts))}/ but not its counterpart",
            hint="give it both scoring/ and holdout/, or neither: then the images are divided by seed",
        )
    pools = [parts["scoring"], parts["holdout"]] if parts else [top]
    names = _class_names(pools, outputs) if labels is None else read_labels(labels, outputs)
    found = [tuple(_labelled(pool, folder, names)) for pool in pools]
    return Listing(names, found[0], found[1] if parts else None)


def survey(folder: Path, labels: Path | None = None) -> Listing:
    """As `scan`, for as many classes as there are folders or labels."""
    if labels is not None:
        return scan(folder, labels, len(labels_of(labels)))
    top = _Folder.top(folder)
    pool = next((child for child in top.children()[0] if child.path.name == "scoring"), top)
    return scan(folder, None, len(_class_folders(pool)))


@dataclass(frozen=True)
class Catalogue:
    """Every image that may take part, by content; `holdout` None: one pool, still to be divided."""

    labels: tuple[str, ...]
    scoring: tuple[Image, ...]
    holdout: tuple[Image, ...] | None
    folder: Path = field(metadata={"key": False})

    @property
    def sha256(self) -> str:
        """Of all images that may take part, names included; what else lies in the folder does not count."""
        return digest_of([[image.path, image.sha256] for image in (*self.scoring, *(self.holdout or ()))])


def catalogue(folder: Path, labels: Path | None, outputs: int, digest: Callable[[Path], str] = sha256_of) -> Catalogue:
    """List and hash the images; `digest` may remember what it has hashed before."""
    listing = scan(folder, labels, outputs)
    read = _digested([*listing.scoring, *(listing.holdout or ())], folder, digest)
    first, second = read[: len(listing.scoring)], read[len(listing.scoring) :]
    return Catalogue(listing.labels, tuple(first), None if listing.holdout is None else tuple(second), folder)


@stage("split", returns=Split)
def split(out: Path, images: Catalogue, scoring: int, holdout: int | None, seed: int) -> Split:
    """fit, selection and holdout."""
    return divide(images, scoring, holdout, seed)


def divide(images: Catalogue, scoring: int, holdout: int | None, seed: int) -> Split:
    """Divide the images by seed and content; file names and listing order do not matter.

    Every prefix of a part holds as equal counts per class as there are images for. Of exact copies one stays; a copy
    on both sides of a given scoring/holdout division is leakage and refused.
    """
    folder = images.folder
    _at_least(4, scoring, "calibration.scoring", "3 fit and 1 selection images")
    _at_least(1, 1 if holdout is None else holdout, "calibration.holdout", "accuracy")
    pool = _deal(_distinct(images.scoring), seed)
    if images.holdout is None:
        _at_least(5, len(pool), f"different images in {folder}", "3 fit, 1 selection and 1 holdout images")
        _leave_some(len(pool), scoring, folder)
        held = _deal(pool[scoring:], seed)[:holdout]
    else:
        _at_least(4, len(pool), f"different images in {folder / 'scoring'}", "3 fit and 1 selection images")
        _refuse_leaks(images.scoring, images.holdout)
        held = _deal(_distinct(images.holdout), seed)[:holdout]
    _warn_of_unseen((*images.scoring, *(images.holdout or ())), held, images.labels)
    fit, selection = _fit_and_selection(pool[:scoring], seed)
    return Split(images.labels, fit, selection, held)


def require_learned(correct: int, images: int, source: Network, what: str, *, gated: bool) -> None:
    """A network near chance means that class folders and outputs, or images and input, do not match.

    Errors: DataError; a warning if not `gated`.
    """
    outputs = source.outputs
    chance = 1 / outputs
    if correct / images > chance + LEARNED * (1 - chance):
        return
    message = f"the dense network is right on {correct} of {images} {what} images, near chance for {outputs} classes"
    if gated:
        raise DataError(
            f"{message}: the order of the labels looks wrong, or the weights are not trained, or they are for another input than "
            f"{source.input.shown}",
            "give calibration.labels with one class name per model output, in the model's order, or correct model.input; "
            "for an untrained network set accuracy.max_drop: null",
        )
    progress.warn(message)


def read_labels(file: Path, outputs: int) -> tuple[str, ...]:
    """The labels of a model with so many outputs."""
    names = labels_of(file)
    if len(names) != outputs:
        raise DataError(
            f"label file {file} names {len(names)} classes and the model has {outputs} outputs",
            hint="write one class name per model output, in the order of the outputs",
        )
    return names


def labels_of(file: Path) -> tuple[str, ...]:
    """One class name per line; UTF-8, blank lines at the end do not count."""
    try:
        text = file.read_text("utf-8-sig")
    except OSError as fault:
        hint = "calibration.labels is a text file with one class name per model output"
        raise DataError(f"cannot read the label file {file}: {fault.strerror}", hint) from fault
    except UnicodeDecodeError as fault:
        raise DataError(f"label file {file}: byte {fault.start} is not UTF-8", hint="save it as UTF-8") from fault
    names = [normalize("NFC", line.strip()) for line in text.rstrip().split("\n")] if text.strip() else []
    line_of: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name or name in line_of:
            what = f"{name!r} is already on line {line_of[name]}" if name else "a blank line"
            raise DataError(f"{file}:{line}: {what}", hint="give each model output a name of its own")
        _require_one_line(name, file)
        line_of[name] = line
    return tuple(names)


def _require_one_line(name: str, place: Path) -> None:
    """labels.txt holds one class name a line, whatever its reader takes for the end of a line."""
    if name.splitlines() != [name]:
        raise DataError(f"class name {name!r} ({place}) holds a line break", hint="rename the class")


# --- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    path: Path
    chain: frozenset[tuple[int, int]]
    """Device and inode of the folder and of those above it: a link back to one of them would never end."""

    @staticmethod
    def top(path: Path) -> _Folder:
        if not stat.S_ISDIR(_stat(path).st_mode):
            raise DataError(f"{path} is not a folder", hint=_ARRANGE)
        real = path.resolve()
        states = [_stat(folder) for folder in (real, *real.parents)]
        return _Folder(path, frozenset((state.st_dev, state.st_ino) for state in states))

    @property
    def name(self) -> str:
        return normalize("NFC", self.path.name)

    def children(self) -> tuple[list[_Folder], list[Path]]:
        """Sub-folders and images, each sorted by name; hidden entries and other files are passed over."""
        folders, images = [], []
        for entry in _entries(self.path):
            state = _stat(entry)
            inode = state.st_dev, state.st_ino
            if stat.S_ISDIR(state.st_mode) and inode not in self.chain:
                folders.append(_Folder(entry, self.chain | {inode}))
            elif stat.S_ISREG(state.st_mode) and entry.suffix.lower() in SUFFIXES:
                images.append(entry)
        return folders, images

    def images(self) -> Iterator[Path]:
        folders, images = self.children()
        yield from chain(images, *(folder.images() for folder in folders))


def _entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as fault:
        raise _unreadable(folder, fault) from fault
    for entry in entries:
        if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
            raise DataError(f"{str(entry)!a}: the name is not UTF-8", hint="rename it")
    return entries


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as fault:
        raise _unreadable(path, fault) from fault


def _unreadable(path: Path, fault: OSError) -> DataError:
    hint = "check calibration.images, the permissions, and where links lead"
    return DataError(f"cannot read {path}: {fault.strerror}", hint)


# --- classes ---------------------------------------------------------------------------------------------------------


def _class_folders(pool: _Folder) -> list[_Folder]:
    folders, loose = pool.children()
    if not folders:
        raise DataError(f"{pool.path} holds no class folders, only {len(loose)} loose images", hint=_ARRANGE)
    return folders


def _class_names(pools: Sequence[_Folder], outputs: int) -> tuple[str, ...]:
    """Folder names in alphabetical order, as torchvision's ImageFolder numbers them and models are trained."""
    every = [tuple(folder.name for folder in _class_folders(pool)) for pool in pools]
    for pool, names in zip(pools, every, strict=True):
        _require_classes(pool.path, names, outputs)
    if odd := {*every[0]} ^ {*every[-1]}:
        raise DataError(
            f"scoring/ and holdout/ have different class folders: {min(odd)!r} is in one of them only",
            hint="give both the same class folders, or name the classes in calibration.labels",
        )
    return every[0]


def _require_classes(pool: Path, names: Sequence[str], outputs: int) -> None:
    if _NOT_CLASSES.issuperset(names):
        raise DataError(
            f"{pool} holds {', '.join(names)}: parts of a data set, not classes",
            hint="name two of them (or links to them) scoring/ and holdout/, or give calibration.images one of them",
        )
    if len(names) != outputs:
        raise DataError(
            f"{pool} holds {len(names)} class folders and the model has {outputs} outputs",
            hint="correct model.num_classes, or give calibration.labels one class name per model output; then a subset will do",
        )
    if all(name.isascii() and name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        raise DataError(
            f"class folders of {pool} are numbers whose alphabetical order ({', '.join(names[:3])}, ...) "
            "is not their numerical one",
            hint="give calibration.labels a file with the folder name of each model output, in the model's order",
        )


def _labelled(pool: _Folder, root: Path, names: Sequence[str]) -> Iterator[Found]:
    label_of = {name: label for label, name in enumerate(names)}
    for folder in _class_folders(pool):
        _require_one_line(folder.name, folder.path)
        if folder.name not in label_of:
            nearest = get_close_matches(folder.name, names, n=1, cutoff=0)[0]
            raise DataError(
                f"class folder {folder.path} is not among the labels; the nearest is {nearest!r}",
                hint="rename the folder, or correct the file of calibration.labels",
            )
        paths = sorted(path.relative_to(root).as_posix() for path in folder.images())
        if not paths:
            raise DataError(f"class folder {folder.path} holds no image", hint="remove it, or add images")
        yield from ((path, label_of[folder.name]) for path in paths)


# --- division --------------------------------------------------------------------------------------------------------


def _digested(found: Sequence[Found], root: Path, digest: Callable[[Path], str]) -> list[Image]:
    images: list[Image] = []
    for path, label in found:
        try:
            images.append(Image(path, digest(root / path), label))
        except OSError as fault:
            raise _unreadable(root / path, fault) from fault
        if len(images) % 64 == 0 or len(images) == len(found):
            progress.advance("images hashed", len(images), len(found))
    return images


def _distinct(images: Sequence[Image]) -> list[Image]:
    """The first by path of each content."""
    first: dict[str, Image] = {}
    for image in sorted(images, key=lambda image: image.path):
        first.setdefault(image.sha256, image)
    if copies := len(images) - len(first):
        contrary = sum(image.label != first[image.sha256].label for image in images)
        progress.warn(f"{copies} exact copies of other images are left out, {contrary} of them of another class")
    return list(first.values())


def _deal(images: Iterable[Image], seed: int) -> tuple[Image, ...]:
    """Shuffle by seed and content, then take the classes in turn."""
    turns: Counter[int] = Counter()
    dealt = []
    for image in sorted(images, key=lambda image: _lot(seed, image.sha256)):
        dealt.append((turns[image.label], image))
        turns[image.label] += 1
    return tuple(image for _, image in sorted(dealt, key=lambda pair: pair[0]))


def _lot(seed: int, what: object) -> str:
    return sha256(f"{seed}:{what}".encode()).hexdigest()


def _fit_and_selection(images: Sequence[Image], seed: int) -> tuple[tuple[Image, ...], tuple[Image, ...]]:
    """Every fourth image, counted class by class, is for selection: a quarter of each class, to within one image."""
    order = sorted(images, key=lambda image: (_lot(seed, image.label), _lot(seed, image.sha256)))
    selection = order[3::4]
    return _deal({*order} - {*selection}, seed), _deal(selection, seed)


def _refuse_leaks(scoring: Sequence[Image], holdout: Sequence[Image]) -> None:
    seen = {image.sha256: image.path for image in scoring}
    for image in holdout:
        if image.sha256 in seen:
            raise DataError(
                f"{seen[image.sha256]} and {image.path} are the same image, on both sides of the division",
                hint="remove one of them: accuracy on images that shaped the model says nothing",
            )


def _at_least(needed: int, have: int, what: str, purpose: str) -> None:
    if have < needed:
        raise DataError(f"{what}: {have}, and {needed} are needed for {purpose}", hint=f"give it {needed} or more")


def _leave_some(images: int, scoring: int, folder: Path) -> None:
    if images <= scoring:
        hint = f"add images, or set calibration.scoring to {max(4, images // 2)}"
        raise DataError(f"{folder} holds {images} different images; {scoring} for scoring leave none for holdout", hint)


def _warn_of_unseen(images: Iterable[Image], holdout: Sequence[Image], labels: Sequence[str]) -> None:
    classes = {image.label for image in images}
    unseen = classes - {image.label for image in holdout}
    if unseen and len(holdout) >= len(classes):
        progress.warn(f"{len(unseen)} classes have no holdout image, among them {labels[min(unseen)]!r}")

"""Folders become splits: deterministic, balanced, disjoint; whatever is ambiguous is refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from cswap_deploy.artifacts import Image, Split, sha256_of
from cswap_deploy.data import catalogue, divide, read_labels, scan
from cswap_deploy.errors import DataError
from cswap_deploy.progress import Recording, reporting


def fill(folder: Path, counts: dict[str, int], tag: str = "") -> Path:
    """Class folders of files with distinct content; only suffix and bytes matter here, nothing is decoded."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:03}.png").write_text(f"{tag} {name} {number}")
    return folder


def split(folder: Path, outputs: int = 3, scoring: int = 8, holdout: int | None = None, seed: int = 0) -> Split:
    return divide(catalogue(folder, None, outputs), scoring, holdout, seed)


def per_class(images: Iterable[Image]) -> list[int]:
    return [count for _, count in sorted(Counter(image.label for image in images).items())]


def digests(images: Iterable[Image]) -> list[str]:
    return [image.sha256 for image in images]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets", {"cat": 20, "dog": 20, "emu": 20})


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    fill(tmp_path / "divided" / "scoring", {"cat": 8, "dog": 8}, "s")
    fill(tmp_path / "divided" / "holdout", {"cat": 6, "dog": 6}, "h")
    fill(tmp_path / "divided" / "train", {"cat": 1, "dog": 1, "unused": 1}, "t")
    return tmp_path / "divided"


def test_parts_are_disjoint_balanced_and_complete(pets: Path) -> None:
    parts = split(pets, scoring=24)
    assert (len(parts.fit), len(parts.selection), len(parts.holdout)) == (18, 6, 36)
    assert [per_class(part) for part in (parts.fit, parts.selection, parts.holdout)] == [[6] * 3, [2] * 3, [12] * 3]
    assert len({*parts.fit, *parts.selection, *parts.holdout}) == 60
    assert parts.labels == ("cat", "dog", "emu")
    for image in parts.fit:
        assert image.path.startswith(parts.labels[image.label] + "/")
        assert image.sha256 == sha256_of(pets / image.path)


def test_every_prefix_is_balanced(pets: Path) -> None:
    holdout = split(pets, scoring=24, holdout=31).holdout
    assert len(holdout) == 31
    for length in range(3, 32):
        counts = per_class(holdout[:length])
        assert len(counts) == 3 and max(counts) - min(counts) <= 1


def test_scarce_classes_give_what_they_have(tmp_path: Path) -> None:
    folder = fill(tmp_path / "few", {"cat": 3, "dog": 50, "emu": 50})
    with reporting(recording := Recording()):
        parts = split(folder, scoring=23)
    assert per_class(parts.fit + parts.selection) == [3, 10, 10]
    assert recording.of("warn") == ["1 classes have no holdout image, among them 'cat'"]


def test_fewer_images_than_classes(tmp_path: Path) -> None:
    parts = split(fill(tmp_path / "many", {f"c{number:02}": 2 for number in range(40)}), outputs=40, scoring=10)
    assert (len(parts.fit), len(parts.selection)) == (8, 2)
    assert len({image.label for image in parts.fit + parts.selection}) == 10


def test_order_comes_from_seed_and_content_alone(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = split(pets)
    assert split(pets) == before
    assert digests(split(pets, seed=1).fit) != digests(before.fit)
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listing(folder), reverse=True)))
    assert split(pets) == before
    renamed = fill(tmp_path / "again", {"cat": 20, "dog": 20, "emu": 20})
    for path in [*renamed.rglob("*.png")]:
        path.rename(path.with_name(f"x{1000 - int(path.stem)}.JPEG"))
    assert digests(split(renamed).fit) == digests(before.fit)


def test_a_given_division_is_kept(divided: Path) -> None:
    parts = split(divided, outputs=2, scoring=8, holdout=4)
    assert [per_class(part) for part in (parts.fit, parts.selection, parts.holdout)] == [[3, 3], [1, 1], [2, 2]]
    assert all(image.path.startswith("scoring/") for image in parts.fit + parts.selection)
    assert all(image.path.startswith("holdout/") for image in parts.holdout)


def test_a_given_division_gives_all_it_has(divided: Path) -> None:
    parts = split(divided, outputs=2, scoring=1024)
    assert (len(parts.fit), len(parts.selection), len(parts.holdout)) == (12, 4, 12)


def test_other_files_and_hidden_ones_are_passed_over(pets: Path) -> None:
    for name in (".cache", "cat/.thumbs", "cat/deep/er"):
        (pets / name).mkdir(parents=True)
    for name in ("readme.md", "loose.png", ".cache/a.png", "cat/.thumbs/b.png", "cat/.c.png", "cat/notes.txt"):
        (pets / name).write_text(name)
    for name in ("a.PNG", "b.Jpg", "c.jpeg", "d.WEBP", "e.bmp"):
        (pets / "cat" / "deep" / "er" / name).write_text(name)
    paths = [path for path, _ in scan(pets, None, 3).scoring]
    assert len(paths) == 65
    assert "cat/deep/er/d.WEBP" in paths


def test_links_are_followed_and_cycles_end(pets: Path, tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", {"fox": 4})
    (pets / "fox").symlink_to(elsewhere / "fox")
    (pets / "cat" / "linked.png").symlink_to(elsewhere / "fox" / "000.png")
    (pets / "cat" / "parent").symlink_to(pets, target_is_directory=True)
    (pets / "up").symlink_to(tmp_path, target_is_directory=True)
    listing = scan(pets, None, 4)
    assert listing.labels == ("cat", "dog", "emu", "fox")
    assert Counter(label for _, label in listing.scoring) == {0: 21, 1: 20, 2: 20, 3: 4}


def test_copies_count_once(pets: Path) -> None:
    (pets / "cat" / "zzz.png").write_bytes((pets / "cat" / "003.png").read_bytes())
    (pets / "dog" / "zzz.png").write_bytes((pets / "cat" / "003.png").read_bytes())
    with reporting(recording := Recording()):
        parts = split(pets)
    everything = digests(parts.fit + parts.selection + parts.holdout)
    assert len(everything) == len(set(everything)) == 60
    assert recording.of("warn") == ["2 exact copies of other images are left out, 1 of them of another class"]


def test_the_given_digest_is_used(pets: Path) -> None:
    parts = divide(catalogue(pets, None, 3, digest=lambda path: path.as_posix()), 8, None, 0)
    assert all(image.sha256 == (pets / image.path).as_posix() for image in parts.holdout)


def test_labels_number_a_subset(pets: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes("\ufeffdog\r\naxolotl\r\nemu\r\ncat\r\ncafe\u0301\r\n\r\n\r\n".encode())
    parts = divide(catalogue(pets, labels, 5), 8, None, 0)
    assert parts.labels == ("dog", "axolotl", "emu", "cat", "caf\u00e9")
    assert {(image.path[:3], image.label) for image in parts.holdout} == {("dog", 0), ("emu", 2), ("cat", 3)}


def test_numbers_in_a_common_width_are_classes(tmp_path: Path) -> None:
    folder = fill(tmp_path / "digits", {f"{number:02}": 1 for number in range(11)})
    assert scan(folder, None, 11).labels[10] == "10"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_numbers_out_of_order_are_ambiguous(tmp_path: Path) -> None:
    folder = fill(tmp_path / "digits", {str(number): 1 for number in range(11)})
    with pytest.raises(DataError, match=r"alphabetical order \(0, 1, 10, \.\.\.\)") as caught:
        scan(folder, None, 11)
    assert "calibration.labels" in caught.value.hint


def test_missing_folder_and_loose_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere: No such file"):
        scan(tmp_path / "nowhere", None, 2)
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="no class folders, only 1 loose images") as caught:
        scan(tmp_path, None, 2)
    assert "<class>/<image>" in caught.value.hint
    with pytest.raises(DataError, match=r"a\.png is not a folder"):
        scan(tmp_path / "a.png", None, 2)


def test_empty_class_folder_and_wrong_number_of_classes(pets: Path) -> None:
    (pets / "fox").mkdir()
    with pytest.raises(DataError, match=r"class folder .*fox holds no image"):
        scan(pets, None, 4)
    with pytest.raises(DataError, match="4 class folders and the model has 1000 outputs"):
        scan(pets, None, 1000)


def test_parts_of_a_data_set_are_not_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train, val: parts of a data set"):
        scan(fill(tmp_path / "set", {"train": 2, "val": 2}), None, 2)


def test_half_a_division_and_unequal_halves(divided: Path) -> None:
    (divided / "holdout" / "dog").rename(divided / "holdout" / "dogs")
    with pytest.raises(DataError, match="different class folders: 'dog' is in one"):
        scan(divided, None, 2)
    (divided / "holdout").rename(divided / "held")
    with pytest.raises(DataError, match="has scoring/ but not its counterpart"):
        scan(divided, None, 2)


def test_leakage_names_both_files(divided: Path) -> None:
    (divided / "holdout/dog/new.png").write_bytes((divided / "scoring/cat/001.png").read_bytes())
    with pytest.raises(DataError, match=r"scoring/cat/001\.png and holdout/dog/new\.png are the same image"):
        split(divided, outputs=2)


@pytest.mark.parametrize(
    ("scoring", "holdout", "message"),
    [
        (3, None, "calibration.scoring: 3, and 4 are needed for 3 fit"),
        (8, 0, "calibration.holdout: 0, and 1 are needed"),
        (60, None, "60 different images; 60 for scoring leave none for holdout"),
    ],
)
def test_too_few_are_asked_for(pets: Path, scoring: int, holdout: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(pets, scoring=scoring, holdout=holdout)


def test_too_few_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"different images in .*few: 4, and 5 are needed"):
        split(fill(tmp_path / "few", {"cat": 2, "dog": 2}), outputs=2)
    fill(tmp_path / "two" / "scoring", {"cat": 2, "dog": 1}, "s")
    fill(tmp_path / "two" / "holdout", {"cat": 2, "dog": 1}, "h")
    with pytest.raises(DataError, match=r"different images in .*scoring: 3, and 4 are needed"):
        split(tmp_path / "two", outputs=2)


def test_unreadable_folder_and_dead_link(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pets / "dog" / "gone.png").symlink_to(pets / "nothing.png")
    with pytest.raises(DataError, match=r"cannot read .*gone\.png: No such file"):
        scan(pets, None, 3)

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot read .*pets: Permission denied"):
        scan(pets, None, 3)


def test_name_that_is_no_text(pets: Path) -> None:
    try:
        Path(os.fsdecode(bytes(pets / "cat" / "x") + b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match="the name is not UTF-8"):
        scan(pets, None, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\n", "names 2 classes and the model has 3 outputs"),
        (b"\n\n", "names 0 classes"),
        (b"cat\ndog\ncat\n", "labels.txt:3: 'cat' is already on line 1"),
        (b"cat\n\ndog\n", "labels.txt:2: a blank line"),
        (b"cat\n\xffdog\n", "byte 4 is not UTF-8"),
    ],
)
def test_label_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labels(file, 3)


def test_label_file_is_missing_or_does_not_fit(pets: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    with pytest.raises(DataError, match=r"cannot read the label file .*labels\.txt: No such file"):
        scan(pets, file, 3)
    file.write_text("cats\ndog\nemu\n")
    with pytest.raises(DataError, match=r"class folder .*cat is not among the labels; the nearest is 'cats'"):
        scan(pets, file, 3)

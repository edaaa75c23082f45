"""The images that scoring and fitting see, and where that runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo

from cswap_deploy.errors import DeviceError
from cswap_deploy.prune.batches import Batches, resolve_device
from cswap_deploy.prune.producers import JUDGES


def pictures(count: int, size: int = 24) -> Batches:
    """No two alike, and none like its own mirror image or a step of itself."""
    pixels = np.random.default_rng(1).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Batches(pixels, np.arange(count, dtype=np.int64), zoo.spec(size), "cpu")


def test_copies_come_last_and_are_steps_of_up_to_an_eighth() -> None:
    plain = pictures(10)
    found = plain.with_copies(20)
    assert (len(found), found.originals, found.copies) == (30, 10, 20)
    assert np.array_equal(found.pixels[:10], plain.pixels)
    assert found.labels.tolist() == [*range(10), *range(2, 10), *range(2, 10), *range(2, 6)]
    steps = set()
    for pixels, label in zip(found.pixels[10:], found.labels[10:], strict=True):
        wide = np.pad(plain.pixels[label], [(0, 0), (3, 3), (3, 3)], mode="reflect")
        own = [(y, x) for y in range(7) for x in range(7) if np.array_equal(wide[:, y : y + 24, x : x + 24], pixels)]
        assert len(own) == 1
        steps.update(own)
    assert len(steps) > 10 and {y for y, _ in steps} != {3} != {x for _, x in steps}
    assert np.array_equal(plain.with_copies(20).pixels, found.pixels), "the same copies each time"


def test_the_first_images_of_copied_ones_are_originals() -> None:
    found = pictures(10).with_copies(20)
    assert [(len(part), part.copies) for part in map(found.first, (4, 10, 15, 99))] == [
        (4, 0),
        (10, 0),
        (15, 5),
        (30, 20),
    ]


def test_pictures_too_small_to_be_moved_are_copied_as_they_are() -> None:
    plain = pictures(5, size=7)
    assert np.array_equal(plain.with_copies(4).pixels[5:], plain.pixels[1:])


def test_what_judges_steps_has_no_copies_among_what_they_learn_from() -> None:
    for count in (*range(25, 800, 7), 384, 385, 768):
        found = pictures(count, size=8).with_copies(4 * count).divided(JUDGES)
        judges = max(1, -(-found.originals // found.size) // JUDGES)  # as `Movers` takes them
        assert judges * found.size <= min(found.labels[count:]) < count / 4


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        resolve_device("cuda")


def test_cuda_computes_in_full_precision_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("allow_tf32", True), ("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    assert resolve_device("cpu") == "cpu" and torch.backends.cudnn.allow_tf32, "nothing is touched where it is not used"
    assert resolve_device("auto") == "cuda"
    found = torch.backends.cudnn
    assert (found.allow_tf32, found.deterministic, found.benchmark) == (False, True, False)

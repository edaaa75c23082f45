"""What is kept of a forward and replayed: the same values as without, whoever writes into them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cswap_deploy.artifacts import InputSpec
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.observe import observe
from cswap_deploy.prune.replay import Reuse, Walk, called_once, left_untouched


class Buffered(nn.Module):
    """Gives its own buffer, which each forward fills anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("given", torch.zeros(0))

    def forward(self, images: Tensor) -> Tensor:
        if self.given.shape != images.shape:
            self.given = torch.zeros_like(images)
        self.given.copy_(images * 2)
        return self.given


class Writing(nn.Module):
    """Writes into the output of `norm`, into a view of that of `second`, into its own sum and, past autograd, into that of `late`."""

    def __init__(self) -> None:
        super().__init__()
        self.given = Buffered()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.same = nn.Identity()
        self.third = nn.Conv2d(4, 4, 1)
        self.late = nn.Identity()
        self.fourth = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        made = self.norm(self.first(self.given(images)))
        made.relu_()
        read = self.same(self.second(made))
        read[:, 0].mul_(2)
        third = self.third(read)
        third += made
        fourth = self.late(self.fourth(third))
        fourth.data.mul_(3)
        found: Tensor = self.last(fourth.mean((2, 3)))
        return found


class Seldom(nn.Module):
    """Writes that change nothing here: a clamp that nothing reaches, a branch that gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.second, self.last = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        for parameter in self.branch.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        made = self.second(self.first(images).clamp_(max=1e6))
        made += self.branch(made)
        found: Tensor = self.last(made.mean((2, 3)))
        return found


class Noting(nn.Module):
    """Keeps what it is given beside its output."""

    def forward(self, images: Tensor) -> Tensor:
        self.map = images.mean(1, keepdim=True).sigmoid()
        return images


class Remembering(nn.Module):
    """What comes later reads what an earlier module has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.note = nn.Conv2d(3, 4, 3, padding=1), Noting()
        self.second, self.third, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        read = self.second(self.note(self.first(images)))
        found: Tensor = self.last(self.third(read * self.note.map).mean((2, 3)))
        return found


def network() -> Writing:
    torch.manual_seed(0)
    return Writing().eval()


def batches() -> Batches:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)
    spec = InputSpec((3, 8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)
    return Batches(pixels, np.zeros(10, np.int64), spec, "cpu", 4)


def test_what_is_written_into_is_told_apart() -> None:
    module, images = network(), next(iter(batches()))[0]
    assert left_untouched(module, called_once(module, images), images) == {"first", "last"}


def test_a_write_that_changes_nothing_on_these_images_is_one() -> None:
    module, images = Seldom().eval(), next(iter(batches()))[0]
    assert left_untouched(module, called_once(module, images), images) == {"branch", "last"}


@torch.no_grad()
def test_what_a_module_keeps_beside_its_output_is_of_the_same_images() -> None:
    module = Remembering().eval()
    walk = Walk(module, batches(), Reuse())
    for name in ("first", "second", "third", "last"):
        for found, (pictures, _) in zip(list(walk.visit(name, as_far_as_sum=False)), batches(), strict=True):
            assert torch.equal(found.inputs, observe(module, name, pictures, as_far_as_sum=False).inputs)


@torch.no_grad()
def test_what_nothing_reads_any_more_is_let_go() -> None:
    layers = [part for _ in range(3) for part in (nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid())]
    module = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(192, 2)).eval()
    walk = Walk(module, batches(), Reuse())
    for name in ("0.0", "0.2", "0.4", "2"):
        list(walk.visit(name, as_far_as_sum=False))
        for kept in walk.kept.values():
            held = {key for key, value in kept.items() if value.untyped_storage().nbytes() > value.element_size()}
            assert held == walk.reuse.read[name]


@torch.no_grad()
@pytest.mark.parametrize("as_far_as_sum", [False, True])
def test_a_walk_sees_what_a_forward_sees(as_far_as_sum: bool) -> None:
    module, images = network(), batches()
    walk = Walk(module, images, Reuse())
    for name in ("first", "second", "third", "fourth", "last"):
        seen = list(walk.visit(name, as_far_as_sum=as_far_as_sum))
        for found, (pictures, _) in zip(seen, images, strict=True):
            fresh = observe(module, name, pictures, as_far_as_sum=as_far_as_sum)
            assert torch.equal(found.inputs, fresh.inputs)
            assert torch.equal(found.output, fresh.output)
            assert (found.shortcut is None) == (fresh.shortcut is None)
            assert found.shortcut is None or torch.equal(found.shortcut, fresh.shortcut)
        for number, (pictures, _) in enumerate(images):
            with walk.rest(number):
                once = module(pictures)
                assert torch.equal(once, module(pictures)), "a second forward finds what the first has left"
            assert torch.equal(once, module(pictures))

"""How far outputs are from the dense network's: closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.damage import Damage


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def images(count: int) -> Batches:
    return zoo.batches(zoo.ZOO["linear"], count)


@pytest.mark.parametrize("name", ["linear", "residual", "vit"])
def test_a_network_is_not_damaged_by_itself(name: str) -> None:
    entry = zoo.ZOO[name]
    module = entry.build()
    assert Damage.to(module, zoo.batches(entry, 70), 4.0).of(module) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 64, 70])
def test_of_constant_logits_it_is_known(temperature: float, count: int) -> None:
    """70 images are two batches of unlike size, which must not weigh alike."""
    dense, other = (1.0, -2.0, 0.5), (0.0, 3.0, -1.0)

    def softmax(values: tuple[float, ...]) -> list[float]:
        powers = [math.exp(value / temperature) for value in values]
        return [power / sum(powers) for power in powers]

    wanted = sum(p * math.log(p / q) for p, q in zip(softmax(dense), softmax(other), strict=True))
    found = Damage.to(Constant(*dense), images(count), temperature).of(Constant(*other))
    assert found == pytest.approx(wanted * temperature**2, rel=1e-5)


def test_every_image_weighs_alike() -> None:
    entry = zoo.ZOO["linear"]
    dense, other, batches = entry.build(), zoo.Entry(zoo.linear, entry.spec, 99).build(), images(70)
    single = [
        Damage.to(dense, one, 2.0).of(other)
        for number in range(70)
        for one in [
            Batches(batches.pixels[number : number + 1], batches.labels[number : number + 1], batches.spec, "cpu")
        ]
    ]
    assert Damage.to(dense, batches, 2.0).of(other) == pytest.approx(float(np.mean(single)), rel=1e-4)


def test_a_shift_of_all_logits_is_no_damage_and_labels_do_not_matter() -> None:
    batches = images(10)
    relabelled = Batches(batches.pixels, batches.labels * 0, batches.spec, "cpu")
    dense: Any = Constant(1.0, 2.0, 3.0)
    assert Damage.to(dense, batches, 4.0).of(Constant(11.0, 12.0, 13.0)) == pytest.approx(0, abs=1e-5)
    other = Constant(3.0, 2.0, 1.0)
    assert Damage.to(dense, batches, 4.0).of(other) == Damage.to(dense, relabelled, 4.0).of(other)


def test_at_a_high_temperature_it_is_half_the_squared_distance_of_the_logits() -> None:
    """Hinton et al. 2015, section 2.1: of centred logits, divided by the number of classes."""
    dense, other = torch.tensor([0.3, -0.2, -0.1]), torch.tensor([-0.4, 0.1, 0.3])
    found = Damage.to(Constant(*dense.tolist()), images(4), 50.0).of(Constant(*other.tolist()))
    assert found == pytest.approx(float((dense - other).square().sum()) / 2 / 3, rel=0.02)

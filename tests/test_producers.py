"""Moving the makers of the units that stay: towards less error of what their consumer gives, in closed steps, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from cswap_deploy.artifacts import Group, Slice
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.producers import pairs
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.recipe import LeastSquaresCompensation

HALF = {"residual": {"layer2.conv1": (0, 2, 5)}, "vit": {"blocks.0.mlp.fc1": tuple(range(0, 24, 2))}}


def outputs(module: nn.Module, name: str, images: Tensor) -> Tensor:
    """What layer `name` gives."""
    seen: list[Tensor] = []
    hook = module.get_submodule(name).register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    with torch.no_grad():
        module(images)
    hook.remove()
    return seen[0]


def fitted(name: str, steps: int, structure: Structure | None = None) -> tuple[Any, Any, Any]:
    entry = zoo.ZOO[name]
    dense, batches = entry.build(), zoo.batches(entry, 80)
    settings = LeastSquaresCompensation(producer_steps=steps)
    return dense, compensated(dense, entry.groups.groups, HALF[name], batches, settings, structure), batches


@pytest.mark.parametrize(
    ("name", "consumer", "less"), [("residual", "layer2", 0.95), ("vit", "blocks.0.mlp.fc2", 0.95)]
)
def test_what_comes_behind_the_consumer_is_nearer_to_the_dense_network(name: str, consumer: str, less: float) -> None:
    errors = []
    for steps in (0, 2):
        dense, module, batches = fitted(name, steps)
        images = torch.cat([batch for batch, _ in batches])
        wanted = outputs(dense, consumer, images)
        errors.append(float((outputs(module, consumer, images) - wanted).square().sum()))
    assert errors[1] < less * errors[0]


def test_each_step_makes_it_better() -> None:
    errors = []
    for steps in range(4):
        dense, module, batches = fitted("residual", steps)
        images = torch.cat([batch for batch, _ in batches])
        errors.append(float((outputs(module, "layer2", images) - outputs(dense, "layer2", images)).square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_makers_that_can_give_all_are_led_there() -> None:
    """The consumer reads the sum of two copies of a channel that is linear in the input: one channel, doubled, is all of it."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(32, 3)).eval()
    entry = zoo.Entry(lambda: dense, zoo.spec(4), 0)
    batches, found = zoo.batches(entry, 60), find(dense, entry.spec)
    group = found.by_name["0"]
    images = torch.cat([batch for batch, _ in batches])
    wanted, errors = outputs(dense, "1", images), []
    for steps in (0, 12):
        settings = LeastSquaresCompensation(producer_steps=steps)
        module = compensated(dense, found.groups, {group.name: (0, 3)}, batches, settings)
        errors.append(float((outputs(module, "1", images) - wanted).square().mean() / wanted.var()))
    assert errors[0] > 0.01  # two of the four directions cannot be combined from the other two
    assert errors[1] < 1e-3 * errors[0]  # but two channels can carry both outputs of the consumer


def test_two_fits_are_the_same_bytes_also_with_what_the_first_found() -> None:
    structure = Structure()
    one, two, three = (fitted("residual", 2, given)[1] for given in (None, structure, structure))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]) and torch.equal(value, three.state_dict()[name])


def test_what_left_stays_out_and_no_hook_or_patch_is_left() -> None:
    dense, module, _ = fitted("residual", 2)
    assert not module.layer2.conv2.weight[:, [1, 3, 4]].any()
    assert all(not layer._forward_hooks and "forward" not in layer.__dict__ for layer in module.modules())
    assert zoo.same(zoo.fingerprint(dense), zoo.fingerprint(zoo.ZOO["residual"].build()))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("residual", {"layer1.conv1": "layer1.conv2", "layer2.conv1": "layer2.conv2", "layer3.conv1": "layer3.conv2"}),
        ("vit", {"blocks.0.mlp.fc1": "blocks.0.mlp.fc2", "blocks.1.mlp.fc1": "blocks.1.mlp.fc2"}),
    ],
)
def test_pairs_of_a_network(name: str, wanted: dict[str, str]) -> None:
    """Inner units of blocks; a stream that several layers make or read, and heads, have no pair."""
    entry, structure = zoo.ZOO[name], Structure()
    examine(entry.build(), structure, zoo.batches(entry, 8), ())
    assert pairs(entry.groups.groups, structure.sites) == wanted


def test_a_layer_that_cannot_be_fitted_makes_no_pair() -> None:
    group = Group("a", "channels", 4, (Slice("a", "weight", 0, 0, 1), Slice("b", "weight", 1, 0, 1)))
    assert pairs([group], {"a": None, "b": None}) == {}

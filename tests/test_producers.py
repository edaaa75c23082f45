"""Moving the makers of the units that stay: towards less error of what their consumer gives, in closed steps, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from cswap_deploy.artifacts import Group, Slice
from cswap_deploy.prune.compensate import compensated
from cswap_deploy.prune.cut import masked_copy
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.producers import Movers, partners
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.prune.replay import Walk
from cswap_deploy.prune.systems import System
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
        (
            "vit",
            {
                "blocks.0.attn.qkv": "blocks.0.attn.proj",
                "blocks.0.mlp.fc1": "blocks.0.mlp.fc2",
                "blocks.1.attn.qkv": "blocks.1.attn.proj",
                "blocks.1.mlp.fc1": "blocks.1.mlp.fc2",
            },
        ),
    ],
)
def test_pairs_of_a_network(name: str, wanted: dict[str, str]) -> None:
    """Inner units of blocks and heads; a stream that several layers make or read has no pair."""
    entry, structure = zoo.ZOO[name], Structure()
    examine(entry.build(), structure, zoo.batches(entry, 8), ())
    found = partners(entry.groups.groups, structure.sites)
    assert {name: partner.consumer for name, partner in found.items()} == wanted


def test_a_layer_that_cannot_be_fitted_makes_no_pair() -> None:
    group = Group("a", "channels", 4, (Slice("a", "weight", 0, 0, 1), Slice("b", "weight", 1, 0, 1)))
    assert partners([group], {"a": None, "b": None}) == {}


class Branches(nn.Module):
    """A short branch and a longer one side by side: the consumer of the first producer runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b1, self.b2 = (zoo.conv_bn(inputs, 8) for inputs in (3, 3, 8))
        self.c, self.d = zoo.conv_bn(8, 6, 1), zoo.conv_bn(8, 6, 1)
        self.head = zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        short = self.a(x)
        out: Tensor = self.c(self.b2(self.b1(x))) + self.d(short)
        return torch.as_tensor(self.head(out))


def test_a_short_branch_beside_a_longer_one_is_moved_towards_what_it_was() -> None:
    torch.manual_seed(0)
    dense = zoo.randomised(Branches()).eval()
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    batches, found = zoo.batches(entry, 80), find(dense, entry.spec)
    keep = {group.name: tuple(range(0, group.units, 2)) for group in found.groups}
    assert {"a.0", "b1.0", "b2.0"} <= keep.keys()
    images, errors = torch.cat([batch for batch, _ in batches]), []
    for steps in (0, 2):
        module = compensated(dense, found.groups, keep, batches, LeastSquaresCompensation(producer_steps=steps))
        errors.append(float((outputs(module, "head", images) - outputs(dense, "head", images)).square().sum()))
    assert errors[1] < errors[0]


class Strided(nn.Module):
    """The maker is a strided 1x1 convolution of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1, stride=2), zoo.conv_bn(8, 6), zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.b(self.a(x).relu())))


def test_a_strided_maker_of_few_channels_moves_too() -> None:
    """Channels last, oneDNN of PyTorch 2.14 writes beyond its gradient on processors with AVX2 alone: the process aborts."""
    torch.manual_seed(0)
    dense = zoo.randomised(Strided()).eval()
    entry = zoo.Entry(lambda: dense, zoo.spec(16), 0)
    batches, found = zoo.batches(entry, 80), find(dense, entry.spec)
    keep = {"a": tuple(range(4))}
    images, errors = torch.cat([batch for batch, _ in batches]), []
    for steps in (0, 2):
        module = compensated(dense, found.groups, keep, batches, LeastSquaresCompensation(producer_steps=steps))
        errors.append(float((outputs(module, "b", images) - outputs(dense, "b", images)).square().sum()))
    assert errors[1] < errors[0]


def test_the_heads_that_stay_move_towards_what_left() -> None:
    """The way from qkv to the projection goes through a softmax; queries, keys and values of the heads that stay all move."""
    entry = zoo.ZOO["vit"]
    dense, batches = entry.build(), zoo.batches(entry, 80)
    units = next(group.units for group in entry.groups.groups if group.name == "blocks.0.attn.heads")
    keep, images = {"blocks.0.attn.heads": tuple(range(units // 2))}, torch.cat([batch for batch, _ in batches])
    errors, weights = [], []
    for steps in (0, 2):
        module = compensated(dense, entry.groups.groups, keep, batches, LeastSquaresCompensation(producer_steps=steps))
        parts = [outputs(net, "blocks.0.attn.proj", images) for net in (module, dense)]
        errors.append(float((parts[0] - parts[1]).square().sum()))
        weights.append(module.get_submodule("blocks.0.attn.qkv").weight.detach().clone())
    assert errors[1] < errors[0]
    changed = (weights[1] != weights[0]).any(1).reshape(3, units, -1)
    assert changed[:, : units // 2].all() and not changed[:, units // 2 :].any(), "what left is not read any more"


def pair_of(name: str, producer: str, keep: dict[str, tuple[int, ...]]) -> tuple[Any, Any]:
    """The pair of a producer in a masked copy of a zoo network, and its own dense network."""
    entry, structure = zoo.ZOO[name], Structure()
    dense, batches = entry.build(), zoo.batches(entry, 80)
    examine(dense, structure, batches, ())
    consumer = partners(entry.groups.groups, structure.sites)[producer].consumer
    module = masked_copy(dense, entry.groups.groups, keep)
    movers = Movers(dense, module, batches, structure.reuse, structure.sites, structure.order, len(batches), 2)
    site = structure.sites[producer]
    assert site
    system = System.begin(site, dense, frozenset())
    for place in movers.here.visit(producer, as_far_as_sum=False):
        system.equations.add(site.rows.draw(place.inputs, place.output, 0), site.rows.order())
    movers.here = Walk(module, movers.batches, structure.reuse)
    gone = frozenset({*range(len(keep[producer]) + 3)} - {*keep[producer]})
    return movers._pair(producer, consumer, system, gone), dense


@torch.no_grad()
def test_the_bias_that_a_batchnorm_took_up_counts() -> None:
    """A fit with a free bias leaves no error on average; before it, the cut left one."""
    pair, _ = pair_of("residual", "layer2.conv1", {"layer2.conv1": (0, 2, 5)})
    plain = replace(pair, behind=replace(pair.behind, outlet=replace(pair.behind.outlet, rectified=False)))
    lessons = [replace(lesson, offsets=None) for lesson in plain.lessons]

    def mean() -> Tensor:
        errors = [plain._error(plain._given(lesson), lesson)[0] for lesson in lessons]
        return torch.cat(errors).mean((0, 2)).abs().max()

    before = mean()
    plain.fit_consumer()
    assert mean() < 0.02 * before


@torch.no_grad()
def test_the_step_is_the_gauss_newton_step_where_the_kronecker_product_is_exact() -> None:
    """One unit, a linear way to the consumer: the line search then reaches the least error along the step in one go."""
    pair, _ = pair_of("vit", "blocks.0.mlp.fc1", {"blocks.0.mlp.fc1": tuple(range(21))})
    pair.fit_consumer()
    layer = pair.here.module.get_submodule(pair.producer)
    weights = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).T.clone()

    def error() -> float:
        return sum(float(pair._error(pair._given(lesson), lesson)[0].square().sum()) for lesson in pair.lessons)

    before = error()
    step, _ = pair.step()
    found = pair.searched(weights, *pair.step())
    after = error()
    assert after < before
    length = float(((found - weights) * step).sum() / step.square().sum())
    for other in (0.5 * length, 1.5 * length):
        pair.system.write(pair.here.module, pair.producer, weights + other * step)
        assert error() > after, "the line search is near the least"


def test_too_few_images_move_nothing() -> None:
    entry = zoo.ZOO["residual"]
    dense, batches = entry.build(), zoo.batches(entry, 1)
    still, moved = (
        compensated(
            dense, entry.groups.groups, HALF["residual"], batches, LeastSquaresCompensation(producer_steps=steps)
        )
        for steps in (0, 2)
    )
    for name, value in still.state_dict().items():
        assert torch.equal(value, moved.state_dict()[name])


def test_what_is_between_maker_and_reader_is_not_fitted_back() -> None:
    entry = zoo.ZOO["separable"]
    dense, batches = entry.build(), zoo.batches(entry, 90)
    group = next(group for group in entry.groups.groups if any(member.module == "2.0" for member in group.members))
    structure = Structure()
    examine(dense, structure, batches, ())
    partner = partners(entry.groups.groups, structure.sites)[group.name]
    assert "2.0" in partner.between and partner.consumer == "3.0"
    keep = {group.name: tuple(range(0, group.units, 2)), entry.groups.groups[0].name: (0, 1, 2)}
    module = compensated(dense, entry.groups.groups, keep, batches, LeastSquaresCompensation())
    assert torch.equal(module[2][0].weight, dense[2][0].weight)
    assert not torch.equal(module[1][0].weight, dense[1][0].weight)

"""Damage curves: each point is what one gets by masking, fitting and running the whole network without any shortcut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from cswap_deploy.artifacts import Group, Groups
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import with_systems
from cswap_deploy.prune.curves import Gauge, leaving_order, tried_widths
from cswap_deploy.prune.cut import masked_copy, positions
from cswap_deploy.prune.damage import Damage
from cswap_deploy.prune.refit import Structure, Systems, examine
from cswap_deploy.prune.select import Kept
from cswap_deploy.recipe import (
    BatchNormCompensation,
    CompensationSettings,
    LeastSquaresCompensation,
    MeanCompensation,
    NoCompensation,
)


@dataclass
class Compensated:
    """A network of the zoo after a first cut, with all that curves are measured from."""

    groups: Groups
    keep: Kept
    module: nn.Module
    systems: Systems
    damage: Damage
    structure: Structure

    @staticmethod
    def of(name: str, settings: CompensationSettings, keep: Mapping[str, Sequence[int]] | None = None) -> Compensated:
        entry = zoo.ZOO[name]
        dense, batches, structure = entry.build(), zoo.batches(entry, 70), Structure()
        everything = {group.name: tuple(range(group.units)) for group in entry.groups.groups}
        kept: Kept = {**everything, **{group: tuple(units) for group, units in (keep or {}).items()}}
        module, systems = with_systems(dense, entry.groups.groups, kept, batches, settings, structure)
        examine(dense, structure, batches, ())
        return Compensated(entry.groups, kept, module, systems, Damage.to(dense, batches, 4.0), structure)

    def orders(self) -> dict[str, tuple[int, ...]]:
        """Every other unit first."""
        return {name: (*units[1::2], *units[::2]) for name, units in self.keep.items()}

    def curves(self, round_to: int = 1) -> Any:
        return self.gauge().curves(round_to)

    def gauge(self) -> Gauge:
        return Gauge(self.module, self.groups.groups, self.orders(), self.systems, self.damage, self.structure)

    def narrowed(self, group: Group, width: int) -> nn.Module:
        """The network with that group narrower, from the systems alone and with nothing replayed."""
        gone = self.orders()[group.name][: len(self.keep[group.name]) - width]
        module = masked_copy(self.module, [group], {group.name: sorted(set(range(group.units)) - set(gone))})
        with torch.no_grad():
            for name in {member.module for member in group.consumers} & set(self.systems):
                system = self.systems[name]
                lost = {c for member in group.consumers if member.module == name for c in positions(member, gone)}
                columns = system.columns([channel for channel in system.channels if channel not in lost])
                system.write(module, name, system.equations.solve(columns, system.start))
        return module


CASES = [
    ("chain", None),
    ("residual", {"stem.0": (0, 2, 3), "layer2.conv2": (1, 4, 5, 7)}),
    ("concat", {"left.0": (0, 4)}),
]
CASES += [("flattened", None), ("recurrent", None), ("in-place", None), ("vit", {"blocks.0.attn.heads": (0, 2)})]
"""`concat`: one layer reads three groups, and one group is read by three layers; `recurrent`: a layer that runs twice."""


@pytest.mark.parametrize("method", [LeastSquaresCompensation(), NoCompensation()], ids=lambda method: str(method.kind))
@pytest.mark.parametrize(("name", "keep"), CASES, ids=[name for name, _ in CASES])
def test_each_point_is_the_damage_of_the_network_really_made(
    name: str, keep: dict[str, tuple[int, ...]] | None, method: CompensationSettings
) -> None:
    found = Compensated.of(name, method, keep)
    begun = found.damage.of(found.module)
    curves = found.curves()
    assert [curve.group for curve in curves] == [group.name for group in found.groups.groups]
    for group, curve in zip(found.groups.groups, curves, strict=True):
        assert curve.order == found.orders()[group.name]
        assert curve.widths == tried_widths(group, len(curve.order), 1)
        for width, damage in list(zip(curve.widths, curve.damage, strict=True))[:: max(1, len(curve.widths) - 1)]:
            wanted = found.damage.of(found.narrowed(group, width)) - begun
            assert damage == pytest.approx(wanted, rel=2e-3, abs=2e-5), (group.name, width)


@pytest.mark.parametrize("name", ["residual", "vit", "concat", "mlp"])
@pytest.mark.parametrize("method", [LeastSquaresCompensation(), MeanCompensation(), BatchNormCompensation()])
@pytest.mark.parametrize("cut", [False, True])
def test_the_module_is_left_as_it_was(name: str, method: CompensationSettings, cut: bool) -> None:
    """Also without the biases that a fit would add."""
    found = Compensated.of(name, method, zoo.half(zoo.ZOO[name].groups) if cut else None)
    before = zoo.fingerprint(found.module)
    found.curves()
    assert zoo.same(before, zoo.fingerprint(found.module))


def test_consumers_that_are_not_fitted_are_masked_only() -> None:
    """Means are folded in when the plan is applied; between the steps the curve says what the mask costs."""
    for method in (MeanCompensation(), BatchNormCompensation(), NoCompensation()):
        found = Compensated.of("chain", method)
        assert found.systems == {}
        first = found.curves()[0]
        group = found.groups.groups[0]
        masked = masked_copy(found.module, [group], {group.name: first.order[-1:]})
        assert first.damage[-1] == pytest.approx(found.damage.of(masked) - found.damage.of(found.module), rel=1e-4)


def test_what_nothing_reads_costs_nothing_and_what_is_fitted_costs_less_than_what_is_not() -> None:
    name = "mlp"
    for group, fitted, masked in zip(
        zoo.ZOO[name].groups.groups,
        Compensated.of(name, LeastSquaresCompensation()).curves(),
        Compensated.of(name, NoCompensation()).curves(),
        strict=True,
    ):
        assert fitted.widths == masked.widths and group.name == fitted.group
        assert sum(fitted.damage) < sum(masked.damage)
    found = Compensated.of(name, NoCompensation())
    group = found.groups.groups[0]
    for unit in found.orders()[group.name][:3]:
        zoo.kill(found.module, group, unit)
    curve = found.curves()[0]
    assert curve.damage[:2] == pytest.approx((0, 0), abs=1e-6)


def test_a_copy_leaves_first_and_at_no_cost() -> None:
    entry = zoo.ZOO["mlp"]
    dense, batches, structure = entry.build(), zoo.batches(entry, 200), Structure()
    group = entry.groups.groups[0]
    zoo.duplicate(dense, group, 3, 7)
    kept = {item.name: tuple(range(item.units)) for item in entry.groups.groups}
    module, systems = with_systems(dense, entry.groups.groups, kept, batches, LeastSquaresCompensation(), structure)
    order = leaving_order(module, group, kept[group.name], systems)
    assert order is not None and order[0] in (3, 7) and sorted(order) == list(range(12))
    orders = {**kept, group.name: order}
    damage = Damage.to(dense, batches, 4.0)
    curve = Gauge(module, entry.groups.groups, orders, systems, damage, structure).curves(1)[0]
    assert abs(curve.damage[0]) < 1e-5 < curve.damage[-1]


def test_without_systems_there_is_no_order_of_elimination() -> None:
    found = Compensated.of("chain", NoCompensation())
    group = found.groups.groups[0]
    assert leaving_order(found.module, group, found.keep[group.name], found.systems) is None


def test_the_order_of_elimination_names_the_kept_units() -> None:
    keep = {"stem.0": (0, 2, 3, 5), "layer1.conv1": (1, 6, 7)}
    found = Compensated.of("residual", LeastSquaresCompensation(), keep)
    for group in found.groups.groups:
        order = leaving_order(found.module, group, found.keep[group.name], found.systems)
        assert order is not None and sorted(order) == list(found.keep[group.name])


@pytest.mark.parametrize(
    ("kind", "units", "now", "round_to", "multiple", "least"),
    [
        ("channels", 64, 64, 1, 1, 1),
        ("channels", 64, 64, 16, 16, 16),
        ("channels", 64, 40, 8, 8, 8),
        ("channels", 20, 20, 8, 8, 8),
        ("channels", 3, 3, 1, 1, 1),
        ("heads", 12, 12, 8, 1, 1),
    ],
)
def test_widths_that_are_tried(kind: Any, units: int, now: int, round_to: int, multiple: int, least: int) -> None:
    """Below the present one, widest first, down to the least; of a wide group several, among them one close to the present."""
    widths = tried_widths(Group("g", kind, units, ()), now, round_to)
    assert widths == tuple(sorted(set(widths), reverse=True))
    assert widths[0] < now and widths[-1] == least
    assert {width % multiple for width in widths} == {0}
    assert widths[0] >= 0.9 * now - 2 * multiple
    assert len(widths) >= min(4, (now - 1) // multiple)


@pytest.mark.parametrize(
    ("kind", "units", "now", "round_to"), [("channels", 5, 5, 8), ("channels", 8, 8, 8), ("heads", 3, 1, 1)]
)
def test_a_group_at_its_least_has_no_width_to_try(kind: Any, units: int, now: int, round_to: int) -> None:
    assert tried_widths(Group("g", kind, units, ()), now, round_to) == ()


def test_images_that_come_in_unlike_batches_weigh_alike() -> None:
    """70 images are a batch of 64 and one of 6: the damage is the mean over the images."""
    found = Compensated.of("chain", NoCompensation())
    assert len(found.damage.batches) == 70 and found.damage.batches.size == 64
    batches = found.damage.batches
    reverse = Batches(batches.pixels[::-1].copy(), batches.labels[::-1].copy(), batches.spec, "cpu")
    other = Compensated.of("chain", NoCompensation())
    other.damage = Damage.to(zoo.ZOO["chain"].build(), reverse, 4.0)
    for one, two in zip(found.curves(), other.curves(), strict=True):
        assert one.damage == pytest.approx(two.damage, rel=1e-3, abs=1e-6)

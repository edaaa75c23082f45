"""Which layers are read as linear systems, and how many output positions of them a fit looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from timm.layers import Conv2dSame
from torch import Tensor, nn

from cswap_deploy.progress import Recording, reporting
from cswap_deploy.prune import refit, rows
from cswap_deploy.prune.compensate import compensated, with_systems
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.producers import Movers
from cswap_deploy.prune.refit import Structure, examine
from cswap_deploy.prune.rows import Rows
from cswap_deploy.recipe import LeastSquaresCompensation

STILL, MOVING = LeastSquaresCompensation(producer_steps=0), LeastSquaresCompensation(producer_steps=2)


class Merging(nn.Linear):
    """Gives a token less than it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x[:, 1:] + x[:, :-1]) / 2)


class Gated(nn.Conv2d):
    """Gives half of its channels, gated by the others."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(super().forward(x), 1)


@pytest.mark.parametrize(
    ("layer", "shape", "fits"),
    [
        (nn.Conv2d(4, 5, 3, stride=2, padding=(0, 1), dilation=(2, 1)), (4, 9, 7), True),
        (nn.Linear(4, 5), (7, 4), True),
        (nn.Linear(4, 5), (4,), True),
        (Conv2dSame(4, 5, 3, stride=2), (4, 8, 8), False),
        (Conv2dSame(4, 5, 5), (4, 2, 2), False),
        (Conv2dSame(4, 5, 2), (4, 8, 8), False),
        (Merging(4, 5), (7, 4), False),
        (Gated(4, 6, 3), (4, 8, 8), False),
    ],
)
def test_a_layer_whose_receptive_fields_are_unknown_is_told_by_what_it_gives(
    layer: Any, shape: tuple[int, ...], fits: bool
) -> None:
    """timm's Conv2dSame says padding 0 and pads in its forward."""
    images = torch.randn(3, *shape)
    with torch.no_grad():
        assert (Rows.of(layer, images, layer(images), 10) is not None) == fits


def test_a_network_of_dynamic_padding_is_fitted_but_for_these_layers() -> None:
    torch.manual_seed(0)
    same, deep = Conv2dSame(6, 8, 3, stride=2), Conv2dSame(8, 8, 3, stride=2, groups=8)
    dense: Any = nn.Sequential(zoo.conv_bn(3, 6), same, nn.ReLU(), nn.Conv2d(8, 8, 1), deep, nn.ReLU(), zoo.pooled(8))
    entry = zoo.Entry(lambda: zoo.randomised(dense).eval(), zoo.spec(8), 0)
    dense, batches = entry.build(), zoo.batches(entry, 40)
    kept, recording = (0, 2, 4), Recording()
    with reporting(recording):
        module: Any = compensated(dense, find(dense, entry.spec).groups, {"0.0": kept}, batches, STILL)
    assert torch.equal(module[1].weight[:, kept], dense[1].weight[:, kept])
    assert torch.equal(module[4].weight, dense[4].weight)
    assert not torch.equal(module[3].weight, dense[3].weight)
    (warning,) = recording.of("warn")
    assert warning.startswith("1 is not refitted: ")


# --- how many


def limited(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    """So many output positions are wanted, and memory is for 32 images."""
    monkeypatch.setattr(rows, "ROWS", wanted)
    monkeypatch.setattr(rows, "ROWS_PER_COLUMN", 0)
    monkeypatch.setattr(refit, "FEWEST_IMAGES", 32)
    monkeypatch.setattr(refit, "CACHE_BYTES", 0)
    monkeypatch.setattr(refit, "MAPS_BYTES", 0)


def test_where_memory_limits_the_images_as_many_positions_are_drawn_from_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 512)
    entry, structure = zoo.ZOO["separable"], Structure()
    dense, batches = entry.build(), zoo.batches(entry, 160)
    keep = {group.name: tuple(range(0, group.units, 2)) for group in entry.groups.groups}
    _, systems = with_systems(dense, entry.groups.groups, keep, batches, STILL, structure)
    assert structure.images == 32
    assert {name: system.equations.rows for name, system in systems.items() if name != "7.2"} == {
        name: 512 for name in systems if name != "7.2"
    }
    assert systems["7.2"].equations.rows == 32, "all that there are"
    assert structure.grouped["2.0"].rows.share * 32 * 16 == 512


def test_the_movers_draw_as_many_positions_as_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 512)
    monkeypatch.setattr(refit, "FEWEST_IMAGES", 64)
    monkeypatch.setattr(refit, "FEWEST_MOVERS", 40)
    pairs, plain = [], Movers._pair

    def kept(self: Movers, *given: Any) -> Any:
        pairs.append(plain(self, *given))
        return pairs[-1]

    monkeypatch.setattr(Movers, "_pair", kept)
    entry, structure = zoo.ZOO["residual"], Structure()
    dense, batches = entry.build(), zoo.batches(entry, 160)
    with_systems(dense, entry.groups.groups, {"layer2.conv1": (0, 2, 5)}, batches, MOVING, structure)
    assert (structure.images, structure.movers, len(pairs)) == (64, 40, 1)
    lessons = [*pairs[0].lessons, *pairs[0].judges]
    positions = sum(lesson.wanted[:, 0].numel() for lesson in lessons)
    assert positions == 40 * 16 and pairs[0].behind.rows.share * positions == 512


class Windows(nn.Module):
    """A linear layer that reads 16 windows of 4 positions of each image, as Swin's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = self.inner(x.reshape(-1, 4, 6)).reshape(x.shape)
        out: Tensor = self.head(x.mean((1, 2)))
        return out


def test_the_windows_of_an_image_are_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS", 1280)
    monkeypatch.setattr(rows, "ROWS_PER_COLUMN", 0)
    dense, structure = Windows().eval(), Structure()
    examine(dense, structure, zoo.batches(zoo.Entry(lambda: dense, zoo.spec(8), 0), 40), ())
    sites = structure.sites
    assert {name: site and site.rows.share for name, site in sites.items()} == {"stem": 0.5, "inner": 0.5, "head": 1.0}


@pytest.mark.parametrize(("images", "moves"), [(100, False), (140, True)])
def test_a_maker_with_fewer_than_eight_rows_per_unknown_stays(images: int, moves: bool) -> None:
    """Of which it has 12 and the consumer six; a sixth of the images judges."""
    layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, zoo.CLASSES)]
    entry = zoo.Entry(lambda: nn.Sequential(*layers), zoo.spec(8), 0)
    dense, batches = entry.build(), zoo.batches(entry, images)
    groups, keep = find(dense, entry.spec).groups, {"2": tuple(range(0, 12, 2))}
    still, moved = (compensated(dense, groups, keep, batches, how) for how in (STILL, MOVING))
    assert moves != torch.equal(still.get_submodule("2").weight, moved.get_submodule("2").weight)

"""What stays makes up for what left: exactly where it can, measurably where it cannot, and nothing reads what left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

from cswap_deploy.artifacts import Groups, HeadDims, HeadRows
from cswap_deploy.progress import Recording, reporting
from cswap_deploy.prune import refit
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.compensate import compensated, seen
from cswap_deploy.prune.cut import cut_copy, masked_copy
from cswap_deploy.prune.groups import find
from cswap_deploy.recipe import (
    BatchNormCompensation,
    CompensationSettings,
    LeastSquaresCompensation,
    MeanCompensation,
    NoCompensation,
)

METHODS: dict[str, CompensationSettings] = {
    "none": NoCompensation(),
    "mean": MeanCompensation(),
    "batchnorm": BatchNormCompensation(),
    "least_squares": LeastSquaresCompensation(),
}
NETWORKS = [name for name in zoo.PRUNABLE if name not in ("resnet", "normalised", "shared")]


def outputs(module: nn.Module, batches: Batches) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(images) for images, _ in batches])


def error(module: nn.Module, dense: nn.Module, batches: Batches) -> float:
    """Distance to the dense network's logits, relative to how much those vary."""
    wanted = outputs(dense, batches)
    return float((outputs(module, batches) - wanted).norm() / (wanted - wanted.mean(0)).norm())


def without(found: Groups, name: str, *units: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(unit for unit in range(found.by_name[name].units) if unit not in units)}


# --- oracle 2: what is redundant costs nothing


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("chain", "0.0"),
        ("chain", "1.0"),
        ("mlp", "1"),
        ("mlp", "3"),
        ("flattened", "1"),
        ("residual", "layer2.conv1"),
        ("separable", "1.0"),
        ("channels-last", "fc1"),
        ("in-place", "conv2"),
        ("vit", "blocks.0.mlp.fc1"),
        ("vit", "blocks.1.attn.heads"),
    ],
)
def test_one_of_two_duplicates_is_not_missed(name: str, group: str) -> None:
    entry = zoo.ZOO[name]
    dense, found, batches = entry.build(), entry.groups, zoo.batches(entry, 64)
    zoo.duplicate(dense, found.by_name[group], 0, 2)
    keep = without(found, group, 2)
    assert error(masked_copy(dense, found.groups, keep), dense, batches) > 1e-2
    pruned = compensated(dense, found.groups, keep, batches, LeastSquaresCompensation())
    difference = (outputs(pruned, batches) - outputs(dense, batches)).abs().max()
    assert float(difference / outputs(dense, batches).abs().max()) < 1e-4


def test_a_unit_that_the_others_add_up_to_is_not_missed() -> None:
    entry = zoo.ZOO["linear"]
    dense: Any = entry.build()
    batches = zoo.batches(entry, 150)
    with torch.no_grad():
        dense[1].weight[2] = dense[1].weight[0] - 2 * dense[1].weight[5]
        dense[1].bias[2] = 0.7
    pruned: Any = compensated(
        dense, entry.groups.groups, without(entry.groups, "1", 2), batches, LeastSquaresCompensation()
    )
    assert error(pruned, dense, batches) < 1e-3
    expected = dense[2].weight[:, 0] + dense[2].weight[:, 2]
    assert torch.allclose(pruned[2].weight[:, 0], expected, atol=5e-3)


# --- mean


@pytest.mark.parametrize(("name", "group"), [("mlp", "1"), ("mlp", "3"), ("chain", "1.0"), ("flattened", "1")])
def test_a_constant_unit_folds_into_the_bias_without_loss(name: str, group: str) -> None:
    """No consumer pads here: a border of zeros would not be constant."""
    entry = zoo.ZOO[name]
    dense, found, batches = entry.build(), entry.groups, zoo.batches(entry, 150)
    producer: Any = dense.get_submodule(group)
    with torch.no_grad():
        producer.weight[1] = 0
        if producer.bias is not None:
            producer.bias[1] = 1.5
    keep = without(found, group, 1)
    pruned = compensated(dense, found.groups, keep, batches, MeanCompensation())
    assert torch.allclose(outputs(pruned, batches), outputs(dense, batches), atol=1e-5)


def test_means_weigh_every_image_alike() -> None:
    """Two batches of unlike size."""
    entry = zoo.ZOO["linear"]
    dense: Any = entry.build()
    batches = zoo.batches(entry, 131)
    pruned: Any = compensated(dense, entry.groups.groups, {"1": (0, 3)}, batches, MeanCompensation())
    images = torch.cat([x for x, _ in batches]).flatten(1)
    with torch.no_grad():
        means = dense[1](images).mean(0)
        expected = dense[2].bias + dense[2].weight[:, [1, 2, 4, 5]] @ means[[1, 2, 4, 5]]
    assert torch.allclose(pruned[2].bias, expected, atol=1e-5)
    assert torch.equal(pruned[2].weight[:, [0, 3]], dense[2].weight[:, [0, 3]])


def test_means_give_a_bias_to_a_layer_that_has_none() -> None:
    entry = zoo.ZOO["residual"]
    dense: Any = entry.build()
    keep = without(entry.groups, "layer2.conv1", 0, 1, 2)
    pruned: Any = compensated(dense, entry.groups.groups, keep, zoo.batches(entry), MeanCompensation())
    assert dense.layer2.conv2.bias is None
    assert pruned.layer2.conv2.bias.abs().max() > 0
    assert pruned.layer3.conv2.bias is None


# --- batchnorm


def norms(module: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)}


@pytest.mark.parametrize("name", ["chain", "residual", "inert"])
def test_batchnorm_changes_statistics_and_nothing_else(name: str) -> None:
    entry = zoo.ZOO[name]
    dense, keep, batches = entry.build(), zoo.half(entry.groups), zoo.batches(entry, 60)
    masked = masked_copy(dense, entry.groups.groups, keep)
    pruned = compensated(dense, entry.groups.groups, keep, batches, BatchNormCompensation())
    old, new = masked.state_dict(), pruned.state_dict()
    assert old.keys() == new.keys()
    changed = {key.rsplit(".", 1)[1] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert [(layer.training, layer.momentum) for layer in norms(pruned).values()] == [(False, 0.1)] * len(norms(dense))
    assert not any(layer.training for layer in pruned.modules())


@pytest.mark.parametrize("name", ["chain", "residual", "inert"])
def test_batchnorm_statistics_are_those_of_what_is_read_now(name: str) -> None:
    entry = zoo.ZOO[name]
    batches = zoo.batches(entry, 100)
    pruned = compensated(entry.build(), entry.groups.groups, zoo.half(entry.groups), batches, BatchNormCompensation())
    require_own_statistics(pruned, batches, tolerance=0.03)


class Queried(nn.Module):
    """Attention over positions whose queries and keys alone lose dimensions; a BatchNorm reads what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k = (nn.Conv2d(3, 6, 3), *(nn.Conv2d(6, 4, 1) for _ in "qk"))
        self.norm, self.head = nn.BatchNorm2d(6), zoo.pooled(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits = self.q(x).flatten(2).transpose(1, 2) @ self.k(x).flatten(2)
        found = (x.flatten(2) @ logits.softmax(-1).transpose(1, 2)).view_as(x)
        out: Tensor = self.head(self.norm(found))
        return out


def test_batchnorm_statistics_are_renewed_where_only_queries_and_keys_lost_dimensions() -> None:
    entry = zoo.Entry(Queried, zoo.spec(8), 0)
    queries, keys = HeadRows(("q",), (0,)), HeadRows(("k",), (0,))
    group = HeadDims("qk_dims", "dims", 4, (), queries=queries, keys=keys, values=None, scales=())
    batches, settings = zoo.batches(entry, 100), BatchNormCompensation()
    pruned = compensated(entry.build(), (group,), {"qk_dims": (0,)}, batches, settings)
    require_own_statistics(pruned, batches, tolerance=0.03)
    whole = compensated(entry.build(), (group,), {}, batches, settings)
    assert zoo.same(zoo.fingerprint(whole), zoo.fingerprint(entry.build()))


def test_batchnorm_without_a_batchnorm_says_that_it_does_nothing() -> None:
    entry = zoo.ZOO["vit"]
    keep, recording = zoo.half(entry.groups), Recording()
    dense = entry.build()
    with reporting(recording):
        pruned = compensated(dense, entry.groups.groups, keep, zoo.batches(entry, 4), BatchNormCompensation())
    (warning,) = recording.of("warn")
    assert "batchnorm does nothing here: the network has no BatchNorm with running statistics" in warning
    assert zoo.same(zoo.fingerprint(pruned), zoo.fingerprint(masked_copy(dense, entry.groups.groups, keep)))


def require_own_statistics(module: nn.Module, batches: Batches, tolerance: float) -> None:
    for layer in norms(module).values():
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        outputs(module, batches)
        handle.remove()
        values = torch.cat(seen).movedim(1, -1).flatten(0, -2)
        deviation = values.std(0).clamp_min(1e-3)
        assert float(((layer.running_mean - values.mean(0)) / deviation).abs().max()) < tolerance
        assert float((layer.running_var.sqrt() / deviation - 1).abs().max()) < tolerance


def test_batchnorm_weighs_every_image_alike() -> None:
    """130 images are a batch of 128 and one of 2; those 2 are white."""
    entry = zoo.ZOO["chain"]
    batches = zoo.batches(entry, 130)
    batches.pixels[128:] = 255
    keep = without(entry.groups, "1.0", 0)
    pruned = compensated(entry.build(), entry.groups.groups, keep, batches, BatchNormCompensation())
    first = Batches(batches.pixels, batches.labels, batches.spec, "cpu")
    values = torch.cat([pruned.get_submodule("0.0")(images) for images, _ in first]).movedim(1, -1).flatten(0, -2)
    layer: Any = pruned.get_submodule("0.1")
    assert torch.allclose(layer.running_mean, values.mean(0), atol=1e-3)


def test_batchnorm_from_one_image_a_batch_still_has_statistics() -> None:
    """Large inputs come one by one: without statistics every layer would keep mean 0 and variance 1."""
    entry = zoo.ZOO["chain"]
    batches = zoo.batches(entry, 1)
    keep = without(entry.groups, "1.0", 0)
    pruned = compensated(entry.build(), entry.groups.groups, keep, batches, BatchNormCompensation())
    layer: Any = pruned.get_submodule("0.1")
    values = pruned.get_submodule("0.0")(next(iter(batches))[0]).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(layer.running_mean, values.mean(0), atol=1e-4)


# --- least squares


@pytest.mark.parametrize("name", zoo.PRUNABLE)
def test_least_squares_comes_closer_than_doing_nothing(name: str) -> None:

    entry = zoo.ZOO[name]
    dense, keep, batches = entry.build(), zoo.half(entry.groups), zoo.batches(entry, 64)
    nothing, means, fitted = (
        error(compensated(dense, entry.groups.groups, keep, batches, METHODS[method]), dense, batches)
        for method in ("none", "mean", "least_squares")
    )
    assert fitted < min(nothing, means)


@pytest.mark.parametrize("name", ["residual", "vit", "separable"])
def test_least_squares_helps_on_images_that_it_has_not_seen(name: str) -> None:
    entry = zoo.ZOO[name]
    dense, keep, others = entry.build(), zoo.half(entry.groups), zoo.batches(entry, 64, seed=9)
    fitted = compensated(dense, entry.groups.groups, keep, zoo.batches(entry, 128), LeastSquaresCompensation())
    assert error(fitted, dense, others) < 0.9 * error(masked_copy(dense, entry.groups.groups, keep), dense, others)


class TwoWays(nn.Module):
    """A linear shortcut that loses units, and beside it a linear branch that knows all of the input."""

    def __init__(self, scale: nn.Module, order: str) -> None:
        super().__init__()
        self.narrow, self.shortcut = nn.Linear(12, 8), nn.Linear(8, 6)
        self.wide, self.branch = nn.Linear(12, 14), nn.Linear(14, 6)
        self.scale, self.order = scale, order
        self.head = nn.Linear(6, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(self.narrow(x.flatten(1)))
        branch = self.scale(self.branch(self.wide(x.flatten(1))))
        if self.order == "in place":
            branch += shortcut
        else:
            branch = branch + shortcut if self.order == "branch first" else shortcut + branch
        out: Tensor = self.head(branch.relu())
        return out


@pytest.mark.parametrize("scale", [nn.Identity(), nn.BatchNorm1d(6), nn.Dropout(0.5)], ids=["plain", "norm", "dropout"])
@pytest.mark.parametrize("order", ["branch first", "shortcut first", "in place"])
def test_least_squares_corrects_what_the_shortcut_lost(scale: nn.Module, order: str) -> None:
    """Half of the shortcut's units leave; the branch, refitted for a unit of its own, makes up for them entirely."""

    # eval mode does the first, so that no timm ViT has the drift of its residual stream corrected.
    entry = zoo.Entry(lambda: TwoWays(scale, order), zoo.spec(2), 18)
    dense, found, batches = entry.build(), entry.groups, zoo.batches(entry, 200)
    keep = {**without(found, "narrow", 0, 2, 4, 6), **without(found, "wide", 5)}
    fitted = compensated(dense, found.groups, keep, batches, LeastSquaresCompensation())
    assert error(masked_copy(dense, found.groups, keep), dense, batches) > 0.3
    assert error(fitted, dense, batches) < 0.02


def test_least_squares_of_a_linear_layer_is_ridge_regression() -> None:
    """Against numpy, in the limit of many images: the best affine map from the units that stay to the dense logits."""
    entry = zoo.ZOO["linear"]
    dense: Any = entry.build()
    batches = zoo.batches(entry, 300)
    pruned = compensated(dense, entry.groups.groups, {"1": (0, 3, 5)}, batches, LeastSquaresCompensation())
    images = torch.cat([x for x, _ in batches]).flatten(1)
    with torch.no_grad():
        hidden = dense[1](images).double().numpy()
    wanted = outputs(dense, batches).double().numpy()
    known = np.concatenate([hidden[:, [0, 3, 5]], np.ones((300, 1))], 1)
    best = known @ np.linalg.lstsq(known, wanted, rcond=None)[0]
    left = np.linalg.norm(outputs(pruned, batches).numpy() - wanted)
    assert left <= 1.0001 * np.linalg.norm(best - wanted)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "recurrent"])
def test_least_squares_refits_every_consumer_in_the_zoo(name: str) -> None:
    entry = zoo.ZOO[name]
    dense, keep = entry.build(), zoo.half(entry.groups)
    recording = Recording()
    with reporting(recording):
        pruned = compensated(dense, entry.groups.groups, keep, zoo.batches(entry, 40), LeastSquaresCompensation())
    assert recording.of("warn") == []
    masked = masked_copy(dense, entry.groups.groups, keep).state_dict()
    fitted = {
        name.rsplit(".", 1)[0]
        for name, tensor in pruned.state_dict().items()
        if name not in masked or not torch.equal(tensor, masked[name])
    }
    assert {member.module for group in entry.groups.groups for member in group.consumers} <= fitted


def test_a_consumer_that_is_no_plain_product_is_left_alone_with_a_warning() -> None:
    torch.manual_seed(0)
    reading = nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")
    dense: Any = zoo.randomised(nn.Sequential(zoo.conv_bn(3, 6), reading, nn.ReLU(), zoo.pooled(5))).eval()
    entry = zoo.Entry(lambda: dense, zoo.spec(8), 0)
    found = find(dense, entry.spec)
    recording = Recording()
    with reporting(recording):
        keep = without(found, "0.0", 0, 3)
        pruned: Any = compensated(dense, found.groups, keep, zoo.batches(entry), LeastSquaresCompensation())
    (warning,) = recording.of("warn")
    assert warning.startswith("1 is not refitted: it is no plain convolution or linear layer")
    masked: Any = masked_copy(dense, found.groups, keep)
    assert torch.equal(pruned[1].weight, masked[1].weight)


def test_a_layer_of_more_inputs_than_memory_holds_is_left_alone_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "MOST_COLUMNS", 90)
    entry = zoo.ZOO["flattened"]
    dense, keep = entry.build(), zoo.half(entry.groups)
    recording = Recording()
    with reporting(recording):
        pruned = compensated(dense, entry.groups.groups, keep, zoo.batches(entry), LeastSquaresCompensation())
    wide = {
        name for name, layer in dense.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight[0].numel() > 90
    }  # fmt: skip
    said = [warning for warning in recording.of("warn") if "inputs would not fit into memory" in warning]
    assert wide and {warning.split()[0] for warning in said} == wide
    masked = masked_copy(dense, entry.groups.groups, keep)
    for name in wide:
        assert torch.equal(pruned.get_submodule(name).weight, masked.get_submodule(name).weight)


@pytest.mark.parametrize(("most", "fitted"), [(54, False), (77, True)])
def test_a_grouped_layer_has_as_much_memory_for_all_of_its_groups(
    monkeypatch: pytest.MonkeyPatch, most: int, fitted: bool
) -> None:
    """Two groups of 54 inputs each: 2 x 54 x 54 values, which 76.4 x 76.4 are."""
    monkeypatch.setattr(refit, "MOST_COLUMNS", most)
    entry = zoo.Entry(
        lambda: nn.Sequential(
            zoo.conv_bn(3, 5, 1), zoo.conv_bn(5, 12, 1), zoo.conv_bn(12, 12, groups=2), zoo.pooled(12)
        ),
        zoo.spec(8),
        0,
    )
    found, recording = refit.Structure(), Recording()
    with reporting(recording), torch.no_grad():
        refit.examine(entry.build(), found, zoo.batches(entry, 4), ("2.0",))
    assert ("2.0" in found.grouped) is fitted
    said = "2.0 is not refitted: the fits of its 2 groups of 54 inputs would not fit into memory"
    assert recording.of("warn") == ([] if fitted else [said])


class Unlike(nn.Module):
    """Rows of pixels as channels of a sequence, or the image as a volume of one slice."""

    def __init__(self, kind: type[nn.Conv1d | nn.Conv3d]) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.head = kind(3, 6, 1), kind(6, 5, 1), nn.Linear(5, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.flatten(2) if self.kind is nn.Conv1d else x[:, :, None]).relu()).relu()
        out: Tensor = self.head(x.flatten(2).mean(2))
        return out


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_a_convolution_of_another_dimension_is_left_alone_with_a_warning(kind: type[nn.Conv1d | nn.Conv3d]) -> None:
    entry, recording = zoo.Entry(lambda: Unlike(kind), zoo.spec(8), 0), Recording()
    keep = without(entry.groups, "first", 0, 3)
    with reporting(recording):
        compensated(entry.build(), entry.groups.groups, keep, zoo.batches(entry), LeastSquaresCompensation())
    assert recording.of("warn") == [f"second is not refitted: layers of the kind {kind.__name__} are not fitted"]


def test_a_layer_that_runs_twice_is_left_alone_with_a_warning() -> None:
    entry = zoo.ZOO["recurrent"]
    dense, keep = entry.build(), zoo.half(entry.groups)
    recording = Recording()
    with reporting(recording):
        pruned: Any = compensated(dense, entry.groups.groups, keep, zoo.batches(entry), LeastSquaresCompensation())
    (warning,) = recording.of("warn")
    assert warning.startswith("again is not refitted: ") and warning.endswith(" that is called once")
    masked: Any = masked_copy(dense, entry.groups.groups, keep)
    assert torch.equal(pruned.again.weight, masked.again.weight)
    assert not torch.equal(pruned.wide.weight, masked.wide.weight)


def test_a_dead_unit_that_stays_does_not_upset_the_fit() -> None:
    entry = zoo.ZOO["mlp"]
    dense: Any = entry.build()
    with torch.no_grad():
        dense[1].weight[0] = 0
        dense[1].bias[0] = -1
    keep = without(entry.groups, "1", 4, 5)
    pruned = compensated(dense, entry.groups.groups, keep, zoo.batches(entry, 64), LeastSquaresCompensation())
    assert bool(outputs(pruned, zoo.batches(entry)).isfinite().all())


# --- what all four promise


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("method", "frozen"), [*((method, False) for method in METHODS), ("least_squares", True)])
def test_cut_is_masked_nothing_reads_what_left_and_dense_stays(name: str, method: str, frozen: bool) -> None:
    entry = zoo.ZOO[name]
    dense, keep, batches = entry.build().requires_grad_(not frozen), zoo.half(entry.groups), zoo.batches(entry, 10)
    before = zoo.fingerprint(dense)
    masked = compensated(dense, entry.groups.groups, keep, batches, METHODS[method])
    assert zoo.same(before, zoo.fingerprint(dense))
    masked = masked.double()
    x = zoo.images(entry)
    with torch.no_grad():
        wanted = masked(x)
        cut = cut_copy(masked, entry.groups.groups, keep)(x)
        zoo.scramble(masked, entry.groups, keep)
        scrambled = masked(x)
    assert bool(wanted.isfinite().all())
    assert float((cut - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())
    assert torch.equal(scrambled, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_that_removes_nothing_changes_nothing(method: str) -> None:
    entry = zoo.ZOO["residual"]
    dense = entry.build()
    everything = {group.name: tuple(range(group.units)) for group in entry.groups.groups}
    for keep in ({}, everything):
        same = compensated(dense, entry.groups.groups, keep, zoo.batches(entry), METHODS[method])
        assert zoo.same(zoo.fingerprint(dense), zoo.fingerprint(same))


@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_images_give_the_same_weights(name: str, method: str) -> None:
    entry = zoo.ZOO[name]
    one, two = (
        compensated(entry.build(), entry.groups.groups, zoo.half(entry.groups), zoo.batches(entry), METHODS[method])
        for _ in range(2)
    )
    assert zoo.same(zoo.fingerprint(one), zoo.fingerprint(two))


@pytest.mark.parametrize("calls", [0, 2, 7])
@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize("method", ["mean", "least_squares"])
def test_an_exception_inside_the_forward_leaves_dense_as_it_was(name: str, method: str, calls: int) -> None:
    entry = zoo.ZOO[name]
    dense = entry.build()
    before = zoo.fingerprint(dense)
    left = [calls]

    def burn(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ArithmeticError("blown")

    layer = "stem.0" if name == "residual" else "patch_embed.proj"
    handle = dense.get_submodule(layer).register_forward_hook(burn)
    if calls == 0 or method == "least_squares":
        with pytest.raises(ArithmeticError, match="blown"):
            compensated(dense, entry.groups.groups, zoo.half(entry.groups), zoo.batches(entry), METHODS[method])
    handle.remove()
    assert zoo.same(before, zoo.fingerprint(dense))


# --- copies of few images


def test_few_images_are_filled_up_and_many_are_not() -> None:
    entry = zoo.ZOO["residual"]

    def counts(images: int, settings: CompensationSettings) -> tuple[int, int]:
        found = seen(zoo.batches(entry, images), settings)
        return found.originals, found.copies

    auto = LeastSquaresCompensation()
    assert [counts(images, auto) for images in (50, 100, 500, 768, 900)] == [
        (50, 280), (100, 560), (500, 268), (768, 0), (900, 0)
    ]  # fmt: skip
    assert counts(900, LeastSquaresCompensation(views=2)) == (900, 720)
    assert counts(50, LeastSquaresCompensation(views=1)) == (50, 0)
    assert {counts(50, settings) for settings in METHODS.values() if settings != auto} == {(50, 0)}


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_copies_of_few_images_help_on_images_that_are_not_among_them(name: str) -> None:
    entry = zoo.ZOO[name]
    dense, keep, others = entry.build(), zoo.half(entry.groups), zoo.batches(entry, 64, seed=9)
    errors = []
    for views in (1, 8):
        settings = LeastSquaresCompensation(views=views)
        few = seen(zoo.batches(entry, 16), settings)
        errors.append(error(compensated(dense, entry.groups.groups, keep, few, settings), dense, others))
    assert errors[1] < 0.95 * errors[0]

"""Scores against closed forms, plain loops and planted units; whatever happens, the module is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from scipy import stats
from torch import Tensor, nn

from cswap_deploy.artifacts import Group, GroupScores
from cswap_deploy.errors import PruningError
from cswap_deploy.prune import criteria
from cswap_deploy.prune.ablation import ablated, taps
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import masked_copy
from cswap_deploy.prune.replay import prefix_reused
from cswap_deploy.recipe import (
    CausalCriterion,
    CriterionSettings,
    MagnitudeCriterion,
    RandomCriterion,
    TaylorCriterion,
    VarianceCriterion,
)

ATTRIBUTION = CausalCriterion(estimator="attribution", intervention="zero")
EXACT = CausalCriterion(estimator="exact", intervention="zero")
CRITERIA: dict[str, CriterionSettings] = {
    "attribution": ATTRIBUTION,
    "attribution, mean": CausalCriterion(estimator="attribution", intervention="mean"),
    "exact": EXACT,
    "exact, mean": CausalCriterion(estimator="exact", intervention="mean"),
    "exact, surgery": CausalCriterion(estimator="exact", intervention="surgery"),
    "screened": CausalCriterion(estimator="screened", intervention="zero"),
    "screened, surgery": CausalCriterion(estimator="screened", intervention="surgery"),
    "taylor": TaylorCriterion(),
    "magnitude": MagnitudeCriterion(),
    "variance": VarianceCriterion(),
    "random": RandomCriterion(),
}
NEEDS_A_FORWARD = [name for name in CRITERIA if name not in ("magnitude", "random")]


def score(
    settings: CriterionSettings, module: nn.Module, groups: tuple[Group, ...], batches: Batches, seed: int = 0
) -> tuple[GroupScores, ...]:
    return criteria.scorer(settings, seed).score(module, groups, batches)


def everything(batches: Batches) -> tuple[Tensor, Tensor]:
    """All images and labels as one pair."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def log_p(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images).double().log_softmax(1)[torch.arange(len(labels)), labels]


# --- oracle 2: closed forms


def linear_case(images: int = 150) -> tuple[Any, tuple[Group, ...], Batches]:
    """More images than one batch holds."""
    entry = zoo.ZOO["linear"]
    return entry.build(), entry.groups.groups, zoo.batches(entry, images)


@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_the_exact_effect_of_a_linear_network_is_its_closed_form(intervention: Any) -> None:
    module, groups, batches = linear_case()
    assert batches.size < len(batches)
    (found,) = score(CausalCriterion(estimator="exact", intervention=intervention), module, groups, batches)
    a, reading, logits, labels = linear_parts(module, batches)
    replacement = a.mean(0) if intervention == "mean" else np.zeros(6)
    changed = logits[:, None, :] + (replacement - a)[:, :, None] * reading.T[None]
    effects = picked(log_softmax(changed), labels) - picked(log_softmax(logits)[:, None], labels)
    assert found.effect == pytest.approx(effects.mean(0), rel=1e-4, abs=1e-6)
    assert found.keep_value == pytest.approx(np.abs(effects).mean(0), rel=1e-4, abs=1e-6)
    assert found.error == pytest.approx(effects.std(0, ddof=1) / math.sqrt(len(effects)), rel=1e-4)
    assert found.xi == pytest.approx(np.expm1(effects).mean(0), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_attribution_of_a_linear_network_is_its_closed_form(intervention: Any) -> None:
    module, groups, batches = linear_case()
    (found,) = score(CausalCriterion(estimator="attribution", intervention=intervention), module, groups, batches)
    a, reading, logits, labels = linear_parts(module, batches)
    slope = (np.eye(zoo.CLASSES)[labels] - np.exp(log_softmax(logits))) @ reading
    effects = ((a.mean(0) if intervention == "mean" else 0) - a) * slope
    assert found.effect == pytest.approx(effects.mean(0), rel=1e-4, abs=1e-6)
    assert found.error == pytest.approx(effects.std(0, ddof=1) / math.sqrt(len(effects)), rel=1e-4)


def linear_parts(module: Any, batches: Batches) -> tuple[Any, Any, Any, Any]:
    """Hidden values (images, units), the weights that read them (classes, units), logits, labels; in float64."""
    images, labels = everything(batches)
    w1, b1, w2, b2 = (parameter.detach().double().numpy() for parameter in module.parameters())
    a = images.flatten(1).double().numpy() @ w1.T + b1
    return a, w2, a @ w2.T + b2, labels.numpy()


def log_softmax(values: Any) -> Any:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def picked(values: Any, labels: Any) -> Any:
    """(images, units, classes) or (images, 1, classes) -> the true class's."""
    return np.take_along_axis(values, labels[:, None, None], 2)[..., 0]


# --- oracle 2: dead and duplicated units


@pytest.mark.parametrize("name", ["residual", "concat", "flattened", "squeeze-excite", "recurrent", "vit"])
@pytest.mark.parametrize("settings", [ATTRIBUTION, EXACT], ids=["attribution", "exact"])
def test_a_unit_that_nothing_reads_has_no_effect(name: str, settings: CausalCriterion) -> None:
    entry = zoo.ZOO[name]
    module, groups = entry.build(), entry.groups.groups[:2]
    for group in groups:
        zoo.kill(module, group, 1)
    for found in score(settings, module, groups, zoo.batches(entry, 8)):
        assert found.effect[1] == found.keep_value[1] == found.xi[1] == 0
        assert found.verdict[1] == "neutral"
        assert any(found.effect)


@pytest.mark.parametrize("name", ["residual", "flattened", "mlp", "vit"])
@pytest.mark.parametrize("criterion", NEEDS_A_FORWARD)
def test_units_that_do_and_feed_the_same_score_the_same(name: str, criterion: str) -> None:
    entry = zoo.ZOO[name]
    module, group = entry.build(), entry.groups.groups[1]
    zoo.duplicate(module, group, 0, 2)
    zoo.same_reading(module, group, 0, 2)
    (found,) = score(CRITERIA[criterion], module, (group,), zoo.batches(entry, 16))
    assert found.keep_value[0] == pytest.approx(found.keep_value[2], rel=1e-3, abs=1e-6)
    assert found.keep_value[0] != pytest.approx(found.keep_value[1], rel=1e-3)


# --- exact against a plain loop, attribution against exact


class Reads(nn.Module):
    """A layer that reads given values in place of some of its inputs."""

    def __init__(self, layer: nn.Module, indices: list[int], values: Tensor, axis: int) -> None:
        super().__init__()
        self.layer, self.indices, self.values, self.axis = layer, indices, values, axis

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1).clone()
        x[..., self.indices] = self.values
        out: Tensor = self.layer(x.movedim(-1, self.axis))
        return out


def plainly(module: nn.Module, group: Group, unit: int, means: Mapping[str, Tensor] | None) -> nn.Module:
    """A copy without this unit: masked, or with means where it is read."""
    import copy

    if means is None:
        return masked_copy(module, [group], {group.name: [u for u in range(group.units) if u != unit]})
    module = copy.deepcopy(module)
    for member in group.consumers:
        indices = list(range(member.offset + unit * member.repeat, member.offset + (unit + 1) * member.repeat))
        layer = module.get_submodule(member.module)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        module.set_submodule(member.module, Reads(layer, indices, means[member.module][indices], axis))
    return module


def input_means(module: nn.Module, groups: tuple[Group, ...], images: Tensor) -> dict[str, Tensor]:
    means = {}
    for name in {member.module for group in groups for member in group.consumers}:
        layer, seen = module.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            module(images)
        handle.remove()
        axis = -1 if isinstance(layer, nn.Linear) else 1
        means[name] = torch.cat([x.movedim(axis, -1).flatten(0, -2) for x in seen]).mean(0)
    return means


@pytest.mark.parametrize("name", ["residual", "concat", "flattened", "separable", "channels-last", "in-place", "vit"])
@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_exact_is_a_plain_loop_over_networks_without_the_unit(name: str, intervention: Any) -> None:
    entry = zoo.ZOO[name]
    module, groups, batches = entry.build(), entry.groups.groups, zoo.batches(entry, 8)
    images, labels = everything(batches)
    means = input_means(module, groups, images) if intervention == "mean" else None
    found = score(CausalCriterion(estimator="exact", intervention=intervention), module, groups, batches)
    whole = log_p(module, images, labels)
    for group, scores in zip(groups, found, strict=True):
        assert scores.group == group.name
        for unit in range(0, group.units, max(1, group.units // 5)):
            effects = log_p(plainly(module, group, unit, means), images, labels) - whole
            assert scores.effect[unit] == pytest.approx(float(effects.mean()), rel=1e-4, abs=1e-5)
            assert scores.keep_value[unit] == pytest.approx(float(effects.abs().mean()), rel=1e-4, abs=1e-5)


def test_exact_follows_a_layer_that_runs_twice() -> None:
    entry = zoo.ZOO["recurrent"]
    module, batches = entry.build(), zoo.batches(entry, 12)
    images, labels = everything(batches)
    group = entry.groups.groups[0]
    (found,) = score(EXACT, module, (group,), batches)
    for unit in range(group.units):
        effects = log_p(plainly(module, group, unit, None), images, labels) - log_p(module, images, labels)
        assert found.effect[unit] == pytest.approx(float(effects.mean()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "flattened", "squeeze-excite", "in-place", "vit"])
@pytest.mark.parametrize("intervention", ["zero", "mean", "surgery"])
def test_attribution_is_the_exact_effect_to_first_order(name: str, intervention: Any) -> None:
    """Each group in turn is read a thousand times more softly, so that what is of second order vanishes; in float64."""
    entry = zoo.ZOO[name]
    batches = zoo.batches(entry, 10)
    for group in entry.groups.groups:
        module = entry.build().double()
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
        with torch.no_grad():
            for layer in {member.module for member in group.consumers}:
                module.get_submodule(layer).weight.mul_(1e-3)
        exact, fast = (
            score(CausalCriterion(estimator=estimator, intervention=intervention), module, (group,), batches)[0]
            for estimator in ("exact", "attribution")
        )
        assert max(exact.keep_value) > 1e-12
        for truth, guess in ((exact.effect, fast.effect), (exact.keep_value, fast.keep_value)):
            assert guess == pytest.approx(truth, rel=0.01, abs=2e-3 * max(exact.keep_value))


@pytest.mark.parametrize("criterion", NEEDS_A_FORWARD)
def test_only_the_first_images_are_read(criterion: str) -> None:
    entry = zoo.ZOO["chain"]
    settings = CRITERIA[criterion].model_copy(update={"images": 9})
    batches, groups = zoo.batches(entry, 30), entry.groups.groups
    assert score(settings, entry.build(), groups, batches) == score(settings, entry.build(), groups, batches.first(9))
    assert score(settings, entry.build(), groups, batches) != score(settings, entry.build(), groups, batches.first(8))


# --- verdicts


def planted(noise: float = 1.0) -> tuple[Any, tuple[Group, ...], Batches]:
    """Always class 0. Constant units: 0 votes for it, 1 against it, 2 hardly says anything; unit 3 is noise, unit 4 dead."""
    module: Any = zoo.ZOO["linear"].build()
    _, groups, batches = linear_case(40)
    with torch.no_grad():
        module[1].weight.zero_()
        module[1].weight[3] = noise * torch.randn(192, generator=torch.Generator().manual_seed(0)) / 14
        module[1].bias.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]))
        module[2].weight.zero_()
        module[2].bias.zero_()
        module[2].weight[0] = torch.tensor([1.5, -1.0, 1e-3, 0.3, 0.0, 0.0])
    return module, groups, Batches(batches.pixels, np.zeros_like(batches.labels), batches.spec, "cpu")


def test_planted_units_get_the_verdicts_that_they_deserve() -> None:
    module, groups, batches = planted()
    (found,) = score(EXACT, module, groups, batches)
    assert found.verdict == ("critical", "detrimental", "neutral", "unresolved", "neutral", "neutral")
    assert found.effect[0] < 0 < found.effect[1]


def test_effects_without_any_spread_are_decided_too() -> None:
    module, groups, batches = planted(noise=0.0)
    (found,) = score(EXACT, module, groups, batches)
    assert found.error == pytest.approx([0.0] * 6, abs=1e-7)
    assert found.verdict == ("critical", "detrimental", "neutral", "neutral", "neutral", "neutral")


def test_attribution_never_says_critical_or_detrimental() -> None:
    module, groups, batches = planted()
    (found,) = score(ATTRIBUTION, module, groups, batches)
    assert found.verdict == ("unresolved", "unresolved", "neutral", "unresolved", "neutral", "neutral")


def test_a_significant_effect_inside_the_margin_is_neutral() -> None:
    module, groups, batches = planted()
    (found,) = score(EXACT, module, groups, batches)
    assert abs(found.effect[2]) > 5 * found.error[2] > 0
    assert found.verdict[2] == "neutral"


def test_the_false_discovery_rate_is_held_over_the_units_of_all_groups() -> None:
    """Benjamini-Hochberg by hand on the effects of a plain loop, where it decides otherwise than each test alone."""
    entry = zoo.ZOO["mlp"]
    module, groups, batches = entry.build(), entry.groups.groups, zoo.batches(entry, 12, seed=3)
    images, labels = everything(batches)
    whole = log_p(module, images, labels)
    effects = [
        (log_p(plainly(module, group, unit, None), images, labels) - whole).numpy()
        for group in groups
        for unit in range(group.units)
    ]
    alpha = 0.2
    p = np.array([stats.ttest_1samp(values, 0).pvalue for values in effects])
    ranked = np.sort(p)
    below = [k for k in range(1, len(p) + 1) if ranked[k - 1] <= alpha * k / len(p)]
    threshold = ranked[max(below) - 1] if below else -1.0
    found = score(CausalCriterion(estimator="exact", intervention="zero", alpha=alpha), module, groups, batches)
    verdicts = [verdict for scores in found for verdict in scores.verdict]
    decided = [verdict in ("critical", "detrimental") for verdict in verdicts]
    intervals = [stats.ttest_1samp(values, 0).confidence_interval(1 - alpha) for values in effects]
    neutral = [low > -0.01 and high < 0.01 for low, high in intervals]
    assert decided == [value <= threshold and not small for value, small in zip(p, neutral, strict=True)]
    assert [verdict == "neutral" for verdict in verdicts] == neutral
    assert 0 < sum(decided) < sum(value <= alpha and not small for value, small in zip(p, neutral, strict=True))
    signs = [values.mean() < 0 for values in effects]
    assert all((verdict == "critical") == sign for verdict, sign, sure in zip(verdicts, signs, decided) if sure)


def test_one_image_decides_nothing() -> None:
    """`criterion.images: 1` is a recipe that validates."""
    module, groups, batches = linear_case(1)
    (found,) = score(EXACT, module, groups, batches)
    assert all(map(math.isfinite, (*found.keep_value, *found.effect, *found.error, *found.xi)))
    assert set(found.verdict) <= {"unresolved", "neutral"}


# --- the other criteria against plain arithmetic


def test_magnitude_is_the_norm_of_all_weights_that_leave() -> None:
    entry = zoo.ZOO["flattened"]
    module: Any = entry.build()
    found = score(MagnitudeCriterion(), module, entry.groups.groups, zoo.batches(entry, 1))[1]
    norms = module[1].weight.flatten(1).norm(dim=1) + module[5].weight.reshape(9, 6, 16).movedim(1, 0).flatten(1).norm(
        dim=1
    )
    assert found.keep_value == pytest.approx((norms / norms.mean()).tolist(), rel=1e-5)


def test_taylor_is_the_squared_first_order_change_of_each_tensor() -> None:
    entry = zoo.ZOO["mlp"]
    module: Any = entry.build()
    batches = zoo.batches(entry, 150)
    found = score(TaylorCriterion(), module, entry.groups.groups, batches)[1]
    images, labels = everything(batches)
    loss = F.cross_entropy(module(images), labels)
    made, read = torch.autograd.grad(loss, [module[3].weight, module[5].weight])
    expected = (module[3].weight * made).sum(1).square() + (module[5].weight * read).sum(0).square()
    assert found.keep_value == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("name", ["chain", "flattened", "concat", "channels-last", "vit", "recurrent"])
def test_variance_is_that_of_what_is_read(name: str) -> None:

    entry = zoo.ZOO[name]
    module, batches = entry.build(), zoo.batches(entry, 150)
    images, _ = everything(batches)
    for group, found in zip(
        entry.groups.groups, score(VarianceCriterion(), module, entry.groups.groups, batches), strict=True
    ):
        values = torch.cat([read_by(module, member, group.units, images) for member in group.consumers], 1).double()
        expected = values.var(1, unbiased=False)
        assert found.keep_value == pytest.approx((expected / expected.mean()).tolist(), rel=1e-4)


def read_by(module: nn.Module, member: Any, units: int, images: Tensor) -> Tensor:
    """All values of each unit that one consumer reads: (units, values)."""
    layer = module.get_submodule(member.module)
    with torch.no_grad(), taps(module, [member.module]) as seen:
        module(images)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    own = torch.cat([tap.movedim(axis, -1).flatten(0, -2) for tap in seen[member.module]])
    own = own[:, member.offset : member.offset + units * member.repeat]
    return own.reshape(-1, units, member.repeat).movedim(1, 0).flatten(1)


def test_a_constant_unit_has_no_variance_where_linear_layers_read_channels_last() -> None:
    entry = zoo.ZOO["channels-last"]
    module: Any = entry.build()
    with torch.no_grad():
        module.fc1.weight[3] = 0
        module.fc1.bias[3] = 2.0
    (found,) = score(VarianceCriterion(), module, entry.groups.groups, zoo.batches(entry))
    assert found.keep_value[3] == pytest.approx(0, abs=1e-6)


# --- what all five promise


@pytest.mark.parametrize("name", ["residual", "flattened", "channels-last", "recurrent", "vit"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_finite_complete_and_repeatable(name: str, criterion: str) -> None:
    entry = zoo.ZOO[name]
    module, groups, batches = entry.build(), entry.groups.groups[:3], zoo.batches(entry, 4)
    found = score(CRITERIA[criterion], module, groups, batches, seed=5)
    for group, scores in zip(groups, found, strict=True):
        assert (scores.group, scores.units) == (group.name, tuple(range(group.units)))
        for values in (scores.keep_value, scores.effect, scores.error, scores.xi, scores.verdict):
            assert len(values) in (group.units, 0 if values is not scores.keep_value else group.units)
        assert all(map(math.isfinite, (*scores.keep_value, *scores.effect, *scores.error, *scores.xi)))
        assert min(scores.keep_value) >= 0
        causal = CRITERIA[criterion].kind == "causal"
        assert bool(scores.effect) == bool(scores.verdict) == bool(scores.verified) == causal
    assert score(CRITERIA[criterion], module, groups, batches, seed=5) == found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_leaves_the_module_as_it_was(name: str, criterion: str, frozen: bool) -> None:

    entry = zoo.ZOO[name]
    module = entry.build().requires_grad_(not frozen)
    before = zoo.fingerprint(module)
    score(CRITERIA[criterion], module, entry.groups.groups[:2], zoo.batches(entry, 4))
    assert zoo.same(before, zoo.fingerprint(module))


def test_random_scores_follow_the_seed_alone() -> None:
    entry = zoo.ZOO["residual"]
    one, two, other = (
        score(RandomCriterion(), entry.build(), entry.groups.groups, zoo.batches(entry, 2, seed=n), seed=seed)
        for n, seed in ((0, 7), (1, 7), (0, 8))
    )
    assert one == two != other


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_group_has_no_scores(criterion: str) -> None:

    entry = zoo.ZOO["linear"]
    assert score(CRITERIA[criterion], entry.build(), (), zoo.batches(entry, 4)) == ()


# --- oracle 4: hooks are gone after an exception


class Fuse(Exception):
    pass


def fused(module: nn.Module, calls: int, name: str) -> Callable[[], None]:
    """Let layer `name` raise after so many calls; returns what takes the fuse out again."""
    left = [calls]

    def burn(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Fuse

    return module.get_submodule(name).register_forward_hook(burn).remove


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize(
    ("criterion", "calls"),
    [
        *((name, 0) for name in NEEDS_A_FORWARD),
        ("attribution, mean", 1),
        ("exact", 1),
        ("exact", 3),
        ("exact, mean", 5),
    ],
)
def test_an_exception_inside_the_forward_leaves_the_module_as_it_was(
    name: str, criterion: str, calls: int, frozen: bool
) -> None:
    entry = zoo.ZOO[name]
    module = entry.build().requires_grad_(not frozen)
    before = zoo.fingerprint(module)
    remove = fused(module, calls, "head")
    with pytest.raises(Fuse):
        score(CRITERIA[criterion], module, entry.groups.groups[1:3], zoo.batches(entry, 4))
    remove()
    assert zoo.same(before, zoo.fingerprint(module))


def interventions(module: nn.Module, group: Group, images: Tensor) -> dict[str, Any]:
    return {
        "taps": taps(module, [member.module for member in group.consumers]),
        "ablated": ablated(module, group, [0, 2]),
        "prefix_reused": prefix_reused(module, images, [member.module for member in group.consumers]),
    }


@pytest.mark.parametrize("name", ["residual", "vit", "concat"])
@pytest.mark.parametrize("which", ["taps", "ablated", "prefix_reused"])
def test_interventions_end_with_their_block(name: str, which: str) -> None:
    entry = zoo.ZOO[name]
    module, group, images = entry.build(), entry.groups.groups[-1], zoo.images(entry).float()
    before = zoo.fingerprint(module)
    with torch.no_grad(), interventions(module, group, images)[which]:
        assert not zoo.same(before, zoo.fingerprint(module))
        module(images)
    assert zoo.same(before, zoo.fingerprint(module))
    with pytest.raises(Fuse), torch.no_grad(), interventions(module, group, images)[which]:
        raise Fuse
    assert zoo.same(before, zoo.fingerprint(module))


def test_a_reused_prefix_answers_what_it_would_have_computed_and_runs_no_more() -> None:
    entry = zoo.ZOO["residual"]
    module: Any = entry.build()
    images = zoo.images(entry).float()
    ran: list[str] = []
    for name in ("stem.0", "layer1.conv1", "layer2.downsample.0", "layer2.conv2", "layer3.conv2"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        expected = module(images)
        with prefix_reused(module, images, ["layer2.conv2"]):
            ran.clear()
            for _ in range(2):
                assert torch.equal(module(images), expected)
    assert {"layer2.conv2", "layer3.conv2"} <= set(ran)
    assert not {"stem.0", "layer1.conv1"} & set(ran)


@pytest.mark.parametrize("layer", ["conv2", "conv3", "conv4"])
def test_a_reused_prefix_survives_writing_in_place(layer: str) -> None:
    entry = zoo.ZOO["in-place"]
    module, images = entry.build(), zoo.images(entry).float()
    with torch.no_grad():
        expected = module(images)
        with prefix_reused(module, images, [layer]):
            assert torch.equal(module(images), expected)
            assert torch.equal(module(images), expected)


def test_a_forward_that_the_user_replaced_stays_replaced() -> None:
    """Some factories wrap a layer by assigning its `forward`; reusing a prefix must put that back."""
    entry = zoo.ZOO["in-place"]
    module: Any = entry.build()
    original = module.conv1.forward
    module.conv1.forward = lambda x: 2 * original(x)
    images = zoo.images(entry).float()
    with torch.no_grad():
        expected = module(images)
        with prefix_reused(module, images, ["conv3"]):
            assert torch.equal(module(images), expected)
        assert torch.equal(module(images), expected)


def test_ablation_by_means_reads_the_mean_of_each_channel() -> None:
    module, groups, batches = linear_case(20)
    images, _ = everything(batches)
    means = input_means(module, groups, images)
    with torch.no_grad(), ablated(module, groups[0], range(6), means):
        logits = module(images)
    with torch.no_grad():
        expected = module(images).mean(0)
    assert torch.allclose(logits, expected.expand_as(logits), atol=1e-5)


# --- rows that are no images


class TokensFirst(nn.Module):
    """An encoder layer of PyTorch's own as it comes: what it reads is (tokens, images, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12)
        self.head = nn.Linear(8, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0))
        return out


def tokens_first() -> tuple[zoo.Entry, nn.Module, tuple[Group, ...]]:
    entry = zoo.Entry(TokensFirst, zoo.spec(16), 3)
    return entry, entry.build(), entry.groups.groups


@pytest.mark.parametrize("count", [8, 10], ids=["a divisor of the tokens", "no divisor"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if isinstance(CRITERIA[name], CausalCriterion)])
def test_tokens_are_not_taken_for_images(criterion: str, count: int) -> None:
    entry, module, groups = tokens_first()
    with pytest.raises(PruningError, match="told apart by image") as caught:
        score(CRITERIA[criterion], module, groups, zoo.batches(entry, count))
    assert caught.value.message.startswith("layer.linear2 reads 16 rows for one image and 16 for 2 images")
    assert "batch_first=True" in caught.value.hint and "'layer.linear2' under prune.skip" in caught.value.hint


def test_variance_needs_no_images_apart() -> None:
    entry, module, groups = tokens_first()
    batches = zoo.batches(entry, 10)
    (found,) = score(VarianceCriterion(), module, groups, batches)
    values = read_by(module, groups[0].consumers[0], 12, everything(batches)[0]).double()
    expected = values.var(1, unbiased=False)
    assert found.keep_value == pytest.approx((expected / expected.mean()).tolist(), rel=1e-4)

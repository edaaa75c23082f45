"""The screened estimator: what it ablates is exact, what it does not stays near, and it says which is which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import nn

from cswap_deploy import progress
from cswap_deploy.model import count
from cswap_deploy.prune import screened
from cswap_deploy.prune.attribution import through_softmax
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria.causal import CausalEffect
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.verdicts import verdicts
from cswap_deploy.recipe import CausalCriterion


def prepared(name: str, images: int = 24) -> Ablations:
    entry = zoo.ZOO[name]
    return Ablations.prepare(entry.build(), entry.groups.groups, zoo.batches(entry, images), "zero")


def exact(ablations: Ablations) -> list[torch.Tensor]:
    return ablations.effects([torch.ones(len(ablations.batches), g.units, dtype=torch.bool) for g in ablations.groups])


@pytest.mark.parametrize("classes", [2, 3])
def test_the_screen_of_a_linear_network_is_exact(classes: int) -> None:
    """Logits are linear in what leaves, and with three classes none is lumped together with another."""
    entry = zoo.ZOO["linear"]
    module: Any = entry.build()
    module[2].weight, module[2].bias = (nn.Parameter(values[:classes].detach()) for values in module[2].parameters())
    some = zoo.batches(entry, 24)
    ablations = Ablations.prepare(
        module, entry.groups.groups, Batches(some.pixels, some.labels % classes, some.spec, "cpu"), "zero"
    )
    (truth,), (guess,) = exact(ablations), through_softmax(ablations.fast, ablations.readings, ablations.batches)
    assert torch.allclose(truth, guess, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "mlp", "vit", "recurrent"])
def test_what_is_ablated_is_exact_and_marked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened, "FEWEST", 2)
    ablations = prepared(name)
    found, truth = screened.screen(ablations, 0.05), exact(ablations)
    for values, mask, true in zip(found.effects, found.exact, truth, strict=True):
        assert torch.allclose(values[mask], true[mask], rtol=1e-4, atol=1e-5)
        assert not values.isnan().any()
    count = sum(map(sum, found.verified))
    units = sum(group.units for group in ablations.groups)
    assert 2 <= count < units
    assert all(
        (spread == 0) or not verified
        for own, marks in zip(found.spread, found.verified, strict=True)
        for spread, verified in zip(own, marks, strict=True)
    )


def test_few_units_are_all_verified() -> None:
    entry = zoo.ZOO["linear"]
    batches = zoo.batches(entry, 20)
    settings = CausalCriterion(estimator="screened"), CausalCriterion(estimator="exact")
    found, true = (CausalEffect(each).score(entry.build(), entry.groups.groups, batches)[0] for each in settings)
    assert found.verified == true.verified == (True,) * 6
    assert found.keep_value == pytest.approx(true.keep_value, rel=1e-5)
    assert found.verdict == true.verdict


def test_it_says_how_many_units_it_verified() -> None:
    recording = progress.Recording()
    with progress.reporting(recording):
        screened.screen(prepared("residual"), 0.05)
    (note,) = recording.of("note")
    assert note.startswith("16 of 36 units verified by ablation on all 24 images, the others on 3;")


def test_the_larger_the_network_the_less_is_ablated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 3 x 72 (unit, image) pairs: 3 of 36 units teach, 3 are in doubt, the others are ablated on 2 hard images."""
    ablations, asked = prepared("residual"), []
    _, macs = count(ablations.module, ablations.batches.spec)
    monkeypatch.setattr(screened, "FEWEST", 2)
    monkeypatch.setattr(screened, "UNITS", 1.0)
    monkeypatch.setattr(screened, "BUDGET", 3 * 72.5 * macs / 2)
    found = Ablations.effects

    def counted(self: Ablations, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
        asked.append(sum(int(mask.sum()) for mask in wanted))
        return found(self, wanted)

    monkeypatch.setattr(Ablations, "effects", counted)
    state = screened.screen(ablations, 0.05)
    assert asked[0] == 3 * 24 and asked[1] <= 72 + 3 * 24
    assert sum(map(sum, state.verified)) == 6
    monkeypatch.setattr(screened, "BUDGET", 1.0)
    assert sum(map(sum, screened.screen(ablations, 0.05).verified)) == 4, "never fewer than FEWEST of each"


def test_a_spread_widens_the_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    effects = [torch.randn(100, 3, generator=generator, dtype=torch.float64) * 0.001 + torch.tensor([0.0, -0.1, 0.1])]
    assert verdicts(effects, 0.05, decisive=True) == [("neutral", "critical", "detrimental")]
    wide = [torch.full((3,), 0.2, dtype=torch.float64)]
    assert verdicts(effects, 0.05, decisive=True, spread=wide) == [("unresolved",) * 3]

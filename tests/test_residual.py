"""Surgery: the unit leaves and its consumer is re-fitted. Against normal equations solved anew for each unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from cswap_deploy.artifacts import Group
from cswap_deploy.progress import Recording, reporting
from cswap_deploy.prune import reading, residual
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.criteria.causal import CausalEffect
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.least_squares import RIDGE, SCARCE
from cswap_deploy.recipe import CausalCriterion


def exact_effects(module: nn.Module, group: Group, batches: Batches, intervention: Any = "surgery") -> Tensor:
    ablations = Ablations.prepare(module, (group,), batches, intervention)
    (found,) = ablations.effects([torch.ones(len(batches), group.units, dtype=torch.bool)])
    return found


def refitted(layer: Any, inputs: Tensor, units: list[int]) -> tuple[Tensor, Tensor]:
    """Weight and bias of `layer` without these input channels: ridge regression onto its own outputs, in float64."""
    kernel = layer.weight[0, 0].numel()
    if isinstance(layer, nn.Linear):
        fields = inputs.double().flatten(0, -2)
    else:
        fields = (
            F.unfold(inputs.double(), layer.kernel_size, 1, layer.padding, layer.stride).movedim(1, -1).flatten(0, -2)
        )
    bias = layer.bias.double() if layer.bias is not None else layer.weight.new_zeros(len(layer.weight)).double()
    dense = torch.cat([layer.weight.double().flatten(1), bias[:, None]], 1).T
    fields = torch.cat([fields, fields.new_ones(len(fields), 1)], 1)
    gram = fields.T @ fields
    power = gram.diagonal()
    ridge = RIDGE * max(1.0, SCARCE * (len(gram) - 1) / len(fields)) * (power + 1e-3 * power.mean())
    left = [c for c in range(len(gram)) if c // kernel not in units or c == len(gram) - 1]
    system = gram[left][:, left] + torch.diag(ridge[left])
    solved = torch.linalg.solve(system, fields[:, left].T @ (fields @ dense) + ridge[left, None] * dense[left])
    whole = torch.zeros_like(dense)
    whole[left] = solved
    return whole[:-1].T.reshape(layer.weight.shape).float(), whole[-1].float()


@pytest.mark.parametrize(("name", "number"), [("linear", 0), ("mlp", 1), ("flattened", 1), ("chain", 0), ("vit", 1)])
def test_exact_surgery_is_the_network_with_its_consumer_fitted_anew(name: str, number: int) -> None:
    entry = zoo.ZOO[name]
    module, group, batches = entry.build(), entry.groups.groups[number], zoo.batches(entry, 40)
    images, labels = next(iter(batches))
    (consumer,) = group.consumers
    layer: Any = module.get_submodule(consumer.module)
    given: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))

    def log_p() -> Tensor:
        with torch.no_grad():
            return module(images).log_softmax(1).gather(1, labels[:, None])[:, 0].double()

    whole = log_p()
    handle.remove()
    found = exact_effects(module, group, batches)
    for unit in range(0, group.units, 4):
        channels = list(range(consumer.offset + unit * consumer.repeat, consumer.offset + (unit + 1) * consumer.repeat))
        with torch.no_grad():
            old = layer.weight, layer.bias
            weight, bias = refitted(layer, given[0], channels)
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
            assert torch.allclose(found[:, unit], log_p() - whole, rtol=1e-2, atol=2e-4)
            layer.weight, layer.bias = old


@pytest.mark.parametrize("name", ["residual", "flattened", "mlp", "vit"])
def test_one_of_two_duplicates_can_leave_for_nothing(name: str) -> None:
    entry = zoo.ZOO[name]
    module, group = entry.build(), entry.groups.groups[1]
    zoo.duplicate(module, group, 0, 2)
    batches = zoo.batches(entry, 64)
    zeroed, cut = (exact_effects(module, group, batches, kind).abs().mean(0) for kind in ("zero", "surgery"))
    assert max(cut[0], cut[2]) < 0.01 * zeroed[0]
    assert cut[1] > 10 * cut[0]


@pytest.mark.parametrize("estimator", ["exact", "attribution", "screened"])
@pytest.mark.parametrize("name", ["residual", "concat", "squeeze-excite", "recurrent", "vit"])
def test_a_unit_that_nothing_reads_has_no_effect_and_explains_nothing(name: str, estimator: Any) -> None:
    entry = zoo.ZOO[name]
    module, group = entry.build(), entry.groups.groups[0]
    zoo.duplicate(module, group, 1, 2)
    zoo.kill(module, group, 1)
    settings = CausalCriterion(estimator=estimator, intervention="surgery")
    (found,) = CausalEffect(settings).score(module, (group,), zoo.batches(entry, 16))
    assert found.effect[1] == found.keep_value[1] == 0
    assert found.keep_value[2] > 1e-5


def test_wide_receptive_fields_are_explained_channel_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two duplicated channels either explains the other then, too."""
    entry = zoo.ZOO["chain"]
    module, group, batches = entry.build(), entry.groups.groups[0], zoo.batches(entry, 64)
    zoo.duplicate(module, group, 0, 2)
    monkeypatch.setattr(residual, "COLUMNS", 10)
    cut, zeroed = (exact_effects(module, group, batches, kind).abs().mean(0) for kind in ("surgery", "zero"))
    assert max(cut[0], cut[2]) < 0.01 * zeroed[0]
    assert cut[1] > 0


def test_a_consumer_of_more_inputs_than_memory_holds_is_scored_without_a_re_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a warning; its units then take their own values, and those of other consumers what the others cannot explain."""
    entry = zoo.ZOO["flattened"]
    module, batches, recording = entry.build(), zoo.batches(entry, 24), Recording()
    narrow, wide = entry.groups.groups[:2]
    surgery, zeroed = (exact_effects(module, wide, batches, kind) for kind in ("surgery", "zero"))
    kept = exact_effects(module, narrow, batches)
    monkeypatch.setattr(reading, "MOST_COLUMNS", 90)
    with reporting(recording):
        found = exact_effects(module, wide, batches)
    assert torch.allclose(found, zeroed, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, surgery, rtol=1e-3, atol=1e-5)
    assert recording.of("warn") == [
        "units that 5 reads are scored without a re-fit: one of its 96 inputs would not fit into memory"
    ]
    assert torch.equal(exact_effects(module, narrow, batches), kept)

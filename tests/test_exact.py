"""The short way to a unit's exact effect: what is folded, skipped and stacked changes nothing; what cannot be stacked comes out too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from cswap_deploy.prune import exact
from cswap_deploy.prune.ablation import ablated
from cswap_deploy.prune.exact import Ablations
from cswap_deploy.prune.folded import folded_copy, narrow
from cswap_deploy.prune.reading import input_means


def example(name: str, count: int = 6) -> Tensor:
    return next(iter(zoo.batches(zoo.ZOO[name], count)))[0]


def everything(ablations: Ablations) -> list[Tensor]:
    masks = [torch.ones(len(ablations.batches), group.units, dtype=torch.bool) for group in ablations.groups]
    return ablations.effects(masks)


def plain_loop(ablations: Ablations, number: int, unit: int, means: dict[str, Tensor]) -> Tensor:
    images, labels = next(iter(ablations.batches))

    def log_p() -> Tensor:
        with torch.no_grad():
            return ablations.module(images).log_softmax(1).gather(1, labels[:, None])[:, 0]

    whole = log_p()
    with ablated(ablations.module, ablations.groups[number], [unit], means or None):
        return (log_p() - whole).double()


@pytest.mark.parametrize("name", zoo.PRUNABLE)
@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_every_unit_and_image_is_as_in_a_plain_loop(name: str, intervention: Any) -> None:
    entry = zoo.ZOO[name]
    ablations = Ablations.prepare(entry.build(), entry.groups.groups, zoo.batches(entry, 7), intervention)
    layers = sorted({member.module for group in ablations.groups for member in group.consumers})
    means = input_means(ablations.module, layers, ablations.batches) if intervention == "mean" else {}
    for number, found in enumerate(everything(ablations)):
        for unit in range(ablations.groups[number].units):
            assert torch.allclose(found[:, unit], plain_loop(ablations, number, unit, means), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["chain", "residual", "separable", "flattened", "mlp", "vit", "resnet", "in-place"])
def test_plain_consumers_start_from_their_output(name: str) -> None:
    entry = zoo.ZOO[name]
    ablations = Ablations.prepare(entry.build(), entry.groups.groups, zoo.batches(entry, 4), "zero")
    assert any(suffix is not None and suffix.head is not None for suffix in ablations.suffixes)
    assert None not in ablations.suffixes


def test_only_what_is_asked_for_is_told() -> None:
    entry = zoo.ZOO["chain"]
    ablations = Ablations.prepare(entry.build(), entry.groups.groups, zoo.batches(entry, 5), "zero")
    masks = [torch.zeros(5, group.units, dtype=torch.bool) for group in ablations.groups]
    masks[1][2:4, 3] = True
    found, whole = ablations.effects(masks), everything(ablations)
    assert [int((~values.isnan()).sum()) for values in found] == [0, 2, 0]
    assert torch.allclose(found[1][2:4, 3], whole[1][2:4, 3], rtol=1e-4, atol=1e-6)


def test_batches_and_groups_that_are_not_asked_for_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group in a section of its own."""
    monkeypatch.setattr(exact, "KEPT_BYTES", 1)
    entry = zoo.ZOO["chain"]
    batches = replace(zoo.batches(entry, 9), at_most=3)
    ablations = Ablations.prepare(entry.build(), entry.groups.groups, batches, "zero")
    masks = [torch.zeros(9, group.units, dtype=torch.bool) for group in ablations.groups]
    masks[0][6:, 1] = masks[2][7, 0] = masks[2][1, 2] = True
    whole = everything(ablations)
    run, forwards = exact.observed, list[int]()
    monkeypatch.setattr(exact, "observed", lambda *given: forwards.append(len(given[1])) or run(*given))
    for found, wanted, mask in zip(ablations.effects(masks), whole, masks, strict=True):
        assert torch.equal(~found.isnan(), mask)
        assert torch.allclose(found[mask], wanted[mask], rtol=1e-4, atol=1e-6)
    assert len([suffixes for suffixes in forwards if suffixes]) == 3 + 2  # two of them to see what the groups keep


class MeetsItsBatch(nn.Module):
    """Rows are not independent: stacking units along the batch would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 6), nn.Linear(6, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).relu()
        out: Tensor = self.second(hidden)
        return out + 0.1 * (out - out.mean(0))


def test_a_network_whose_rows_are_not_independent_goes_the_long_way() -> None:
    entry = zoo.ZOO["mlp"]
    torch.manual_seed(0)
    module = MeetsItsBatch().eval()
    from cswap_deploy.prune import groups

    found = groups.find(module, entry.spec).groups
    ablations = Ablations.prepare(module, found, zoo.batches(entry, 6), "zero")
    assert ablations.suffixes == (None,)
    (values,) = everything(ablations)
    for unit in range(6):
        assert torch.allclose(values[:, unit], plain_loop(ablations, 0, unit, {}), rtol=1e-4, atol=1e-6)


# --- the private copy


@pytest.mark.parametrize("name", ["chain", "residual", "separable", "resnet"])
def test_folding_leaves_no_batchnorm_behind_and_the_logits_alone(name: str) -> None:
    module, images = zoo.ZOO[name].build(), example(name)
    before = zoo.fingerprint(module)
    fast = folded_copy(module, images)
    with torch.no_grad():
        assert torch.allclose(fast(images), module(images), rtol=1e-4, atol=1e-5)
    assert not [layer for layer in fast.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert zoo.same(before, zoo.fingerprint(module))


class ReadTwice(nn.Module):
    """The convolution's output is read beside its BatchNorm, too: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.head((self.norm(y) + y).relu().mean((2, 3)))
        return out


def test_a_batchnorm_is_not_folded_where_its_input_is_read_elsewhere() -> None:
    module = zoo.randomised(ReadTwice()).eval()
    images = example("chain")
    fast = folded_copy(module, images)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
    with torch.no_grad():
        assert torch.equal(fast(images), module(images))


def test_the_last_block_of_a_transformer_works_for_the_class_token_alone() -> None:
    module, images = zoo.ZOO["vit"].build(), example("vit")
    fast = folded_copy(module, images)
    narrow(fast, images)
    seen: dict[str, int] = {}
    for name in ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1"):
        layer: Any = fast.get_submodule(name)
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: int(output.any(2).sum(1)[0])})
        )
    with torch.no_grad():
        assert torch.allclose(fast(images), module(images), rtol=1e-4, atol=1e-5)
    assert seen == {"blocks.0.mlp.fc1": 17, "blocks.1.mlp.fc1": 1}

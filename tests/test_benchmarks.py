"""The benchmarks' peers and statistics: torch-pruning is asked what it says it does, and p-values are exact."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import benchmark
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import Tensor, nn

from cswap_deploy import data, recipe
from cswap_deploy.artifacts import Group, Groups, GroupScores, ImageSet, InputSpec
from cswap_deploy.errors import DeviceError
from cswap_deploy.intervals import paired_drop
from cswap_deploy.model import count
from cswap_deploy.progress import Recording, reporting
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.cut import masked_copy
from cswap_deploy.prune.groups import find
from cswap_deploy.prune.search import Search

SPEC = zoo.spec(32)


paired, peers, cifar_resnet = (benchmark(name) for name in ("paired", "peers", "cifar_resnet"))
oneshot_cells, oneshot_nets = (benchmark(name) for name in ("oneshot_cells", "oneshot_nets"))
oneshot_paths, _, oneshot, cost = (benchmark(name) for name in ("oneshot_paths", "oneshot_table", "oneshot", "cost"))


# --- statistics


def correct(*seeds: str) -> np.ndarray:
    """One row of 0 and 1 per seed."""
    return np.array([[mark == "1" for mark in seed] for seed in seeds])


def outcomes(seeds: int, images: int, rate: float = 0.8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, images)) < rate


def test_holm_against_values_worked_out_by_hand() -> None:
    adjusted = paired.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert paired.holm({("x", 0.7): 0.9, ("x", 0.5): 0.6}) == {("x", 0.7): 1.0, ("x", 0.5): 1.0}
    assert paired.holm({}) == {}


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (9, 2), (2, 9), (40, 40), (300, 250)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_images(lost: int, won: int) -> None:
    first = np.array([True] * lost + [False] * won + [True, False] * 5)
    second = np.array([False] * lost + [True] * won + [True, False] * 5)
    expected = binomtest(won, lost + won).pvalue if lost + won else 1.0
    assert paired.mcnemar(first, second) == pytest.approx(expected)
    assert paired.sign_flip(first, second) == pytest.approx(expected, rel=1e-9)


def test_sign_flip_counts_the_assignments_that_are_as_far_from_even() -> None:
    first, second = outcomes(3, 9, 0.7), outcomes(3, 9, 0.5, seed=1)
    differences = first.sum(0).astype(int) - second.sum(0)
    totals = np.array([differences @ signs for signs in itertools.product((-1, 1), repeat=9)])
    assert paired.sign_flip(first, second) == pytest.approx((np.abs(totals) >= abs(differences.sum())).mean())


def test_seeds_that_repeat_one_another_prove_no_more_than_one_does() -> None:
    dense, one = outcomes(1, 400, 0.9)[0], outcomes(1, 400, 0.85, seed=1)[0]
    repeated = np.stack([one] * 5)
    assert paired.sign_flip(dense, repeated) == pytest.approx(paired.mcnemar(dense, one), rel=1e-9)
    assert paired.drop_interval(dense, repeated) == pytest.approx(paired.drop_interval(dense, one))


def test_the_interval_is_tangos_with_one_seed_and_narrower_with_more() -> None:
    dense, seeds = outcomes(1, 400, 0.9)[0], outcomes(5, 400, 0.85, seed=1)
    lost, won = int((dense & ~seeds[0]).sum()), int((seeds[0] & ~dense).sum())
    assert paired.drop_interval(dense, seeds[0]) == pytest.approx(paired_drop(lost, won, 400))
    one, five = (np.ptp(paired.drop_interval(dense, some)) for some in (seeds[:1], seeds))
    assert five < 0.9 * one
    assert paired.drop_interval(dense, np.stack([dense] * 5)) == pytest.approx(paired_drop(0, 0, 400))


def test_the_interval_covers_the_true_drop_as_often_as_it_says() -> None:
    """Images of their own difficulty make the seeds alike; the true drop is 5 points."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        difficulty = generator.uniform(0.5, 0.9, 300)
        dense, seeds = generator.random(300) < difficulty + 0.05, generator.random((3, 300)) < difficulty
        low, high = paired.drop_interval(dense, seeds)
        hits += low <= 0.05 <= high
    assert 0.91 <= hits / 200 <= 0.99


def test_a_comparison_shows_each_seed_and_their_mean() -> None:
    found = paired.compare(correct("1111")[0], correct("1110", "1010"))
    assert (found.images, found.drop) == (4, 0.375)
    assert [(seed.lost, seed.won, seed.drop, seed.p) for seed in found.by_seed] == [(1, 0, 0.25, 1.0), (2, 0, 0.5, 0.5)]
    assert found.low < found.drop < found.high
    assert found.p == pytest.approx(0.5)  # sizes 1 and 2: of four assignments of signs, two are 3 away from even


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 and 4 images"):
        paired.compare(correct("111"), correct("1111"))
    with pytest.raises(AssertionError, match="bool"):
        paired.sign_flip(correct("111").astype(float), correct("110").astype(float))
    with pytest.raises(AssertionError, match="one seed at a time"):
        paired.mcnemar(correct("111", "110"), correct("111", "110"))


def test_agreement_and_divergence_are_means_over_seeds() -> None:
    dense = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]))
    assert paired.agreement(dense, other).tolist() == [0, 1]
    assert paired.agreement(dense, np.stack([dense, other])).tolist() == [0.5, 1]
    assert paired.divergence(dense, other, 1.0) == pytest.approx([0.25 * np.log(2), 0])
    assert paired.divergence(dense, np.stack([dense, other]), 1.0) == pytest.approx([0.125 * np.log(2), 0])
    flat = paired.divergence(dense, other, 100.0)  # grows flat: half the variance of the logits' difference
    assert flat[0] == pytest.approx(np.log(2) ** 2 / 3, rel=0.02)


# --- peers


@cache
def resnet() -> tuple[nn.Module, Groups]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = zoo.randomised(cifar_resnet.CifarResNet(8)).eval()
    return module, find(module, SPEC)


def noise(spec: InputSpec, count: int = 12, classes: int = zoo.CLASSES) -> Batches:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, *spec.shape), dtype=np.uint8)
    return Batches(pixels, generator.integers(0, classes, count), spec, "cpu")


def example(spec: InputSpec) -> Tensor:
    return torch.zeros(1, *spec.shape)


@pytest.mark.parametrize("name", peers.IMPORTANCES)
def test_its_own_pruner_reaches_the_target_on_the_same_units(name: str) -> None:
    module, found = resnet()
    before = zoo.fingerprint(module)
    protected = peers.outputs_to_protect(module, found.groups)
    assert protected == ("conv1", *(f"layer{k}.0.conv2" for k in (1, 2, 3)), "fc")
    pruned = peers.bare(name, module, example(SPEC), noise(SPEC), 0.7, 0, protected)
    fraction = count(pruned, SPEC)[1] / count(module, SPEC)[1]
    assert 0.7 <= fraction < 0.7 + 0.03  # one unit of the last layer is 1.5 % of this small network's MACs
    for layer in protected:
        assert len(pruned.get_submodule(layer).weight) == len(module.get_submodule(layer).weight)
    with torch.no_grad():
        assert pruned(torch.zeros(2, *SPEC.shape)).shape == (2, 10)
    assert zoo.same(before, zoo.fingerprint(module))


@pytest.mark.parametrize(("network", "name"), [("cifar", "random"), ("cifar", "bn_scale"), ("vit", "taylor")])
def test_the_units_that_its_pruner_kept_are_known(network: str, name: str) -> None:
    """Masking all others gives the same logits; of the transformer, heads and MLP units leave."""
    entry = zoo.ZOO["vit"]
    module, found, spec = (*resnet(), SPEC) if network == "cifar" else (entry.build(), entry.groups, entry.spec)
    pruned, keep = peers.bare_units(name, module, example(spec), noise(spec), 0.6, 3, found.groups)
    assert any(len(keep[group.name]) < group.units for group in found.groups)
    images = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = masked_copy(module, found.groups, keep).double()(images)
        assert torch.allclose(pruned.double()(images), expected, rtol=1e-9, atol=1e-9)
    assert found.cost(keep)[1] / found.cost({})[1] == pytest.approx(count(pruned.float(), spec)[1] / found.cost({})[1])


def test_a_target_that_its_pruner_cannot_reach_is_refused() -> None:
    entry = zoo.ZOO["mlp"]
    with pytest.raises(peers.OutOfReachError, match=r"bn_scale: no pruning ratio brings the MACs down to 0\.5"):
        peers.bare_units("bn_scale", entry.build(), example(entry.spec), noise(entry.spec), 0.5, 0, entry.groups.groups)


@pytest.mark.parametrize("network", ["chain", "separable", "concat", "flattened", "squeeze-excite", "mlp", "vit"])
def test_every_group_gets_finite_values(network: str) -> None:
    entry = zoo.ZOO[network]
    module = entry.build()
    before, state = zoo.fingerprint(module), torch.get_rng_state()
    for name in peers.IMPORTANCES:
        scores = peers.PeerScorer(name, 0).score(module, entry.groups.groups, noise(entry.spec, 4))
        for group, item in zip(entry.groups.groups, scores, strict=True):
            assert (item.group, item.units) == (group.name, tuple(range(group.units)))
            assert len(item.keep_value) == group.units and np.isfinite(item.keep_value).all()
    assert zoo.same(before, zoo.fingerprint(module)) and torch.equal(state, torch.get_rng_state())


def scores(name: str, module: nn.Module, groups: tuple[Group, ...], batches: Batches, seed: int = 0) -> list[float]:
    found: tuple[GroupScores, ...] = peers.PeerScorer(name, seed).score(module, groups, batches)
    return [value for item in found for value in item.keep_value]


def test_group_l1_is_what_its_definition_says() -> None:
    module, found = resnet()
    block = module.get_submodule("layer2.0")
    parts = (block.conv1.weight.abs().sum((1, 2, 3)), block.bn1.weight.abs(), block.conv2.weight.abs().sum((0, 2, 3)))
    expected = sum(parts) / sum(parts).mean()
    item = peers.PeerScorer("magnitude_l1", 0).score(module, found.groups, noise(SPEC, 1))[1]
    assert item.group == "layer2.0.conv1"
    assert item.keep_value == pytest.approx(expected.tolist())


def test_random_draws_by_seed() -> None:
    entry = zoo.ZOO["chain"]
    batches = noise(entry.spec, 1)
    first, again, other = (scores("random", entry.build(), entry.groups.groups, batches, seed) for seed in (1, 1, 2))
    assert first == again != other
    one, same, another = (
        peers.bare_units("random", entry.build(), example(entry.spec), batches, 0.7, seed, entry.groups.groups)[1]
        for seed in (1, 1, 2)
    )
    assert one == same != another


@pytest.mark.parametrize("name", ["magnitude_l2", "lamp", "fpgm", "bn_scale", "taylor", "hessian"])
def test_units_that_left_count_in_no_score(name: str) -> None:
    """Nonsense in what makes them changes nothing; neither does the seed, and they are worth nothing themselves."""
    module, found = resnet()
    keep = zoo.half(found)
    masked = masked_copy(module, found.groups, keep)
    clean = scores(name, masked, found.groups, noise(SPEC, 4))
    zoo.scramble(masked, found, keep)
    assert scores(name, masked, found.groups, noise(SPEC, 4), seed=1) == pytest.approx(clean)
    alive = [unit in keep[group.name] for group in found.groups for unit in range(group.units)]
    assert not any(itertools.compress(clean, (not there for there in alive)))
    assert any(itertools.compress(clean, alive))


def test_the_documented_hessian_loop_sees_the_last_image_only() -> None:
    module, found = resnet()
    images = noise(SPEC, 6)
    last = Batches(images.pixels[-1:], images.labels[-1:], SPEC, "cpu")
    documented, alone = (scores("hessian_last_image", module, found.groups, some) for some in (images, last))
    assert documented == pytest.approx(alone)
    assert scores("hessian", module, found.groups, last) == pytest.approx(alone, rel=1e-4)
    assert scores("hessian", module, found.groups, images) != pytest.approx(alone, rel=1e-2)


def test_groups_without_an_importance_are_equal_and_named() -> None:
    entry = zoo.ZOO["mlp"]
    groups, record = entry.groups.groups, Recording()  # proven here, so that no event of it is recorded
    with reporting(record):
        values = scores("bn_scale", entry.build(), groups, noise(entry.spec, 1))
    assert set(values) == {1.0}
    assert [event[:2] for event in record.events] == [
        ("warn", f"bn_scale has no importance for {group.name}: its units count as equal")
        for group in entry.groups.groups
    ]


# --- the one-shot benchmark


DIGITS = Path(__file__).parents[1] / "calibration" / "digits"


@cache
def telling_weights() -> dict[str, Tensor]:
    """Random, but for the last layer: the digits differ in class."""
    module, pixels = resnet()[0], data.catalogue(DIGITS / "scoring", None, 10)
    spec = InputSpec((3, 32, 32), oneshot_nets.INPUT["mean"], oneshot_nets.INPUT["std"], "bilinear", 1.0)
    with torch.no_grad():
        logits = torch.cat(
            [module(images) for images, _ in Batches.read(ImageSet(pixels.scoring[::10], pixels.folder), spec, "cpu")]
        )
    weights = module.state_dict()
    weights["fc.weight"] = weights["fc.weight"] / logits.std(0)[:, None]
    weights["fc.bias"] = (weights["fc.bias"] - logits.mean(0)) / logits.std(0)
    return weights


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[oneshot_cells.Cell]]:
    """Run it on a small network of random weights, 24 images to fit and 8 to choose with; the cells of its results file."""
    factory = f"{Path(cifar_resnet.__file__)}:CifarResNet"
    settings = {"factory": factory, "kwargs": {"depth": 8}, "input": oneshot_nets.INPUT}
    save_file(telling_weights(), tmp_path / "tiny.safetensors")
    monkeypatch.setitem(oneshot_nets.NETS, "tiny", (settings, "tiny", "digits"))
    monkeypatch.setattr(oneshot_nets, "SCORING", 32)
    monkeypatch.setattr(oneshot_nets, "RESERVED", 40)

    def run(*arguments: str) -> list[oneshot_cells.Cell]:
        files = ["--results", str(tmp_path / "cells.jsonl"), "--json", str(tmp_path / "table.json")]
        where = ["--images", str(DIGITS.parent), "--weights", str(tmp_path)]
        oneshot.main(["--net", "tiny", "--seeds", "0", "--stride", "0.3", *where, *files, *arguments])
        return list(oneshot_cells.Results.read(tmp_path / "cells.jsonl").cells.values())

    return run


def test_every_method_and_column_makes_a_cell_and_none_twice(
    tiny: Callable[..., list[oneshot_cells.Cell]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny("--methods", "ours,peers", "--peers", "magnitude_l1,taylor", "--cuts", "0.7")
    found = {(cell.key.method, cell.key.column, cell.key.seed) for cell in first}
    columns = [("bare", 0), ("compensated: its units", 0), ("compensated: its ranking", 0), ("curves", 0)]
    expected = {("dense", "dense", None), ("ours", "curves", 0), ("magnitude_l1", "bare", None)}
    assert found == expected | {("magnitude_l1", *column) for column in columns[1:]} | {("taylor", *c) for c in columns}
    for cell in first[1:]:
        assert not cell.refused and len(cell.right) == cell.images == 40
        assert 0.6 < cell.macs < 0.75 and 0 < cell.params < 1 and cell.kl > 0 and cell.agree <= 40
    lines = (tmp_path / "cells.jsonl").read_text()
    printed = capsys.readouterr().out
    assert (
        "### tiny: fraction of the MACs kept" in printed
        and "| ours, steps of 30 % " in printed
        and "- curves: ours better in" in printed
    )
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["verdict"] for row in rows if row["method"] == "ours"} == {""}
    assert sum(bool(row["verdict"]) for row in rows) == 6  # of the two compensated forms the better one
    tiny("--methods", "ours,peers", "--peers", "magnitude_l1,taylor", "--cuts", "0.7")
    assert (tmp_path / "cells.jsonl").read_text() == lines
    assert capsys.readouterr().out == printed
    tiny("--table")
    assert capsys.readouterr().out == printed


def test_a_path_goes_on_from_its_last_cut_as_if_it_had_not_stopped(
    tiny: Callable[..., list[oneshot_cells.Cell]], tmp_path: Path
) -> None:
    """Cuts beside the path change nothing on it; neither does a line that was cut short."""
    apart = tiny("--cuts", "0.8,0.7")
    file = tmp_path / "cells.jsonl"
    file.write_text(file.read_text() + '{"key": {"net"')
    apart = tiny("--cuts", "0.4")
    file.unlink()
    at_once = tiny("--cuts", "0.7,0.4")
    for cut in (0.7, 0.4):
        one, other = ([cell for cell in cells if cell.key.cut == cut] for cells in (apart, at_once))
        assert [(c.keep, c.correct) for c in one] == [(c.keep, c.correct) for c in other] and len(one) == 1


def test_what_is_switched_off_changes_the_outcome(tiny: Callable[..., list[oneshot_cells.Cell]]) -> None:
    tried = ["global ranking", "consumers only", "no rectifier"]
    same = ["one step"]  # as the whole path
    cells = tiny("--ablate", ",".join([*tried, *same]), "--cuts", "0.7")
    assert [cell.key.column.removeprefix("changed: ") for cell in cells[1:]] == [*tried, *same]
    full = tiny("--cuts", "0.7")[-1].kl
    close = [
        cell.key.column.removeprefix("changed: ") for cell in cells[1:] if cell.kl == pytest.approx(full, rel=1e-6)
    ]
    assert close == same


def test_targets_count_parameters_and_units() -> None:
    entry = zoo.ZOO["vit"]
    found = entry.groups
    for target, kind in oneshot_nets.KINDS.items():
        own = oneshot_nets.counted(found, target)
        units = {group.name: group.units for group in found.groups if group.kind == kind}
        assert {group.name: group.units for group in own.groups} == units
        assert own.cost({}) == (sum(units.values()), sum(units.values()))
        name = next(iter(units))
        assert own.cost({name: (0,)})[1] == sum(units.values()) - units[name] + 1
    assert oneshot_nets.counted(found, "params") is found


def test_cells_of_other_code_or_images_are_left_out(
    tiny: Callable[..., list[oneshot_cells.Cell]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = tiny("--cuts", "0.7")
    results = oneshot_cells.Results.read(tmp_path / "cells.jsonl")
    results.add(replace(cells[-1], key=cells[-1].key._replace(seed=1), code="older"))
    results.add(replace(cells[-1], key=cells[-1].key._replace(seed=2), judged="others"))
    tiny("--table")
    printed = capsys.readouterr().out
    assert (
        "Left out: 1 cells of other code, 1 on other images or weights." in printed
        and "mean over seeds, 1 where" in printed
    )


def test_reserved_images_are_in_no_split_and_the_holdout_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "holdout").mkdir()  # empty: listing it would be refused
    (tmp_path / "scoring").symlink_to(DIGITS / "scoring")
    catalogue = oneshot_nets.reserved(data.catalogue(tmp_path / "scoring", None, 10))
    judged = {image.sha256 for image in catalogue.holdout}
    for seed in (0, 1):
        split = data.divide(catalogue, 1024, None, seed)
        assert not judged & {image.sha256 for image in (*split.fit, *split.selection)}
        assert {image.sha256 for image in split.holdout} == judged and len(judged) == 200


def test_cells_of_more_scoring_images_say_so(tiny: Callable[..., list[oneshot_cells.Cell]]) -> None:
    few, many = tiny("--cuts", "0.8"), tiny("--cuts", "0.8", "--scoring", "48")
    assert {cell.key.net for cell in few} == {"tiny"}
    added = [cell for cell in many if cell.key.net == "tiny (48 scoring images)"]
    assert [cell.key.method for cell in added] == ["dense", "ours"] and len(many) == len(few) + 2
    assert added[1].kl != few[1].kl


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(SystemExit, match="resnet5: expected some of resnet56-jpeg"):
        oneshot_nets.names("resnet5", list(oneshot_nets.NETS))
    with pytest.raises(SystemExit, match="resnet20-lossless needs --images and --weights"):
        oneshot.main(["--net", "resnet20-lossless"])


# --- cost


def test_results_of_costs_are_kept_by_case_and_drawn(tmp_path: Path) -> None:
    def result(name: str, axis: str, units: int, images: int, seconds: float) -> dict[str, object]:
        stages = dict.fromkeys(cost.STAGES, seconds)
        return vars(cost.Result(name, axis, units, images, stages, 5 * seconds, 100.0))

    written = [result("a", "units", 10, 512, 1.0), result("b", "units", 100, 512, 10.0), result("c", "images", 10, 64, 2.0),
               result("d", "images", 10, 128, 4.0), result("resnet50", "", 9, 9, 9.0)]  # fmt: skip
    (tmp_path / "cost.json").write_text(json.dumps(written))
    cost.main(["--results", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.svg")])
    drawn = (tmp_path / "cost.svg").read_text()
    assert drawn.count("<path") == 2 * len(cost.COLOURS)
    assert 'd="M60 236 L400 167"' in drawn, "a factor of ten is two sevenths of 240 pixels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a CUDA device here")
def test_the_estimators_ask_for_their_device_as_a_recipe_does(tmp_path: Path) -> None:
    """On cuda convolutions are then in full float32; without one nothing is loaded."""
    fidelity, args = benchmark("fidelity"), Namespace(device="cuda", seed=0, images=8, intervention="zero")
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        fidelity.prepare("vit", tmp_path / "none.safetensors", tmp_path, args, tmp_path)


def test_every_case_of_costs_is_a_recipe(tmp_path: Path) -> None:
    for name in ("resnet56", "resnet50", "growth"):
        for case in cost.cases(name, None):
            (tmp_path / "recipe.yaml").write_text(json.dumps(case.recipe(tmp_path)))
            assert recipe.load(tmp_path / "recipe.yaml", []).prune.steps == case.steps


def test_what_a_path_changes_of_the_search_is_there_to_be_changed() -> None:
    """An ablation whose method the search no longer calls would measure the default under another name."""
    own = {
        name for name, value in vars(oneshot_paths.Passing).items() if callable(value) or isinstance(value, property)
    }
    assert (
        {name for name in own if not name.startswith("__")} - {"through"}
        == {"_curves", "criterion"}
        <= set(vars(Search))
    )

"""Why a unit left: what plan.json keeps of each, `show --unit`, and what the report and `show` say of them all."""

from __future__ import annotations

import copy as copying
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import Built, faults, run
from scipy import stats
from typer.testing import CliRunner

from cswap_deploy import cli, schemas, units
from cswap_deploy.console import WIDTH, left_lines
from cswap_deploy.digests import sealed
from cswap_deploy.errors import UsageError, VerifyError
from cswap_deploy.intervals import mean_interval
from cswap_deploy.manifest import VERDICTS
from cswap_deploy.report import render_html

Change = Callable[[dict[str, Any]], object]


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def plan_of(built: Built) -> dict[str, Any]:
    return dict(json.loads((built.bundle.folder / "plan.json").read_text()))


def every_unit(plan: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for group in plan["groups"]:
        for index in range(group["units"]):
            yield group["name"], index


def item(scores: dict[str, Any], group: str) -> dict[str, Any]:
    return next(own for own in scores["groups"] if own["group"] == group)


def described(
    plan: dict[str, Any], wanted: str, allocation: str = "curves", compensation: str = "least_squares"
) -> dict[str, Any]:
    return units.describe(plan, {"allocation": allocation, "compensation": compensation}, wanted)


def changed(folder: Path, change: Change) -> Path:
    """The bundle with another plan, which its manifest vouches for."""
    plan, path = json.loads((folder / "plan.json").read_text()), folder / "manifest.json"
    change(plan)
    content = json.dumps(plan).encode()
    (folder / "plan.json").write_bytes(content)
    manifest = json.loads(path.read_text("utf-8"))
    entry = next(entry for entry in manifest["files"] if entry["path"] == "plan.json")
    entry |= {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    path.write_text(json.dumps(sealed(manifest)), "utf-8")
    return folder


# --- what plan.json keeps


def test_plan_keeps_the_scores_of_the_scores_stage(colours):
    (stored,) = colours.work.glob("stages/scores/*/stage.json")
    found, kept = json.loads(stored.read_text())["value"], plan_of(colours)["dense_scores"]
    assert {key: kept[key] for key in ("criterion", "estimator", "intervention", "images", "alpha")} == {
        "criterion": "causal", "estimator": "screened", "intervention": "surgery", "images": 36, "alpha": 0.05,
    }  # fmt: skip
    for own in found["groups"]:
        same = item(kept, own["group"])
        assert same["verdict"] == own["verdict"] and same["verified"] == own["verified"]
        assert same["units"] == list(range(len(own["units"])))
        for key in ("keep_value", "effect", "error", "xi"):
            assert same[key] == pytest.approx(own[key], rel=1e-5, abs=1e-300)
            assert same[key] == [float(f"{value:.6g}") for value in own[key]]


def test_scores_of_the_last_step_say_how_they_were_found(colours, zeroed, quickstart):
    later, eliminated, only = plan_of(zeroed), plan_of(colours), plan_of(quickstart)
    assert len(later["steps"]) == 2 and later["scores"]["estimator"] == "attribution"
    assert len(eliminated["steps"]) == 2 and eliminated["scores"] is None and eliminated["dense_scores"]
    assert len(only["steps"]) == 1 and only["scores"] == only["dense_scores"]
    assert only["scores"]["estimator"] == "screened"


def test_plan_is_the_same_bytes_when_it_is_made_again(project, cheap_export):
    first = project.build(work="one").bundle.folder / "plan.json"
    assert first.read_bytes() == (project.build(work="two").bundle.folder / "plan.json").read_bytes()
    assert max(map(len, first.read_text().splitlines())) < 2000 < first.stat().st_size


# --- the facts of one unit


def test_every_unit_has_left_once_or_stayed(colours, quickstart):
    for built in (colours, quickstart):
        plan = plan_of(built)
        for group, index in every_unit(plan):
            unit = described(plan, f"{group}:{index}")
            steps = [n for n, step in enumerate(plan["steps"], 1) if index in step["removed"].get(group, [])]
            assert unit["left"] == (index not in plan["keep"][group]) == bool(steps)
            assert (unit["step"]["number"] if unit["left"] else None) == (steps[0] if steps else None)
            assert unit["kept"] == len(plan["keep"][group]) and unit["steps"] == len(plan["steps"])
            if unit["left"]:
                assert unit["kept_as"] is unit["last"] is None
            else:
                assert plan["keep"][group][unit["kept_as"]] == index and unit["step"] is None


def test_widths_on_the_way_add_up(colours):
    plan = plan_of(colours)
    sizes = {group["name"]: group["units"] for group in plan["groups"]}
    gone = dict.fromkeys(sizes, 0)
    for number, step in enumerate(plan["steps"], 1):
        before = dict(gone)
        for group, removed in step["removed"].items():
            gone[group] += len(removed)
            found = described(plan, f"{group}:{removed[0]}")["step"]
            assert found["number"] == number and found["macs"] == step["macs"] and found["drop_pp"] == step["drop_pp"]
            assert found["gone_before"] == sum(before.values())
            assert (found["width_before"], found["width_after"]) == (
                sizes[group] - before[group],
                sizes[group] - gone[group],
            )
    assert {group: sizes[group] - count for group, count in gone.items()} == {
        group: len(kept) for group, kept in plan["keep"].items()
    }


def test_figures_are_those_of_the_step_in_which_it_left(colours):
    plan = plan_of(colours)
    for number, step in enumerate(plan["steps"], 1):
        for own in step["scores"]:
            for place, index in enumerate(own["units"]):
                unit = described(plan, f"{own['group']}:{index}")
                dense = item(plan["dense_scores"], own["group"])
                assert unit["dense"]["effect"] == dense["effect"][index]
                assert unit["dense"]["verdict"] == dense["verdict"][index]
                found = unit["step"]["scores"]
                assert {key: found[key] for key in ("effect", "error", "verdict", "verified", "keep_value")} == {
                    key: own[key][place] for key in ("effect", "error", "verdict", "verified", "keep_value")
                }
                assert found["estimator"] == ("screened" if number == 1 else "attribution")


@pytest.mark.parametrize("allocation", ["curves", "global"])
def test_lowest_ranks_leave_first(project, cheap_export, allocation):
    built = project.build("prune.criterion={kind: causal, intervention: zero}", f"prune.allocation={allocation}")
    plan = plan_of(built)
    for group in plan["keep"]:
        values = item(plan["dense_scores"], group)["keep_value"]
        for index in range(len(values)):
            unit = described(plan, f"{group}:{index}", allocation)
            assert unit["dense"]["rank"] == sorted(values).index(values[index]) + 1 and not unit["by_elimination"]
            assert unit["turn"] is None if allocation == "global" else unit["turn"] >= unit["dense"]["rank"]
            if unit["left"]:
                scores = unit["step"]["scores"]
                assert scores["among"] == unit["step"]["width_before"]
                assert scores["rank"] <= unit["step"]["width_before"] - unit["step"]["width_after"]


def test_those_whose_turn_it_is_leave_first(colours):
    """By elimination, which is the default, the keep value ranks a unit only among those that left with it."""
    (stored,) = colours.work.glob("stages/curves/*/stage.json")
    orders = {curve["group"]: curve["order"] for curve in json.loads(stored.read_text())["value"]["groups"]}
    plan = plan_of(colours)
    for group, removed in plan["steps"][0]["removed"].items():
        found = [described(plan, f"{group}:{index}") for index in removed]
        assert sorted(unit["turn"] for unit in found) == list(range(1, len(removed) + 1))
        assert {orders[group][unit["turn"] - 1] for unit in found} == set(removed)
        assert {unit["step"]["scores"]["among"] for unit in found} == {len(removed)}
        assert all(unit["by_elimination"] for unit in found)


@pytest.mark.parametrize("images", [2, 3, 4, 7, 16, 256, 1024, 100_000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_interval_is_student_s(images, confidence):
    low, high = (bound + 0.5 for bound in mean_interval(-0.5, 0.25, images, confidence))
    wanted = stats.t.interval(confidence, images - 1, 0, 0.25)
    assert (low, high) == pytest.approx(wanted, rel=1e-9 if images <= 1024 else 2e-3)


def test_neutral_units_have_their_interval_within_the_margin(colours, quickstart):
    """Verdict and interval are of one rule, rounding aside."""
    for built in (colours, quickstart):
        plan = plan_of(built)
        for group, index in every_unit(plan):
            dense = described(plan, f"{group}:{index}")["dense"]
            inside = dense["interval"][0] > -0.01 and dense["interval"][1] < 0.01
            if all(abs(abs(bound) - 0.01) > 1e-6 for bound in dense["interval"]):
                assert (dense["verdict"] == "neutral") == inside
            low, high = stats.t.interval(0.95, dense["images"] - 1, dense["effect"], dense["error"] or 1e-300)
            assert dense["interval"] == pytest.approx([low, high], rel=1e-6, abs=1e-9)


# --- which unit is meant


def test_a_layer_stands_for_its_group_where_it_has_one(colours, quickstart):
    plan = plan_of(colours)
    assert described(plan, "bn2:3") == described(plan, "conv2:3") != described(plan, "conv1:3")
    assert described(plan, "fc:3")["group"] == "conv2"
    deep = plan_of(quickstart)
    assert described(deep, "layer1.0.bn1:1")["group"] == "layer1.0.conv1"
    with pytest.raises(UsageError, match=r"'layer1.0.conv2' belongs to 2 groups") as refusal:
        described(deep, "layer1.0.conv2:1")
    assert "conv1.6:1 (what it makes) or layer1.0.conv1:1 (what it reads)" in refusal.value.hint


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        ("conv3:1", "no group is called 'conv3'", "the nearest are conv2:1, conv1:1, "),
        ("convl:99", "no group is called 'convl'", "the nearest are conv2:23, conv1:23, "),
        ("fcc:7", "no group is called 'fcc'", "the nearest are fc:7, "),
        ("nothing.like.it:1", "no group is called", "the nearest are "),
        ("conv1:24", "group 'conv1' has 24 units, counted from 0, so there is no unit 24", "the nearest is conv1:23"),
        ("conv1", "'conv1' is not GROUP:INDEX", "counted from 0; the nearest are conv1:0, "),
        ("conv1:-1", "is not GROUP:INDEX", "the nearest are conv1:0, "),
        ("conv1:1.0", "is not GROUP:INDEX", "the nearest are conv1:0, "),
        (":1", "is not GROUP:INDEX", "the nearest are "),
        ("conv1:" + "9" * 5000, "is not GROUP:INDEX", "the nearest are conv1:0, "),
        ("conv1:\u0663", "is not GROUP:INDEX", "the nearest are conv1:0, "),
    ],
)
def test_a_unit_that_is_not_there_is_refused(colours, wanted, message, hint):
    result = call("show", colours.bundle.folder, "--unit", wanted, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 2 and document["error"]["type"] == "UsageError"
    assert message in document["error"]["message"] and hint in document["error"]["hint"]
    for near in re.findall(r"[\w.]+:\d+", hint):
        assert call("show", colours.bundle.folder, "--unit", near).exit_code == 0
    assert list(faults(document, schemas.of(command="show"))) == []


def test_a_dense_bundle_has_no_units(project, cheap_export):
    built = project.build("prune.target=null")
    result = call("show", built.bundle.folder, "--unit", "conv1:0")
    assert result.exit_code == 2 and "nothing was pruned in this bundle" in result.stderr
    assert "0 of 0 units removed" in call("show", built.bundle.folder).stdout
    assert "Nothing was pruned, so no unit was removed" in (built.bundle.folder / "report.html").read_text("utf-8")


def test_only_refitted_consumers_eliminate(colours):
    plan = plan_of(colours)
    (group, removed), *_ = plan["steps"][0]["removed"].items()
    name = f"{group}:{removed[0]}"
    assert described(plan, name)["by_elimination"]
    assert not described(plan, name, compensation="mean")["by_elimination"]
    assert not described(plan, name, allocation="global")["by_elimination"]


# --- as a command


@pytest.fixture
def zeroed(project, cheap_export):
    """Two steps, of which the second has scores of its own."""
    return project.build("prune.criterion={kind: causal, intervention: zero}")


def test_show_tells_people_why_a_unit_left(zeroed):
    plan = plan_of(zeroed)
    group, removed = next(iter(plan["steps"][1]["removed"].items()))
    result = call("show", zeroed.bundle.folder, "--unit", f"{group}:{removed[0]}")
    unit = described(plan, f"{group}:{removed[0]}")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and max(map(len, lines)) <= WIDTH
    text = " ".join(result.stdout.split())
    dense, then = unit["dense"], unit["step"]["scores"]
    shown = [
        f"{group}:{removed[0]} left in step 2 of 2", f"verdict {dense['verdict']} {then['verdict']}",
        f"effect {dense['effect']:+.3g} {then['effect']:+.3g}", f"error {dense['error']:.3g} {then['error']:.3g}",
        f"rank, lowest first {dense['rank']} of 24 {then['rank']} of {then['among']}",
        f"its turn to leave was {unit['turn']} of 24", "estimator screened attribution", "images 36 36",
        f"ablated on {'all 36' if dense['verified'] else 'at most 5 of 36'} none of 36",
        f"from 24 to {unit['kept']} channels, in step 2 from {unit['step']['width_before']} to",
        f"{unit['step']['gone_before']} units had left before that step", "verdicts do not decide",
        "is aimed at 5 % (Benjamini-Hochberg)", "the interval, at 95 %, is of this unit alone",
        "it calls no unit critical or detrimental", "Coupled to it",
    ]  # fmt: skip
    assert [words for words in shown if words not in text] == []


def test_show_tells_people_that_elimination_took_a_unit(colours):
    plan = plan_of(colours)
    group, removed = next(iter(plan["steps"][1]["removed"].items()))
    result = call("show", colours.bundle.folder, "--unit", f"{group}:{removed[0]}")
    unit, text = described(plan, f"{group}:{removed[0]}"), " ".join(result.stdout.split())
    assert result.exit_code == 0 and unit["by_elimination"] and unit["step"]["scores"] is None
    shown = [f"{group}:{removed[0]} left in step 2 of 2", f"effect {unit['dense']['effect']:+.3g}",
             f"its turn to leave was {unit['turn']} of 24", "the keep value is not that order"]  # fmt: skip
    assert [words for words in shown if words not in text] == []


def test_show_tells_people_that_a_unit_stayed(zeroed):
    plan = plan_of(zeroed)
    index = plan["keep"]["conv1"][-1]
    text = " ".join(call("show", zeroed.bundle.folder, "--unit", f"conv1:{index}").stdout.split())
    last = len(plan["keep"]["conv1"]) - 1
    assert f"conv1:{index} stayed: it is unit {last} of the {last + 1} that are kept, counted from 0" in text
    assert "dense network before the last step" in text and f"keeps {last + 1} of 24 channels" in text


@pytest.mark.parametrize("index", range(0, 24, 5))
def test_json_of_a_unit_keeps_to_the_schema(colours, index):
    result = call("show", colours.bundle.folder, "--unit", f"conv2:{index}", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and list(faults(document, schemas.of(command="show"))) == []
    assert document["schema"] == "cswap-deploy/show/1"
    assert document["unit"] == described(plan_of(colours), f"conv2:{index}")


def test_show_of_a_unit_imports_no_framework(quickstart):
    code = (
        "import sys\nfrom cswap_deploy import cli\nsys.argv = ['cswap-deploy', *sys.argv[1:]]\n"
        "try:\n    cli.main()\n"
        "finally:\n    print([m for m in ('torch', 'timm', 'onnx', 'scipy') if m in sys.modules], file=sys.stderr)\n"
    )
    done = run("-c", code, "show", quickstart.bundle.folder, "--unit", "layer3.0.conv1:17")
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout.startswith("layer3.0.conv1:17 ")


# --- criteria that say less


def test_a_criterion_without_causes_still_tells_step_and_widths(project, cheap_export):
    built = project.build("prune.criterion={kind: magnitude}", "prune.allocation=global")
    plan = plan_of(built)
    group, removed = next(iter(plan["steps"][0]["removed"].items()))
    found = call("show", built.bundle.folder, "--unit", f"{group}:{removed[0]}")
    text = " ".join(found.stdout.split())
    assert found.exit_code == 0 and max(map(len, found.stdout.splitlines())) <= WIDTH
    assert "left in step 1 of 2" in text and "from 24 to" in text and "keep value" in text
    assert "Criterion magnitude gives no effect, error or verdict." in text and "Benjamini" not in text
    document = json.loads(call("show", built.bundle.folder, "--unit", f"{group}:{removed[0]}", "--json").stdout)
    assert list(faults(document, schemas.of(command="show"))) == []
    assert document["unit"]["dense"]["effect"] is document["unit"]["dense"]["verdict"] is None
    assert "units removed; criterion magnitude gives no verdicts" in " ".join(left_lines(built.bundle))
    page = (built.bundle.folder / "report.html").read_text("utf-8")
    assert "Criterion magnitude gives no effects and no verdicts" in page and "Benjamini" not in page


def test_attribution_is_not_said_to_judge(project, cheap_export):
    built = project.build("prune.criterion={kind: causal, estimator: attribution}")
    groups = built.manifest["pruned"]["groups"]
    assert all(group["dense"][verdict] == 0 for group in groups for verdict in ("critical", "detrimental"))
    page = " ".join((built.bundle.folder / "report.html").read_text("utf-8").split())
    assert "estimator attribution" in page and "it calls no unit critical or detrimental" in page
    said = " ".join(" ".join(left_lines(built.bundle)).split())
    assert said.endswith("(by attribution: it calls no unit critical or detrimental)")


def test_a_plan_of_a_version_that_kept_less_is_read(zeroed, tmp_path):
    def older(plan: dict[str, Any]) -> None:
        del (
            plan["dense_scores"],
            plan["dense_order"],
            plan["scores"]["estimator"],
            plan["scores"]["intervention"],
            plan["scores"]["alpha"],
        )

    folder = changed(shutil.copytree(zeroed.bundle.folder, tmp_path / "bundle"), older)
    for step in plan_of(zeroed)["steps"]:
        group, removed = next(iter(step["removed"].items()))
        result = call("show", folder, "--unit", f"{group}:{removed[0]}")
        assert result.exit_code == 0 and "left in step" in result.stdout
    assert "Its scores were not kept." in call("show", folder, "--unit", f"{first_gone(zeroed)}").stdout


def first_gone(built: Built) -> str:
    group, removed = next(iter(plan_of(built)["steps"][0]["removed"].items()))
    return f"{group}:{removed[0]}"


# --- a bundle is not trusted


def set_at(*place: Any, value: Any) -> Change:
    def change(plan: dict[str, Any]) -> None:
        inner: Any = plan
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("groups"), "'groups' is missing"),
        (lambda plan: plan.pop("steps"), "'steps' is missing"),
        (set_at("schema", value="cswap-deploy/plan/2"), "expected cswap-deploy/plan/1"),
        (set_at("groups", 0, "name", value=7), "expected string"),
        (set_at("groups", 0, "units", value=-3), "out of range"),
        (set_at("groups", 0, "units", value=2**60), "does not say of every unit"),
        (set_at("groups", 0, "units", value=True), "expected integer"),
        (set_at("groups", 0, "members", value={}), "expected array"),
        (set_at("keep", value=[]), "expected object"),
        (set_at("keep", "conv1", value=["0"]), "expected integer"),
        (set_at("keep", "conv1", value=[0, 0]), "does not say of every unit"),
        (lambda plan: plan["keep"].pop("conv1"), "does not say of every unit"),
        (set_at("steps", 0, "removed", value=3), "expected object"),
        (set_at("steps", 0, "removed", value={}), "does not say of every unit"),
        (set_at("steps", 0, "drop_pp", value="low"), "expected number"),
        (set_at("steps", 0, "macs", value=float("nan")), "expected number"),
        (set_at("dense_order", value=[]), "expected object"),
        (set_at("dense_order", "conv1", value=[0] * 24), "does not order the units"),
        (set_at("dense_scores", value="none"), "dense_scores: none of the allowed forms"),
        (set_at("dense_scores", "alpha", value=7), "dense_scores: none of the allowed forms"),
        (set_at("dense_scores", "groups", 0, "effect", value=["x"] * 24), r"effect\[0\]: expected number"),
        (set_at("dense_scores", "groups", 0, "effect", value=[0.5]), "effect: 1 values for 24 units"),
        (set_at("dense_scores", "groups", 0, "verdict", value=["\x1b[2J"] * 24), r"verdict\[0\]: expected critical or"),
        (set_at("dense_scores", "groups", 0, "keep_value", value=[]), "keep_value: 0 values"),
        (lambda plan: plan["dense_scores"]["groups"][0].pop("verified"), "'verified' is missing"),
    ],
)  # fmt: skip
def test_a_plan_that_is_not_ours_is_a_damaged_bundle(colours, tmp_path, change, message):
    folder = changed(shutil.copytree(colours.bundle.folder, tmp_path / "bundle"), change)
    result = call("show", folder, "--unit", "conv1:0", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["error"]["exit_code"] == 9 and document["error"]["type"] == "VerifyError"
    assert list(faults(document, schemas.of(command="show"))) == []
    with pytest.raises(VerifyError, match=message):
        described(units.read(folder / "plan.json"), "conv1:0")


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"[" * 100_000, b"\xff", b'{"schema": 1e999}'])
def test_a_plan_that_is_no_plan_is_a_damaged_bundle(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(VerifyError, match=r"plan\.json"):
        units.read(tmp_path / "plan.json")


def test_a_plan_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / "plan.json").open("wb") as stream:
        stream.truncate(units.LARGEST_PLAN + 1)
    with pytest.raises(VerifyError, match="larger than any plan"):
        units.read(tmp_path / "plan.json")


def test_a_plan_that_was_changed_or_is_gone_is_a_damaged_bundle(copy):
    (copy / "plan.json").write_text("{}")
    assert call("show", copy, "--unit", "conv1.0:0").exit_code == 9
    (copy / "plan.json").unlink()
    result = call("show", copy, "--unit", "conv1.0:0")
    assert result.exit_code == 9 and "'plan.json' of the bundle is missing" in result.stderr


def test_names_of_a_plan_cannot_drive_the_terminal(colours, tmp_path):
    name = "\x1b[2J\x1b]0;title\x07\r\u202e\nPASS: all is well"

    def rename(plan: dict[str, Any]) -> None:
        group = plan["groups"][0]
        group_name = group["name"]
        plan["keep"][name] = plan["keep"].pop(group["name"])
        for step in plan["steps"]:
            if group["name"] in step["removed"]:
                step["removed"][name] = step["removed"].pop(group["name"])
        group |= {"name": name, "kind": name}
        group["members"][0]["module"] = name
        group["members"][1]["module"] = "plain"
        plan["dense_order"][name] = plan["dense_order"].pop(group_name)
        plan["dense_scores"] |= {"criterion": name, "estimator": name, "intervention": name}

    folder = changed(shutil.copytree(colours.bundle.folder, tmp_path / "bundle"), rename)
    for wanted in ("plain:0", "plain:99", "none:0"):
        result = call("show", folder, "--unit", wanted)
        assert not set(result.output) & set("\x1b\x07\r\u202e")
        assert not [line for line in result.output.splitlines() if line.startswith("PASS")]


# --- all units together


def test_manifest_counts_what_the_plan_lists(colours, quickstart):
    for built in (colours, quickstart):
        plan, pruned = plan_of(built), built.manifest["pruned"]
        assert pruned["scores"] == {key: plan["dense_scores"][key] for key in pruned["scores"]}
        for group in pruned["groups"]:
            own, gone = item(plan["dense_scores"], group["name"]), set(range(group["units"]))
            for part, members in (("dense", gone), ("left", gone - set(plan["keep"][group["name"]]))):
                assert {key: group[part][key] for key in VERDICTS} == {
                    key: Counter(own["verdict"][unit] for unit in members)[key] for key in VERDICTS
                }
                effects = [own["effect"][unit] for unit in members]
                bounds = [min(effects), max(effects)] if effects else None
                assert group[part]["effect"] == (bounds and pytest.approx(bounds, rel=1e-5))


def test_show_counts_those_that_left_by_verdict(colours):
    pruned = colours.manifest["pruned"]
    text = " ".join(call("show", colours.bundle.folder).stdout.split())
    said = text[text.index(f"{pruned['units_removed']} of {pruned['units']} units removed") :]
    for verdict in VERDICTS:
        count = sum(group["left"][verdict] for group in pruned["groups"])
        assert (f"{count} {verdict}" in said) == bool(count)


def judged(count: int) -> dict[str, Any]:
    dense = {"critical": 7, "neutral": 50, "detrimental": 13, "unresolved": 10, "effect": [-0.1234, 0.0567]}
    left = {"critical": 2, "neutral": 41, "detrimental": 5, "unresolved": 0, "effect": [-0.00321, 0.0123]}
    return {"name": f"<b>stage.{count}", "units": 80, "kept": 32, "dense": dense, "left": left}


@pytest.mark.parametrize("count", [1, 300])
def test_report_shows_each_layer(quickstart, count):
    manifest = copying.deepcopy(quickstart.manifest)
    manifest["pruned"] |= {"groups": [judged(number) for number in range(count)], "units": 80 * count}
    manifest["pruned"]["scores"] |= {"images": 345, "alpha": 0.07}
    page = render_html(manifest)
    assert "What was removed, layer by layer" in page and "<b>" not in page
    assert page.count('<th scope="row"><bdi>&lt;b&gt;stage.') == 2 * count
    for cell in ("2 of 7", "41 of 50", "5 of 13", "0 of 10", "-123 to +57", "-3.2 to +12"):
        shown = len(re.findall(f'<td(?: data-value="[0-9]+")?>{re.escape(cell)}</td>', page))
        assert shown == count + (count == 1 and " of " in cell)
    for cell in (f"{2 * count} of {7 * count}", f"{5 * count} of {13 * count}"):
        assert f"<td>{cell}</td>" in page
    assert page.count('class="mark critical" x="40.00%" width="2.50%"') == count
    assert page.count('class="mark detrimental" x="42.50%" width="6.25%"') == count
    assert "345 images" in page and "7.0 % (Benjamini-Hochberg)" in page and "over all\nunits" in page
    assert len(page) < 5000 * count + 75_000


def test_report_of_a_group_that_lost_nothing_has_no_range_for_it(quickstart):
    manifest = copying.deepcopy(quickstart.manifest)
    group = judged(0)
    group["left"] = {**dict.fromkeys(VERDICTS, 0), "effect": None}
    manifest["pruned"]["groups"] = [group]
    assert "<td>-123 to +57</td><td></td></tr>" in render_html(manifest)

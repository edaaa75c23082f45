"""Mutated recipes, manifests and stage records: one message or the same meaning, never a traceback, never a bug of ours.

What has become another recipe by a mutation is one: `prune.steps: 3` cannot be told from a wish. So a recipe that is accepted must
say all that its text says, as an independent reader of YAML finds it: nothing is dropped, rounded or taken for something else.
Manifests and stage records have one meaning only, that of the one who wrote them: any other is refused, or made again.
"""

from __future__ import annotations

import copy as copies
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Built, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from typer.testing import CliRunner

from cswap_deploy import pipeline
from cswap_deploy.bundle import Bundle
from cswap_deploy.cli import app
from cswap_deploy.errors import RecipeError
from cswap_deploy.recipe import Recipe, load
from cswap_deploy.stage import Workdir

RECIPES, RECORDS, BY_COMMAND = 2000, 500, 25
"""Mutated recipes; mutated manifests and stage records, half of each; and how many of a kind go through a whole command."""
FULL = """
name: full
seed: 3
device: cpu
model:
  name: resnet18
  pretrained: false
  kwargs: {channels: [32, 48, 64, 64]}
  num_classes: 10
  input: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: bicubic, crop_pct: 1.0}
calibration: {images: digits, scoring: 100, holdout: 50}
prune:
  target: {params: 0.5}
  criterion: {kind: causal, estimator: exact, intervention: mean, images: 64, alpha: 0.1}
  compensate: {kind: least_squares}
  allocation: {kind: curves, images: 64}
  steps: 3
  round_to: 8
  skip: [layer1.*, fc]
ship: int8
accuracy: {max_drop: 2.5, rule: bound, confidence: 0.9}
onnx: {opset: 17, dynamic_batch: true}
variants: [fp16, int8]
latency: {target: local, batch: 2, threads: 2, warmup_s: 0.5, duration_s: 1}
"""
TEXTS = (FULL, (ROOT / "recipes" / "quickstart.yaml").read_text())
LONG = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)

words = st.one_of(
    st.sampled_from(["", "null", "~", "true", "no", "1e3", "0x1F", ".nan", "-.inf", "1_0", "0o7", "'", '"', ": ", "- ", "&a", "*a",
                     "!!python/name:os.system", "<<: ", "? ", "|", ">", "%YAML 1.1", "---", "...", "#", "\t", "\0", "\ufeff",
                     "9" * 400, "{", "}", "[", "]", "@", "`", "2026-01-01", "12:30:45", "é", "\u2028", "\x85", "\ud7ff"]),
    st.text(max_size=8),
)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 40), st.floats(), words, st.builds(list), st.builds(dict),
    st.sampled_from(["fp16", "int8", "taylor", "causal", "auto", "none", "local", "ssh://board", "ssh://-x", "tensorrt"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=4
)


# --- mutations


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """A recipe with one to three pieces of it replaced, swapped, repeated, moved or lost."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 3))):
        lines = text.split("\n")
        at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        match draw(st.sampled_from(["insert", "replace", "delete", "repeat", "swap", "indent", "cut", "value"])):
            case "insert":
                place = draw(st.integers(0, len(text)))
                text = text[:place] + draw(words) + text[place:]
                continue
            case "replace":
                place = draw(st.integers(0, len(text)))
                text = text[:place] + draw(words) + text[place + draw(st.integers(1, 4)) :]
                continue
            case "cut":
                text = text[: draw(st.integers(0, len(text)))]
                continue
            case "delete":
                del lines[at]
            case "repeat":
                lines.insert(other, lines[at])
            case "swap":
                lines[at], lines[other] = lines[other], lines[at]
            case "indent":
                lines[at] = draw(st.sampled_from(["", " ", "    "])) + lines[at].strip()
            case "value":
                lines[at] = lines[at].partition(":")[0] + ": " + draw(words)
        text = "\n".join(lines)
    return text


@st.composite
def mutated(draw: st.DrawFn, document: Any, times: int = 2) -> Any:
    """Plain JSON data with one or two values replaced, removed, added or put under another key."""
    document = copies.deepcopy(document)
    for _ in range(draw(st.integers(1, times))):
        where = list(containers(document))
        if not where:
            break
        block = draw(st.sampled_from(where))
        keys = list(block) if isinstance(block, dict) else list(range(len(block)))
        key = draw(st.sampled_from(keys)) if keys else None
        match draw(st.sampled_from(["replace", "remove", "add", "rename", "nudge"])):
            case "replace" if keys:
                block[key] = copies.deepcopy(draw(values))
            case "nudge" if keys and isinstance(block[key], int | float):
                block[key] += draw(st.sampled_from([1, -1, 1e-9, 0.5]))
            case "nudge" if keys and isinstance(block[key], str) and block[key]:
                place = draw(st.integers(0, len(block[key]) - 1))
                block[key] = block[key][:place] + draw(st.sampled_from("0aZ ")) + block[key][place + 1 :]
            case "remove" if keys:
                del block[key]
            case "rename" if keys and isinstance(block, dict):
                block[draw(words)] = block.pop(key)
            case _:
                if isinstance(block, dict):
                    block[draw(words)] = copies.deepcopy(draw(values))
                else:
                    block.append(copies.deepcopy(draw(values)))
    return document


def containers(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        yield node
        for item in node.values() if isinstance(node, dict) else node:
            yield from containers(item)


# --- recipes


def accepted(folder: Path, text: str) -> Recipe | None:
    """The recipe, or None where it was refused as a recipe is to be refused."""
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        return load(path, ())
    except RecipeError as error:
        assert error.exit_code == 2 and error.message.startswith(str(path)), error.message
        assert error.message.isprintable() or "\n" in error.message
        return None


def require_said(written: Any, said: Any, place: str = "") -> None:
    """Everything that is written is in the recipe that was read."""
    if isinstance(written, dict) and isinstance(said, dict):
        for key, value in written.items():
            assert key in said, f"{place}.{key} was dropped"
            require_said(value, said[key], f"{place}.{key}")
    elif place == ".model.input.size" and isinstance(written, int):
        assert said == [written, written]
    elif isinstance(said, dict) and "kind" in said:
        assert written == said["kind"], f"{place}: {written!r} became {said!r}"
    elif isinstance(written, list) and isinstance(said, list):
        assert len(written) == len(said), place
        for number, (one, other) in enumerate(zip(written, said, strict=True)):
            require_said(one, other, f"{place}.{number}")
    elif isinstance(said, str) and Path(said).is_absolute():
        assert said.endswith(Path(str(written)).name), f"{place}: {written!r} became {said!r}"
    elif isinstance(said, float) and isinstance(written, float | int) and not isinstance(written, bool):
        assert math.isclose(said, written), f"{place}: {written!r} became {said!r}"
    elif written is not None:  # null stands for the default
        assert (type(written), written) == (type(said), said), f"{place}: {written!r} became {said!r}"


def require_refused_or_said(folder: Path, text: str) -> None:
    recipe = accepted(folder, text)
    if recipe is not None:
        require_said(YAML(typ="safe", pure=True).load(text), recipe.model_dump(mode="json"))


@given(text=mutated_texts())
@settings(LONG, max_examples=RECIPES // 2)
def test_a_recipe_with_other_text_is_refused_or_means_what_it_says(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_refused_or_said(tmp_path_factory.getbasetemp(), text)


@given(document=st.sampled_from(TEXTS).flatmap(lambda text: mutated(YAML(typ="safe", pure=True).load(text), 3)))
@settings(LONG, max_examples=RECIPES // 2)
def test_a_recipe_with_other_values_is_refused_or_means_what_it_says(
    document: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_refused_or_said(tmp_path_factory.getbasetemp(), json.dumps(document, ensure_ascii=False))


def require_one_message(code: int, stderr: str) -> None:
    """A documented refusal: neither success nor a bug of ours, one error, no traceback."""
    assert code in (2, 3, 4, 5, 6, 9), stderr
    assert stderr.startswith("error: ") and "Traceback" not in stderr, stderr
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) == 1, stderr


@given(text=mutated_texts())
@settings(LONG, max_examples=BY_COMMAND)
def test_the_command_says_one_thing_about_a_recipe_that_is_refused(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if accepted(folder, text) is None:
        result = CliRunner().invoke(app, ["check", str(folder / "recipe.yaml")])
        require_one_message(result.exit_code, result.stderr)
        assert result.exit_code == 2 and result.stdout == ""


# --- manifests


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """JSON text with other values, or with a piece of it replaced, repeated or cut off."""
    if draw(st.booleans()):
        return json.dumps(draw(mutated(json.loads(text))))
    place, end = draw(st.integers(0, len(text))), draw(st.integers(0, 40))
    piece = draw(
        st.sampled_from(["", " ", "0", "1", "}", "]", ",", '"', "null", "NaN", "1e999", "\0", "\ud800", "[" * 2000])
    )
    return draw(
        st.sampled_from([text[:place], text[:place] + piece + text[place + end :], text[:place] + piece + text[place:]])
    )


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@pytest.fixture(scope="module")
def bundle(colours: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(colours.bundle.folder, tmp_path_factory.mktemp("fuzz") / "bundle")


def require_answers(bundle: Path, text: str, said: str, *commands: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for command in commands:
        result = CliRunner().invoke(app, [command, str(bundle)])
        if result.exit_code == 0:
            assert parsed(text) == parsed(said), f"{command} takes another manifest for the one that was written"
        elif command == "show":
            require_one_message(result.exit_code, result.stderr)
        else:
            assert result.exit_code == 9 and "failed" in result.stdout, result.output
        assert "Traceback" not in result.output


@given(data=st.data())
@settings(LONG, max_examples=RECORDS // 2)
def test_show_and_verify_never_take_another_manifest_for_the_one_that_was_written(
    data: st.DataObject, colours: Built, bundle: Path
) -> None:
    said = (colours.bundle.folder / "manifest.json").read_text("utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_onnx", "_pytorch"):  # the networks take seconds, and what is read of the manifest comes before
            patch.setattr(f"cswap_deploy.verify.{name}", lambda *_: "not run")
        require_answers(bundle, data.draw(damaged(said)), said, "show", "verify")


@given(data=st.data())
@settings(LONG, max_examples=3)
def test_verify_as_a_whole_answers_as_well(data: st.DataObject, colours: Built, bundle: Path) -> None:
    said = (colours.bundle.folder / "manifest.json").read_text("utf-8")
    require_answers(bundle, data.draw(damaged(said)), said, "verify")


# --- work folders


@pytest.fixture(scope="module")
def own(colours: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = shutil.copytree(colours.recipe.parent, tmp_path_factory.mktemp("fuzz") / "own")
    return Built(folder / "recipe.yaml", (), folder / "work", Bundle.read(folder / "work" / "bundle"))


def status(own: Built) -> dict[str, str]:
    with Workdir(own.work, dry=True).open() as work:
        return dict(pipeline.status(load(own.recipe, ()), work))


@given(data=st.data())
@settings(LONG, max_examples=RECORDS // 2)
def test_a_rerun_never_uses_a_stage_record_that_was_changed(data: st.DataObject, own: Built) -> None:
    path = data.draw(st.sampled_from(sorted(own.work.glob("stages/*/*/stage.json"))))
    stage, said = path.parent.parent.name, path.read_text()
    text = data.draw(damaged(said))
    try:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = status(own)
    finally:
        path.write_text(said)
    if found[stage] == "up to date":
        assert parsed(text) == parsed(said), f"a rerun uses another record of {stage} than the one that was written"
    else:
        assert found[stage] == "stored result is damaged"


@given(data=st.data())
@settings(LONG, max_examples=BY_COMMAND)
@pytest.mark.parametrize("name", ["stages/bundle/*/stage.json", "stages/split/*/stage.json", "bundle/manifest.json"])
def test_a_build_after_damage_ends_with_the_bundle_of_an_undisturbed_one(
    data: st.DataObject, name: str, own: Built, colours: Built
) -> None:
    (path,) = own.work.glob(name)
    (said,) = colours.work.glob(name)  # the record of another run would hold other times
    path.write_bytes(data.draw(damaged(said.read_text("utf-8"))).encode("utf-8", "surrogatepass"))
    result = CliRunner().invoke(app, ["build", str(own.recipe), "--work", str(own.work), "--quiet"])
    assert result.exit_code == 0, result.output
    built, wanted = Bundle.read(own.work / "bundle").require_sealed().manifest, colours.manifest
    undated = {key: built[key] for key in ("created", "files", "sha256")}
    assert {**wanted, **undated} == built


@given(data=st.data())
@settings(LONG, max_examples=2 * BY_COMMAND)
@pytest.mark.parametrize("name", ["prepared.json", "work.json", "history.json", "digests.json", "holdout_reads"])
def test_other_files_of_a_work_folder_are_refused_or_done_without(data: st.DataObject, name: str, own: Built) -> None:
    path = own.work / name
    said = path.read_text()
    text = data.draw(damaged(said))
    before = tree(own.work / "bundle")
    try:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        command = (
            ["deploy", str(own.work)]
            if name == "prepared.json"
            else ["check", str(own.recipe), "--work", str(own.work)]
        )
        result = CliRunner().invoke(app, command)
    finally:
        path.write_text(said)
    if result.exit_code:
        require_one_message(result.exit_code, result.stderr)
    elif name == "work.json":
        assert parsed(text)["format"] == parsed(said)["format"]
    else:
        assert name != "prepared.json" or parsed(text) == parsed(said)
    assert tree(own.work / "bundle") == before

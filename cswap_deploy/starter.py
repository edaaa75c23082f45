"""`cswap-deploy init`: a commented recipe to start from, out of a few wishes and of what lies in the folder."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cswap_deploy import data, model, recipe
from cswap_deploy.data import Listing
from cswap_deploy.digests import write_atomically
from cswap_deploy.errors import DataError, ModelError, RecipeError, UsageError
from cswap_deploy.recipe import ModelSettings, Recipe
from cswap_deploy.wording import printable

MODEL, TARGET = "resnet50", "macs=0.7"
"""What is taken where nothing is said."""
FILE, SCHEMA = "recipe.yaml", "recipe.schema.json"
PLACES = ("images", "data", "dataset", "calibration")
"""Where images are looked for, below the recipe's folder."""
NAMES_SHOWN = 6


@dataclass(frozen=True)
class Wishes:
    """What the user asks for; paths are relative to the current folder."""

    path: Path
    name: str | None = None
    model: str = MODEL
    """A timm name, or a factory, relative to the recipe's folder."""
    images: Path | None = None
    labels: Path | None = None
    checkpoint: Path | None = None
    target: str = TARGET
    """KEY=VALUE, or none."""
    on: str | None = None
    """Where to measure; None: nowhere."""


@dataclass(frozen=True)
class Starter:
    """Files that were written, and what the user should know about them."""

    recipe: Path
    schema: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """What follows from the model and the images."""

    images: Path | None
    listing: Listing | None
    settings: dict[str, Any]
    """Of the model block beside its name."""
    untrained: str = ""
    """Why no weights are loaded; empty: some are."""


def write(wishes: Wishes, force: bool) -> Starter:
    """Write the recipe and its schema; nothing is left behind unless the recipe passes the real loader.

    Errors: UsageError for a file that is there, RecipeError, DataError, ModelError for a wish that cannot be.
    """
    require_free(wishes.path, force)
    _require_target(wishes)
    path = place(wishes.path)
    schema = path.with_name(SCHEMA)
    seen = look(wishes)
    text = compose(wishes, seen)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _require_valid(text, path)
    except BaseException:
        for folder in made:
            folder.rmdir()
        raise
    with path.open("w" if force else "x", encoding="utf-8") as stream:
        stream.write(text)
    write_atomically(schema, json.dumps(recipe.schema(), indent=1, ensure_ascii=False) + "\n")
    return Starter(path, schema, tuple(_notes(wishes, seen)))


def require_free(wished: Path, force: bool) -> None:
    """Errors: UsageError where a file would be replaced that is not asked to be."""
    path = place(wished)
    schema = path.with_name(SCHEMA)
    if force:
        return
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already", "give another path, or --force to replace it")
    if schema.exists() and not _is_ours(schema):
        raise UsageError(
            f"{schema}, where the recipe's schema goes, holds something else", "move it, or give --force to replace it"
        )


def is_speed(target: str) -> bool:
    """Whether KEY=VALUE asks for what is measured."""
    return target.startswith(("latency_ms=", "fps="))


def _require_target(wishes: Wishes) -> None:
    """Errors: UsageError where a speed is asked for and nothing says where it is measured."""
    if wishes.on is None and is_speed(wishes.target):
        raise UsageError(
            f"--target: {wishes.target} is measured, and nothing says where",
            "give --on local, or --on ssh://[user@]host[:port]: either will add a latency block",
        )


def place(path: Path) -> Path:
    """The file to write; in a folder, one with the usual name."""
    return path / FILE if path.is_dir() else path


def find_images(path: Path) -> Path | None:
    """The first folder near the recipe that holds class folders with images."""
    for candidate in PLACES:
        folder = place(path).parent / candidate
        with suppress(DataError):
            if folder.is_dir():
                data.survey(folder)
                return folder
    return None


def look(wishes: Wishes) -> _Seen:
    """Errors: DataError for images that cannot be used, ModelError for a model or weights that are not there."""
    images = wishes.images or find_images(wishes.path)
    listing = data.survey(images, wishes.labels) if images else None
    if is_factory(wishes.model):
        return _Seen(images, listing, {})
    outputs = outputs_of(wishes.model)
    classes = len(listing.labels) if listing else outputs
    settings: dict[str, Any] = {"num_classes": classes} if classes != outputs else {}
    if wishes.checkpoint:
        return _Seen(images, listing, settings)
    why = _unpublished(wishes.model)
    if classes != outputs:
        why = why or f"the published weights of {wishes.model} have {outputs} classes, the images {classes}"
    return _Seen(images, listing, {"pretrained": False, **settings} if why else {}, why)


def outputs_of(name: str) -> int:
    """Of a timm name, as published. Errors: ModelError, which knows the nearest name."""
    return model.expected_outputs(ModelSettings(name=name, pretrained=False)) or 0


def _unpublished(name: str) -> str:
    """Why timm has no weights of it, or nothing."""
    try:
        model.expected_outputs(ModelSettings(name=name, pretrained=True))
    except ModelError as error:
        return error.message
    return ""


def is_factory(name: str) -> bool:
    return ":" in name and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def compose(wishes: Wishes, seen: _Seen) -> str:
    """The recipe's text. Whatever a name holds, it is one YAML scalar; in comments it is printable."""
    return "\n".join(_lines(wishes, seen)) + "\n"


def _lines(wishes: Wishes, seen: _Seen) -> Iterator[str]:
    path, key = place(wishes.path), "factory" if is_factory(wishes.model) else "name"
    yield f"# yaml-language-server: $schema={SCHEMA}"
    yield "# A recipe to start from: everything that a run depends on. An editor with a YAML language server completes"
    yield f"# and explains its keys, {SCHEMA} beside it tells them. What would run, and whether all is there:"
    yield f"#   {printable(shlex.join(['cswap-deploy', 'check', str(path)]))}"
    yield f"name: {_scalar(wishes.name or _name(wishes))}"
    yield ""
    yield "model:"
    yield "  # `name`: a timm name; or in its place `factory: nets.py:build`, a function that returns your nn.Module"
    yield f"  {key}: {_scalar(wishes.model)}"
    if seen.untrained:
        yield f"  # UNTRAINED: {printable(seen.untrained)}."
        yield "  # Give your weights as `checkpoint`, remove `pretrained: false`, and set accuracy.max_drop to a number."
    yield from (f"  {name}: {_scalar(value)}" for name, value in seen.settings.items())
    if wishes.checkpoint:
        yield f"  checkpoint: {_path(wishes.checkpoint, path)}"
    else:
        yield "  # checkpoint: weights.safetensors   # your weights: .safetensors, or .pth without code in it"
    if key == "factory":
        yield "  # What the network was trained with; where it is not given, ImageNet's at 224 pixels is taken:"
        yield "  # input: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 1.0}"
    else:
        yield "  # input: {size: 224}                # where the preprocessing differs from the model's own"
    yield ""
    yield from _calibration(wishes, seen, path)
    yield ""
    yield "prune:"
    yield "  # one of macs, params (fraction to keep), max_drop (points of top-1), latency_ms, fps (measured); null: export only"
    yield f"  target: {target_block(wishes.target)}"
    yield "  # round_to: 16                      # widths in multiples; what makes pruned networks fast, see docs/pruning.md"
    yield '  # skip: ["layer4.*"]                # modules to leave alone'
    yield ""
    yield "accuracy:"
    yield "  # points of top-1 that may be lost on the hold-out images, else the build fails; null: no gate"
    yield f"  max_drop: {'null' if seen.untrained else '1.0'}"
    yield ""
    yield "# ship: int8                           # fp32 (default), fp16 or int8: what the gate and the latency are about"
    yield "# variants: [fp16]                     # further files in the bundle"
    yield ""
    if wishes.on:
        yield "# measured in turn with the dense model, where it will run: local, or ssh://[user@]host[:port]"
        yield "latency:"
        yield f"  target: {_scalar(wishes.on)}"
    else:
        yield "# latency: {target: local}             # measure: here, or on ssh://[user@]host[:port]"


def _calibration(wishes: Wishes, seen: _Seen, path: Path) -> Iterator[str]:
    yield "calibration:"
    yield "  # one folder per class; or scoring/ and holdout/ with one folder per class each"
    if seen.images is None or seen.listing is None:
        yield "  images: path/to/images               # CHANGE THIS"
    else:
        yield f"  # {printable(described(seen.listing))}"
        yield f"  images: {_path(seen.images, path)}"
    if wishes.labels:
        yield f"  labels: {_path(wishes.labels, path)}"
    else:
        yield "  # labels: labels.txt                # one class name per model output, where the folders are a subset"
    found = seen.listing
    if found and found.holdout is None and len(found.scoring) <= 2 * 1024:
        yield "  # images that shape the model and make its choices; the others only report"
        yield f"  scoring: {max(8, len(found.scoring) // 2)}"


def described(listing: Listing) -> str:
    more = ", ..." if len(listing.labels) > NAMES_SHOWN else ""
    classes = f"{len(listing.labels)} classes ({', '.join(listing.labels[:NAMES_SHOWN])}{more})"
    if listing.holdout is None:
        return f"{len(listing.scoring)} images of {classes}"
    return f"{len(listing.scoring)} scoring and {len(listing.holdout)} holdout images of {classes}"


def _notes(wishes: Wishes, seen: _Seen) -> Iterator[str]:
    if seen.listing:
        yield f"images   {described(seen.listing)}"
    else:
        yield "warning: no class folders with images were found: set calibration.images"
    if seen.untrained:
        yield f"warning: untrained and without a gate: {seen.untrained}; give --checkpoint, or edit the recipe"


# --- text


def _name(wishes: Wishes) -> str:
    """From the file's name, or from the model's where the file has the usual name."""
    stem = place(wishes.path).stem
    text = wishes.model.rpartition(":")[2] if stem == Path(FILE).stem else stem
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-") or "my-model"


def target_block(text: str) -> str:
    """`macs=0.7` as a block of one key; the value is YAML, as behind --set."""
    key, equals, value = text.partition("=")
    if text == "none":
        return "null"
    if not (equals and re.fullmatch(r"[a-z_]+", key) and re.fullmatch(r"[0-9.eE+-]+", value)):
        raise UsageError(
            f"--target: {text!r} is no target", "give macs=0.7, params=0.5, max_drop=0.5, latency_ms=5 or none"
        )
    return f"{{{key}: {value}}}"


def _scalar(value: Any) -> str:
    """One YAML scalar on one line of printable letters: text that means itself is plain, other text in double quotes."""
    from ruamel.yaml import YAML

    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z./][A-Za-z0-9_./+@:-]*(?<!:)", value) and YAML(typ="safe", pure=True).load(value) == value:
        return value
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(letter: str) -> str:
    if letter in '\\"':
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\U{ord(letter):08x}"


def _path(path: Path, file: Path) -> str:
    """Absolute as it is, else relative to the recipe's folder; one that starts with ~ would be taken for a home folder."""
    if path.is_absolute():
        return _scalar(str(path))
    here = path.parent.resolve() / path.name
    text = os.path.relpath(path.absolute(), file.parent.absolute())
    if (
        file.parent / text
    ).parent.resolve() / path.name != here:  # a link on the way, above which `..` is another folder
        text = os.path.relpath(here, file.parent.resolve())
    return _scalar(str(here) if text.startswith("~") else text if text.strip() else f"./{text}")


# --- files


def _is_ours(schema: Path) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads(schema.read_bytes())["title"] == recipe.schema()["title"])
    return False


def _require_valid(text: str, path: Path) -> None:
    """What the real loader says of it, in the folder where it will lie. Errors: RecipeError, ModelError."""
    trial = path.with_name(f".{path.name}.trial")
    try:
        trial.write_text(text, encoding="utf-8")
        found: Recipe = recipe.load(trial)
        model.expected_outputs(found.model)
    except RecipeError as error:
        raise RecipeError(error.message.removeprefix(f"{error.where}: "), error.hint, key=error.key) from None
    finally:
        trial.unlink(missing_ok=True)

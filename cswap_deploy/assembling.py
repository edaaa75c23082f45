"""The bundle: everything a Jetson or phone team needs, in one folder with a manifest. `bundle.py` reads it."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from cswap_deploy import bom, facts, handoff, onnx_facts
from cswap_deploy import manifest as manifests
from cswap_deploy.artifacts import (
    BundleFiles,
    Engine,
    Evaluation,
    File,
    FileLatency,
    LatencyReport,
    OnnxModel,
    sha256_of,
)
from cswap_deploy.budget import account
from cswap_deploy.bundle import ENGINE, LAYERS, MANIFEST
from cswap_deploy.digests import sealed
from cswap_deploy.handoff import FILES
from cswap_deploy.prepared import Prepared, Reason
from cswap_deploy.recipe import (
    AccuracySettings,
    EngineSettings,
    LatencySettings,
    OnnxSettings,
    Precision,
    PruneSettings,
    Recipe,
)
from cswap_deploy.report import render_card, render_html, render_readme, web_files
from cswap_deploy.stage import stage

RECORD = "# A record of what was built; local files are named without their folders, with their sha256.\n"
ENVIRONMENT = bom.LIBRARIES
"""Whose versions the manifest holds: the bill of materials is made of them."""


@dataclass(frozen=True)
class Terms:
    """What the recipe says about the bundle: nothing in it names a path."""

    name: str
    prune: PruneSettings
    accuracy: AccuracySettings
    ship: Precision
    ships_engine: bool
    shipped_file: str
    remote: bool
    engine: EngineSettings | None
    latency: LatencySettings | None
    onnx: OnnxSettings

    @staticmethod
    def of(recipe: Recipe) -> Terms:
        return Terms(**{item.name: getattr(recipe, item.name) for item in fields(Terms)})


@dataclass(frozen=True)
class Deployed:
    """The device's half: what was built and measured on the target. Nothing, when nothing was asked for or it failed."""

    engine: Engine | None = None
    on_engine: Evaluation | None = None
    latency: LatencyReport | None = None
    files: FileLatency | None = None
    reasons: tuple[Reason, ...] = ()

    def with_hint(self, hint: str) -> Deployed:
        """The same, with what to do at the end of each reason."""
        return replace(self, reasons=tuple(replace(each, text=f"{each.text}. {hint}") for each in self.reasons))


@stage("bundle", returns=BundleFiles, libraries=("cswap-deploy", "jinja2"))
def assemble(
    out: Path, terms: Terms, ready: Prepared, deployed: Deployed, holdout_reads: int, created: str
) -> BundleFiles:
    """Write the bundle; the manifest is written last and lists every other file. Equal arguments give equal bytes."""
    assert ready.pruned.plan is not None
    copies = handoff.copies(ready.models, ready.models["fp32"].vectors)
    copies |= {"plan.json": ready.pruned.plan, "weights.safetensors": ready.pruned.weights}
    if deployed.engine:
        copies |= {ENGINE: deployed.engine.file, LAYERS: deployed.engine.layers}
    for name, file in copies.items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file.path, out / name)
    (out / "recipe.yaml").write_text(RECORD + _placed(ready.recipe, terms, deployed), encoding="utf-8")
    handoff.write(out, ready.models, ready.labels, ready.source.input)
    for name, text in web_files().items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    document = _manifest(terms, ready, deployed, holdout_reads, sha256_of(out / "recipe.yaml"), created)
    document["files"] = _entries(out)
    later: dict[str, Callable[[], str]] = {
        "bom.cdx.json": lambda: json.dumps(bom.bill(document), indent=1, ensure_ascii=False) + "\n",
        "README.md": lambda: render_readme(document),
        "MODEL_CARD.md": lambda: render_card(document),
        "report.html": lambda: render_html(document),  # it names all files but itself
        MANIFEST: lambda: json.dumps(sealed(document), indent=1, ensure_ascii=False),
    }
    for name, text_of in later.items():
        (out / name).write_text(text_of(), encoding="utf-8")
        document["files"] = _entries(out)
    manifest = out / MANIFEST
    others = [File.of(path) for path in sorted(out.rglob("*")) if path.is_file() and path != manifest]
    return BundleFiles(File.of(manifest), (*others, File.of(manifest)))


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Every file in it, by name."""
    files = sorted((File.of(path) for path in folder.rglob("*") if path.is_file()), key=lambda file: file.path)
    return [
        {"path": file.path.relative_to(folder).as_posix(), "sha256": file.sha256, "bytes": file.bytes} for file in files
    ]


def _manifest(
    terms: Terms, ready: Prepared, deployed: Deployed, holdout_reads: int, recipe_sha256: str, created: str
) -> dict[str, Any]:
    """Everything but the list of files."""
    name, shipped = _shipped(terms, ready, deployed)
    verdict = facts.gate_of(ready.accuracy, shipped, terms.accuracy)
    reasons = [*ready.reasons, *deployed.reasons, *facts.gate_reasons(ready.accuracy, shipped, verdict)]
    budget = account.account(ready.budget, ready.groups, deployed.latency) if ready.budget else None
    reasons += account.reasons(budget) if budget else []
    reasons.sort(key=lambda reason: reason.exit_code)
    prune = terms.prune
    how = ("none", "none", "none")
    if prune.target is not None:
        how = (prune.criterion.kind, prune.compensate.kind, prune.allocation.kind)
    no_engine = next((reason.text for reason in deployed.reasons), "")
    engine, latency = deployed.engine, deployed.latency
    return {
        "schema": manifests.SCHEMA,
        "name": terms.name,
        "created": created,
        "tool": {"name": "cswap-deploy", "version": metadata.version("cswap-deploy")},
        "recipe_sha256": recipe_sha256,
        "shipped": name,
        "verdict": "fail" if reasons else "pass",
        "reasons": [reason.text for reason in reasons],
        "exit_code": reasons[0].exit_code if reasons else 0,
        "model": facts.model_block(ready.source),
        "pruned": facts.pruned_block(ready.pruned, ready.plan, ready.groups, *how),
        "accuracy": facts.accuracy_block(
            ready.accuracy, deployed.on_engine, shipped, verdict, ready.labels, holdout_reads
        ),
        "size": facts.size_block(ready.source, ready.pruned, *_sizes(name, ready, deployed)),
        "onnx": onnx_facts.onnx_block(
            ready.exported, ready.models, FILES, ready.accuracy, verdict, terms.onnx.runtimes, deployed.files
        ),
        "latency": facts.latency_block(latency, terms.latency, terms.ship, terms.remote)
        if latency and terms.latency
        else None,
        "budget": budget,
        "engine": facts.engine_block(engine, terms.engine, "" if engine else no_engine, terms.onnx.dynamic_batch)
        if terms.engine
        else None,
        "environment": ready.environment,
    }


def _placed(recipe: str, terms: Terms, deployed: Deployed) -> str:
    """The resolved recipe with the board that was measured in place of the target's address."""
    device = deployed.latency.conditions["device"] if deployed.latency else "another machine" if terms.remote else ""
    place = f"{device}, over ssh" if terms.remote else device
    return re.sub(r"(?m)^(  target: local).*$", lambda found: f"{found[1]}  # {place}" if place else found[1], recipe)


def _shipped(terms: Terms, ready: Prepared, deployed: Deployed) -> tuple[str, Evaluation]:
    """The file that ships, and how it did on the hold-out; where it is missing, which is a reason to fail, its nearest."""
    nearest = terms.shipped_file if terms.shipped_file in ready.models else "fp32"
    if terms.ships_engine and deployed.engine and deployed.on_engine:
        return ENGINE, deployed.on_engine
    return FILES[nearest], ready.accuracy.models[nearest]


def _sizes(name: str, ready: Prepared, deployed: Deployed) -> tuple[OnnxModel | None, int]:
    """The dense twin of the file that ships, and that file's bytes; a dense engine does not leave the target."""
    if name == ENGINE and deployed.engine:
        return None, deployed.engine.file.bytes
    nearest = next(key for key in ready.models if FILES[key] == name)
    return ready.dense.get(nearest), facts.model_bytes(ready.models[nearest])


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that make a bundle, and the platform."""
    versions = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    for library in ENVIRONMENT:
        try:
            versions[library.replace("-", "_")] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions

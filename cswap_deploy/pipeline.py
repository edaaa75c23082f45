"""The straight line from a recipe to a bundle; alone in knowing the order of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cswap_deploy import accuracy, bundle, data, engine, export, latency, model, prepared, prune, variants
from cswap_deploy.artifacts import Engine, Groups, ImageSet, Network, OnnxModel, Prepared, PruningPlan, Reason, Split
from cswap_deploy.bundle import Bundle, Deployed, Terms
from cswap_deploy.device.target import Probe, Target, reach
from cswap_deploy.errors import DeviceError, ExportError, RecipeError
from cswap_deploy.factory import code_files
from cswap_deploy.recipe import (
    CausalCriterion,
    FpsTarget,
    LatencyTarget,
    Recipe,
    Variant,
    to_yaml,
)
from cswap_deploy.stage import Workdir, WouldRun

STAGES = (
    "source", "split", "groups", "scores", "curves", "staircase", "plan", "pruned", "exported", "simplified", "variants",
    "engine", "accuracy", "latency", "bundle",
)  # fmt: skip
"""All stage names that --force takes, in order."""
FINISH = "To finish: cswap-deploy deploy WORK, on a machine that has it or with --on ssh://USER@HOST"
ALWAYS = ("source", "split", "pruned", "exported", "simplified", "accuracy", "bundle")
PRUNING = ("groups", "scores", "plan")


def build(recipe: Recipe, work: Workdir) -> Bundle:
    """Everything; `work` must be open. The bundle says pass or fail; only what cannot be built raises."""
    return deploy(recipe, prepare(recipe, work), work)


def prepare(recipe: Recipe, work: Workdir) -> Prepared:
    """The host's half: load, split, prune, export, simplify, make variants, judge them on the hold-out images."""
    require_available(recipe)
    source = _located(work.run(model.load, recipe.model, code_files(recipe.model.factory), recipe.seed), recipe)
    images, calibration = recipe.calibration.images, recipe.calibration
    catalogue = data.catalogue(images, calibration.labels, source.outputs, work.digest)
    split = work.run(data.split, catalogue, calibration.scoring, calibration.holdout, recipe.seed)
    fit, holdout = ImageSet(split.fit, images), ImageSet(split.holdout, images)
    groups, plan = _plan(recipe, source, split, work)
    pruned = work.run(prune.apply, source, groups, plan, fit, recipe.prune.compensate, recipe.device)
    pruned = _located(pruned, recipe)
    exported = work.run(export.to_onnx, pruned, split.labels, fit, recipe.onnx)
    models, reasons = _models(recipe, exported, pruned, fit, work, recipe.wanted_variants)
    dense, more = _dense(recipe, source, split, fit, work)
    learned = recipe.accuracy.max_drop is not None
    judged = work.run(accuracy.compare, source, pruned, models, holdout, learned, recipe.device)
    ready = Prepared(
        recipe=to_yaml(recipe, lambda path: catalogue.sha256 if path == images else work.digest(path)),
        source=source,
        pruned=pruned,
        groups=groups,
        plan=plan,
        exported=exported,
        models=models,
        dense=dense,
        accuracy=judged,
        labels=split.labels,
        pixels=work.run(accuracy.crop, holdout, source.input) if recipe.engine else None,
        reasons=(*reasons, *more),
        environment=bundle.environment(),
    )
    if not work.dry:
        prepared.keep(work, recipe, ready)
    return ready


def deploy(recipe: Recipe, ready: Prepared, work: Workdir) -> Bundle:
    """The device's half: build and measure on the target, then assemble the bundle in `<work>/bundle`. Needs no torch."""
    deployed = _on_target(recipe, ready, work) if recipe.engine or recipe.latency else Deployed()
    files = work.run(bundle.assemble, Terms.of(recipe), ready, deployed, work.holdout_reads)
    return Bundle.read(work.publish(files.files, files.manifest.path.parent, "bundle"))


# --- the host's half


def _plan(recipe: Recipe, source: Network, split: Split, work: Workdir) -> tuple[Groups, PruningPlan]:
    settings, device, seed = recipe.prune, recipe.device, recipe.seed
    if settings.target is None:
        return Groups((), (), ()), PruningPlan({}, (), None)
    root, learned = recipe.calibration.images, recipe.accuracy.max_drop is not None
    fit, selection = ImageSet(split.fit, root), ImageSet(split.selection, root)
    groups = work.run(prune.find_groups, source, settings.skip)
    scores = work.run(prune.score, source, groups, fit, settings.criterion, device, seed, learned)
    plan = work.run(prune.choose, source, groups, scores, fit, selection, settings, round_to(recipe), device, seed)
    return groups, plan


def _models(
    recipe: Recipe, exported: OnnxModel, network: Network, fit: ImageSet, work: Workdir, wanted: Sequence[Variant]
) -> tuple[dict[str, OnnxModel], list[Reason]]:
    """The simplified file and its variants; one that cannot be made is a reason to fail, not the end of the build."""
    simplified = work.run(export.simplify, exported, network, fit, recipe.onnx)
    models, reasons = {"fp32": simplified}, []
    for variant in wanted:
        try:
            models[variant] = work.run(variants.make, simplified, network, fit, variant, recipe.onnx)
        except ExportError as error:
            reasons.append(Reason(error.exit_code, f"variant {variant}: {error}"))
    return models, reasons


def _dense(
    recipe: Recipe, source: Network, split: Split, fit: ImageSet, work: Workdir
) -> tuple[dict[str, OnnxModel], list[Reason]]:
    """The dense twin of what ships, and what an engine of it may be built from."""
    if not (recipe.engine or recipe.latency):
        return {}, []
    exported = work.run(export.to_onnx, source, split.labels, fit, recipe.onnx)
    wanted = [variant for variant in recipe.wanted_variants if variant == recipe.shipped_file]
    models, reasons = _models(recipe, exported, source, fit, work, wanted)
    return models, [Reason(reason.exit_code, f"dense network, {reason.text}") for reason in reasons]


def _located(network: Network, recipe: Recipe) -> Network:
    """A stored network with its factory where it is now: the place does not count, so the project may have moved."""
    return replace(network, architecture=replace(network.architecture, location=recipe.model.factory or ""))


# --- the device's half


def _on_target(recipe: Recipe, ready: Prepared, work: Workdir) -> Deployed:
    """What could be built and measured; the first thing that could not is a reason to fail, not the end of the build."""
    done = Deployed()
    try:
        with reach(recipe.target) as target:
            for done in _steps(recipe, ready, work, target):  # noqa: B007
                pass
    except DeviceError as error:
        text = str(error).replace(recipe.target, "the target") if recipe.target != "local" else str(error)
        missing = "engine: " if recipe.engine and not done.engine else "target: "
        done = replace(done, reasons=(*done.reasons, Reason(error.exit_code, f"{missing}{text}. {FINISH}")))
    return done


def _steps(recipe: Recipe, ready: Prepared, work: Workdir, target: Target) -> Iterator[Deployed]:
    """Engine, its accuracy, latency: each adds to what the one before has done."""
    done, probe = Deployed(), Probe.of(target)
    dense = shipped = None
    if recipe.engine:
        probe.require_tensorrt(target.name)
        dense, shipped = (_engine(recipe, models, ready, work, target, probe) for models in (ready.dense, ready.models))
        yield (done := replace(done, engine=shipped))
        assert ready.pixels is not None
        spec, batch = ready.source.input, recipe.engine.batch.opt
        outcome = work.run(accuracy.on_engine, shipped, ready.pixels, ready.accuracy.labels, spec, batch, target)
        yield (done := replace(done, on_engine=outcome))
    if recipe.latency:
        if recipe.latency.runtime == "tensorrt":
            assert dense and shipped
            files = dense.file, shipped.file
        elif recipe.shipped_file in ready.dense and recipe.shipped_file in ready.models:
            files = ready.dense[recipe.shipped_file].graph, ready.models[recipe.shipped_file].graph
        else:  # the variant that ships could not be made, which is a reason already
            return
        facts = probe.facts(recipe.latency.runtime)
        yield replace(done, latency=work.run(latency.measure, *files, recipe.latency, facts, target))


def _engine(
    recipe: Recipe, models: dict[str, OnnxModel], ready: Prepared, work: Workdir, target: Target, probe: Probe
) -> Engine:
    """From the file that carries the precision for this version of TensorRT: by flags to 10.x, in its own types from 11."""
    assert recipe.engine
    by_flags = "int8-tensorrt" if recipe.engine.precision == "int8" else "fp32"
    name = recipe.shipped_file if probe.typed else by_flags
    if name not in models:
        raise DeviceError(
            f"an engine of precision {recipe.engine.precision} needs the variant {name}", "see the reasons"
        )
    spec, facts, described = ready.source.input, probe.facts("tensorrt"), probe.has_tensorrt_module
    model, dynamic = models[name].graph, recipe.onnx.dynamic_batch
    return work.run(engine.build, model, spec, recipe.engine, dynamic, facts, described, target)


# --- asking about a recipe


def stages(recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages that this recipe runs, in order."""
    wanted = {*ALWAYS, *(PRUNING if recipe.prune.target is not None else ())}
    wanted |= {"variants"} if recipe.wanted_variants else set()
    wanted |= {"engine"} if recipe.engine else set()
    wanted |= {"latency"} if recipe.latency else set()
    return tuple(name for name in STAGES if name in wanted)


def status(recipe: Recipe, work: Workdir) -> Iterator[tuple[str, str]]:
    """(stage, "up to date" or why it would run) for each stage; `work` must be dry. Nothing runs."""
    names = stages(recipe)
    try:
        build(recipe, work)
        stopped = len(names)
        reason = ""
    except WouldRun as first:
        stopped, reason = names.index(first.name), first.reason
    for position, name in enumerate(names):
        if position < stopped:
            yield name, "up to date"
        else:
            later = reason if reason == "not run yet" else f"runs if the result of {names[stopped]} changes"
            yield name, reason if position == stopped else later


def device_stages(recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages of `deploy`, in order."""
    wanted = {"bundle", *(("engine", "accuracy") if recipe.engine else ()), *(("latency",) if recipe.latency else ())}
    return tuple(name for name in STAGES if name in wanted)


def round_to(recipe: Recipe) -> int:
    """`auto`: multiples that TensorRT's kernels like (fp16 8, int8 32); ONNX Runtime has none that is known in advance."""
    if recipe.prune.round_to != "auto":
        return recipe.prune.round_to
    return {"fp32": 1, "fp16": 8, "int8": 32}[recipe.engine.precision] if recipe.engine else 1


def require_available(recipe: Recipe) -> None:
    """Refuse what the recipe language knows and this version does not do yet, rather than leave it out in silence."""
    criterion = recipe.prune.criterion
    missing = {
        "prune.target": isinstance(recipe.prune.target, LatencyTarget | FpsTarget),
        "prune.criterion.estimator": isinstance(criterion, CausalCriterion) and criterion.estimator == "screened",
        "prune.criterion.intervention": isinstance(criterion, CausalCriterion) and criterion.intervention == "surgery",
    }
    refused = [key for key, asked in missing.items() if asked]
    if refused:
        raise RecipeError(
            f"{', '.join(refused)}: what it asks for is not available in this version",
            "remove it",
            where=recipe.where(refused[0]),
            key=refused[0],
        )

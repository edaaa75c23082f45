"""The straight line from a recipe to a bundle: the stages, run in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from cswap_deploy import (
    accuracy,
    assembling,
    data,
    engines,
    export,
    handoff,
    latency,
    metering,
    model,
    outline,
    planning,
    prepared,
    progress,
    prune,
    signing,
    surveying,
    variants,
)
from cswap_deploy.artifacts import Engine, File, Groups, ImageSet, LatencyReport, Network, OnnxModel, PruningPlan, Split
from cswap_deploy.assembling import Deployed, Terms
from cswap_deploy.budget import account
from cswap_deploy.budget.values import Budget
from cswap_deploy.bundle import Bundle
from cswap_deploy.checkpoint import CHECKPOINT
from cswap_deploy.device import needs, recorded
from cswap_deploy.device.building import refused
from cswap_deploy.device.target import Probe, Target, reach
from cswap_deploy.errors import DeviceError, ExportError, ModelError, PruningError, UnshippableError, UsageError
from cswap_deploy.factory import code_files
from cswap_deploy.paths import require_paths
from cswap_deploy.prepared import Prepared, Reason
from cswap_deploy.prune import reachable
from cswap_deploy.recipe import (
    CurvesAllocation,
    FpsTarget,
    LatencySettings,
    LatencyTarget,
    MacsTarget,
    ParamsTarget,
    Recipe,
    Variant,
    to_yaml,
)
from cswap_deploy.stage import Workdir, WouldRun
from cswap_deploy.wording import UNPLANNED

BUNDLE = "bundle"
"""Folder of the work folder that holds what was built."""
FINISH = "To finish: cswap-deploy deploy WORK --on TARGET, with the work folder and a target that can do it"
SWEEP_AGAIN = "To finish: the same sweep again, which goes on from there"


def build(recipe: Recipe, work: Workdir, folder: str = BUNDLE, beside: Sequence[float] = ()) -> Bundle:
    """Everything; `work` must be open. The bundle says pass or fail; only what cannot be built raises.

    `folder`: of the work folder, for the bundle. `beside`: as in `planning.choose`.
    """
    if recipe.remote and not work.dry:
        _warn_if_away(recipe)
    return deploy(recipe, prepare(recipe, work, beside), work, folder)


def prepare(recipe: Recipe, work: Workdir, beside: Sequence[float] = ()) -> Prepared:
    """The host's half: load, split, prune, export, simplify, make variants, judge them on the hold-out images."""
    require_inputs(recipe)
    source = load(recipe, work)
    images, calibration = recipe.calibration.images, recipe.calibration
    catalogue = data.catalogue(images, calibration.labels, source.outputs, work.digest)
    split = work.run(data.split, catalogue, calibration.scoring, calibration.holdout, recipe.seed)
    fit, holdout = ImageSet(split.fit, images), ImageSet(split.holdout, images)
    dense, more = _dense(recipe, source, split, work) if recipe.goal_ms else ({}, [])
    pruning, groups, plan, asked, lost = choose_plan(recipe, source, split, dense, work, beside)
    pruned, exported, models, reasons = _made(recipe, pruning, split, groups, plan, work, recipe.wanted_variants)
    reasons += _further(recipe, models, pruned, fit, work)
    if not dense:
        dense, more = _dense(recipe, source, split, work)
    learned = recipe.accuracy.max_drop is not None
    with progress.part("dense"):
        reference = work.run(accuracy.of_dense, source, holdout, learned, recipe.device)
    judged = work.run(accuracy.compare, source, reference, pruned, models, holdout, recipe.device)
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
        pixels=_pixels(holdout, source, work) if recipe.engine else None,
        reasons=(*lost, *reasons, *more),
        environment=assembling.environment(),
        budget=asked,
    )
    if not work.dry:
        prepared.keep(work, recipe, ready)
    return ready


def deploy(recipe: Recipe, ready: Prepared, work: Workdir, folder: str = BUNDLE, *, by_answers: bool = False) -> Bundle:
    """The device's half: build and measure on the target, then assemble the bundle in the work folder's `folder`. Needs no torch.

    `by_answers`: the board was asked without a network, its answers lie in the work folder (`device.recorded`).
    """
    if recipe.sign:
        signing.require(recipe.sign)
    asked = recipe.engine or recipe.latency
    if asked and not ready.dense:
        raise UsageError(
            f"{work.root} was prepared without a measurement: there is no dense model to compare with",
            f"run prepare again with --on TARGET, or with a latency block in the recipe, and --work {work.root}",
        )
    deployed = _on_target(recipe, ready, work, by_answers) if asked else Deployed()
    if not is_unplanned(recipe, ready):  # that says itself what to do
        deployed = deployed.with_hint(FINISH if folder == BUNDLE else SWEEP_AGAIN)
    created = handoff.creation_date(ready.accuracy)
    files = work.run(assembling.assemble, Terms.of(recipe), ready, deployed, work.holdout_reads, created)
    made = Bundle.read(work.publish(files.files, files.manifest.path.parent, folder))
    if recipe.sign and not work.dry:
        signing.sign(made.folder, recipe.sign)
    return made


# --- the host's half


@contextmanager
def blaming(recipe: Recipe) -> Iterator[None]:
    """A fault of the model is told with the recipe's line: of the key at fault, else of the model's name."""
    try:
        yield
    except ModelError as error:
        network = "model.name" if recipe.model.name else "model.factory"
        built_in = error.key == CHECKPOINT and recipe.model.checkpoint is None
        raise error.at(recipe.where(network if built_in else error.key or network)) from error


def load(recipe: Recipe, work: Workdir) -> Network:
    """The dense network."""
    with blaming(recipe):
        source = work.run(model.load, recipe.model, code_files(recipe.model.factory), recipe.seed)
    return _located(source, recipe)


def find_groups(recipe: Recipe, source: Network, work: Workdir) -> Groups:
    """What can leave it."""
    return work.run(prune.find_groups, source, recipe.prune.skip, recipe.prune.heads, recipe.goal_ms is not None)


def choose_plan(
    recipe: Recipe,
    source: Network,
    split: Split,
    dense: Mapping[str, OnnxModel],
    work: Workdir,
    beside: Sequence[float],
) -> tuple[Network, Groups, PruningPlan, Budget | None, list[Reason]]:
    """What is pruned, what leaves it, what came of a latency that is asked for, and why nothing leaves where the target was lost.

    `dense`: the dense network's files, where a latency is asked for; `beside`: as in `planning.choose`. Errors: PruningError,
    ExportError.
    """
    if recipe.goal_ms is None:
        return *_plan(recipe, source, split, work), None, []

    def ship(pruning: Network, groups: Groups, plan: PruningPlan, name: str) -> dict[str, OnnxModel]:
        wanted = [variant for variant in recipe.wanted_variants if variant in (name, recipe.shipped_file)]
        try:
            _, _, models, reasons = _made(recipe, pruning, split, groups, plan, work, wanted)
        except ExportError as error:
            raise UnshippableError(f"the network with this latency cannot be exported: {error}") from error
        if name not in models:
            raise UnshippableError(f"the network with this latency cannot be made in {name}: {reasons[0].text}")
        return models

    if not recipe.ships_engine and recipe.shipped_file not in dense:
        text = f"the dense network cannot be made in {recipe.shipped_file}. {UNPLANNED}: choose another ship"
        return source, *planning.UNPRUNED, None, [Reason(ExportError.exit_code, text)]
    try:
        return *planning.choose(recipe, source, split, dense, work, ship, beside), []
    except (DeviceError, UnshippableError) as error:
        progress.warn(f"{error}; the dense network takes the place of the pruned one")
        what, further = error.message, "choose another ship"
        if isinstance(error, DeviceError):
            what, further = f"target: {error.public}", "the same build, prepare or sweep again goes on from there"
            if error.public.startswith(surveying.UNBUILT):
                further = surveying.NARROW_HINT
            elif refused(error):
                further = "the same again fails as this did, another engine.precision may not"
        text = f"{what}. {UNPLANNED}: {further}"
        return source, *planning.UNPRUNED, None, [Reason(error.exit_code, text)]


def foreseen(ready: Prepared) -> list[Reason]:
    """Why a bundle of this will not pass, as far as that is known before the device's half."""
    return [*ready.reasons, *(account.foreseen(ready.budget) if ready.budget else ())]


def is_unplanned(recipe: Recipe, ready: Prepared) -> bool:
    """Whether a latency is asked for, and the target was lost, or failed, before anything could be pruned for it."""
    return recipe.goal_ms is not None and ready.budget is None


def _made(
    recipe: Recipe,
    source: Network,
    split: Split,
    groups: Groups,
    plan: PruningPlan,
    work: Workdir,
    wanted: Sequence[Variant],
) -> tuple[Network, OnnxModel, dict[str, OnnxModel], list[Reason]]:
    """The pruned network, its exported file, and the simplified one with its variants."""
    fit = ImageSet(split.fit, recipe.calibration.images)
    pruned = work.run(prune.apply, source, groups, plan, fit, recipe.prune.compensate, recipe.device)
    pruned = _located(pruned, recipe)
    exported = work.run(export.to_onnx, pruned, split.labels, fit, recipe.onnx.graph)
    return pruned, exported, *_models(recipe, exported, pruned, split, work, wanted)


def _plan(recipe: Recipe, source: Network, split: Split, work: Workdir) -> tuple[Network, Groups, PruningPlan]:
    settings, device, seed = recipe.prune, recipe.device, recipe.seed
    if settings.target is None:
        return source, *planning.UNPRUNED
    root, learned = recipe.calibration.images, recipe.accuracy.max_drop is not None
    fit, selection = ImageSet(split.fit, root), ImageSet(split.selection, root)
    groups = find_groups(recipe, source, work)
    fault = reachable.fault(recipe, groups, round_to(recipe))
    if fault and isinstance(settings.target, MacsTarget | ParamsTarget):
        raise fault
    source = planning.rotated(recipe, source, split, groups, work)
    scores = work.run(prune.score, source, groups, fit, settings.criterion, device, seed, learned)
    curves = None
    if isinstance(settings.allocation, CurvesAllocation):
        allocation, multiple = settings.allocation, round_to(recipe)
        criterion, compensate = settings.criterion, settings.compensate
        curves = work.run(
            prune.measure_curves, source, groups, scores, fit, criterion, compensate, allocation, multiple, device
        )
    try:
        plan = work.run(
            prune.choose, source, groups, scores, curves, fit, selection, settings, round_to(recipe), device, seed
        )
    except PruningError as error:
        raise error.at(recipe.where("prune.target")) from error
    return source, groups, plan


def _models(
    recipe: Recipe, exported: OnnxModel, network: Network, split: Split, work: Workdir, wanted: Sequence[Variant]
) -> tuple[dict[str, OnnxModel], list[Reason]]:
    """The simplified file and its variants; one that cannot be made is a reason to fail, not the end of the build."""
    root, settings = recipe.calibration.images, recipe.onnx.graph
    fit, selection = ImageSet(split.fit, root), ImageSet(split.selection, root)
    simplified = work.run(export.simplify, exported, network, fit, settings)
    models, reasons = {"fp32": simplified}, list[Reason]()
    for variant in wanted:
        try:
            with progress.part(variant):
                models[variant] = work.run(
                    variants.make, simplified, network, fit, selection, variant, settings, recipe.int8
                )
        except ExportError as error:
            reasons.append(Reason(error.exit_code, str(error)))
    return models, reasons


def _further(
    recipe: Recipe, models: dict[str, OnnxModel], network: Network, fit: ImageSet, work: Workdir
) -> list[Reason]:
    """Other forms of the ONNX file that ships, added to `models`; one that cannot be made is a reason to fail."""
    shipped, reasons = models.get(recipe.shipped_file, models["fp32"]), []
    makers: dict[str, Callable[[], OnnxModel]] = {
        "ort": lambda: work.run(variants.to_ort, shipped, network, fit),
        "image": lambda: work.run(variants.with_image_input, shipped, network, fit, recipe.onnx.graph),
    }
    for name in outline.further_forms(recipe):
        try:
            with progress.part(name):
                models[name] = makers[name]()
        except ExportError as error:
            reasons.append(Reason(error.exit_code, str(error)))
    return reasons


def _dense(recipe: Recipe, source: Network, split: Split, work: Workdir) -> tuple[dict[str, OnnxModel], list[Reason]]:
    """The dense twin of what ships, and what an engine of it may be built from."""
    if not (recipe.engine or recipe.latency):
        return {}, []
    fit = ImageSet(split.fit, recipe.calibration.images)
    with progress.part("dense"):
        exported = work.run(export.to_onnx, source, split.labels, fit, recipe.onnx.graph)
        models, reasons = _models(recipe, exported, source, split, work, outline.dense_variants(recipe))
    return models, [Reason(reason.exit_code, f"dense network, {reason.text}") for reason in reasons]


def _pixels(holdout: ImageSet, source: Network, work: Workdir) -> File:
    with progress.part("images"):
        return work.run(accuracy.crop, holdout, source.input)


def _located(network: Network, recipe: Recipe) -> Network:
    """A stored network with its factory where it is now: the place does not count, so the project may have moved."""
    return replace(network, architecture=replace(network.architecture, location=recipe.model.factory or ""))


# --- the device's half


Step = Callable[[Recipe, Prepared, Workdir, Target, Probe, Deployed], Deployed]


def _on_target(recipe: Recipe, ready: Prepared, work: Workdir, by_answers: bool) -> Deployed:
    """What could be built and measured; what could not is a reason to fail, not the end of the build."""
    try:
        with _reached(recipe, work, by_answers) as (target, probe):
            return _through_steps(recipe, ready, work, target, probe)
    except DeviceError as error:
        progress.warn(str(error))
        return _failing(Deployed(), error, "target")


def _reached(recipe: Recipe, work: Workdir, by_answers: bool) -> AbstractContextManager[tuple[Target, Probe]]:
    if not by_answers:
        return planning.reached(recipe, work)
    target = recorded.recorded(work.root, recipe.target)
    return nullcontext((target, Probe.of(target)))


def _through_steps(recipe: Recipe, ready: Prepared, work: Workdir, target: Target, probe: Probe) -> Deployed:
    done = Deployed()
    steps: list[Step] = [*((_build_engine, _judge_engine) if recipe.engine else ())]
    steps += [_measure, _compare_files] if recipe.latency else []
    for step in steps:
        try:
            done = step(recipe, ready, work, target, probe, done)
        except DeviceError as error:
            progress.warn(str(error))
            done = _failing(done, error, "engine" if step is _build_engine else "target")
    return done


def _failing(done: Deployed, error: DeviceError, what: str) -> Deployed:
    return replace(done, reasons=(*done.reasons, Reason(error.exit_code, f"{what}: {error.public}")))


def _build_engine(
    recipe: Recipe, ready: Prepared, work: Workdir, target: Target, probe: Probe, done: Deployed
) -> Deployed:
    probe.require_tensorrt(target.name)
    return replace(done, engine=_engine_of(recipe, ready.models, ready, work, target, probe))


def _judge_engine(
    recipe: Recipe, ready: Prepared, work: Workdir, target: Target, probe: Probe, done: Deployed
) -> Deployed:
    if not done.engine:
        return done
    assert recipe.engine and ready.pixels
    spec, batch, truth = ready.source.input, recipe.engine.batch.opt, ready.accuracy.labels
    with progress.part("engine"):
        outcome = work.run(accuracy.on_engine, done.engine, ready.pixels, truth, spec, batch, target)
    return replace(done, on_engine=outcome)


def _measure(recipe: Recipe, ready: Prepared, work: Workdir, target: Target, probe: Probe, done: Deployed) -> Deployed:
    """What ships and its dense twin; where one of them could not be made, which is a reason already, nothing."""
    assert recipe.latency
    name = recipe.shipped_file
    if recipe.latency.runtime == "tensorrt" and done.engine:
        with progress.part("dense"):
            dense = _engine_of(recipe, ready.dense, ready, work, target, probe)
        files, name = (dense.file, done.engine.file), engines.built_from(recipe, probe.typed)
    elif recipe.latency.runtime == "onnxruntime" and name in ready.dense and name in ready.models:
        files = engines.alone(ready.dense[name]), engines.alone(ready.models[name])
    else:
        return done
    facts, graphs = probe.facts(recipe.latency.runtime), (ready.dense[name].graph, ready.models[name].graph)
    found: list[LatencyReport] = []

    def measure(timing: LatencySettings) -> LatencyReport:
        """A board without a network was asked once: where a longer measurement fails, the first stands."""
        try:
            found.append(work.run(latency.measure, *files, graphs, ready.groups, timing, facts, target))
        except DeviceError as error:
            if not found:
                raise
            progress.warn(f"whether the budget is met is open, and measuring longer failed: {error.message}")
        return found[-1]

    report = metering.reported(metering.timing_of(recipe, ready.budget), ready.budget, measure)
    return replace(done, latency=report)


def _compare_files(
    recipe: Recipe, ready: Prepared, work: Workdir, target: Target, probe: Probe, done: Deployed
) -> Deployed:
    """Every ONNX file that ONNX Runtime runs as it is, beside the float32 one; nothing where there is but that."""
    assert recipe.latency
    files = {name: engines.alone(model) for name, model in ready.models.items() if name in latency.COMPARED}
    if recipe.latency.runtime != "onnxruntime" or len(files) < 2:
        return done
    facts = probe.facts("onnxruntime")
    with progress.part("files"):
        return replace(done, files=work.run(latency.compare_files, files, recipe.latency, facts, target))


def _engine_of(
    recipe: Recipe, models: Mapping[str, OnnxModel], ready: Prepared, work: Workdir, target: Target, probe: Probe
) -> Engine:
    return engines.build(recipe, models, ready.source.input, ready.groups, work, target, probe)


def _warn_if_away(recipe: Recipe) -> None:
    """Said before the long stages rather than after; the target may still come back, or be mended, meanwhile."""
    name = recipe.target
    try:
        with reach(name) as target:
            probe = Probe.of(target)
        for need in needs.shortfalls(recipe, probe.document):
            progress.warn(f"{name}: {need.text}; the host's half goes on ({need.fix})")
    except DeviceError as error:
        progress.warn(f"{error}; the host's half goes on, and without the target the bundle will fail")


# --- asking about a recipe


def status(recipe: Recipe, work: Workdir) -> Iterator[tuple[str, str]]:
    """(stage, "up to date" or why it would run) for each stage; `work` must be dry. Nothing runs."""
    stopped, reason = "", ""
    try:
        build(recipe, work)
    except WouldRun as first:
        stopped, reason = first.name, first.reason
    except PruningError:
        stopped, reason = "scores", "refused: prune.target is out of reach"
    passed = {reference.partition("/")[0] for reference in work.used}
    names = outline.stages(recipe)
    later = {*(names[names.index(stopped) :] if stopped in names else ())}
    if stopped == "staircase":  # also of candidates, after these, which hang on no measurement
        later -= {"rotated", "scores", "curves"}
    for name in names:
        if name == stopped:
            yield name, reason
        elif name in passed and name not in later:
            yield name, "up to date"
        elif stopped in ("", names[-1]):
            yield name, "did not run: not needed, or the target was lost"
        else:
            yield name, reason if reason == "not run yet" else f"runs if the result of {stopped} changes"


def round_to(recipe: Recipe) -> int:
    """`auto`: multiples that TensorRT's kernels like (fp16 8, int8 32); ONNX Runtime has none that is known in advance."""
    if recipe.prune.round_to != "auto":
        return recipe.prune.round_to
    if isinstance(recipe.prune.target, LatencyTarget | FpsTarget):
        return 1
    return {"fp32": 1, "fp16": 8, "int8": 32}[recipe.engine.precision] if recipe.engine else 1


def require_inputs(recipe: Recipe) -> None:
    """Errors: DataError, ModelError, UsageError where files that the recipe names are not there or not what they have to be."""
    require_paths(recipe)
    if recipe.sign:
        signing.require(recipe.sign)

"""What a recipe runs, told without running it: its stages, and the lines that a run reports, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cswap_deploy import latency, progress
from cswap_deploy.recipe import CurvesAllocation, Recipe, Variant

STAGES = (
    "source", "split", "groups", "sizes", "staircase", "rotated", "scores", "curves", "plan", "pruned", "exported", "simplified",
    "variants", "engine", "accuracy", "latency", "bundle",
)  # fmt: skip
"""All stage names that --force takes, in order."""
ALWAYS = ("source", "split", "pruned", "exported", "simplified", "accuracy", "bundle")
PRUNING = ("groups", "scores", "plan")


def stages(recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages that this recipe runs, in order."""
    wanted = {*ALWAYS, *(PRUNING if recipe.prune.target is not None else ())}
    wanted |= {"curves"} if "plan" in wanted and isinstance(recipe.prune.allocation, CurvesAllocation) else set()
    wanted |= {"rotated"} if "plan" in wanted and recipe.prune.heads == "dims" else set()
    wanted |= {"sizes", "staircase"} if recipe.goal_ms else set()
    wanted |= {"variants"} if recipe.wanted_variants or further_forms(recipe) else set()
    wanted |= {"engine"} if recipe.engine else set()
    wanted |= {"latency"} if recipe.latency else set()
    return tuple(name for name in STAGES if name in wanted)


def lines(recipe: Recipe) -> tuple[str, ...]:
    """What a run reports, in order, as `progress.spelt`: a stage that runs several times has a line for each."""
    names, further = stages(recipe), [progress.spelt("variants", name) for name in further_forms(recipe)]
    made = [*_model_lines(recipe.wanted_variants), *further]
    dense = [*_model_lines(dense_variants(recipe), "dense")] if recipe.engine or recipe.latency else []
    before = [*names[: names.index("exported")]]
    if recipe.goal_ms:
        engine, alone = recipe.ships_engine, progress.spelt("staircase", "dense")
        first = ["groups", progress.spelt("engine", "dense"), alone] if engine else [alone, "groups"]
        parts = ("floor", *(("multiples",) if recipe.prune.round_to == "auto" else ()), "widths")
        learned = [*(progress.spelt("staircase", part) for part in parts), "staircase"]
        scored = [name for name in ("rotated", "scores", "curves") if name in names]
        chosen = [progress.spelt("staircase", "candidate"), "plan", "pruned"]
        before = [*before[:2], *dense, *first, "sizes", *learned, *scored, *chosen]
        made, dense = [*made, *(["engine"] if engine else ()), "latency"], []
    return (
        *before,
        *made,
        *dense,
        progress.spelt("accuracy", "dense"),
        "accuracy",
        *([progress.spelt("accuracy", "images")] if recipe.engine else ()),
        *device_lines(recipe),
    )


def _model_lines(wanted: Sequence[Variant], *parts: str) -> Iterator[str]:
    yield from (progress.spelt(name, *parts) for name in ("exported", "simplified"))
    yield from (progress.spelt("variants", variant, *parts) for variant in wanted)


def device_lines(recipe: Recipe) -> tuple[str, ...]:
    """The lines of `deploy`."""
    found = ["engine", progress.spelt("accuracy", "engine")] if recipe.engine else []
    if recipe.latency and recipe.latency.runtime == "tensorrt":
        found.append(progress.spelt("engine", "dense"))
    found += ["latency"] if recipe.latency else []
    if recipe.latency and recipe.latency.runtime == "onnxruntime" and {*recipe.wanted_variants} & {*latency.COMPARED}:
        found.append(progress.spelt("latency", "files"))
    return (*found, "bundle")


def device_stages(recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages of `deploy`, in order."""
    wanted = {"bundle", *(("engine", "accuracy") if recipe.engine else ()), *(("latency",) if recipe.latency else ())}
    return tuple(name for name in STAGES if name in wanted)


def further_forms(recipe: Recipe) -> list[str]:
    """Of the ONNX file that ships."""
    return [name for name, asked in (("ort", recipe.onnx.ort_format), ("image", recipe.onnx.image_input)) if asked]


def dense_variants(recipe: Recipe) -> list[Variant]:
    """Of the dense network: what it is measured in beside the pruned one."""
    return [name for name in recipe.wanted_variants if name in (recipe.shipped_file, recipe.engine_file)]

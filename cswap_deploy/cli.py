"""The command line: one function per command; what it answers is printed by its session."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cswap_deploy import interrupts, running
from cswap_deploy.errors import UsageError
from cswap_deploy.session import Answer, refuse_arguments, refuse_output, say_interrupted, session

if TYPE_CHECKING:
    from cswap_deploy.bundle import Bundle

app = typer.Typer(
    name="cswap-deploy",
    help="From a pretrained image classifier to a pruned, checked model, without fine-tuning.",
    no_args_is_help=True,
    subcommand_metavar="COMMAND [OPTIONS]",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="the recipe, a YAML file")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="override one recipe key; repeatable")
]
WorkOption = Annotated[
    Path | None, typer.Option("--work", metavar="DIR", help="work folder (default: runs/<recipe name>)")
]
ForceOption = Annotated[list[str] | None, typer.Option("--force", metavar="STAGE", help="rerun this stage; repeatable")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
OnOption = Annotated[
    str | None,
    typer.Option("--on", metavar="TARGET", help="where to build and measure: local, or ssh://[user@]host[:port]"),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="print the result only")]

LONGEST_S = 86400
"""Of a warm-up or of sampling: a day."""
ParserError: Any = typer.BadParameter.__mro__[1]
"""UsageError of click, whichever copy of click typer carries."""


def _show_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"cswap-deploy {metadata.version('cswap-deploy')}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print name and version")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    recipe: RecipeArgument,
    work: WorkOption = None,
    overrides: SetOption = None,
    on: OnOption = None,
    force: ForceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Everything the recipe asks for, to the bundle in <work>/bundle."""
    with session("build", as_json) as answer:
        from cswap_deploy import pipeline

        settings, folder = running.load(recipe, work, overrides, on)
        with running.opened(settings, folder, force, quiet or as_json) as work_folder:
            bundle = pipeline.build(settings, work_folder)
        _answer_bundle(answer, bundle)


@app.command()
def prepare(
    recipe: RecipeArgument,
    work: WorkOption = None,
    overrides: SetOption = None,
    on: OnOption = None,
    force: ForceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The host's half: prune, export, make variants, judge them. `deploy` goes on, here or on the device."""
    with session("prepare", as_json) as answer:
        from cswap_deploy import errands, pipeline
        from cswap_deploy.console import prepared_lines

        settings, folder = running.load(recipe, work, overrides, on)
        with running.opened(settings, folder, force, quiet or as_json) as work_folder:
            ready = pipeline.prepare(settings, work_folder)
            for_board = errands.lay(settings, ready, work_folder)
        reasons = [reason.text for reason in pipeline.foreseen(ready)]
        again = not pipeline.is_unplanned(settings, ready)
        answer.document = {"work": str(folder), "onnx": str(ready.models["fp32"].graph.path), "macs": ready.pruned.macs}
        answer.document["reasons"] = reasons
        answer.lines = [*prepared_lines(ready, reasons, folder if again else None, for_board)]


@app.command()
def deploy(
    work: Annotated[Path, typer.Argument(metavar="WORK", help="the work folder of `prepare`, or a copy of it")],
    on: OnOption = None,
    force: ForceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The device's half: build the engine, measure, make the bundle. From what `prepare` has made; needs no PyTorch.

    Without --on, where a board without a network has answered (python3 device/agent.py there), from its answers.
    """
    with session("deploy", as_json) as answer:
        from cswap_deploy import outline, pipeline, prepared, progress
        from cswap_deploy.console import Console
        from cswap_deploy.device import recorded
        from cswap_deploy.progress import reporting
        from cswap_deploy.stage import Workdir

        if not work.is_dir():
            raise UsageError(f"{work} is not a folder", "give the work folder of a run, such as runs/<recipe name>")
        running.require_target(on)
        prepared.require(work)
        with Workdir(work, force or ()).open() as opened:
            recipe, ready = prepared.find(opened)
            recipe = running.moved(recipe, on) if on else recipe
            running.require_known_stages(force or [], outline.device_stages(recipe))
            console = Console(outline.device_lines(recipe), silent=quiet or as_json)
            with closing(console), reporting(console):
                by_answers = on is None and recorded.has_answers(work)
                if by_answers:
                    progress.note(
                        f"from the board's answers in {work / recorded.FOLDER}; --on TARGET asks a target anew"
                    )
                bundle = pipeline.deploy(recipe, ready, opened, by_answers=by_answers)
        _answer_bundle(answer, bundle)


@app.command()
def sweep(
    recipe: RecipeArgument,
    latency: Annotated[str, typer.Option("--latency", metavar="MS[,MS]", help="latencies to reach, in ms")],
    work: WorkOption = None,
    overrides: SetOption = None,
    on: OnOption = None,
    force: ForceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """A bundle for each of several latencies, and a chart of them."""
    with session("sweep", as_json) as answer:
        from cswap_deploy import sweeping
        from cswap_deploy.console.front import sweep_lines

        wanted = sweeping.latencies_of(latency)
        settings, folder = running.load(recipe, work, overrides, on)
        recipes = [
            running.load(recipe, work, [*(overrides or ()), *sweeping.overrides_of(settings, value)], on)[0]
            for value in wanted
        ]
        with running.opened(recipes[0], folder, force, quiet or as_json) as work_folder:
            front = sweeping.sweep(recipes, work_folder)
        answer.document, answer.lines = {"work": str(folder), **front}, [*sweep_lines(front, folder)]
        answer.code = min((point["exit_code"] for point in front["points"] if point["exit_code"]), default=0)


@app.command()
def measure(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="a .onnx file, or an engine that was built on the target")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="run in turn with this one")
    ] = None,
    on: OnOption = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="images per inference")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the runtime")] = 1,
    warmup: Annotated[
        float, typer.Option("--warmup", min=0, max=LONGEST_S, help="seconds before the first sample")
    ] = 1.0,
    duration: Annotated[
        float, typer.Option("--duration", min=0.01, max=LONGEST_S, help="seconds of sampling, each model")
    ] = 5.0,
    layers: Annotated[bool, typer.Option("--layers", help="also show where MODEL's time goes")] = False,
    trust_engine: Annotated[
        list[str] | None, typer.Option("--trust-engine", metavar="SHA256", help="run an engine built elsewhere")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Latency of a model on a target, or of two and their ratio. With --against the two run in turn."""
    with session("measure", as_json) as answer:
        from cswap_deploy import measuring
        from cswap_deploy.console import measured_lines
        from cswap_deploy.recipe import LatencySettings

        running.require_target(on)
        paths = [model, *([against] if against else [])]
        settings = LatencySettings(
            runtime=measuring.runtime_of(paths), target=on or "local", batch=batch, threads=threads,
            warmup_s=warmup, duration_s=duration,
        )  # fmt: skip
        answer.document = measuring.measure(paths, settings, trust_engine or (), layers)
        answer.lines = [*measured_lines(answer.document)]


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="also compare the target with what this recipe needs")
    ] = None,
    on: OnOption = None,
    as_json: JsonOption = False,
) -> None:
    """What this machine and the target can do, and how to fix the rest."""
    with session("doctor", as_json) as answer:
        from cswap_deploy import doctor as examination
        from cswap_deploy.console import finding_lines
        from cswap_deploy.device.target import Probe, reach
        from cswap_deploy.errors import DeviceError

        running.require_target(on)
        settings = running.load(recipe, None, None, on)[0] if recipe else None
        name = on or (settings.target if settings else "local")
        here = examination.host()
        try:
            with reach(name) as target:
                there = examination.target(name, Probe.of(target).document, settings)
        except DeviceError as error:
            there, answer.code = examination.unreachable(name, error.message, error.hint), error.exit_code
        answer.document = {
            "host": [asdict(finding) for finding in here],
            "target": {"name": name, "findings": [asdict(finding) for finding in there]},
        }
        answer.lines = ["this machine", *finding_lines(here), "", f"target {name}", *finding_lines(there)]


@app.command()
def check(
    recipe: RecipeArgument,
    work: WorkOption = None,
    overrides: SetOption = None,
    on: OnOption = None,
    groups: Annotated[bool, typer.Option("--groups", help="also prove and list what can be pruned")] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate recipe, images and model; say what would run, and why.

    With --groups also what can be pruned.
    """
    with session("check", as_json) as answer:
        from cswap_deploy import checks
        from cswap_deploy.console import check_lines, group_lines

        settings, folder = running.load(recipe, work, overrides, on)
        report = checks.check(settings, folder, prove=groups)
        found = report.groups if groups else None
        answer.document = {
            "facts": report.facts,
            "stages": [{"name": name, "status": status} for name, status in report.stages],
            "groups": checks.groups_document(found) if found else None,
        }
        answer.lines = [*check_lines(report), *(group_lines(found) if found else ())]
        answer.fault = min(report.faults, key=lambda fault: fault.exit_code, default=None)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="the recipe to write")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="timm name, or file.py:function")] = None,
    images: Annotated[Path | None, typer.Option("--images", metavar="DIR", help="one folder per class")] = None,
    labels: Annotated[Path | None, typer.Option("--labels", metavar="FILE", help="class names of the outputs")] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", metavar="FILE", help="your weights")] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="KEY=VALUE", help="such as macs=0.7, max_drop=0.5; or none")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="of the run and of its bundle")] = None,
    on: OnOption = None,
    force: Annotated[bool, typer.Option("--force", help="replace files that are there")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe to start from. On a terminal and without options, after a few questions."""
    with session("init", as_json) as answer:
        from cswap_deploy import starter
        from cswap_deploy.console.answers import starter_lines
        from cswap_deploy.console.questions import ask, on_a_terminal

        running.require_target(on)
        given: dict[str, Any] = {
            "model": model,
            "images": images,
            "labels": labels,
            "checkpoint": checkpoint,
            "target": target,
        }
        given |= {"name": name, "on": on}
        wishes = starter.Wishes(path, **{key: value for key, value in given.items() if value is not None})
        if not as_json and set(given.values()) == {None} and on_a_terminal():
            starter.require_free(path, force)
            wishes = ask(wishes)
        made = starter.write(wishes, force)
        answer.document = {"recipe": str(made.recipe), "editor_schema": str(made.schema), "notes": list(made.notes)}
        answer.lines = [*starter_lines(made)]


@app.command()
def show(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="a bundle folder")],
    unit: Annotated[
        str | None,
        typer.Option("--unit", metavar="GROUP:INDEX", help="why this unit left or stayed, in place of the rest"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="the report as markdown, junit or html, in place of the rest"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What is in a bundle: before and after, verdict, files. With --unit, why a unit left or stayed."""
    with session("show", as_json) as answer:
        from cswap_deploy import report, units
        from cswap_deploy.bundle import Bundle
        from cswap_deploy.console import bundle_lines, file_lines, left_lines, unit_lines

        if form is not None and (as_json or unit is not None):
            raise UsageError("--format, --json and --unit exclude each other", "ask for one of them")
        opened = Bundle.read(bundle).require_sealed()
        if form is not None:
            answer.lines = report.render(opened.manifest, form).rstrip("\n").split("\n")
        elif unit is None:
            answer.document = {"manifest": opened.manifest}
            answer.lines = [*bundle_lines(opened), *left_lines(opened), "", *file_lines(opened)]
        else:
            facts = units.describe(units.read(opened.file("plan.json").path), opened.manifest["pruned"], unit)
            answer.document, answer.lines = {"unit": facts}, [*unit_lines(facts)]


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="a bundle folder")],
    require: Annotated[
        str | None, typer.Option("--require", metavar="CHECK[,CHECK]", help="these checks must not be skipped")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="FILE", help="also check the signature with this key (PEM)")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option("--signature", metavar="FILE", help="the signature (default: <BUNDLE>.sig)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle: sha256, test vectors through each file, reload.

    What cannot run here is skipped with the reason.
    """
    with session("verify", as_json) as answer:
        from cswap_deploy import verify as checks
        from cswap_deploy.console import verified_lines
        from cswap_deploy.errors import VerifyError

        if signature and not public_key:
            raise UsageError("--signature is checked with a key", "add --public-key FILE")
        wanted = [name for name in (require or "").split(",") if name]
        found = checks.verify(bundle, wanted, public_key=public_key, signature=signature)
        answer.document = {"bundle": str(bundle), "checks": [asdict(check) for check in found]}
        answer.lines = [*verified_lines(found)]
        if any(check.outcome == "failed" for check in found):
            answer.code = VerifyError.exit_code


@app.command()
def schema(
    manifest: Annotated[bool, typer.Option("--manifest", help="of manifest.json in place of the recipe")] = False,
    command: Annotated[
        str | None, typer.Option("--command", metavar="NAME", help="of a command's --json output")
    ] = None,
    agent: Annotated[bool, typer.Option("--agent", help="of the device agent's requests and documents")] = False,
) -> None:
    """JSON Schema of the recipe, for editors and programs."""
    with session("schema", as_json=False) as answer:
        from cswap_deploy import schemas

        document = schemas.of(manifest=manifest, command=command, agent=agent)
        answer.lines = [json.dumps(document, indent=2, ensure_ascii=False)]


def main() -> NoReturn:
    """Entry point of the console script; click's own usage errors end with exit code 2 as ours do."""
    interrupts.arm(say_interrupted)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of two runs on one machine starve each other
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a class name must not end a run in a locale without its letters
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = interrupts.EXIT_CODE
    except ParserError as error:
        refuse_arguments(error)
    except OSError as error:  # of the help; commands answer for themselves
        refuse_output(error)
    if interrupts.asked() or code == interrupts.EXIT_CODE:
        say_interrupted()
        os._exit(interrupts.EXIT_CODE)  # libraries take seconds to shut down
    interrupts.disarm()
    sys.exit(code)


# --- what commands share


def _answer_bundle(answer: Answer, bundle: Bundle) -> None:
    """How a run ended is in the manifest, so a second run that finds all up to date ends as the first did."""
    from cswap_deploy.console import bundle_lines, next_commands

    answer.document = {"bundle": str(bundle.folder), "verdict": bundle.verdict, "manifest": bundle.manifest}
    answer.lines = [*bundle_lines(bundle), "", *next_commands(bundle)]
    answer.code = bundle.manifest["exit_code"]

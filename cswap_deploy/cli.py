"""The command line: the only file that prints or exits."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from cswap_deploy import interrupts
from cswap_deploy.errors import CswapError, UsageError

if TYPE_CHECKING:
    from cswap_deploy.bundle import Bundle
    from cswap_deploy.recipe import Recipe

app = typer.Typer(
    name="cswap-deploy",
    help="From a pretrained image classifier to a pruned, checked model, without fine-tuning.",
    no_args_is_help=True,
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
STOPPED = ("Interrupted", "interrupted", "run the same command again; a build goes on where it stopped")
UNHEARD = "run the command again, its output to where there is room; what was built is kept"
_telling, _told = threading.Lock(), threading.Event()
"""Held while an error is printed; set once one was."""
ParserError: Any = typer.BadParameter.__mro__[1]
"""UsageError of click, whichever copy of click typer carries."""


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
    """Do everything the recipe asks for; ends with the bundle in <work>/bundle."""
    with _session("build", as_json) as answer:
        from cswap_deploy import pipeline

        settings, folder = _load(recipe, work, overrides, on)
        with _run(settings, folder, force, quiet or as_json) as opened:
            bundle = pipeline.build(settings, opened)
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
    """The host's half: load, prune, export, make variants, judge them; `deploy` goes on, here or on the device."""
    with _session("prepare", as_json) as answer:
        from cswap_deploy import pipeline
        from cswap_deploy.console import prepared_lines

        settings, folder = _load(recipe, work, overrides, on)
        with _run(settings, folder, force, quiet or as_json) as opened:
            ready = pipeline.prepare(settings, opened)
        answer.document = {"work": str(folder), "onnx": str(ready.models["fp32"].graph.path), "macs": ready.pruned.macs}
        answer.document["reasons"] = [reason.text for reason in ready.reasons]
        answer.lines = [*prepared_lines(ready, folder)]


@app.command()
def deploy(
    work: Annotated[Path, typer.Argument(metavar="WORK", help="the work folder of `prepare`, or a copy of it")],
    on: OnOption = None,
    force: ForceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The device's half: build and measure what `prepare` has made, and assemble the bundle. Needs no PyTorch."""
    with _session("deploy", as_json) as answer:
        from cswap_deploy import pipeline, prepared
        from cswap_deploy.console import Console
        from cswap_deploy.progress import reporting
        from cswap_deploy.stage import Workdir

        if not work.is_dir():
            raise UsageError(f"{work} is not a folder", "give the work folder of a run, such as runs/<recipe name>")
        _require_target(on)
        prepared.require(work)
        with Workdir(work, force or ()).open() as opened:
            recipe, ready = prepared.find(opened)
            recipe = _moved(recipe, on) if on else recipe
            _require_known_stages(force or [], pipeline.device_stages(recipe))
            console = Console(pipeline.device_stages(recipe), silent=quiet or as_json)
            with closing(console), reporting(console):
                bundle = pipeline.deploy(recipe, ready, opened)
        _answer_bundle(answer, bundle)


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
    """Latency of a model on a target; with --against, of two in turn and their ratio."""
    with _session("measure", as_json) as answer:
        from cswap_deploy import measuring
        from cswap_deploy.console import measured_lines
        from cswap_deploy.recipe import LatencySettings

        _require_target(on)
        paths = [model, *([against] if against else [])]
        settings = LatencySettings(
            runtime=measuring.runtime_of(paths), target=on or "local", batch=batch, threads=threads,
            warmup_s=warmup, duration_s=duration,
        )  # fmt: skip
        answer.document = measuring.measure(paths, settings, trust_engine or (), layers)
        answer.lines = [*measured_lines(answer.document)]


@app.command()
def doctor(on: OnOption = None, as_json: JsonOption = False) -> None:
    """What this machine and the target can do, what is missing, and how to fix it."""
    with _session("doctor", as_json) as answer:
        from cswap_deploy import doctor as examination
        from cswap_deploy.console import finding_lines
        from cswap_deploy.device.target import Probe, reach
        from cswap_deploy.errors import DeviceError

        _require_target(on)
        name = on or "local"
        here = examination.host()
        try:
            with reach(name) as target:
                there = examination.target(name, Probe.of(target).document)
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
    """Validate the recipe, the images and the model's name; say which stages would run, and why."""
    with _session("check", as_json) as answer:
        from cswap_deploy import checks
        from cswap_deploy.console import check_lines, group_lines

        settings, folder = _load(recipe, work, overrides, on)
        report = checks.check(settings, folder)
        found = checks.provable_groups(settings) if groups else None
        answer.document = {
            "facts": report.facts,
            "stages": [{"name": name, "status": status} for name, status in report.stages],
            "groups": checks.groups_document(found) if found else None,
        }
        answer.lines = [*check_lines(report), *(group_lines(found) if found else ())]
        if report.fault:
            _print([] if as_json else answer.lines)
            raise report.fault


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
    """What is in a bundle: the table before and after, the verdict, the files; with --unit, why a unit left or stayed."""
    with _session("show", as_json) as answer:
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
        str | None, typer.Option("--require", metavar="CHECK,...", help="these checks must not be skipped")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle: sha256 of every file, test vectors through ONNX Runtime, reload in PyTorch where it is."""
    with _session("verify", as_json) as answer:
        from cswap_deploy import verify as checks
        from cswap_deploy.console import verified_lines
        from cswap_deploy.errors import VerifyError

        found = checks.verify(bundle, [name for name in (require or "").split(",") if name])
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
    with _session("schema", as_json=False) as answer:
        from cswap_deploy import schemas

        document = schemas.of(manifest=manifest, command=command, agent=agent)
        answer.lines = [json.dumps(document, indent=2, ensure_ascii=False)]


def main() -> NoReturn:
    """Entry point of the console script; click's own usage errors end with exit code 2 as ours do."""
    interrupts.arm(_say_interrupted)
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
        _refuse_arguments(error)
    except OSError as error:  # of the help; commands answer for themselves
        _print([f"error: cannot write to standard output: {error.strerror}", f"  hint: {UNHEARD}"], sys.stderr)
        os._exit(UsageError.exit_code)
    if code == interrupts.EXIT_CODE:
        _say_interrupted()
        os._exit(code)  # libraries take seconds to shut down
    interrupts.disarm()
    sys.exit(code)


def _say_interrupted() -> None:
    """Unless an error, this or another, was told before."""
    with _telling:
        if not _told.is_set():
            command = next((word for word in sys.argv[1:] if not word.startswith("-")), "cswap-deploy")
            _tell(command, "--json" in sys.argv[1:], *STOPPED, interrupts.EXIT_CODE)


def _refuse_arguments(error: Any) -> NoReturn:
    """What the parser of the command line refuses; asked for --json, it is answered in JSON as well."""
    if "--json" in sys.argv[1:]:
        command = error.ctx.info_name if error.ctx else "cswap-deploy"
        fault = {"type": "UsageError", "message": error.format_message(), "hint": "", "exit_code": error.exit_code}
        _print_json(command, {"error": fault})
    error.show()
    sys.exit(error.exit_code)


# --- what all commands share


class _Answer:
    """What a command has to say at its end: lines for people, or the document for --json."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.document: dict[str, Any] = {}
        self.code = 0


@contextmanager
def _session(command: str, as_json: bool) -> Iterator[_Answer]:
    """Run a command's body, then print its answer, or its error with the documented exit code."""
    answer = _Answer()
    try:
        yield answer
        if as_json:
            _print_json(command, answer.document)
        else:
            _print(answer.lines)
    except CswapError as error:
        _fail(command, as_json, type(error).__name__, error.message, error.hint, error.exit_code)
    except KeyboardInterrupt:
        _fail(command, as_json, *STOPPED, interrupts.EXIT_CODE)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = "check space and permissions of the work folder; what was committed is kept"
        _fail(command, as_json, "OSError", f"{error.strerror or error}{where}", hint, UsageError.exit_code)
    except Exception as error:
        if not interrupts.asked():
            traceback.print_exc(file=sys.stderr)
        _fail(command, as_json, type(error).__name__, f"internal error: {error}", "please report the lines above", 1)
    if answer.code:
        raise typer.Exit(answer.code)


def _fail(command: str, as_json: bool, kind: str, message: str, hint: str, code: int) -> NoReturn:
    """Print an error and end; after an interrupt that is the reason, since native code makes errors of its own of it."""
    if interrupts.asked():
        kind, message, hint, code = *STOPPED, interrupts.EXIT_CODE
    with _telling:
        _tell(command, as_json, kind, message, hint, code)
    raise typer.Exit(code)


def _tell(command: str, as_json: bool, kind: str, message: str, hint: str, code: int) -> None:
    _told.set()
    if as_json:
        error = {"type": kind, "message": message, "hint": hint, "exit_code": code}
        with suppress(UsageError):  # the error itself is the news
            _print_json(command, {"error": error})
    _print([f"error: {message}", *([f"  hint: {hint}"] if hint else ())], sys.stderr)


def _print_json(command: str, body: dict[str, Any]) -> None:
    """One line of ASCII: every terminal and every locale can carry it."""
    _print([json.dumps({"schema": f"cswap-deploy/{command}/1", **body})])


def _print(lines: Sequence[str], stream: TextIO | None = None) -> None:
    """A reader that has gone, as in `show | head`, changes nothing about how the command ended; a full disk does.

    Errors: UsageError where standard output cannot be written.
    """
    from cswap_deploy.console import printable

    stream = stream or sys.stdout
    if stream is None:  # closed by the caller
        return
    try:
        for line in lines:
            print(*map(printable, line.split("\n")), sep="\n", file=stream)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise UsageError(f"cannot write to standard output: {error.strerror}", UNHEARD) from error


def _answer_bundle(answer: _Answer, bundle: Bundle) -> None:
    """How a run ended is in the manifest, so a second run that finds all up to date ends as the first did."""
    from cswap_deploy.console import bundle_lines, next_commands

    answer.document = {"bundle": str(bundle.folder), "verdict": bundle.verdict, "manifest": bundle.manifest}
    answer.lines = [*bundle_lines(bundle), "", *next_commands(bundle)]
    answer.code = bundle.manifest["exit_code"]


def _require_target(name: str | None) -> None:
    from cswap_deploy.recipe import TARGET

    if name is not None and not re.fullmatch(TARGET, name):
        raise UsageError(
            f"--on: {name!r} is no target", "give local or ssh://[user@]host[:port]; no user or host starts with '-'"
        )


def _load(path: Path, work: Path | None, overrides: list[str] | None, on: str | None) -> tuple[Recipe, Path]:
    from cswap_deploy.recipe import load

    _require_target(on)
    recipe = load(path, [*(overrides or ()), *([f"latency.target={json.dumps(on)}"] if on else ())])
    return recipe, work or Path("runs") / recipe.name


def _moved(recipe: Recipe, target: str) -> Recipe:
    """The recipe on this target. Errors: UsageError where a measurement with the defaults does not fit it."""
    try:
        return recipe.on(target)
    except ValueError as error:  # pydantic's
        faults = "; ".join(fault["msg"] for fault in getattr(error, "errors", list)()) or str(error)
        raise UsageError(
            f"--on {target}: {faults}", "add a latency block to the recipe and run prepare again"
        ) from error


@contextmanager
def _run(recipe: Recipe, folder: Path, force: list[str] | None, silent: bool) -> Iterator[Any]:
    """An open work folder whose stages are reported on standard error."""
    from cswap_deploy import pipeline
    from cswap_deploy.console import Console
    from cswap_deploy.progress import reporting
    from cswap_deploy.stage import Workdir

    _require_known_stages(force or [], pipeline.stages(recipe))
    pipeline.require_available(recipe)
    work = Workdir(folder, force or ())
    with closing(Console(pipeline.stages(recipe), silent=silent)) as console, reporting(console), work.open():
        yield work


def _require_known_stages(force: list[str], stages: Sequence[str]) -> None:
    from cswap_deploy.pipeline import STAGES

    for name in force:
        if name not in stages:
            known = "does not run for this recipe" if name in STAGES else "is not a stage"
            raise UsageError(f"--force: {name!r} {known}", f"this recipe runs {', '.join(stages)}")

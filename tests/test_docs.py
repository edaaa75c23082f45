"""What README and docs say can be done, can be done: every command runs, or parses, or is listed with what it needs.

A command is a line of a code block, or a code span, that begins with a program. A new one that is neither run nor in
NEEDS fails here; so does an option, a `--set` key, a file name or a link that does not exist.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomllib
from conftest import QUICK, ROOT, Built, run
from ruamel.yaml import YAML
from typer.main import get_command
from typer.testing import CliRunner

from cswap_deploy import cli, outline, recipe

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NEEDS = {
    r"ssh://|--on TARGET": "a board at that address",
    r"cswap-deploy (build|deploy) .*--on local": "seconds of measuring; test_deploy measures",
    r"cswap-deploy build .*prune\.": "a minute of pruning anew; test_pipeline and test_a_criterion_can_be_added prune",
    r"untrained-224\.yaml|runs/(resnet18|mobilenetv2_100)/": "minutes of exporting at 224 pixels, and what that leaves",
    r"^cswap-deploy sweep": "minutes of measuring; test_planning sweeps on a simulated device",
    r"--trust-engine": "an engine of TensorRT; test_agent_tensorrt has a double",
    r"recipes/cifar10-(resnet56|vit)\.yaml": "images and weights that are not in the repository",
    r"^cswap-deploy [a-z]+( --[a-z-]+)*( [A-Z]+)*( --[a-z-]+( [A-Z.,a-z]+)?)*$": "names in capitals replaced",
    r"docs/generate_recipe\.py": "a copy of docs/; test_a_criterion_can_be_added and test_recipe run it",
    r"^(pip|uv) install": "a package index; .ci/wheel installs the wheel",
    r"^make( |$)": "minutes; the target's name is looked up in the Makefile",
    r"^(sudo )?(nvpmodel|jetson_clocks|apt(-get)? install)": "a Jetson",
    r"^(\.|source) \.venv/bin/activate$": "the environment that make demo creates",
    r"^(\.venv/bin/)?python3? benchmarks/": "images, weights and hours; its options are looked up in its source",
    r"^(\.venv/bin/)?python3? calibration/": "minutes of training; it is there",
    r"^\.ci/": "minutes; it is there",
    r"^python3 device/agent\.py$": "what prepare has laid there; test_engine carries it out",
    r"^python3 -m http\.server$": "a visitor; test_web_page is one",
    r"^(trtexec|git|ssh|ssh-copy-id|docker|openssl|npm) ": "a program of somebody else's",
}
"""Commands that do not run here (a pattern) and what they need that is absent here. They are still looked up."""
PROGRAMS = (
    "cswap-deploy",
    "make",
    "python",
    "python3",
    "pip",
    "uv",
    "sudo",
    ".",
    "source",
    "git",
    "ssh",
    "docker",
    "trtexec",
)
MINIMAL = {"name": "x", "model": {"name": "resnet18"}, "calibration": {"images": "images"}}
NOT_OURS = ("nets.py", "file.py")
"""File names that stand for a user's own."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    place: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def program(self) -> str:
        return self.words[0].removeprefix(".venv/bin/")

    @property
    def plain(self) -> str:
        """Without comment and the environment's folder."""
        return shlex.join(self.words).removeprefix(".venv/bin/").replace("'", "")

    def __str__(self) -> str:
        return f"{self.place} {self.text}"


def blocks(path: Path) -> Iterator[Block]:
    page, inside, language, start = path.relative_to(ROOT).as_posix(), list[str](), None, 0
    for number, line in enumerate([*path.read_text("utf-8").splitlines(), ""], 1):
        if language is None and (found := re.match(r"```(\w*)\s*$", line)):
            language, start, inside = found[1], number, []
        elif language is not None and line.startswith("```"):
            yield Block(page, start, language, "\n".join(inside))
            language = None
        elif language is not None:
            inside.append(line)
        elif line.startswith("    ") and _program(line.strip()):
            yield Block(page, number, "", line.strip())


def spans(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each code span outside of blocks."""
    text = re.sub(r"(?ms)^```.*?^```", lambda block: "\n" * block[0].count("\n"), path.read_text("utf-8"))
    for found in re.finditer(r"(`+)(.+?)\1", text):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{path.relative_to(ROOT)}:{line}", " ".join(found[2].split())


def _program(line: str) -> bool:
    """The line begins with something that runs."""
    first = line.removeprefix("$ ").split(" ")[0].removeprefix(".venv/bin/")
    return first in PROGRAMS or first.startswith(".ci/") or line.startswith("$ ")


def _installed(line: str) -> bool:
    """The line begins with a program of this machine: a command that PROGRAMS does not know."""
    return bool(re.match(r"[a-z][\w.-]+ ", line)) and shutil.which(line.split(" ")[0]) is not None


def commands(path: Path) -> Iterator[Command]:
    for block in blocks(path):
        if block.language in ("", "sh", "bash", "console"):
            lines = [*unrolled(block.text.replace("\\\n", " ").splitlines())]
            prompts = any(line.startswith("$ ") for line in lines)
            for line in lines:
                if line.startswith("$ ") if prompts else _program(line) or _installed(line):
                    yield Command(str(block), line.removeprefix("$ "))
    for place, text in spans(path):
        if _program(text) and len(text.split()) > 1 and "..." not in text:
            yield Command(place, text)


def unrolled(lines: Iterable[str]) -> Iterator[str]:
    """`for x in a b; do one $x && two $x; done` as the lines that it stands for."""
    for line in lines:
        if found := re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", line):
            for value in found[2].split():
                yield from found[3].replace(f"${found[1]}", value).split(" && ")
        else:
            yield line


COMMANDS = [command for page in PAGES for command in commands(page)]
OURS = [command for command in COMMANDS if command.program == "cswap-deploy"]
EXAMPLE = "docs/adding-a-criterion.md"
"""Its commands and recipes need what it adds: test_a_criterion_can_be_added has them."""
BLOCKS = [block for page in PAGES for block in blocks(page)]


def needs(command: Command) -> str | None:
    return next((reason for pattern, reason in NEEDS.items() if re.search(pattern, command.plain)), None)


RUN = [command for command in OURS if needs(command) is None]


# --- commands


def test_the_pages_were_read() -> None:
    assert len(COMMANDS) > 30 and len(RUN) >= 8
    assert {"README.md", "CONTRIBUTING.md", "docs/measuring.md"} <= {
        command.place.partition(":")[0] for command in COMMANDS
    }


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in OURS], ids=str)
def test_a_command_of_another_program_is_listed_and_its_parts_exist(command: Command) -> None:
    assert needs(command), f"{command}: run it in this file, or put what it needs into NEEDS"
    words = [word for word in command.words if not word.endswith("sudo")]
    if command.program == "make":
        targets = re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text())
        asked = [word for word in words[1:] if "=" not in word]
        assert set(asked) <= set(targets), f"{command}: no such target"
    if command.program.startswith(("python", ".ci/")) and not {"-c", "-m"} & set(words):
        script = next(word for word in words if "/" in word and not word.endswith("python"))
        laid_by_prepare = ROOT / "cswap_deploy" / script  # into the work folder, where it has the same name
        assert (ROOT / script).is_file() or laid_by_prepare.is_file(), f"{command}: no such file"
        source = "".join(path.read_text() for path in (ROOT / script).parent.glob("*.py"))
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert option in source, f"{command}: {script} has no option {option}"
    if command.program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"cswap-deploy\[([a-z,]+)\]", command.text):
            assert set(name.split(",")) <= set(extras), f"{command}: no such extra"


@pytest.mark.parametrize("command", [command for command in OURS if not command.place.startswith(EXAMPLE)], ids=str)
def test_our_commands_parse_and_set_keys_that_exist(command: Command, tmp_path: Path) -> None:
    program: Any = get_command(cli.app)
    name, *arguments = [word for word in command.words[1:] if word != "..."]
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    assert name in program.commands, f"{command}: no such command"
    wanted = {parameter.name for parameter in program.commands[name].params if parameter.required}
    missing = [parameter for parameter in wanted if not [word for word in arguments if not word.startswith("-")]]
    context = program.commands[name].make_context(name, [*arguments, *("x" for _ in missing)])
    overrides = [text for text in context.params.get("overrides") or () if not text.startswith("KEY")]
    path = tmp_path / "recipe.yaml"
    YAML().dump(MINIMAL, path)
    recipe.load(path, overrides)
    for stage in context.params.get("force") or () if name != "init" else ():
        assert stage in (*outline.STAGES, "STAGE"), f"{command}: no such stage"


@pytest.fixture(scope="module")
def world(quickstart: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages' files are: recipes, a recipe of the user's own, its finished run, two ONNX files."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("recipes", "calibration", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    data = YAML(typ="safe").load(quickstart.recipe)
    data |= {"name": "my-model"}
    for key, block in (("checkpoint", data["model"]), ("images", data["calibration"])):
        block[key] = block[key].removeprefix("../")
    for name in ("my.yaml", "recipe.yaml"):
        YAML().dump(data, folder / name)
    for name in ("quickstart", "my-model"):
        shutil.copytree(quickstart.work, folder / "runs" / name)
    shutil.copytree(quickstart.work, folder / "my-model")
    for name in ("a.onnx", "b.onnx"):
        shutil.copyfile(quickstart.bundle.folder / "model.onnx", folder / name)
    return folder


@pytest.mark.parametrize("command", RUN, ids=str)
def test_our_commands_run(command: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, in a folder where what they name exists; with the settings that make the tests' builds short."""
    name, *arguments = command.words[1:]
    monkeypatch.chdir(tmp_path if name == "init" else world)  # it overwrites nothing
    if name in ("build", "prepare", "check"):
        arguments += [f"--set={setting}" for setting in QUICK]
    if name == "measure":
        arguments += ["--duration", "0.05", "--warmup", "0"]
    result = CliRunner().invoke(cli.app, [name, *arguments])
    assert result.exit_code == 0, f"{command}: {result.stderr}"
    assert result.stdout


def test_what_is_shown_of_a_second_run_has_the_stages_of_today() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    stages = outline.lines(recipe.load(ROOT / "recipes" / "quickstart.yaml"))
    shown = re.findall(r"(?m)^\[ ?(\d+)/(\d+)\] (\w+(?: \([\w, -]+\))?) +(.+)$", text)
    assert shown and {(int(number), int(count), name) for number, count, name, _ in shown} <= {
        (number, len(stages), name) for number, name in enumerate(stages, 1)
    }


# --- examples


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_examples_run(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if re.match(r"# [\w/]+\.py\n", block.text):
        return  # a file of a worked example: test_a_criterion_can_be_added
    monkeypatch.chdir(world)
    exec(compile(block.text, str(block), "exec"), {})


RECIPES = [b for b in BLOCKS if b.language == "yaml" and b.page != EXAMPLE and not b.text.startswith("- ")]
"""Lists are steps of a workflow."""


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_recipes_in_pages_load(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    written = YAML(typ="safe").load(block.text)
    YAML().dump({**MINIMAL, **written}, path)
    recipe.load(path)


def test_every_kind_of_block_is_looked_at() -> None:
    assert {block.language for block in BLOCKS} <= {"", "sh", "bash", "console", "python", "yaml", "diff"}


# --- the worked example


def hunks(text: str) -> Iterator[tuple[Path, str, str]]:
    """(file, old, new) of the hunks of a diff; a hunk ends at the next `@@`."""
    head, *parts = re.split(r"(?m)^@@.*\n", text)
    found = re.search(r"(?m)^--- (\S+)$", head)
    assert found, head
    for part in parts:
        lines = part.splitlines()
        old = [line[1:] for line in lines if not line.startswith("+")]
        new = [line[1:] for line in lines if not line.startswith("-")]
        yield Path(found[1]), "\n".join(old), "\n".join(new)


def test_a_criterion_can_be_added_as_its_page_says(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for name in ("cswap_deploy", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    shutil.copyfile(ROOT / "tests" / "zoo.py", copy / "tests" / "zoo.py")
    page = [block for block in BLOCKS if block.page == EXAMPLE]
    for block in page:
        if block.language == "python":
            first, _, rest = block.text.partition("\n")
            (copy / first.removeprefix("# ")).write_text(rest + "\n")
        for path, old, new in hunks(block.text) if block.language == "diff" else ():
            text = (copy / path).read_text()
            assert text.count(old) == 1, f"{block}: {path} holds {text.count(old)} times:\n{old}"
            (copy / path).write_text(text.replace(old, new))
    surroundings = {"PYTHONPATH": str(copy)}
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", copy / "tests", cwd=copy, **surroundings)
    assert tested.returncode == 0 and "2 passed" in tested.stdout, tested.stdout + tested.stderr
    written = run(copy / "docs" / "generate_recipe.py", cwd=copy, **surroundings)
    assert written.returncode == 0 and "activation" in (copy / "docs" / "recipe.md").read_text()
    (command,) = [command for command in OURS if command.place.startswith(EXAMPLE)]
    (block,) = [block for block in page if block.language == "yaml"]
    written = YAML(typ="safe").load(block.text)["prune"]
    assert {f"prune.{key}={value}" for key, value in written.items()} <= set(command.words)
    arguments = [word.replace("recipes/", f"{ROOT}/recipes/") for word in command.words[1:]]
    settings = [f"--set={setting}" for setting in QUICK]
    built = run("-m", "cswap_deploy", *arguments, *settings, "--json", cwd=copy, **surroundings)
    assert built.returncode == 0 and '"criterion": "activation"' in built.stdout, built.stderr


# --- names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", target.read_text("utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    known = [
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not {".venv", ".git", "runs"} & {*path.parts}
    ]
    for place, text in spans(page):
        for name in re.findall(
            r"(?<![\w./{<-])[\w.-]+(?:/[\w.-]+)*\.py\b|(?<![\w./])(?:cswap_deploy|tests|docs|recipes)/[\w./-]*\w", text
        ):
            if name in NOT_OURS:
                continue
            gone = page.name == "CHANGELOG.md" and "is gone" in page.read_text("utf-8")
            assert gone or any(path == name or path.endswith(f"/{name}") for path in known), f"{place}: {name}"


def test_the_code_map_names_every_module() -> None:
    text = (ROOT / "README.md").read_text("utf-8").partition("## Code map")[2]
    named = set(re.findall(r"[\w]+\.py|\w+/", text))
    modules = {path.name + "/" * path.is_dir() for path in (ROOT / "cswap_deploy").iterdir()}
    modules -= {"__init__.py", "__main__.py", "__pycache__/", "py.typed"}
    assert sorted(modules - named - {"py.typed"}) == []


# --- the checks see what they are for


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("```\ncswap-deploy biuld x.yaml\n```", "cswap-deploy biuld x.yaml"),
        ("```\nmake demo\ndocker run x\n```", "docker run x"),
        ("```\nmake demo\nsort x\n```", "sort x"),
        ("Then `make frobnicate` it.", "make frobnicate"),
        ("$ no program\n\n    python benchmarks/x.py --y", "python benchmarks/x.py --y"),
        ("```\n[ 1/2] x\n$ cswap-deploy show x \\\n  --json\nPASS\n```", "cswap-deploy show x    --json"),
    ],
)
def test_commands_are_found(text: str, caught: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    assert [command.text for command in commands(tmp_path / "page.md")][-1] == caught


def test_a_command_with_an_unknown_option_or_key_is_refused(tmp_path: Path) -> None:
    for text in (
        "build r.yaml --nonsense",
        "build r.yaml --set prune.taget=1",
        "frobnicate x",
        "build r.yaml --force x",
    ):
        with pytest.raises(Exception, match=r"nonsense|taget|frobnicate|no such stage"):
            test_our_commands_parse_and_set_keys_that_exist(Command("here", f"cswap-deploy {text}"), tmp_path)

"""The digests of source files reach whatever a stage's module imports, and only that."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cswap_deploy import sources
from cswap_deploy.sources import NEUTRAL, package_imports, source_digests


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of our name with nothing in it yet; the real one comes back afterwards."""
    root = tmp_path / "cswap_deploy"
    root.mkdir()
    (root / "__init__.py").touch()
    monkeypatch.setattr(sources, "PACKAGE", root)
    source_digests.cache_clear()
    yield root
    source_digests.cache_clear()


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py") if name != "init" else root / "part" / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def reached(module: str) -> list[str]:
    source_digests.cache_clear()
    return list(source_digests(module))


def test_imports_are_followed_at_any_depth(package: Path) -> None:
    write(
        package,
        a="def f():\n    if True:\n        from cswap_deploy.b import g",
        b="import cswap_deploy.c as c\nimport json",
        c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cswap_deploy import d",
        d="from cswap_deploy.a import f",
        stranger="",
    )
    assert reached("cswap_deploy.a") == ["a.py", "b.py", "c.py", "d.py"]
    assert reached("cswap_deploy.stranger") == ["stranger.py"]


def test_packages_their_modules_and_both_in_one_line(package: Path) -> None:
    write(
        package,
        init="from cswap_deploy.part.inside import x",
        part__inside="x = 1",
        part__other="",
        whole="import cswap_deploy.part",
        module="from cswap_deploy.part import other",
        both="from cswap_deploy.part import other, x",
        top="import cswap_deploy",
    )
    assert reached("cswap_deploy.part") == ["part/__init__.py", "part/inside.py"]
    assert reached("cswap_deploy.whole") == ["part/__init__.py", "part/inside.py", "whole.py"]
    assert reached("cswap_deploy.module") == ["module.py", "part/other.py"]
    assert reached("cswap_deploy.both") == ["both.py", "part/__init__.py", "part/inside.py", "part/other.py"]
    assert reached("cswap_deploy.top") == ["__init__.py", "top.py"]


def test_neutral_files_count_neither_by_themselves_nor_by_their_imports(package: Path) -> None:
    write(package, a="from cswap_deploy import progress, stage", progress="", stage="import cswap_deploy.b", b="")
    assert reached("cswap_deploy.a") == ["a.py"]


def test_module_from_outside_counts_by_its_file(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(package, a="")
    own = ModuleType("mine.stages")
    own.__file__ = str(tmp_path / "stages.py")
    Path(own.__file__).write_text("from cswap_deploy.a import f")
    monkeypatch.setitem(sys.modules, "mine.stages", own)
    assert reached("mine.stages") == ["a.py", "stages.py"]


def test_names_that_only_look_like_ours_are_not_followed() -> None:
    assert package_imports(b"import cswap_deploy_tools\nfrom cswap import deploy\nfrom . import x") == []


def test_only_the_changed_file_changes_its_digest(package: Path) -> None:
    real = Path(sources.__file__).parent
    shutil.copytree(real, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    source_digests.cache_clear()
    before = source_digests("cswap_deploy.model")
    assert {"model.py", "artifacts.py", "recipe.py"} <= before.keys()
    assert not NEUTRAL & before.keys()
    (package / "artifacts.py").write_text((package / "artifacts.py").read_text() + "# one more line\n")
    (package / "images.py").write_text("not even Python")
    (package / "stage.py").write_text("not even Python")
    source_digests.cache_clear()
    after = source_digests("cswap_deploy.model")
    assert [name for name in before if before[name] != after[name]] == ["artifacts.py"]
    assert before.keys() == after.keys()


def test_every_neutral_file_exists() -> None:
    assert [name for name in NEUTRAL if not (sources.PACKAGE / name).is_file()] == []


def test_missing_module_is_a_fault(package: Path) -> None:
    write(package, a="import cswap_deploy.gone")
    with pytest.raises(FileNotFoundError, match=r"gone\.py"):
        reached("cswap_deploy.a")


@pytest.mark.parametrize("module", ["data", "model", "prune", "export", "variants", "accuracy", "engine", "latency"])
def test_how_things_are_worded_is_no_reason_to_measure_anew(module: str) -> None:
    assert "wording.py" not in source_digests(f"cswap_deploy.{module}")

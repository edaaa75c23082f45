"""A bundle's signature, with keys as openssl makes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Built, Project, build, tree

from cswap_deploy import pipeline, signing
from cswap_deploy.errors import UsageError, VerifyError
from cswap_deploy.stage import Workdir
from cswap_deploy.verify import verify


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one; as openssl makes them."""
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


def test_a_signature_holds_until_a_file_changes(
    colours: Built, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    project = shutil.copytree(colours.recipe.parent, tmp_path / "project")
    made = build(project / "recipe.yaml", [f"sign={private}"], project / "work")
    folder, signature = made.bundle.folder, made.work / "bundle.sig"
    assert tree(folder).keys() == tree(colours.bundle.folder).keys(), "the signature lies beside what it signs"
    for name, content in tree(made.work / "bundle").items():
        assert b"PRIVATE KEY" not in content and str(tmp_path).encode() not in content, name
    assert str(tmp_path) not in signature.read_text()
    before = signature.read_bytes()
    build(project / "recipe.yaml", [f"sign={private}"], project / "work")
    assert signature.read_bytes() == before, "what holds is not signed again"
    found = {check.name: check for check in verify(folder, ["signature"], public_key=public)}
    assert found["signature"].outcome == "passed" and "bundle.sig holds for every file" in found["signature"].detail
    (folder / "labels.txt").write_text("other\n")
    found = {check.name: check for check in verify(folder, public_key=public)}
    assert found["signature"].outcome == "failed" and "does not hold" in found["signature"].detail


def test_what_cannot_sign_is_refused_before_the_long_stages(
    project: Project, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "no.pem").write_text("no key")
    for key, words in ((tmp_path / "gone.pem", "there is no file"), (tmp_path / "no.pem", "no private key on a curve")):
        with pytest.raises(UsageError, match=words) as caught, Workdir(tmp_path / "work").open() as work:
            pipeline.build(project.load(f"sign={key}"), work)
        assert caught.value.exit_code == 2 and "openssl" in caught.value.hint
    with pytest.raises(VerifyError, match="there is no signature"):
        signing.check(tmp_path, tmp_path / "x.sig", keys[1])

"""A bundle stands alone, and is not trusted: what reads it imports nothing that it names and follows no path out."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Built, Project, build, make_project, run, tree

from cswap_deploy import load_pruned
from cswap_deploy.artifacts import File, Network, sha256_of
from cswap_deploy.bundle import SAFE_KWARGS, Bundle
from cswap_deploy.codec import decode
from cswap_deploy.digests import sealed
from cswap_deploy.errors import DataError, ModelError, UsageError, VerifyError
from cswap_deploy.prune.cut import restore

LISTED = {
    "README.md", "MODEL_CARD.md", "bom.cdx.json", "report.html", "recipe.yaml", "model.onnx", "labels.txt", "preprocess.json",
    "plan.json", "weights.safetensors", "test_vectors/expected.json", "web/index.html", "web/page.js", "web/preprocess.js",
    *(f"test_vectors/{name}.npy" for name in ("input", "output", "pixels")),
    *(f"test_vectors/image_{number}.png" for number in range(4)),
}  # fmt: skip
RELOAD = """
import sys
import numpy as np, torch
import cswap_deploy
factory = None
if len(sys.argv) > 3:
    sys.path.insert(0, sys.argv[3])
    from net import colours as factory
module = cswap_deploy.load_pruned(sys.argv[1], factory)
assert not module.training and not any(p.requires_grad for p in module.parameters())
np.save(sys.argv[2], module(torch.from_numpy(np.load(sys.argv[1] + "/test_vectors/input.npy"))).numpy())
"""


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as someone would who wants it to be believed."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    change(document)
    with suppress(ValueError):  # what is no number cannot be sealed
        document = sealed(document)
    path.write_text(json.dumps(document), "utf-8")


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Another content under a name that the manifest lists, its digest set right."""
    (folder / name).write_bytes(content)
    entry = {"path": name, "sha256": sha256_of(folder / name), "bytes": len(content)}
    edit(folder, lambda m: m.update(files=[entry if item["path"] == name else item for item in m["files"]]))


def edit_plan(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    change(plan)
    replace_file(folder, "plan.json", json.dumps(plan).encode())


def pruned_network(built: Built) -> Network:
    """The network that was exported, as the work folder keeps it."""
    (entry,) = (built.work / "stages" / "pruned").iterdir()
    return decode(Network, json.loads((entry / "stage.json").read_text())["value"], entry)


# --- what is in it


def test_manifest_lists_every_file_with_its_digest(quickstart):
    folder = quickstart.bundle.folder
    assert set(tree(folder)) == LISTED | {"manifest.json"}
    assert {entry["path"] for entry in quickstart.manifest["files"]} == LISTED
    for entry in quickstart.manifest["files"]:
        assert quickstart.bundle.file(entry["path"]) == File.of(folder / entry["path"])
        assert entry["bytes"] == (folder / entry["path"]).stat().st_size


def test_nothing_in_it_names_a_place_of_this_machine(quickstart, colours):
    for built in (quickstart, colours):
        places = [str(ROOT), str(built.work), str(built.recipe.parent), str(Path.home())]
        for name, content in tree(built.bundle.folder).items():
            assert [place for place in places if place.encode() in content] == [], name


def test_labels_and_preprocessing_agree_with_the_onnx_file_and_the_manifest(quickstart):
    import onnx

    folder = quickstart.bundle.folder
    model = onnx.load(folder / "model.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    preprocess = json.loads((folder / "preprocess.json").read_text())
    assert metadata["cswap.labels"] == (folder / "labels.txt").read_text("utf-8").splitlines() == list("0123456789")
    assert metadata["cswap.preprocess"] == preprocess
    image = model.graph.input[0]
    assert [axis.dim_value for axis in image.type.tensor_type.shape.dim] == [1, *preprocess["shape"]]
    assert (image.name, model.graph.output[0].name) == (preprocess["input"], preprocess["output"])
    stated = quickstart.manifest["model"]["input"]
    assert preprocess["mean"] == stated["mean"] and preprocess["std"] == stated["std"]
    assert preprocess["shape"] == stated["shape"] and preprocess["resize"]["crop_pct"] == stated["crop_pct"]
    assert preprocess["resize"]["interpolation"] == stated["interpolation"]
    assert (model.opset_import[0].version, model.ir_version) == (18, quickstart.manifest["onnx"]["ir_version"])
    assert quickstart.manifest["onnx"]["nodes_simplified"] == len(model.graph.node)


def test_readme_s_code_runs_in_the_bundle(quickstart):
    readme = (quickstart.bundle.folder / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    done = run("-W", "error", "-c", code, cwd=quickstart.bundle.folder)
    assert done.returncode == 0, done.stderr
    expected = np.load(quickstart.bundle.folder / "test_vectors/output.npy").argmax(1)
    assert done.stdout.split() == [str(label) for label in expected]


def test_class_names_with_a_line_break_are_refused(project, cheap_export):
    for part in ("scoring", "holdout"):
        (project.folder / "images" / part / "blue").rename(project.folder / "images" / part / "bl\u2028ue")
    with pytest.raises(DataError, match="line break"):
        project.build("prune.target=null")


# --- reloading


def test_timm_network_reloads_bit_equal_in_a_process_without_its_checkpoint(quickstart, tmp_path):
    import torch

    bundle = shutil.copytree(quickstart.bundle.folder, tmp_path / "elsewhere")
    done = run("-c", RELOAD, bundle, tmp_path / "logits.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    inputs = torch.from_numpy(np.load(bundle / "test_vectors/input.npy"))
    with torch.no_grad():
        exported = restore(pruned_network(quickstart))(inputs).numpy()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), exported)
    assert np.allclose(exported, np.load(bundle / "test_vectors/output.npy"), atol=1e-4)


def test_vision_transformer_reloads_bit_equal(tmp_path, cheap_export):
    import torch

    settings = ("calibration.scoring=32", "calibration.holdout=20", "prune.steps=1", "prune.criterion=taylor")
    built = build(ROOT / "recipes" / "quickstart-vit.yaml", settings, tmp_path / "work")
    assert built.manifest["pruned"]["units_removed"] > 0
    inputs = torch.from_numpy(np.load(built.bundle.folder / "test_vectors/input.npy"))
    with torch.no_grad():
        assert torch.equal(load_pruned(built.bundle.folder)(inputs), restore(pruned_network(built))(inputs))


def test_factory_network_reloads_through_the_caller_s_factory(colours, tmp_path):
    import torch

    bundle = shutil.copytree(colours.bundle.folder, tmp_path / "elsewhere")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(colours.recipe.with_name("net.py"), source)
    done = run("-c", RELOAD, bundle, tmp_path / "logits.npy", source)
    assert done.returncode == 0, done.stderr
    inputs = torch.from_numpy(np.load(bundle / "test_vectors/input.npy"))
    with torch.no_grad():
        assert np.array_equal(np.load(tmp_path / "logits.npy"), restore(pruned_network(colours))(inputs).numpy())


def test_a_factory_that_a_bundle_names_is_not_imported(colours, tmp_path, monkeypatch):
    planted = make_project(tmp_path / "planted")
    shutil.copytree(colours.bundle.folder, planted.folder, dirs_exist_ok=True)
    edit(planted.folder, lambda m: m["model"].update(name=f"{planted.folder / 'net.py'}:colours"))
    monkeypatch.chdir(planted.folder)
    monkeypatch.syspath_prepend(str(planted.folder))
    with pytest.raises(ModelError, match="not imported from a bundle"):
        load_pruned(planted.folder)
    assert not (planted.folder / "imported").exists()


def test_what_the_caller_s_factory_returns_must_be_the_network(colours):
    from torch import nn

    with pytest.raises(ModelError, match="returned int"):
        load_pruned(colours.bundle.folder, factory=lambda: 1)
    with pytest.raises(ModelError, match="made for another network"):
        load_pruned(colours.bundle.folder, factory=lambda: nn.Linear(2, 2))


# --- not trusted


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "plan.json", "test_vectors/input.npy", "test_vectors/output.npy"]
)
def test_a_changed_file_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[-5] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(VerifyError, match=f"{name}' of the bundle is not what the manifest says"):
        load_pruned(copy)


def test_weights_changed_together_with_their_digest_fail_the_test_vectors(copy):
    from safetensors.torch import load_file, save

    state = load_file(copy / "weights.safetensors")
    state["fc.bias"][0] += 5
    replace_file(copy, "weights.safetensors", save(state))
    with pytest.raises(ModelError, match=r"differs from the recorded test vectors by .* made with timm"):
        load_pruned(copy)


def test_a_missing_file_is_named(copy):
    (copy / "plan.json").unlink()
    with pytest.raises(VerifyError, match=r"'plan\.json' of the bundle is missing"):
        load_pruned(copy)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "..", "", ".", "a\\..\\x", "a\0b", "a\x1b[2Jb"])
def test_a_manifest_that_lists_names_outside_is_refused(copy, path):
    edit(copy, lambda m: m["files"].append({"path": path, "sha256": "0" * 64, "bytes": 1}))
    with pytest.raises(VerifyError, match="outside the bundle"):
        Bundle.read(copy)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "test_vectors/input.npy"])
def test_a_link_out_of_the_bundle_is_not_followed(copy, tmp_path, name):
    outside = tmp_path / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(VerifyError, match="leads out of the bundle"):
        load_pruned(copy)


def test_a_linked_folder_out_of_the_bundle_is_not_followed(copy, tmp_path):
    (copy / "test_vectors").rename(tmp_path / "outside")
    (copy / "test_vectors").symlink_to(tmp_path / "outside")
    with pytest.raises(VerifyError, match="leads out of the bundle"):
        load_pruned(copy)


def test_a_bundle_behind_a_link_is_read(copy, tmp_path):
    (tmp_path / "latest").symlink_to(copy)
    assert Bundle.read(tmp_path / "latest").file("plan.json").sha256 == Bundle.read(copy).file("plan.json").sha256


@pytest.mark.parametrize(
    "key", ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "act_layer", "cache_dir"]
)
def test_kwargs_outside_the_allow_list_are_refused(copy, key):
    assert key not in SAFE_KWARGS
    edit(copy, lambda m: m["model"]["kwargs"].update({key: "x"}))
    with pytest.raises(ModelError, match=f"built with {key}, which a bundle may not pass"):
        load_pruned(copy)


@pytest.mark.parametrize(
    "name", ["hf_hub:timm/resnet18", "hf-hub:timm/resnet18", "local-dir:x", "../x", "/x/y", "a/b", ""]
)
def test_model_names_that_are_no_registry_names_are_refused(copy, name):
    edit(copy, lambda m: m["model"].update(name=name))
    with pytest.raises(ModelError, match="not a name of timm's registry"):
        load_pruned(copy)


def test_an_unknown_registry_name_is_refused(copy):
    edit(copy, lambda m: m["model"].update(name="resnet18x"))
    with pytest.raises(ModelError, match="no model named 'resnet18x'"):
        load_pruned(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "has schema None"),
        (b'"x"', "has schema None"),
        (b'{"schema": "cswap-deploy/manifest/2"}', "schema 'cswap-deploy/manifest/2', expected"),
        (b'{"schema": "cswap-deploy/manifest/1"}', "not a manifest: 'name' is missing"),
    ],
)
def test_garbage_in_place_of_a_manifest_is_refused(copy, content, message):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(VerifyError, match=message):
        Bundle.read(copy)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("files",), {}), (("files", 0), "x"), (("files", 0, "path"), None), (("model", "kwargs"), []),
        (("model", "source"), "hub"), (("accuracy",), None), (("accuracy", "source", "top1"), float("nan")),
        (("accuracy", "source", "top1_ci95"), [1]), (("accuracy", "images"), 0), (("pruned", "macs"), 10**400),
        (("verdict",), "maybe"), (("reasons",), "x"), (("accuracy", "gate", "max_drop_pp"), "1"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_refused(copy, place, value):
    def change(node: Any) -> None:
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value

    edit(copy, change)
    with pytest.raises(VerifyError, match=r"not a manifest|not valid JSON"):
        Bundle.read(copy)


def test_a_huge_manifest_is_refused_without_reading_it(copy):
    os.truncate(copy / "manifest.json", 1 << 40)
    with pytest.raises(VerifyError, match="larger than any manifest"):
        Bundle.read(copy)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match=r"not a bundle: it holds no manifest\.json"):
        Bundle.read(tmp_path)


def npy(array: np.ndarray, path: Path, **options: Any) -> bytes:
    np.save(path, array, **options)
    return path.read_bytes()


def test_pickled_test_vectors_are_refused_and_not_run(copy, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    content = npy(np.array([Bomb()], object), tmp_path / "x.npy", allow_pickle=True)
    replace_file(copy, "test_vectors/input.npy", content)
    with pytest.raises(VerifyError, match=r"input\.npy is not a plain array"):
        load_pruned(copy)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 32, 32)), np.zeros((0, 3, 32, 32), np.float32), np.array(["a", "b"])], ids=str
)
def test_test_vectors_of_another_kind_are_refused(copy, tmp_path, array):
    replace_file(copy, "test_vectors/input.npy", npy(array, tmp_path / "x.npy"))
    with pytest.raises(VerifyError, match=r"input\.npy is not an array of float32"):
        load_pruned(copy)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff", b"not an array"])
def test_test_vectors_that_are_no_arrays_are_refused(copy, content):
    replace_file(copy, "test_vectors/output.npy", content)
    with pytest.raises(VerifyError, match=r"output\.npy is not"):
        load_pruned(copy)


def test_test_vectors_that_do_not_fit_are_refused(copy, tmp_path):
    wanted = np.load(copy / "test_vectors/output.npy")
    replace_file(copy, "test_vectors/output.npy", npy(wanted[:1], tmp_path / "x.npy"))
    with pytest.raises(ModelError, match="the test vectors hold"):
        load_pruned(copy)
    replace_file(copy, "test_vectors/output.npy", npy(wanted * np.float32("nan"), tmp_path / "x.npy"))
    with pytest.raises(ModelError, match="differs from the recorded test vectors by nan"):
        load_pruned(copy)
    replace_file(copy, "test_vectors/input.npy", npy(np.zeros((1, 5, 32, 32), np.float32), tmp_path / "x.npy"))
    with pytest.raises(ModelError, match="cannot run on the test vectors"):
        load_pruned(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("groups"),
        lambda plan: plan.update(keep=[]),
        lambda plan: plan["groups"][0]["members"][0].update(module="no.such.module"),
        lambda plan: plan["groups"][0]["members"][0].update(parameter="__class__"),
        lambda plan: plan["groups"][0]["members"][0].update(surprise=1),
        lambda plan: plan["rewrites"].append({"kind": "run", "module": "fc"}),
        lambda plan: plan.update(schema="other"),
        lambda plan: plan["keep"].update({plan["groups"][0]["name"]: []}),
        lambda plan: plan["shapes"].pop("after"),
        lambda plan: plan["groups"][0].update(members=[], units=10**11),
        lambda plan: plan["groups"][0].update(units=10**11),
        lambda plan: plan["groups"][0].update(
            kind="dims", units=10**11, queries=None, keys=None, values=None, scales=[]
        ),
    ],
)
def test_a_plan_that_is_not_ours_is_a_model_error(copy, change):
    edit_plan(copy, change)
    with pytest.raises(ModelError):
        load_pruned(copy)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"[" * 100_000, b"\xff"])
def test_a_plan_that_is_no_object_is_a_model_error(copy, content):
    replace_file(copy, "plan.json", content)
    with pytest.raises(ModelError, match=r"plan\.json"):
        load_pruned(copy)


def test_projects_of_tests_are_right_on_every_image(colours: Built, project: Project):
    """The premise of the tests with a colours project: its dense network knows its classes."""
    assert colours.manifest["accuracy"]["source"]["top1"] == 1.0
    assert not (project.folder / "imported").exists()

"""What a phone team gets: each file agrees with the model beside it, tells nothing about this machine, and can be made again."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import COLOURS, NO_VNNI, VNNI, Built, build, make_project, reseal, run, traces, tree
from PIL import Image
from ruamel.yaml import YAML

from cswap_deploy import assembling, bom, export, progress
from cswap_deploy.artifacts import InputSpec
from cswap_deploy.errors import UsageError
from cswap_deploy.handoff import FILES
from cswap_deploy.images import normalise, resized, transform
from cswap_deploy.preprocess import preprocess
from cswap_deploy.report import render_card, render_readme
from cswap_deploy.vectors import softmax
from cswap_deploy.verify import verify

EVERYTHING = (
    "variants=[fp16, int8, int8-tensorrt, int8-arm]", "onnx.ort_format=true", "onnx.image_input=true",
    "onnx.runtimes=[onnxruntime>=1.18, tensorrt==10.3]",
)  # fmt: skip
STRANGE = ("海, 空", "a, b", "\u05d0\u05d1", "🙂", "Ж", "é|`<b>")
"""Class names in other scripts, with commas and with what means something to Markdown and HTML."""
NAME = "2 net-ü.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle with every file there is, of a network whose name is no identifier and whose classes have such names."""
    project = make_project(tmp_path_factory.mktemp("whole") / "project")
    (project.folder / "net.py").rename(project.folder / NAME)
    project.recipe.write_text(project.recipe.read_text().replace("net.py:colours", f'"{NAME}:colours"'), "utf-8")
    for part in ("scoring", "holdout"):
        for name, strange in zip(sorted(COLOURS), sorted(STRANGE), strict=True):
            folder = project.folder / "images" / part
            (folder / name).rename(folder / strange)
    net = (project.folder / NAME).read_text()
    (project.folder / NAME).write_text(
        net.replace("def colours(copies=COPIES):", "def colours(copies=COPIES, cache=''):")
    )
    return project.build(*EVERYTHING, f"model.kwargs.cache={project.folder / 'cache'}")


@pytest.fixture
def expected(whole: Built) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((whole.bundle.folder / "test_vectors" / "expected.json").read_text("utf-8"))
    return found


# --- names


def test_labels_and_the_network_s_name_arrive_as_they_are(whole: Built) -> None:
    folder, ordered = whole.bundle.folder, sorted(STRANGE)
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == ordered
    model = onnx.load(folder / "model.image.onnx")
    assert json.loads({e.key: e.value for e in model.metadata_props}["cswap.labels"]) == ordered
    assert whole.manifest["model"]["name"] == f"{NAME}:colours" and whole.manifest["model"]["outputs"] == len(ordered)
    assert all(outcome.outcome != "failed" for outcome in verify(folder))


# --- test vectors


def test_expected_json_leads_to_the_numbers(whole: Built, expected: dict[str, Any]) -> None:
    """Read as a program without NumPy would: an offset and a shape."""
    folder = whole.bundle.folder / "test_vectors"
    for name, array in expected["arrays"].items():
        raw = (folder / array["file"]).read_bytes()[array["offset"] :]
        values = np.frombuffer(raw, np.dtype(array["dtype"]).newbyteorder("<")).reshape(array["shape"])
        assert np.array_equal(values, np.load(folder / f"{name}.npy"))
    logits, labels = np.load(folder / "output.npy"), sorted(STRANGE)
    for image, row in zip(expected["images"], logits, strict=True):
        assert (image["top1"], image["label"]) == (row.argmax(), labels[row.argmax()])


def test_pictures_become_pixels_become_inputs(whole: Built, expected: dict[str, Any]) -> None:
    folder = whole.bundle.folder / "test_vectors"
    spec = spec_of(whole.manifest)
    pixels, inputs = np.load(folder / "pixels.npy"), np.load(folder / "input.npy")
    for number, image in enumerate(expected["images"]):
        with Image.open(folder / image["picture"]) as picture:
            assert np.array_equal(np.asarray(transform(picture, spec)), pixels[number])
            assert picture.info == {}
    assert np.array_equal(normalise(pixels.transpose(0, 3, 1, 2), spec), inputs)


def spec_of(manifest: dict[str, Any]) -> InputSpec:
    made = {
        key: tuple(value) if isinstance(value, list) else value for key, value in manifest["model"]["input"].items()
    }
    return InputSpec(**made)


def test_every_file_is_within_its_tolerance(whole: Built, expected: dict[str, Any]) -> None:
    import onnxruntime

    folder = whole.bundle.folder
    assert set(expected["files"]) == set(FILES.values())
    arrays = {name: np.load(folder / "test_vectors" / f"{name}.npy") for name in expected["arrays"]}
    for name, ends in expected["files"].items():
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [ends["input"]["name"]]
        given = arrays[ends["input"]["array"]]
        found = np.concatenate(
            [session.run([ends["output"]["name"]], {ends["input"]["name"]: x[None]})[0] for x in given]
        )
        wanted = softmax(arrays["output"]) if ends["output"]["expects"] == "softmax(output)" else arrays["output"]
        assert 0 <= np.abs(found - wanted).max() <= ends["tolerance"], name
        assert ends["tolerance"] < 0.6 * np.ptp(wanted), f"{name}: a tolerance that excludes nothing"


def test_verify_answers_for_every_file_and_tells_one_that_was_exchanged(whole: Built, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.bundle.folder, tmp_path / "bundle")
    found = {check.name: check for check in verify(folder)}
    assert {name for name in found if name.startswith("onnx")} == {
        "onnx",
        *(f"onnx:{kind}" for kind in FILES if kind != "fp32"),
    }
    assert {check.outcome for name, check in found.items() if name.startswith("onnx")} == {"passed"}
    (folder / "model.ort").write_bytes(bytes(8) + (folder / "model.ort").read_bytes()[8:])
    reseal(folder)
    assert {check.name: check for check in verify(folder)}["onnx:ort"].detail.startswith(
        "model.ort is not in ORT format"
    )


# --- files of other forms


def test_preprocessing_inside_is_of_standard_operators_alone(whole: Built) -> None:
    model = onnx.load(whole.bundle.folder / "model.image.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""} and [e.domain for e in model.opset_import] == [""]
    assert model.ir_version <= 10
    (image,), (output,) = model.graph.input, model.graph.output
    assert (image.name, output.name) == ("image", "probabilities")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_value for dim in image.type.tensor_type.shape.dim] == [1, 8, 8, 3]
    inside = json.loads({e.key: e.value for e in model.metadata_props}["cswap.preprocess"])
    assert (inside["dtype"], inside["layout"], inside["shape"]) == ("uint8", "NHWC", [8, 8, 3])


def test_ort_format_comes_with_the_operators_it_needs(whole: Built) -> None:
    text = (whole.bundle.folder / "model.required_operators.config").read_text()
    assert "Conv" in text and "/" not in text
    assert whole.manifest["onnx"]["variants"]["ort"]["beside"] == ["model.required_operators.config"]


@pytest.mark.skipif(not VNNI, reason=NO_VNNI)
def test_the_onnx_block_says_where_each_file_runs_and_what_speaks_against_it(whole: Built) -> None:
    variants = whole.manifest["onnx"]["variants"]
    runs = {name: [item["runs"] for item in found["runs_on"]] for name, found in variants.items()}
    assert runs["int8"] == [True, False] and runs["int8-tensorrt"] == [True, True] and runs["ort"] == [True, False]
    assert "around zero" in variants["int8"]["runs_on"][1]["why_not"]
    providers = {item["provider"]: item for item in whole.manifest["onnx"]["coverage"]}
    assert set(providers) == {"NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram", "XNNPACK"}
    assert providers["CoreML MLProgram"]["supported"] == providers["CoreML MLProgram"]["nodes"] > 3
    for name in ("int8", "int8-arm", "int8-tensorrt"):
        assert variants[name]["quantised"]["met"] and variants[name]["quantised"]["images"] == 12
        assert variants[name]["accuracy"]["gate"] == "pass" and variants[name]["marks"] == []


# --- nothing about this machine


def test_no_file_tells_about_this_machine(whole: Built) -> None:
    assert traces(whole) == {}
    plan = json.loads((whole.bundle.folder / "plan.json").read_text("utf-8"))
    assert whole.manifest["model"]["kwargs"] == plan["source"]["kwargs"] == {"cache": "cache"}


def test_what_tells_about_this_machine_is_found(whole: Built, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.bundle.folder, tmp_path / "bundle")
    (folder / "labels.txt").write_text(f"a\n{whole.work}/stages\n")
    assert traces(replace(whole, bundle=replace(whole.bundle, folder=folder))).keys() == {"labels.txt"}


# --- made again


def assembled(built: Built, work: Path, epoch: str | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The bundle that is assembled anew from the same cached results."""
    if epoch is None:
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    else:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with progress.reporting(recording := progress.Recording()):
        made = build(built.recipe, built.overrides, work, ["bundle"])
    assert recording.of("finished") == ["bundle"]
    return tree(made.bundle.folder)


def test_the_same_results_give_the_same_bytes(whole: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = shutil.copytree(whole.work, tmp_path / "work")
    first = tree(whole.bundle.folder)
    assert assembled(whole, work, None, monkeypatch) == first
    dated = assembled(whole, work, "1700000000", monkeypatch)
    assert json.loads(dated["manifest.json"])["created"] == "2023-11-14T22:13:20+00:00"
    assert json.loads(dated["bom.cdx.json"])["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    assert dated == assembled(whole, work, "1700000000", monkeypatch) != first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="expected whole seconds"):
        build(whole.recipe, whole.overrides, work)


# --- the bill of materials and the card


@pytest.fixture(scope="module")
def strict() -> Any:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed")
    from cyclonedx.schema import SchemaVersion

    return validation.JsonStrictValidator(SchemaVersion.V1_6)


def test_the_bill_of_materials_is_valid_cyclonedx(whole: Built, quickstart: Built, strict: Any) -> None:
    for built in (whole, quickstart):
        text = (built.bundle.folder / "bom.cdx.json").read_text("utf-8")
        assert strict.validate_str(text) is None
        found = json.loads(text)
        listed = {item["path"]: item["sha256"] for item in built.manifest["files"]}
        for component in found["components"]:
            if component["bom-ref"].startswith("file/"):
                assert component["hashes"] == [{"alg": "SHA-256", "content": listed[component["name"]]}]
        assert {name for name in listed if name.endswith((".onnx", ".ort"))} <= {c["name"] for c in found["components"]}
        assert found["metadata"]["component"]["type"] == "machine-learning-model"


def test_the_bill_names_every_library_that_wrote_the_files(quickstart: Built) -> None:
    bill = json.loads((quickstart.bundle.folder / "bom.cdx.json").read_text("utf-8"))
    listed = {each["name"]: each["version"] for each in bill["components"] if each["type"] == "library"}
    assert listed == {name: metadata.version(name) for name in bom.LIBRARIES} and "onnx-ir" in listed
    assert set(bom.LIBRARIES) == set(assembling.ENVIRONMENT) and "onnx-ir" in export.LIBRARIES


def test_the_validator_sees_a_broken_bill(quickstart: Built, strict: Any) -> None:
    broken = bom.bill(quickstart.manifest)
    broken["metadata"]["component"]["modelCard"]["modelParameters"]["approach"]["type"] = "magic"
    assert strict.validate_str(json.dumps(broken)) is not None


def test_the_model_card_is_one_to_hugging_face(whole: Built, quickstart: Built) -> None:
    from huggingface_hub import ModelCard

    for built in (whole, quickstart):
        card = ModelCard((built.bundle.folder / "MODEL_CARD.md").read_text("utf-8"))
        assert card.data.license == "unknown" and card.data.pipeline_tag == "image-classification"
        (result,) = card.data.eval_results
        assert result.metric_value == pytest.approx(built.manifest["accuracy"]["shipped"]["top1"], rel=1e-5)
        headings = re.findall(r"(?m)^##+ (.*)$", card.text)
        wanted = "Model Details, Uses, Direct Use, Out-of-Scope Use, Bias, Risks, and Limitations, Evaluation, Training Details, Results"
        assert set(wanted.replace("Bias, Risks, and", "Bias; Risks; and").split(", ")) <= {
            name.replace("Bias, Risks, and", "Bias; Risks; and") for name in headings
        }


@pytest.mark.parametrize(
    ("given", "license", "name"), [("Apache-2.0", "apache-2.0", None), ("my: own\n- one", "other", "my: own\n- one")]
)
def test_a_licence_goes_into_the_card_and_the_bill(
    whole: Built, strict: Any, given: str, license: str, name: str | None
) -> None:
    manifest = json.loads(json.dumps(whole.manifest))
    manifest["model"]["license"] = given
    front = YAML(typ="safe").load(render_card(manifest).split("---\n")[1])
    assert (front["license"], front.get("license_name")) == (license, name)
    bill = bom.bill(manifest)
    assert bill["metadata"]["component"]["licenses"] == [{"license": {"name": given}}]
    assert strict.validate_str(json.dumps(bill)) is None


# --- the code of the README


def blocks(text: str) -> dict[str, str]:
    return dict(re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL))


def test_python_code_runs_from_the_picture_on(whole: Built, expected: dict[str, Any]) -> None:
    folder = whole.bundle.folder
    code = blocks((folder / "README.md").read_text("utf-8"))["python"]
    done = run("-W", "error", "-c", code, cwd=folder, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [image["label"] for image in expected["images"]]


SPECS = [
    InputSpec((3, 24, 24), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.875),
    InputSpec((3, 24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9),
    InputSpec((1, 20, 20), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "lanczos", 1.0),
    InputSpec((3, 16, 24), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 1.0, "squash"),
    InputSpec((3, 20, 20), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "nearest", 0.8),
    InputSpec((3, 24, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9, "border"),
    InputSpec((1, 20, 20), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0, "border"),
]
SIZES = [(40, 60), (61, 33), (24, 24), (15, 90), (20, 21)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = []
    for number, size in enumerate(SIZES):
        small = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(small) + random.normal(0, 40, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        found.append(folder / f"image_{number}.png")
        Image.fromarray(noisy).save(found[-1])
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.interpolation}-{spec.crop_mode}")
def test_python_code_prepares_as_the_images_were(
    whole: Built, pictures: list[Path], spec: InputSpec, tmp_path: Path
) -> None:
    manifest = json.loads(json.dumps(whole.manifest))
    manifest["model"]["input"] = {
        **vars(spec),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "shape": list(spec.shape),
    }
    code = blocks(render_readme(manifest))["python"].split("\n\n\nlabels =")[0]
    (tmp_path / "readme.py").write_text(code, "utf-8")
    space = runpy.run_path(str(tmp_path / "readme.py"))
    for path in pictures:
        wanted = normalise(cropped(path, spec)[None], spec)
        np.testing.assert_allclose(space["prepare"](path), wanted, atol=1e-6)


def cropped(path: Path, spec: InputSpec) -> np.ndarray:
    values = np.asarray(transform(Image.open(path).convert("RGB" if spec.shape[0] == 3 else "L"), spec))
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


CHECK = """
import { readFileSync, writeFileSync } from "node:fs";
const { crop, fromCanvas, normalise } = await import(process.argv[2]);
const out = JSON.parse(readFileSync(process.argv[3], "utf8")).map(({ spec, raw, width, height }) => {
  const image = crop(fromCanvas(new Uint8ClampedArray(readFileSync(raw)), width, height, spec.color), spec);
  return { pixels: Array.from(image.data), input: Array.from(normalise(image, spec).data) };
});
writeFileSync(process.argv[4], JSON.stringify(out));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed: apt-get install nodejs")
def test_javascript_resizes_as_pillow(whole: Built, pictures: list[Path], tmp_path: Path) -> None:
    module = tmp_path / "preprocess.mjs"
    shutil.copyfile(whole.bundle.folder / "web" / "preprocess.js", module)
    (tmp_path / "check.mjs").write_text(CHECK)
    jobs, wanted = [], []
    for spec in SPECS:
        for path in pictures:
            picture = Image.open(path)
            raw = tmp_path / f"{path.stem}.rgba"
            raw.write_bytes(picture.convert("RGBA").tobytes())
            jobs.append({"spec": preprocess(spec), "raw": str(raw), "width": picture.width, "height": picture.height})
            pixels = cropped(path, spec)
            wanted.append((pixels.transpose(1, 2, 0).ravel(), normalise(pixels[None], spec).ravel()))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [
        "node",
        str(tmp_path / "check.mjs"),
        str(module),
        str(tmp_path / "jobs.json"),
        str(tmp_path / "out.json"),
    ]
    subprocess.run(command, check=True, timeout=60)
    for found, (pixels, inputs), job in zip(json.loads((tmp_path / "out.json").read_text()), wanted, jobs, strict=True):
        rule, apart = job["spec"]["resize"], np.abs(np.array(found["pixels"]) - pixels.astype(int))
        if rule["interpolation"] == "nearest":
            assert not apart.any(), rule
        assert apart.max() <= 6 and apart.mean() < 0.3, rule  # Pillow may take the vertical pass first
        spread = 6 / 255 / min(job["spec"]["std"])
        np.testing.assert_allclose(found["input"], inputs, atol=spread)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.interpolation}-{spec.crop_mode}")
def test_preprocess_json_has_the_sizes_of_the_resize(spec: InputSpec) -> None:
    rule = preprocess(spec)["resize"]
    for size in SIZES:
        wide, high = resized(size, spec)
        if rule["rule"] == "longest":
            assert abs(max(wide / rule["to"][1], high / rule["to"][0]) - 1) < 0.02
            assert rule["fill"] == [round(255 * value) for value in spec.mean]
        elif rule["rule"] == "exact" or rule["to"][0] != rule["to"][1]:
            assert (high >= rule["to"][0] or wide >= rule["to"][1]) and rule["crop"] == list(spec.shape[1:])
        else:
            assert min(wide, high) == rule["to"][0]

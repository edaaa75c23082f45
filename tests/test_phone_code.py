"""The README's code for phones. Kotlin is compiled and run on the JVM: what it feeds the model is what PyTorch was fed.

`tests/android/` stands in for Android and for ONNX Runtime's Java API: the signatures that the code needs, as both publish
them, with no network behind. So names, types and preprocessing are proven, not the runtime on a phone. Swift is parsed only.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Built
from PIL import Image

from cswap_deploy.artifacts import InputSpec
from cswap_deploy.images import normalise
from cswap_deploy.report import render_readme

LIBRARIES = ROOT / "benchmarks" / "node_modules" / "kotlin-compiler" / "lib"
STAND_INS = Path(__file__).parent / "android"
RUN = """
import ai.onnxruntime.OrtSession
import android.content.Context
import android.content.res.AssetManager
import android.graphics.Bitmap
import java.io.File

fun main(arguments: Array<String>) {
    val folder = File(arguments[0])
    val context = object : Context() { override fun getAssets() = AssetManager(folder.path) }
    fun numbers(name: String) = File(folder, name).readLines().map { it.toInt() }.toIntArray()
    OrtSession.logits = numbers("logits").map { it.toFloat() }.toFloatArray()
    for ((name, classify) in mapOf("RGB" to rgb.Classifier(context)::classify, "L" to gray.Classifier(context)::classify)) {
        println(classify(Bitmap(numbers("pixels-$name"), WIDTH)))
        println(OrtSession.input.shape.joinToString())
        File(folder, "input-$name").writeText(OrtSession.input.values.joinToString("\\n"))
    }
    println(OrtSession.model.decodeToString())
}
"""
SPECS = {
    "RGB": InputSpec((3, 5, 7), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 1.0),
    "L": InputSpec((1, 5, 7), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0),
}


def missing() -> str:
    if not LIBRARIES.is_dir():
        return "the Kotlin compiler is not installed: npm ci --prefix benchmarks --ignore-scripts"
    return "" if shutil.which("javac") else "a Java compiler is not installed: apt-get install default-jdk-headless"


def code_for(built: Built, spec: InputSpec, language: str) -> str:
    manifest = json.loads(json.dumps(built.manifest))
    manifest["model"]["input"] = json.loads(json.dumps(vars(spec)))
    found = re.search(rf"```{language}\n(.*?)```", render_readme(manifest), re.DOTALL)
    assert found
    return found[1]


def java(*arguments: str | Path, program: str = "java") -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")
def test_kotlin_code_compiles_and_prepares_as_the_images_were(quickstart: Built, tmp_path: Path) -> None:
    classes, sources = tmp_path / "classes", tmp_path / "sources"
    java("-d", classes, *STAND_INS.rglob("*.java"), program="javac")
    sources.mkdir()
    (sources / "Rgb.kt").write_text(f"package rgb\n\n{code_for(quickstart, SPECS['RGB'], 'kotlin')}")
    (sources / "Gray.kt").write_text(f"package gray\n\n{code_for(quickstart, SPECS['L'], 'kotlin')}")
    (sources / "Main.kt").write_text(RUN.replace("WIDTH", "7"))
    path = f"{classes}:{LIBRARIES / 'kotlin-stdlib.jar'}"
    compiler = ["-cp", LIBRARIES / "kotlin-compiler.jar", "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    java(*compiler, "-no-stdlib", "-no-reflect", "-Werror", "-cp", path, "-d", classes, sources)

    labels = ["海, 空", "a, b", "Ж", "last"]
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    (tmp_path / "model.onnx").write_text("the model")
    (tmp_path / "logits").write_text("-3\n0\n2\n-1")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    packed = (0xFF << 24 | pixels.astype(int) @ [1 << 16, 1 << 8, 1]).astype(np.uint32).view(np.int32)
    for name in SPECS:
        (tmp_path / f"pixels-{name}").write_text("\n".join(map(str, packed.ravel())))
    said = java("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", path, "MainKt", tmp_path)
    assert said.splitlines() == ["Ж", "1, 3, 5, 7", "Ж", "1, 1, 5, 7", "the model"]
    for name, spec in SPECS.items():
        seen = np.asarray(Image.fromarray(pixels).convert(name)).reshape(5, 7, spec.shape[0]).transpose(2, 0, 1)
        found = np.array((tmp_path / f"input-{name}").read_text().split(), np.float32)
        np.testing.assert_allclose(found.reshape(1, *spec.shape), normalise(seen[None], spec), atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_swift_code_has_no_fault_of_syntax(quickstart: Built, spec: InputSpec) -> None:
    tree_sitter = pytest.importorskip("tree_sitter", reason="tree-sitter is not installed")
    swift = pytest.importorskip("tree_sitter_swift", reason="tree-sitter-swift is not installed")
    parser = tree_sitter.Parser(tree_sitter.Language(swift.language()))
    code = code_for(quickstart, spec, "swift")
    assert not parser.parse(code.encode()).root_node.has_error
    for sound, broken in (("throws {", "throws"), ("[Float] =", "[Float"), ("0..<plane", "0..<")):
        assert parser.parse(code.replace(sound, broken, 1).encode()).root_node.has_error

"""The README's Kotlin, compiled and run on the JVM: what it feeds the model is what PyTorch was fed.

`tests/android/` stands in for Android and for ONNX Runtime's Java API: the signatures that the code needs, as both publish
them, with no network behind. So names, types and preprocessing are proven, not the runtime on a phone.
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


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")


def code_for(built: Built, spec: InputSpec, package: str) -> str:
    manifest = json.loads(json.dumps(built.manifest))
    manifest["model"]["input"] = json.loads(json.dumps(vars(spec)))
    found = re.search(r"```kotlin\n(.*?)```", render_readme(manifest), re.DOTALL)
    assert found
    return f"package {package}\n\n{found[1]}"


def java(*arguments: str | Path, program: str = "java") -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kotlin_code_compiles_and_prepares_as_the_images_were(quickstart: Built, tmp_path: Path) -> None:
    classes, sources = tmp_path / "classes", tmp_path / "sources"
    java("-Xlint:all,-serial", "-Werror", "-d", classes, *STAND_INS.rglob("*.java"), program="javac")
    sources.mkdir()
    (sources / "Rgb.kt").write_text(code_for(quickstart, SPECS["RGB"], "rgb"))
    (sources / "Gray.kt").write_text(code_for(quickstart, SPECS["L"], "gray"))
    (sources / "Main.kt").write_text(RUN.replace("WIDTH", "7"))
    compiler = ["-cp", LIBRARIES / "kotlin-compiler.jar", "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    java(
        *compiler,
        "-no-stdlib",
        "-no-reflect",
        "-Werror",
        "-cp",
        f"{classes}:{LIBRARIES / 'kotlin-stdlib.jar'}",
        "-d",
        classes,
        sources,
    )

    labels = ["海, 空", "a, b", "Ж", "last"]
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    (tmp_path / "model.onnx").write_text("the model")
    (tmp_path / "logits").write_text("-3\n0\n2\n-1")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    packed = (0xFF << 24 | pixels.astype(int) @ [1 << 16, 1 << 8, 1]).astype(np.uint32).view(np.int32)
    for name in SPECS:
        (tmp_path / f"pixels-{name}").write_text("\n".join(map(str, packed.ravel())))
    said = java("-Dfile.encoding=UTF-8", "-cp", f"{classes}:{LIBRARIES / 'kotlin-stdlib.jar'}", "MainKt", tmp_path)
    assert said.splitlines() == ["Ж", "1, 3, 5, 7", "Ж", "1, 1, 5, 7", "the model"]
    for name, spec in SPECS.items():
        seen = np.asarray(Image.fromarray(pixels).convert(name)).reshape(5, 7, spec.shape[0]).transpose(2, 0, 1)
        found = np.array((tmp_path / f"input-{name}").read_text().split(), np.float32)
        np.testing.assert_allclose(found.reshape(1, *spec.shape), normalise(seen[None], spec), atol=1e-6)

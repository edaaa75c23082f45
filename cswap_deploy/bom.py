"""The bundle as a bill of materials: CycloneDX 1.6 with a model card, written by hand since its library has no such class."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

Facts = dict[str, Any]
SPEC = "1.6"
LIBRARIES = ("torch", "timm", "onnx", "onnxruntime", "onnxsim", "onnxscript", "onnx-ir", "numpy")
"""Of the manifest's `environment`: what made the files."""


def bill(manifest: Facts) -> Facts:
    """CycloneDX JSON of a bundle's manifest, whose `files` are listed already. Equal manifests give equal bills."""
    by_name = {file["path"]: file for file in manifest["files"]}
    shipped = by_name.get(manifest["shipped"], by_name["model.onnx"])
    identity = f"{shipped['sha256']}/{manifest['recipe_sha256']}/{manifest['created']}"
    others = [*_files(manifest, by_name), *_libraries(manifest)]
    root = f"model/{manifest['name']}"
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, identity)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest["created"],
            "tools": {
                "components": [{"type": "application", "name": "cswap-deploy", "version": manifest["tool"]["version"]}]
            },
            "component": _model(manifest, shipped, root),
        },
        "components": others,
        "dependencies": [{"ref": root, "dependsOn": sorted(each["bom-ref"] for each in others)}],
    }


def _model(m: Facts, shipped: Facts, root: str) -> Facts:
    pruned = "structurally pruned without fine-tuning" if m["pruned"]["units_removed"] else "not pruned"
    component: Facts = {
        "type": "machine-learning-model",
        "bom-ref": root,
        "name": m["name"],
        "version": shipped["sha256"][:16],
        "description": f"{m['model']['name']}, {pruned}; what ships is {m['shipped']}",
        "hashes": _hashes(shipped),
        "pedigree": {
            "ancestors": [{"type": "machine-learning-model", "name": m["model"]["name"], **_licenses(m)}],
            "notes": f"{m['pruned']['units_removed']} of {m['pruned']['units']} units removed",
        },
        "modelCard": _card(m),
    }
    return component | _licenses(m)


def _licenses(m: Facts) -> Facts:
    """Of the weights that it was made from; nothing where they are not known."""
    return {"licenses": [{"license": {"name": str(m["model"]["license"])}}]} if m["model"].get("license") else {}


def _card(m: Facts) -> Facts:
    a, spec = m["accuracy"], m["model"]["input"]
    shape = " x ".join(map(str, (1, *spec["shape"])))
    low, high = a["shipped"]["top1_ci95"]
    metrics = [
        _metric("top-1 accuracy", a["shipped"]["top1"], low, high),
        _metric("top-1 drop from the dense network, points", a["drop_pp"], *a["drop_ci95_pp"]),
    ]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image classification",
            "modelArchitecture": m["model"]["name"],
            "inputs": [{"format": f"float32 tensor {shape} (preprocess.json)"}],
            "outputs": [{"format": "float32 logits, one for each line of labels.txt"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {
            "useCases": ["images like those of the hold-out split, into the classes of labels.txt"],
            "technicalLimitations": [
                f"judged on {a['images']} hold-out images; nothing is known about images of another kind",
                "latency holds for the device and the conditions that manifest.json gives",
            ],
        },
    }


def _metric(name: str, value: float, low: float, high: float) -> Facts:
    return {
        "type": name,
        "value": f"{value:.6g}",
        "confidenceInterval": {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"},
    }


def _files(m: Facts, by_name: dict[str, Facts]) -> Iterator[Facts]:
    """Every file but those that are made from this bill."""
    models = {"model.onnx", *(variant["file"] for variant in m["onnx"]["variants"].values()), "weights.safetensors"}
    for name, file in by_name.items():
        kind = "machine-learning-model" if name in models else "data" if name.startswith("test_vectors/") else "file"
        yield {"type": kind, "bom-ref": f"file/{name}", "name": name, "hashes": _hashes(file)}


def _libraries(m: Facts) -> Iterator[Facts]:
    """What made it."""
    for name in LIBRARIES:
        if version := m["environment"].get(name.replace("-", "_")):
            yield {
                "type": "library",
                "bom-ref": f"pypi/{name}",
                "name": name,
                "version": version,
                "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
                "scope": "excluded",
            }


def _hashes(file: Facts) -> list[Facts]:
    return [{"alg": "SHA-256", "content": file["sha256"]}]

"""Writes recipe.md and recipe.schema.json: `python docs/generate_recipe.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cswap_deploy import recipe
from cswap_deploy.schema_words import expected, flow

PAGE = Path(__file__).with_name("recipe.md")
SCHEMA = Path(__file__).with_name("recipe.schema.json")

INTRO = """\
# The recipe

<!-- Written by docs/generate_recipe.py from the schema; change the descriptions in cswap_deploy/recipe.py instead. -->

A recipe is a YAML file with everything that a run depends on, except the machine it runs on. Three keys are required:

```yaml
name: resnet18-small
model: {name: resnet18}
calibration: {images: path/to/images}
```

That prunes timm's pretrained ResNet-18 to 70 % of its multiply-accumulates and refuses to ship more than one
percentage point of accuracy lost.

A recipe that asks for more:

```yaml
name: resnet18-orin
seed: 7
device: cuda

model:
  factory: nets.py:dashcam        # a callable of yours in a file beside the recipe
  kwargs: {width: 64}
  checkpoint: weights/dashcam.safetensors
  num_classes: 12
  input: {size: [192, 320], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], interpolation: bilinear, crop_pct: 1.0}

calibration:
  images: data/dashcam            # class folders, or scoring/ and holdout/ with class folders
  labels: data/labels.txt
  scoring: 2048
  holdout: 5000

prune:
  target: {params: 0.5}           # or {latency_ms: 4.5, percentile: 90}: docs/latency-budget.md
  criterion: {kind: causal, estimator: screened, intervention: surgery, images: 512}
  compensate: least_squares       # short for {kind: least_squares}
  steps: 12
  skip: ["head.*"]

accuracy: {max_drop: 0.5, rule: bound, confidence: 0.95}
variants: [int8]
onnx: {dynamic_batch: true}       # leaves the batch open: more than one image at a time
engine: {precision: fp16, batch: {min: 1, opt: 1, max: 4}}
latency: {target: "ssh://jetson@orin.local:2222", duration_s: 10}
```

**Paths** are relative to the recipe's folder; `~` is your home folder.

**`--set key.path=value`** overrides one key for one run. The value is YAML, a path in it is relative to the folder you
stand in, and a block is replaced whole: `--set 'prune.target={macs: 0.5}'`.

**`--on TARGET`** is `--set latency.target=TARGET`: it adds the measurement to a recipe that has none.

**Faults** are listed all at once, each with file, line, key, value and what was expected; the exit code is 2.

**Editors** complete and check a recipe with its schema. `cswap-deploy init` puts one beside the recipe that it writes, so that it works
offline and travels with the recipe; for another recipe save what `cswap-deploy schema` prints as `recipe.schema.json` and begin
the recipe with `# yaml-language-server: $schema=recipe.schema.json`.

A recipe is trusted like code: a factory is imported and called.

## Combinations that are refused

- `model.name` and `model.factory` together, or neither
- `model.pretrained: true` with a factory or with a checkpoint
- `pretrained`, `num_classes` or `checkpoint_path` in `model.kwargs` of a timm model: they have keys of their own
- `engine.dla_core` with `precision: fp32`
- `ship: fp16` or `ship: int8` where `engine.precision` says otherwise
- a `latency_ms` or `fps` target without a `latency` block, or with `prune.allocation: global`
- `latency.runtime: tensorrt` without an `engine` block, where an ONNX file ships, or with a `latency.batch` outside `engine.batch`
- `latency.runtime: onnxruntime` where the engine ships
- `latency.batch` or `engine.batch.max` above 1 without `onnx.dynamic_batch: true`
- `engine.batch` that is not min <= opt <= max
- `engine.dla_fallback: true` without `engine.dla_core`
- `prune.heads: dims` with `prune.allocation: global`
- a runtime in `onnx.runtimes` that cannot read `onnx.opset`
"""


def schema_text() -> str:
    """The schema as an editor reads it."""
    return json.dumps(recipe.schema(), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """The reference as Markdown."""
    schema = recipe.schema()
    return "\n".join([INTRO, *_block(schema, schema, "")])


def _block(schema: Mapping[str, Any], node: Mapping[str, Any], key: str) -> Iterator[str]:
    yield f"## {f'`{key}`' if key else 'Top level'}\n"
    if key:
        yield f"{node['description']}\n"
    yield from _table(schema, node)
    for name, child in node["properties"].items():
        inner = f"{key}.{name}".lstrip(".")
        for block in _blocks(schema, child):
            if "oneOf" in child or "enum" in child.get("anyOf", [{}])[0] or _is_target(child):
                yield from _choice(schema, block, inner)
            else:
                yield from _block(schema, block, inner)


def _choice(schema: Mapping[str, Any], node: Mapping[str, Any], key: str) -> Iterator[str]:
    first = node["required"][0]
    kind = node["properties"][first].get("const")
    yield f"### `{key}: {{{first}: {kind or '...'}}}`\n"
    yield f"{node['description']}\n"
    yield from _table(schema, node, skip="kind")


def _table(schema: Mapping[str, Any], node: Mapping[str, Any], skip: str = "") -> Iterator[str]:
    rows = {name: child for name, child in node["properties"].items() if name != skip}
    if not rows:
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, child in rows.items():
        cells = [f"`{name}`", _type(schema, child), _default(name, child, node), child["description"]]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _type(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    if "errorMessage" in node:
        return str(node["errorMessage"]).removeprefix("expected ")
    if any(_blocks(schema, node)):
        return "a block or null" if "anyOf" in node else "a block"
    return expected(schema, node)


def _default(name: str, node: Mapping[str, Any], outer: Mapping[str, Any]) -> str:
    if name in outer.get("required", ()):
        return "required"
    if "default" in node:
        return f"`{flow(node['default'])}`"
    return "its own defaults" if "$ref" in node else "see meaning"


def _blocks(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The blocks that a key takes, unions opened."""
    for branch in node.get("anyOf", node.get("oneOf", [node])):
        if "$ref" in branch:
            block = schema["$defs"][branch["$ref"].rpartition("/")[2]]
            if "properties" in block:
                yield block
        elif branch is not node:
            yield from _blocks(schema, branch)


def _is_target(node: Mapping[str, Any]) -> bool:
    return any("oneOf" in branch for branch in node.get("anyOf", ()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")

"""Any timm classifier through the pruner: group, prove, prune, train a step, store and load, export; and torch-pruning beside it.

    python benchmarks/zoo.py --models all            # appends to zoo.json as models finish; one that is in it is not run again
    python benchmarks/zoo.py --models all --peer     # torch-pruning alone, into the same lines
    python benchmarks/zoo.py --models all --table    # the Markdown table of what is in zoo.json

Weights are random, statistics of BatchNorm and what starts as a constant too. Each model runs in a process of its own, each step
within a time limit. The same fraction of every group's units leaves, drawn at random, so that 70 % of the multiply-accumulates stay
or the nearest that can be reached. Nothing is judged but that the networks are what they are said to be.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zoo_models import MODELS
from zoo_table import fault, table

from cswap_deploy.digests import digest_of

HERE = Path(__file__).parent
TARGET = 0.7
LIMITS = {
    "built": 240,
    "grouped": 600,
    "proof": 400,
    "pruned": 120,
    "trained": 180,
    "stored": 120,
    "exported": 180,
    "onnx": 300,
}
"""Seconds for each step."""
PEER_SECONDS = 75
FORKED = multiprocessing.get_context("fork")
PRUNE = HERE.parent / "cswap_deploy" / "prune"
CODE = digest_of([path.read_text() for path in sorted(PRUNE.rglob("*.py"))])[:12]
"""Of what finds, proves and cuts: stands in each line of the file."""
Facts = dict[str, Any]


# --- one model, in a process of its own


class Case:
    """A model on its way through the steps; each returns what it found, and raises where it fails."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def built(self) -> Facts:
        import torch

        from cswap_deploy import model, recipe
        from cswap_deploy.artifacts import File
        from cswap_deploy.checkpoint import save_state
        from cswap_deploy.prune.cut import restore

        settings = recipe.ModelSettings(name=self.name, pretrained=False)
        network = model.load(self.folder, settings, seed=0)
        module = restore(network)
        generator = torch.Generator().manual_seed(0)
        for layer in module.modules():
            if getattr(layer, "running_var", None) is not None:
                layer.running_mean.copy_(torch.rand(layer.running_mean.shape, generator=generator) * 0.4 - 0.2)
                layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
        for tensor in module.parameters():
            if float(tensor.abs().max()) < 1e-3 or float(tensor.max() - tensor.min()) == 0.0:
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
                tensor.copy_((torch.rand(tensor.shape, generator=generator) - 0.3) * fan_in**-0.5)
        path = self.folder / "weights.safetensors"
        save_state(module, path)
        self.network, self.module = replace(network, weights=File.of(path)), module
        return {"params": network.params, "macs": network.macs, "input": list(network.input.shape)}

    def grouped(self) -> Facts:
        from cswap_deploy.prune.groups import find

        start, begun = time.perf_counter(), time.process_time()
        self.groups = find(self.module, self.network.input)
        seconds, cpu = time.perf_counter() - start, time.process_time() - begun
        dense = self.groups.cost({})
        least = self.groups.cost({group.name: (0,) for group in self.groups.groups})
        reasons = Counter(_kind(item.reason) for item in self.groups.refused)
        assert (round(dense[0]), round(dense[1])) == (self.network.params, self.network.macs), (
            "the dense cost is another"
        )
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "groups": len(self.groups.groups),
            "heads": sum(group.kind == "heads" for group in self.groups.groups),
            "units": sum(group.units for group in self.groups.groups),
            "prunable": [round(1 - low / high, 4) for low, high in zip(least, dense)],
            "refused": [[item.name, item.reason] for item in self.groups.refused],
            "why": reasons.most_common(3),
        }

    def proof(self) -> Facts:
        """Once more, from outside: other images, other units, the network's own weights."""
        import torch

        generator = torch.Generator().manual_seed(7)
        keep = {}
        for group in self.groups.groups:
            width = 1 + int(torch.randint(group.units, (1,), generator=generator))
            keep[group.name] = tuple(sorted(torch.randperm(group.units, generator=generator)[:width].tolist()))
        images = torch.randn(2, *self.network.input.shape, generator=generator)
        try:
            cut, masked = self._both(keep, images.double())
        except RuntimeError:  # a forward that insists on float32
            cut, masked = self._both(keep, images)
        limit = 1e-9 if cut.dtype == torch.float64 else 1e-3
        difference = float((cut - masked).abs().max() / masked.abs().max().clamp_min(1e-30))
        assert difference <= limit, f"cut and masked differ by {difference:.1e}"
        return {"difference": difference, "precision": str(cut.dtype).removeprefix("torch.")}

    def _both(self, keep: dict[str, tuple[int, ...]], images: Any) -> tuple[Any, Any]:
        """Logits of the cut and of the masked network, in the images' precision."""
        import torch

        from cswap_deploy.prune.cut import cut_copy, masked_copy

        own = copy.deepcopy(self.module).to(images.dtype)
        with torch.no_grad():
            return tuple(make(own, self.groups.groups, keep)(images) for make in (cut_copy, masked_copy))

    def pruned(self) -> Facts:
        from cswap_deploy.model import count
        from cswap_deploy.prune.cut import cut_copy

        self.keep = self._plan()
        self.smaller = cut_copy(self.module, self.groups.groups, self.keep)
        params, macs = count(self.smaller, self.network.input)
        said = self.groups.cost(self.keep)
        assert (round(said[0]), round(said[1])) == (params, macs), f"{said} was said, {(params, macs)} counted"
        return {"params": params / self.network.params, "macs": macs / self.network.macs}

    def _plan(self) -> dict[str, tuple[int, ...]]:
        """The widest network of the same fraction everywhere that meets the target, else the narrowest."""
        import torch

        generator = torch.Generator().manual_seed(11)
        order = {group.name: torch.randperm(group.units, generator=generator).tolist() for group in self.groups.groups}
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self._macs(self._kept(order, middle)) <= TARGET else (low, middle)
        return self._kept(order, low)

    def _macs(self, keep: dict[str, tuple[int, ...]]) -> float:
        return self.groups.cost(keep)[1] / self.network.macs

    def _kept(self, order: dict[str, list[int]], fraction: float) -> dict[str, tuple[int, ...]]:
        return {
            group.name: tuple(sorted(order[group.name][: max(1, round(fraction * group.units))]))
            for group in self.groups.groups
        }

    def trained(self) -> Facts:
        """One step of gradient descent on two images, in the mode of training."""
        import torch

        own = copy.deepcopy(self.smaller).requires_grad_(True).train()
        images = torch.randn(2, *self.network.input.shape, generator=torch.Generator().manual_seed(1))
        logits = own(images)
        logits = logits if isinstance(logits, torch.Tensor) else sum(logits) / len(logits)
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
        gradients = [parameter.grad for parameter in own.parameters() if parameter.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is not finite"
        torch.optim.SGD(own.parameters(), 1e-3).step()
        return {"with_gradient": len(gradients), "parameters": sum(1 for _ in own.parameters())}

    def stored(self) -> Facts:
        """plan.json and safetensors, and back."""
        import torch

        from cswap_deploy.artifacts import File, PruningPlan
        from cswap_deploy.checkpoint import save_state
        from cswap_deploy.prune.cut import restore, write_plan

        path = self.folder / "plan.json"
        plan = PruningPlan(self.keep, (), None)
        write_plan(path, self.module, self.smaller, self.network, self.groups.groups, plan)
        weights = self.folder / "pruned.safetensors"
        save_state(self.smaller, weights)
        self.small = replace(self.network, plan=File.of(path), weights=File.of(weights))
        images = torch.randn(2, *self.network.input.shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            again, logits = restore(self.small)(images), self.smaller(images)
        assert bool(logits.isfinite().all()), "logits are not finite"
        assert torch.equal(again, logits), "the network that was loaded computes something else"
        return {"plan_bytes": path.stat().st_size}

    def exported(self) -> Facts:
        import torch

        image = torch.randn(1, *self.network.input.shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            program = torch.export.export(self.smaller, (image,))
            difference = float((program.module()(image) - self.smaller(image)).abs().max())
        return {"difference": difference}

    def onnx(self) -> Facts:
        """The package's own stage, with its parity on real images."""
        from cswap_deploy import data, export
        from cswap_deploy.artifacts import ImageSet
        from cswap_deploy.recipe import OnnxSettings

        catalogue = data.catalogue(HERE.parent / "calibration" / "digits", None, 10)
        images = ImageSet(catalogue.holdout[:4], catalogue.folder)
        labels = tuple(str(number) for number in range(self.network.outputs))
        made = export.to_onnx(self.folder, self.small, labels, images, OnnxSettings())
        return {"nodes": made.nodes, "max_abs": made.parity.max_abs, "sqnr_db": made.parity.sqnr_db}


def _kind(reason: str) -> str:
    """A reason without the place in the network."""
    return reason.split(" in ")[0]


def run_one(name: str, say: Callable[[Facts], None]) -> None:
    """Say which step begins, and what it found."""
    with TemporaryDirectory() as folder:
        case = Case(name, Path(folder))
        for step in LIMITS:
            say({"begun": step})
            start = time.perf_counter()
            try:
                found = getattr(case, step)()
            except Exception as error:
                say({step: {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}})
                return
            say({step: {**found, "took": round(time.perf_counter() - start, 2)}})


def run_peer(name: str, say: Callable[[Facts], None]) -> None:
    """torch-pruning alone: 30 % of all channels, global magnitudes, multiples of 8, the classifier left whole."""
    import timm
    import torch
    import torch_pruning as tp

    say({"begun": "torch_pruning"})
    module = timm.create_model(name).eval()
    image = torch.randn(1, *module.pretrained_cfg["input_size"])
    head = module.get_classifier()
    heads = {
        layer.qkv: layer.num_heads
        for layer in module.modules()
        if hasattr(layer, "qkv") and hasattr(layer, "num_heads")
    }
    stage = "build graph"
    try:
        pruner = tp.pruner.BasePruner(
            module, image, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=0.3,
            round_to=8, ignored_layers=[*(head if isinstance(head, tuple) else (head,))], num_heads=heads,
        )  # fmt: skip
        stage = "prune"
        pruner.step()
        stage = "forward"
        with torch.no_grad():
            module(image)
    except Exception as error:
        say({"torch_pruning": {"failed": f"{stage}: {type(error).__name__}: {' '.join(str(error).split())}"[:160]}})
        return
    say({"torch_pruning": {"completed": True}})


# --- all of them


def main() -> None:
    options = _options()
    path: Path = options.json
    chosen = list(MODELS) if options.models == "all" else options.models.split(",")
    done: dict[str, Facts] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        done[row["model"]] = {**done.get(row["model"], {}), **row}
    if options.table:
        print(table([done[name] for name in chosen if name in done], len(chosen)))
        return
    _imported()
    for number, name in enumerate(chosen, 1):
        row: Facts = {"model": name, "file": MODELS.get(name, "")}
        if options.peer and (name not in done or "torch_pruning" not in done[name]):
            row |= _watched(run_peer, name, "torch_pruning")
        elif not options.peer and (name not in done or options.again or "built" not in done[name]):
            row |= _watched(run_one, name, "built") | {"code": CODE}
        else:
            continue
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{number}/{len(chosen)} {name}: {_summary(row)}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default="all", help="comma-separated timm names")
    parser.add_argument("--json", type=Path, default=HERE / "zoo.json", help="one JSON line for each model")
    parser.add_argument("--table", action="store_true", help="print the Markdown table and run nothing")
    parser.add_argument("--peer", action="store_true", help="torch-pruning alone instead of ours")
    parser.add_argument("--again", action="store_true", help="also models that are in the file")
    return parser.parse_args()


def _watched(run: Callable[[str, Callable[[Facts], None]], None], name: str, step: str) -> Facts:
    """What the steps of a model found, in a process of its own; a step that takes longer than its limit ends it."""
    found: Facts = {}
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_alone, args=(run, name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while ours.poll(LIMITS.get(step, PEER_SECONDS)):
            said = ours.recv()
            step = said.pop("begun", step)
            found |= said
        return found | {step: {"failed": f"no end within {LIMITS.get(step, PEER_SECONDS)} s"}}
    except EOFError:
        process.join()
        return found if step in found else found | {step: {"failed": f"the process ended with {process.exitcode}"}}
    finally:
        process.kill()
        process.join()


def _alone(run: Callable[[str, Callable[[Facts], None]], None], name: str, connection: Any) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    run(name, connection.send)


def _imported() -> None:
    """Before the processes fork: what takes seconds to import is imported once."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import timm
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.onnx  # noqa: B018
    timm.is_model("resnet18")


def _summary(row: Facts) -> str:
    if "torch_pruning" in row:
        return str(row["torch_pruning"])
    if wrong := fault(row):
        return wrong
    grouped, pruned = row["grouped"], row["pruned"]
    return f"{grouped['groups']} groups in {grouped['cpu_seconds']} s, {pruned['macs']:.1%} of the MACs"


if __name__ == "__main__":
    main()

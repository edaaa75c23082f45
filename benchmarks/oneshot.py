"""One-shot structured pruning side by side: ours, and every criterion of torch-pruning 1.6.1 in three columns.

    python benchmarks/oneshot.py --net resnet56-jpeg --images DATA --weights MODELS --methods ours,peers --seeds 0-4
    python benchmarks/oneshot.py --net vit-jpeg --images DATA --weights MODELS --target mlp --cuts 0.75,0.5
    python benchmarks/oneshot.py --table                            # only prints what the results file holds

ours          the recipe's defaults.
bare          torch-pruning's own pruner, global ranking, as its users get it, on the units of our groups alone (its own groups of
              the ResNets' option A shortcuts are wrong); it stops at the cut or just above it.
compensated   with our compensation, in two forms: the very units that the bare pruner kept, or its ranking in our step-by-step
              selection of all units by one ranking. The table shows the form that did better on the judging images: kind to the peer.
curves        its ranking as the order in which units leave, our curves and our compensation.

One path passes all cuts: `--stride` of the dense cost leaves in a step; a cut that is no multiple of it branches off the path, so
that no cell depends on which other cuts were asked for. `--target`: fraction of the `macs`, of the `params`, of all MLP units
(`mlp`) or of all attention heads (`heads`) that is kept; bare meets the last two in MACs, which is the same where all blocks are
alike. Peers score on 256 fit images, as the causal criterion does.

`--judge selection` (default) judges on scoring images that no seed prunes with, at most 2,000; the hold-out images are neither
listed nor read. `--judge holdout` is the final run. The CIFAR networks have learnt the scoring images: their drops are not those
of new images. Networks are judged cut, as they ship. Every finished cell is one line of `--results`, which several runs may share;
a rerun does what is missing. Cells that other code made are made anew.

`--ablate` runs ours with one ingredient after the other changed. Each is a setting of the recipe or a value in the hands of the
refit (which layers it knows of, whether it knows of rectifiers); `all curves anew` measures more between the steps.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of two runs on one machine starve each other

import oneshot_table
import peers
import torch
from oneshot_cells import Cell, Key, Results, code_of
from oneshot_nets import NETS, Case, Net, names
from oneshot_paths import ABLATIONS, SCORED, How, begun, passing, shipped

from cswap_deploy import progress, recipe
from cswap_deploy.errors import PruningError
from cswap_deploy.prune.batches import resolve_device
from cswap_deploy.prune.select import CostKind

COLUMNS = ("bare", "compensated", "curves")
TARGETS = ("macs", "params", "mlp", "heads")
DATA_FREE = ("magnitude_l1", "magnitude_l2", "lamp", "fpgm", "bn_scale")
"""What the bare pruner makes of these is the same for every seed."""


@dataclass(frozen=True)
class Run:
    """Makes the cells that are missing."""

    results: Results
    cuts: Sequence[float]
    stride: float

    def dense(self, net: Net) -> None:
        key = net.key("macs", 1.0, "dense", "dense", None, 0.0)
        if not self._has(net, key):
            self._add(net.cell(key, net.dense, {}, 0.0, conditions(net)))

    def bare(self, case: Case, name: str) -> None:
        """torch-pruning's own result."""
        net = case.net
        for cut in self.cuts:
            key = self._bare_key(case, name, cut)
            if self._has(net, key):
                continue
            start, example = time.monotonic(), next(iter(case.fit))[0][:1]
            try:
                module, keep = peers.bare_units(
                    name, net.dense, example, case.fit.first(SCORED), case.macs(cut), case.seed, case.groups.groups
                )
            except peers.OutOfReachError as fault:
                self._add(net.refused(key, str(fault)))
                continue
            self._add(net.cell(key, module, keep, time.monotonic() - start, conditions(net)))

    def own_units(self, case: Case, name: str) -> None:
        """What the bare pruner kept, with our compensation."""
        self.bare(case, name)
        net = case.net
        for cut in self.cuts:
            key = net.key(case.target, cut, name, "compensated: its units", case.seed, 1.0)
            if self._has(net, key):
                continue
            bare = self._find(net, self._bare_key(case, name, cut))
            assert bare, f"{name} at {cut}: no bare cell"
            if bare.refused:
                self._add(net.refused(key, bare.refused))
                continue
            start, keep = time.monotonic(), net.kept(bare.units)
            module = shipped(case, How(), keep)
            seconds = bare.seconds + time.monotonic() - start
            self._add(net.cell(key, module, keep, seconds, conditions(net)))

    def path(self, case: Case, method: str, column: str, how: How, stride: float) -> None:
        """All missing cuts of one path."""
        net = case.net
        keys = {cut: net.key(case.target, cut, method, column, case.seed, stride) for cut in self.cuts}
        missing = [cut for cut, key in keys.items() if not self._has(net, key)]
        if not missing:
            return
        kind: CostKind = "params" if case.target == "params" else "macs"
        spent = time.monotonic()
        try:
            for cut, state in begun(passing(case, how), how).through(kind, stride, missing):
                passed = time.monotonic()
                module = shipped(case, how, state.keep)
                seconds = time.monotonic() - spent
                self._add(net.cell(keys[cut], module, state.keep, seconds, conditions(net)))
                missing.remove(cut)
                spent += time.monotonic() - passed  # a path to a deeper cut alone ships nothing on the way
        except PruningError as fault:
            for cut in missing:
                self._add(net.refused(keys[cut], str(fault)))

    def _bare_key(self, case: Case, name: str, cut: float) -> Key:
        return case.net.key(case.target, cut, name, "bare", None if name in DATA_FREE else case.seed, 1.0)

    def _find(self, net: Net, key: Key) -> Cell | None:
        return self.results.find(key, code_of(key.method, key.column), net.digest)

    def _has(self, net: Net, key: Key) -> bool:
        return self._find(net, key) is not None

    def _add(self, cell: Cell) -> None:
        self.results.add(cell)
        print(oneshot_table.line(cell), file=sys.stderr, flush=True)


def conditions(net: Net) -> dict[str, Any]:
    device = net.judged.device
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }


def one_case(case: Case, run: Run, args: argparse.Namespace) -> None:
    """All that is asked for of one network and seed."""
    if args.ablate is not None:
        for name in args.ablate:
            run.path(case, "ours", f"changed: {name}", ABLATIONS[name], 1.0 if name == "one step" else run.stride)
        return
    if "ours" in args.methods:
        run.path(case, "ours", "curves", How(), run.stride)
    for name in args.peers if "peers" in args.methods else ():
        if "bare" in args.columns and case.target != "params":
            run.bare(case, name)
        if "compensated" in args.columns:
            if case.target != "params":
                run.own_units(case, name)
            ranked = How(peer=name, allocation=recipe.GlobalAllocation())
            run.path(case, name, "compensated: its ranking", ranked, run.stride)
        if "curves" in args.columns:
            run.path(case, name, "curves", How(peer=name), run.stride)


class Warnings(progress.Silent):
    def warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)


def work(args: argparse.Namespace) -> None:
    run, device = Run(Results.read(args.results), args.cuts, args.stride), resolve_device(args.device)
    for column in COLUMNS:  # of what is loaded now, whatever becomes of the files while this runs
        code_of("ours", column), code_of("peer", column)
    for name in args.net:
        with TemporaryDirectory() as scratch, progress.reporting(Warnings()):
            net = Net.load(name, args.images, args.weights, args.judge, Path(scratch), args.scoring, device)
            run.dense(net)
            for seed in args.seeds:
                one_case(Case.of(net, seed, args.target), run, args)


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument(
        "--net", default=[], type=lambda text: names(text, list(NETS)), help=f"of {', '.join(NETS)}, or all"
    )
    cli.add_argument("--images", type=Path, help="folder that holds the CIFAR-10 folders")
    cli.add_argument("--weights", type=Path, help="folder that holds their checkpoints")
    cli.add_argument("--methods", default=["ours"], type=lambda text: names(text, ("ours", "peers")))
    cli.add_argument("--columns", default=COLUMNS, type=lambda text: names(text, COLUMNS))
    cli.add_argument("--peers", default=peers.PEERS, type=lambda text: names(text, peers.PEERS))
    cli.add_argument("--ablate", nargs="?", const="all", type=lambda text: names(text, list(ABLATIONS)),
                     help=f"of {', '.join(ABLATIONS)}, or all")  # fmt: skip
    cli.add_argument("--seeds", default=[0, 1, 2, 3, 4], type=numbers, help="0-4, or 0,2")
    cli.add_argument("--scoring", type=int, default=0, help="images that a seed prunes with; default: 1024")
    cli.add_argument("--target", default="macs", choices=TARGETS)
    cli.add_argument(
        "--cuts", default=[0.8, 0.7, 0.6, 0.5, 0.4], type=lambda text: [float(part) for part in text.split(",")]
    )
    cli.add_argument("--stride", type=float, default=0.1, help="fraction of the dense cost that leaves in one step")
    cli.add_argument("--judge", default="selection", choices=("selection", "holdout"))
    cli.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"), help="where PyTorch runs")
    cli.add_argument("--threads", type=int, help="of torch; default: its own choice")
    cli.add_argument("--results", type=Path, default=here / "oneshot.jsonl")
    cli.add_argument("--json", type=Path, default=here / "oneshot.json", help="the table's figures")
    cli.add_argument("--table", action="store_true", help="only print the table")
    args = cli.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.table:
        if not args.net:
            cli.error("--net is required, or --table")
        work(args)
    oneshot_table.show(Results.read(args.results), args.judge, args.json)


def numbers(text: str) -> list[int]:
    """`0-4` or `0,2`."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()

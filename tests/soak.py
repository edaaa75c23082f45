"""Builds killed at random moments, each followed by a plain rerun, which must end as an undisturbed build does.

    python tests/soak.py [--builds 60] [--seed N] [--short]

SIGKILL, which nothing can catch, in real processes and in the middle of whatever a build of the quickstart does then. After each
kill every stored result must be whole; the rerun must exit with 0, keep those results (not one is made again), and leave a
complete bundle whose plan, weights, graph and test vectors are those of the undisturbed build, byte for byte. `--short` takes
settings under which a build is a matter of seconds: what continuous integration runs. Every moment is printed with the seed it
comes from; `--seed N --builds 1` repeats the build that was printed with seed N.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cswap_deploy.artifacts import sha256_of
from cswap_deploy.bundle import Bundle

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
SHORT = (
    "calibration.scoring=96",
    "calibration.holdout=60",
    "prune.steps=1",
    "prune.criterion={kind: causal, estimator: attribution}",
    "prune.allocation={kind: curves, images: 64}",
    "accuracy.max_drop=null",
    "latency=null",
)
"""Fewer images, one step, no ablation, no gate and no measurement: the same stages but `latency`, in a fifth of the time."""
DATED = ("manifest.json", "report.html", "README.md", "MODEL_CARD.md", "bom.cdx.json")
"""Files of a bundle that hold a date or a measurement."""


def main() -> int:
    parser = argparse.ArgumentParser(description="kill builds at random moments and run them again")
    parser.add_argument("--builds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--short", action="store_true")
    asked = parser.parse_args()
    sets = [f"--set={setting}" for setting in (SHORT if asked.short else ())]
    with tempfile.TemporaryDirectory(prefix="cswap-soak-") as name:
        folder = Path(name)
        start = time.monotonic()
        finish(folder / "undisturbed", sets)
        seconds = time.monotonic() - start
        wanted = products(folder / "undisturbed" / "bundle")
        print(f"undisturbed build: {seconds:.1f} s, {len(wanted)} files to compare", flush=True)
        seed = asked.seed
        for number in range(asked.builds):
            while not disturbed(folder / "work", sets, random.Random(seed).uniform(0, seconds)):
                print(f"seed {seed}: ended before it could be killed; the next seed takes its turn", flush=True)
                shutil.rmtree(folder / "work")
                seed += 1
            kept = whole_results(folder / "work")
            finish(folder / "work", sets)
            lost = {result for result, record in kept.items() if whole_results(folder / "work").get(result) != record}
            assert not lost, f"seed {seed}: made again although they were whole: {lost}"
            assert products(folder / "work" / "bundle") == wanted, f"seed {seed}: the bundle differs"
            print(
                f"{number + 1}/{asked.builds} seed {seed}: {len(kept)} results kept, bundle as undisturbed", flush=True
            )
            shutil.rmtree(folder / "work")
            seed += 1
    print(f"{asked.builds} builds killed, {asked.builds} complete bundles with the bytes of the undisturbed one")
    return 0


def command(work: Path, sets: list[str]) -> list[str]:
    return [sys.executable, "-m", "cswap_deploy", "build", str(RECIPE), "--work", str(work), "--quiet", *sets]


def disturbed(work: Path, sets: list[str], moment: float) -> bool:
    """Kill a build `moment` seconds after its start; False when it has ended by then."""
    process = subprocess.Popen(command(work, sets), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def finish(work: Path, sets: list[str]) -> None:
    done = subprocess.run(command(work, sets), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"


def whole_results(work: Path) -> dict[str, str]:
    """Each stored result's record, after its files were compared with it."""
    found = {}
    for record in work.glob("stages/*/*/stage.json"):
        files = json.loads(record.read_text())["files"]
        assert {name: sha256_of(record.parent / name) for name in files} == files, f"{record} is damaged"
        found[str(record.parent.relative_to(work))] = record.read_text()
    return found


def products(folder: Path) -> dict[str, str]:
    """sha256 of each file of a complete bundle, those that differ from run to run left out."""
    bundle = Bundle.read(folder)
    listed = {entry["path"]: bundle.file(entry["path"]).sha256 for entry in bundle.manifest["files"]}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present == {*listed, "manifest.json"}, f"not as listed: {present ^ {*listed, 'manifest.json'}}"
    return {name: digest for name, digest in listed.items() if name not in DATED}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same threads in every build: the order of sums is theirs
    sys.exit(main())

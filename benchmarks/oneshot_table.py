"""The table of the one-shot benchmark, from its results file: drops with paired intervals, the bars, and ours against each peer.

The drop is the dense network's top-1 minus the pruned one's, in points, mean over seeds; intervals, p-values and Holm's
correction are those of `paired`, which says what they mean. Holm's family is a column: all peers at all cuts of all networks in
the file, judged on the same part of the images.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import paired
from oneshot_cells import Bools, Cell, Results

ALPHA = 0.05
STRIDE = 0.1
"""Steps that the names of rows do not mention."""
CLOSE = 0.005
"""Peers that stop farther above the cut than this fraction of the MACs are shown with what they keep."""
RESNET56 = {0.8: 0.2, 0.7: 0.5, 0.6: 1.0, 0.5: 1.7, 0.4: 3.5}
BARS: dict[tuple[str, str], dict[float, float]] = {
    ("resnet56-jpeg", "macs"): RESNET56,
    ("resnet56-lossless", "macs"): RESNET56,
    ("resnet20-lossless", "macs"): {0.8: 0.3, 0.7: 0.7, 0.6: 2.5, 0.5: 5.0},
    ("vit-jpeg", "mlp"): {0.75: 0.5, 0.5: 1.5},
    ("vit-jpeg", "heads"): {0.75: 1.5},
    ("vit-jpeg", "macs"): {0.7: 1.5},
}
"""Points of top-1 that ours may lose at most."""
PARAMS_BAR = {0.4: 0.8}
"""Of every network, by parameters."""
DECISIVE = (0.5, 0.4)
"""Cuts at which ours is to be significantly better than every bare and every compensated peer."""
CONTEXT = """\
Others' results on CIFAR-10 WITH fine-tuning, after hundreds of epochs on the training set: ResNet-56 (93.53) at 2.11x / 2.51x
fewer MACs 93.46 / 93.36, Group-L1 92.93 at 2.12x; ResNet-56 (92.80) at 2.0x AMC 91.90, CP 91.80 (all: Torch-Pruning's reproduce
page). Without fine-tuning: ResNet-18, 75 % of channels, 84.8 (GRAIL)."""
KEPT = {"macs": "fraction of the MACs kept", "params": "fraction of the parameters kept", "mlp": "fraction of the MLP units kept",
        "heads": "fraction of the attention heads kept"}  # fmt: skip
COLUMNS = ("bare", "compensated", "curves")
FORMS = ("compensated: its units", "compensated: its ranking")


Seeds = dict["int | None", Cell]
"""Cells of one method at one cut; the seed None stands for all."""
Place = tuple[str, str, float, str, str, float]
"""net, target, cut, method, column, stride."""


@dataclass(frozen=True)
class Entry:
    """One place of the table. `p` (Holm's) and `verdict` are about ours against it."""

    place: Place
    found: paired.Comparison
    agreement: float
    kl: float
    macs: float
    params: float
    seconds: float
    seeds: int
    """0 where no seed matters."""
    p: float | None = None
    verdict: str = ""

    @property
    def text(self) -> str:
        found, cut = self.found, self.place[2]
        above = f" at {self.macs:.2f}" if self.place[1] == "macs" and self.macs > cut + CLOSE else ""
        drop = f"{100 * found.drop:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
        return f"{drop} / {100 * self.agreement:.1f} % / {self.kl:.3f}{above}"


def line(cell: Cell) -> str:
    """What a finished cell is reported with."""
    key = cell.key
    seed = "" if key.seed is None else f" seed {key.seed}"
    name = f"{key.net} {key.target} {key.cut:g} {key.method} ({key.column}){seed}"
    if cell.refused:
        return f"{name}: out of reach: {cell.refused}"
    return (
        f"{name}: MACs {cell.macs:.3f}, parameters {cell.params:.3f}, {int(cell.right.sum())} of {cell.images} right, "
        f"agreement {100 * cell.agree / cell.images:.2f} %, KL {cell.kl / cell.images:.4f}, {cell.seconds:.0f} s"
    )


def show(results: Results, judge: str, document: Path | None) -> None:
    """Print the table as Markdown and write its figures as JSON."""
    current, outdated = results.of(judge)
    table = Table.of(current, judge)
    if outdated or table.strangers:
        print(f"Left out: {len(outdated)} cells of other code, {table.strangers} on other images or weights.\n")
    print("\n\n".join(table.blocks()) or f"No cells that were judged on {judge} images.")
    if document:
        document.write_text(json.dumps(table.document(), indent=1))


@dataclass(frozen=True)
class Table:
    judge: str
    dense: dict[str, Cell]
    entries: dict[Place, Entry]
    refused: dict[Place, str]
    strangers: int

    @staticmethod
    def of(cells: Sequence[Cell], judge: str) -> Table:
        """Of each network those cells count that were judged as its last dense one."""
        dense = {cell.key.net: cell for cell in cells if cell.key.method == "dense"}
        own = [cell for cell in cells if cell.key.net in dense and cell.judged == dense[cell.key.net].judged]
        places: dict[Place, Seeds] = defaultdict(dict)
        for cell in own:
            key = cell.key
            if key.method != "dense":
                places[key.net, key.target, key.cut, key.method, key.column, key.stride][key.seed] = cell
        reached = {place: seeds for place, seeds in places.items() if not any(cell.refused for cell in seeds.values())}
        refused = {
            place: next(c.refused for c in seeds.values() if c.refused)
            for place, seeds in places.items()
            if place not in reached
        }
        entries = {place: _entry(place, seeds, dense[place[0]]) for place, seeds in reached.items()}
        return Table(judge, dense, _judged(entries, reached), refused, len(cells) - len(own))

    def blocks(self) -> list[str]:
        pairs = dict.fromkeys(place[:2] for place in (*self.entries, *self.refused))
        found = [self._block(net, target) for net, target in pairs]
        return [*found, *self._against()]

    def _block(self, net: str, target: str) -> str:
        own = [place for place in (*self.entries, *self.refused) if place[:2] == (net, target)]
        most = max((self.entries[place].seeds for place in own if place in self.entries), default=0)
        cuts = sorted({place[2] for place in own}, reverse=True)
        lines = [["", *(f"{cut:g}" for cut in cuts)]]
        for row in sorted({place[3:] for place in own}, key=_order):
            lines.append([_name(row), *(self._text((net, target, cut, *row), most) for cut in cuts)])
        dense = self.dense[net]
        title = (
            f"### {net}: {KEPT[target]}\n\nDense {100 * dense.right.mean():.2f} % of {dense.images} {self.judge} images; "
            f"mean over seeds, {most} where no other number stands. "
            "Drop in points (95 % interval) / agreement with the dense network / KL."
        )
        context = f"\n\n{CONTEXT}" if net.startswith("resnet56") and target == "macs" else ""
        return f"{title}\n\n{_markdown(lines)}{context}"

    def _text(self, place: Place, most: int) -> str:
        if place in self.refused:
            return "out of reach"
        if (entry := self.entries.get(place)) is None:
            return ""
        parts = [entry.text, f"{entry.seeds} seeds" if 0 < entry.seeds < most else "", entry.verdict]
        if (bar := _bar(place)) is not None:
            parts.append(f"{'ok' if 100 * entry.found.drop <= bar + 1e-9 else 'missed'}, at most {bar:g}")
        return " / ".join(filter(None, parts))

    def _against(self) -> list[str]:
        """Column by column, in how many cells ours is better and worse."""
        lines = []
        for column in COLUMNS:
            own = [entry for entry in self.entries.values() if entry.verdict and _column(entry.place) == column]
            if not own:
                continue
            worse = [_cell_name(entry.place) for entry in own if entry.verdict == "ours worse"]
            decisive = [entry for entry in own if entry.place[2] in DECISIVE]
            undecided = [_cell_name(entry.place) for entry in decisive if entry.verdict != "ours better"]
            better = sum(entry.verdict == "ours better" for entry in own)
            lines.append(
                f"- {column}: ours better in {better} of {len(own)} cells, worse in {len(worse)}"
                f"{_listed(worse)}; at {' and '.join(map(str, DECISIVE))} better in {len(decisive) - len(undecided)} of "
                f"{len(decisive)}{_listed(undecided, 'not')}"
            )
        title = (
            f"### Ours against each peer, paired over the images, Holm over all cells of a column, alpha {ALPHA:g}\n\n"
        )
        return [title + "\n".join(lines)] if lines else []

    def document(self) -> dict[str, Any]:
        names = ("net", "target", "cut", "method", "column", "stride")
        return {
            "judge": self.judge,
            "dense": {
                net: {"images": cell.images, "top1": float(cell.right.mean()), "conditions": cell.conditions}
                for net, cell in self.dense.items()
            },
            "rows": [
                {**dict(zip(names, place, strict=True)), "bar": _bar(place),
                 **{key: value for key, value in asdict(entry).items() if key != "place"}}
                for place, entry in self.entries.items()
            ],
            "out_of_reach": [{**dict(zip(names, place, strict=True)), "why": why} for place, why in self.refused.items()],
        }  # fmt: skip


# --- statistics


def _entry(place: Place, seeds: Seeds, dense: Cell) -> Entry:
    cells = list(seeds.values())

    def mean(name: str) -> float:
        return float(np.mean([getattr(cell, name) for cell in cells]))

    return Entry(
        place,
        paired.compare(dense.right, np.stack([cell.right for cell in cells])),
        mean("agree") / dense.images,
        mean("kl") / dense.images,
        mean("macs"),
        mean("params"),
        mean("seconds"),
        0 if None in seeds else len(seeds),
    )


def _judged(entries: dict[Place, Entry], cells: dict[Place, Seeds]) -> dict[Place, Entry]:
    """With ours compared to every other row at its cut, on the seeds that both have; of the compensated forms the better one."""
    families: dict[str, dict[Place, tuple[float, float]]] = defaultdict(dict)
    for place in entries:
        net, target, cut, method, column, _ = place
        ours = _finest(entries, net, target, cut)
        if ours is None or place == ours or (method, column) == ("ours", "curves"):
            continue
        a, b = _common(cells[ours], cells[place])
        if len(a) and not _beaten_by_other_form(place, entries):
            families[_column(place)][place] = (paired.sign_flip(a, b), float(a.mean() - b.mean()))
    judged = dict(entries)
    for family in families.values():
        for place, p in paired.holm({place: p for place, (p, _) in family.items()}).items():
            better = "ours better" if family[place][1] > 0 else "ours worse"
            judged[place] = replace(entries[place], p=p, verdict=better if p < ALPHA else "no difference")
    return judged


def _finest(entries: Iterable[Place], net: str, target: str, cut: float) -> Place | None:
    """Ours, in the smallest steps there are."""
    own = [place for place in entries if place[:5] == (net, target, cut, "ours", "curves")]
    return min(own, key=lambda place: place[5], default=None)


def _beaten_by_other_form(place: Place, entries: dict[Place, Entry]) -> bool:
    if place[4] not in FORMS:
        return False
    forms = [other for other in entries if other[:4] == place[:4] and other[4] in FORMS]
    return min(forms, key=lambda form: (entries[form].found.drop, forms.index(form))) != place


def _common(first: Seeds, second: Seeds) -> tuple[Bools, Bools]:
    """(seeds, images) each, of the seeds that both have."""
    if None in second:
        second = dict.fromkeys(first, second[None])
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return np.zeros((0, 1), np.bool_), np.zeros((0, 1), np.bool_)
    return np.stack([first[seed].right for seed in seeds]), np.stack([second[seed].right for seed in seeds])


def _column(place: Place) -> str:
    return place[4].partition(":")[0]


def _bar(place: Place) -> float | None:
    net, target, cut, method, column, _ = place
    bars = PARAMS_BAR if target == "params" else BARS.get((net, target), {})
    return bars.get(cut) if (method, column) == ("ours", "curves") else None


# --- text


def _order(row: tuple[str, str, float]) -> tuple[int, str, str, float]:
    """Ours, what it is without, then the peers column by column."""
    method, column, stride = row
    if method == "ours":
        return (0 if column == "curves" else 1), "", column, stride
    return 2 + COLUMNS.index(column.partition(":")[0]), column, method, stride


def _name(row: tuple[str, str, float]) -> str:
    method, column, stride = row
    steps = "" if stride in (STRIDE, 1.0) else f", steps of {100 * stride:g} %"
    if method == "ours":
        column = column.removeprefix("changed: ")
    return ("ours" if row[:2] == ("ours", "curves") else f"{method}, {column}") + steps


def _cell_name(place: Place) -> str:
    return f"{place[3]} at {place[2]:g} of {place[0]}" + ("" if place[1] == "macs" else f" ({place[1]})")


def _listed(names: Sequence[str], word: str = "") -> str:
    return f" ({' '.join(filter(None, [word, ', '.join(names)]))})" if names else ""


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A pipe table, its columns aligned for the console as well."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])

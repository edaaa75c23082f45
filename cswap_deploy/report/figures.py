"""The manifest → the charts of the page, each with what a screen reader is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from markupsafe import Markup

from cswap_deploy.manifest import VERDICTS
from cswap_deploy.report import svg
from cswap_deploy.report.svg import Axis
from cswap_deploy.report.words import count, effects, ms, percent, plural, points, share, size, sizes, times
from cswap_deploy.wording import SLOWEST

Facts = dict[str, Any]
Row = dict[str, Any]
NAMES = {"source": "dense", "pruned": "ships"}
"""What the two models of a measurement are called."""


def halves(m: Facts) -> Iterator[Row]:
    """What shrank: `title`, `dense` and `shipped` as text, `kept` in 0..1 or None, `chart`."""
    latency = m["latency"]
    pairs: list[tuple[str, float | None, float, Any]] = [
        ("multiply-accumulates", m["model"]["macs"], m["pruned"]["macs"], count),
        ("parameters", m["model"]["params"], m["pruned"]["params"], count),
    ]
    if files := sizes(m):
        pairs.append((*files, size))
    if latency:
        pairs.insert(0, ("latency, p50", latency["source"]["p50_ms"], latency["pruned"]["p50_ms"], ms))
        dense, shipped = (latency[key].get("peak_memory_mb") for key in NAMES)
        if dense and shipped:
            pairs.append(("peak memory", dense, shipped, lambda value: f"{value:.0f} MB"))
    for title, before, after, form in pairs:
        row: Row = {"title": title, "dense": None, "shipped": form(after), "kept": None, "chart": ""}
        if before:
            longest = max(before, after)
            label = f"{title}: dense {form(before)}, ships {form(after)}"
            told = (f"dense {form(before)}", f"ships {form(after)}")
            chart = svg.pair(label, (before / longest, told[0]), (after / longest, told[1]))
            row |= {"dense": form(before), "kept": after / before, "chart": chart}
        yield row


def outcomes(m: Facts) -> tuple[Markup, list[Row]]:
    """Top-1 of every model with its interval: the axis and a row for each."""
    found = m["accuracy"]
    models = {"dense": found["source"], "pruned, in PyTorch": found["pruned"], "model.onnx": found["exported"]}
    models |= {m["onnx"]["variants"].get(name, {}).get("file", name): each for name, each in found["variants"].items()}
    models |= {"TensorRT engine": found["engine"]} if found["engine"] else {}
    bounds = [bound for each in models.values() for bound in each["top1_ci95"]]
    axis = Axis.around(100 * min(bounds), 100 * max(bounds), 0.05)
    ships = "TensorRT engine" if m["shipped"].startswith("engine/") else m["shipped"]
    rows = []
    for name, each in models.items():
        low, high = each["top1_ci95"]
        tip = f"{name}: {percent(each['top1'])}, 95 % {percent(low)} to {percent(high)}"
        kind = "dense" if name == "dense" else "ship"
        chart = svg.whisker(tip, axis, 100 * low, 100 * each["top1"], 100 * high, tip, kind)
        rows.append({"name": name, "ships": name == ships, "chart": chart, **each})
    return svg.scale(axis, "{:g} %"), rows


def drop(m: Facts) -> Markup:
    """The drop before what the gate allows."""
    found = m["accuracy"]
    low, high = found["drop_ci95_pp"]
    tip = f"drop {points(found['drop_pp'])} points, 95 % {points(low)} to {points(high)}"
    limit = found["gate"]["max_drop_pp"] if found["gate"]["verdict"] != "off" else None
    label = f"{tip}; the gate allows {limit:g}" if limit is not None else f"{tip}; no gate"
    return svg.drop(label, low, found["drop_pp"], high, limit, tip)


def latencies(latency: Facts) -> Markup | None:
    """Histograms of both models; None where the manifest holds none."""
    spreads = latency.get("distribution")
    if not spreads or not _matching(spreads):
        return None
    said = "; ".join(
        f"{name} p50 {ms(latency[key]['p50_ms'])}, p99 {ms(latency[key]['p99_ms'])}" for key, name in NAMES.items()
    )
    return svg.histogram(f"Latency of both models. {said}", spreads, latency, NAMES)


def _matching(spreads: Facts) -> bool:
    """Manifests are not trusted: bins that do not fit are not drawn."""
    return 0 < len(spreads["source"]) == len(spreads["pruned"]) <= 1000 and 0 < spreads["from_ms"] < spreads["to_ms"]


def beyond(latency: Facts) -> list[str]:
    """What the histogram leaves out, for each model that has it."""
    spreads = latency["distribution"]
    found = zip(NAMES.items(), spreads["above"], spreads["max_ms"], strict=True)
    return [
        f"{name} {share(above / latency[key]['samples'])}, up to {ms(longest)}"
        for (key, name), above, longest in found
        if above
    ]


def course(latency: Facts) -> Markup | None:
    """Medians while the measurement ran."""
    values = latency.get("course")
    if not values or not 0 < len(values["source"]) == len(values["pruned"]) <= 1000:
        return None
    parts = ", ".join(f"{name} {ms(min(values[key]))} to {ms(max(values[key]))}" for key, name in NAMES.items())
    return svg.course(f"Median latency in the order of the rounds: {parts}", values, NAMES)


def candidates(budget: Facts) -> tuple[Markup | str, list[Row]]:
    """Each candidate and what ships, as a part of the dense latency with its interval, before the budget."""
    found = [{**each, "name": f"candidate {number}"} for number, each in enumerate(budget.get("candidates", ()), 1)]
    if found and budget.get("ratio_ci95"):
        low, high = budget["ratio_ci95"]
        found.append({"name": "what ships", "predicted": None, "ratio": budget["ratio"], "low": low, "high": high})
    if not found:
        return "", []
    limit = budget["ratio_asked"]
    axis = Axis.around(
        100 * min(limit, *(each["low"] for each in found)), 100 * max(limit, *(each["high"] for each in found)), 0.1
    )
    rows = []
    for each in found:
        tip = f"{each['name']}: {percent(each['ratio'])}, 95 % {percent(each['low'])} to {percent(each['high'])}; asked {percent(limit)}"
        kind = "ship" if each["ratio"] <= limit else "dense"
        chart = svg.whisker(tip, axis, 100 * each["low"], 100 * each["ratio"], 100 * each["high"], tip, kind)
        predicted = percent(each["predicted"]) if each["predicted"] is not None else ""
        rows.append({**each, "chart": chart, "predicted": predicted})
    return svg.scale(axis, "{:g} %"), rows


def stairs(budget: Facts) -> Iterator[Row]:
    """Per kind of group the latency of the whole network over its width, between 0 and the slowest."""
    for kind in budget["staircase"]["kinds"]:
        if 0 < len(kind["widths"]) == len(kind["ms"]) <= 1000 and kind["widths"][-1] > 0:
            most = max(*kind["ms"], budget["dense_ms"])
            points = [
                (width / kind["widths"][-1], cost / most)
                for width, cost in zip(kind["widths"], kind["ms"], strict=True)
            ]
            told = ", ".join(f"{width}: {ms(cost)}" for width, cost in zip(kind["widths"], kind["ms"], strict=True))
            yield {**kind, "chart": svg.stairs(f"{kind['name']}: {told}", points)}


def front(sweep: Facts) -> Markup | None:
    """Top-1 over latency of several bundles and of the dense network; None where nothing was measured."""
    dense = sweep["dense"]
    points = []
    if dense["latency_ms"] is not None:
        tip = f"dense: {ms(dense['latency_ms'])}, {percent(dense['top1'])}"
        points.append((dense["latency_ms"], 100 * dense["top1"], "dense", "", tip))
    for each in sweep["points"]:
        if each["achieved_ms"] is not None and each["verdict"] != "infeasible":  # what ships there is the dense network
            tip = (
                f"asked {ms(each['latency_ms'])}, {each['verdict']}: {ms(each['achieved_ms'])}, {percent(each['top1'])}"
            )
            kind = "ship" if each["on_front"] else "ship beaten"
            points.append((each["achieved_ms"], 100 * each["top1"], kind, f"{each['bundle']}/report.html", tip))
    return svg.scatter("; ".join(tip for *_, tip in points), points) if points else None


def macs(m: Facts) -> Markup | None:
    """Multiply-accumulates along the network."""
    rows = m["pruned"].get("layers")
    if not rows:
        return None
    told = [
        (row["name"], row["macs"], row["macs_kept"],
         f"{row['name']}: {count(row['macs'])} before, {count(row['macs_kept'])} after")
        for row in rows
    ]  # fmt: skip
    most = max(rows, key=lambda row: row["macs"])
    label = f"Multiply-accumulates of {len(rows)} layers before and after; most in {most['name']}, {count(most['macs'])} before"
    return svg.columns(label, told)


def timed(latency: Facts | None) -> Facts | None:
    """Where the runtime says that the time goes: `chart`, rows by `operators` and by `layers`; None where it was not asked."""
    found = (latency or {}).get("layers")
    if not found or not any(found.values()):
        return None
    layers, operators = _side_by_side(found, "name"), _side_by_side(found, "op")
    told = [(row["name"], row["dense"], row["shipped"], row["said"]) for row in layers]
    most = max(layers, key=lambda row: row["dense"])
    label = f"Milliseconds of {len(layers)} layers, dense and what ships; longest in {most['name']}, dense {ms(most['dense'])}"
    sums = {key: sum(row["ms"] for row in rows) for key, rows in found.items()}
    groups = {row["name"]: row.get("groups") or [] for rows in found.values() for row in rows}
    longest = [
        {**row, "groups": ", ".join(groups.get(row["name"], []))}
        for row in sorted(layers, key=lambda row: -max(row["dense"], row["shipped"]))[:SLOWEST]
    ]
    operators = sorted(operators, key=lambda row: -row["dense"])
    return {
        "chart": svg.columns(label, told, "ms"),
        "operators": operators,
        "layers": longest,
        "sums": sums,
        "count": len(layers),
    }


def _side_by_side(found: Facts, key: str) -> list[Row]:
    """Sums of both models by a layer's `key`, in the order of the dense one; 0 where a model has none."""
    sums: dict[str, list[float]] = {}
    for place, model in enumerate(NAMES):
        for row in found[model]:
            sums.setdefault(row[key] or "other", [0.0, 0.0])[place] += row["ms"]
    top = max(max(pair) for pair in sums.values()) or 1.0
    rows = []
    for name, (dense, shipped) in sums.items():
        said = f"{name}: dense {ms(dense)}, ships {ms(shipped)}"
        chart = svg.pair(said, (dense / top, f"dense {ms(dense)}"), (shipped / top, f"ships {ms(shipped)}"))
        rows.append({"name": name, "dense": dense, "shipped": shipped, "said": said, "chart": chart})
    return rows


def heaviest(m: Facts) -> list[Row]:
    """Layers by their MACs before, each with its share of all and its chart."""
    rows = m["pruned"].get("layers") or []
    whole, top = m["model"]["macs"], max((row["macs"] for row in rows), default=1)
    found = []
    for row in sorted(rows, key=lambda row: -row["macs"]):
        before, after = row["macs"], row["macs_kept"]
        label = f"{row['name']}: {count(before)} before, {count(after)} after"
        chart = svg.pair(label, (before / top, f"before {count(before)}"), (after / top, f"after {count(after)}"))
        found.append({**row, "share": before / whole, "chart": chart})
    return found


def groups(m: Facts, margin: float) -> tuple[Markup | None, list[Row]]:
    """Units, verdicts and effects of each group: the axis of effects and a row for each."""
    rows = m["pruned"].get("groups") or []
    judged = [group for group in rows if group.get("dense")]
    axis = None
    if bounds := [bound for group in judged for bound in group["dense"]["effect"] or ()]:
        axis = Axis(1.3 * min(*bounds, -margin), 1.3 * max(*bounds, margin), bend=_bend(judged, margin))
    found = []
    for group in rows:
        row = {**group, "known": bool(group.get("dense")), "chart": _units(group)}
        if row["known"]:
            row |= {"verdicts": _verdicts(group), "spread": _spread(group, axis, margin) if axis else None}
        found.append(row)
    return (svg.scale(axis, "{:g}") if axis else None), found


def _bend(judged: list[Facts], margin: float) -> float:
    """Nats: effects are drawn linearly below, where most lie, and logarithmically above."""
    middles = [
        abs(group["dense"]["quantiles"][place])
        for group in judged
        if group["dense"].get("quantiles")
        for place in (1, 3)
    ]
    return min(max(float(median(middles or [margin])), margin / 100), margin)


def _units(group: Facts) -> Markup:
    name, units, kept, left = group["name"], group["units"], group["kept"], group.get("left") or {}
    parts = [("kept", kept / units, f"{name}: {kept} of {units} kept")]
    parts += [
        (verdict, left[verdict] / units, f"{name}: {left[verdict]} {verdict} removed")
        for verdict in ("critical", "detrimental")
        if left.get(verdict)
    ]
    return svg.bar(f"{name}: {kept} of {units} units kept", parts)


def _verdicts(group: Facts) -> Markup:
    units, dense, left = group["units"], group["dense"], group["left"]
    told = [f"{dense[verdict]} {verdict}, {left[verdict]} of them removed" for verdict in VERDICTS if dense[verdict]]
    parts = [
        (
            verdict,
            dense[verdict] / units,
            f"{group['name']}: {dense[verdict]} {verdict}, {left[verdict]} of them removed",
        )
        for verdict in VERDICTS
    ]
    return svg.bar(f"{group['name']}: {'; '.join(told)}", parts)


def _spread(group: Facts, axis: Axis, margin: float) -> Markup:
    dense, left = group["dense"], group["left"]
    told = f"{group['name']}: effects {effects(dense['effect'])} thousandths of a nat"
    told += f", of those that left {effects(left['effect'])}" if left["effect"] else ""
    return svg.spread(told, axis, dense, left, margin, told)


def steps(m: Facts) -> list[Row]:
    """MACs kept and the drop on the selection images after each step."""
    return [
        {
            **step,
            "chart": svg.bar(
                f"step {number}: {share(step['macs'])} of the MACs kept",
                [("kept", step["macs"], f"{share(step['macs'])} kept")],
            ),
        }
        for number, step in enumerate(m["pruned"].get("trace") or (), 1)
    ]


def losers(m: Facts, most: int = 20) -> list[Row]:
    """Classes that lost top-1, the worst first."""
    found = [item for item in m["accuracy"]["worst_classes"] if item["drop_pp"] > 0][:most]
    top = max((item["drop_pp"] for item in found), default=1.0)
    return [
        {**item, "chart": svg.bar(f"{item['label']}: {points(item['drop_pp'])} points on {plural(item['images'], 'image')}",
                                  [("loss", item["drop_pp"] / top, f"{item['label']}: {points(item['drop_pp'])} points")])}
        for item in found
    ]  # fmt: skip


def tiles(m: Facts) -> Iterator[Row]:
    """The figures that a reader looks for first: `title`, `value`, `detail`, `state`."""
    latency, accuracy = m["latency"], m["accuracy"]
    if latency:
        low, high = latency["speedup_ci95"]
        state = "good" if low > 1 else "bad" if high < 1 else ""
        dense, shipped = (latency[key]["p50_ms"] for key in NAMES)
        detail = f"{dense:.3g} → {shipped:.3g} ms, p50"
        yield {"title": "Speed", "value": f"{times(latency['speedup'])} \N{MULTIPLICATION SIGN}", "detail": detail, "state": state,
               "note": "" if latency["stable"] else "measurement not stable"}  # fmt: skip
    else:
        yield {"title": "Speed", "value": "\N{EM DASH}", "detail": "not measured", "state": "", "note": ""}
    limit = accuracy["gate"]["max_drop_pp"]
    allowed = f"{limit:g} allowed" if accuracy["gate"]["verdict"] != "off" else "no gate"
    state = {"pass": "good", "fail": "bad"}.get(accuracy["gate"]["verdict"], "")
    yield {"title": "Top-1 drop", "value": points(accuracy["drop_pp"]), "detail": f"points, {allowed}", "state": state,
           "note": "not proven" if accuracy["gate"]["verdict"] == "pass" and not accuracy["gate"]["proven"] else ""}  # fmt: skip
    for title, key in (("Compute", "macs"), ("Parameters", "params")):
        before, after = m["model"][key], m["pruned"][key]
        yield {"title": title, "value": share(after / before), "detail": f"{count(before)} → {count(after)}",
               "state": "", "note": ""}  # fmt: skip


def share_pair(title: str, dense: float, shipped: float) -> Markup:
    """Two shares of everything, one above the other."""
    label = f"{title}: dense {percent(dense)}, ships {percent(shipped)}"
    return svg.pair(label, (dense, f"dense {percent(dense)}"), (shipped, f"ships {percent(shipped)}"))

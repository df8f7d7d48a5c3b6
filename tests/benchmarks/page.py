"""The results as text, as a page of the documentation and as plots."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def entries_line(row: dict[str, Any]) -> str:
    parts = []
    for entry in row["entries"]:
        said = f"{entry['ms']:.2f} ms" if entry["ms"] is not None and not entry["note"] else entry["note"] or "-"
        parts.append(f"{entry['who']} {said}")
    return ", ".join(parts)


def groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        found[row["group"]].append(row)
    return {name: found[name] for name in sorted(found, key=_place)}


_ORDER = ("entropic, to", "entropic, clusters", "entropic, small", "exact", "unbalanced", "many", "points", "gradient")


def _place(group: str) -> int:
    return next((k for k, start in enumerate(_ORDER) if group.startswith(start)), len(_ORDER))


def hard(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entropic problems that plain sweeps take hundreds or thousands of steps for."""
    hard_ones = ("2d", "eps = 0.001"), ("cosine", "eps = 0.05"), ("clusters", "eps = 0.05"), ("clusters", "eps = 0.01")
    words = [(row, row["work"].split(", ")) for row in rows if row["group"].startswith("entropic")]
    return [row for row, (kind, _, epsilon) in words if (kind, epsilon) in hard_ones]


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def summary(results: dict[str, Any]) -> str:
    lines = []
    for name, rows in groups(results).items():
        ratios = [r["ratio"] for r in rows if r["ratio"]]
        if ratios:
            lines.append(
                f"{name}: geometric mean {geometric(ratios):.1f}, median {median(ratios):.1f}, least {min(ratios):.2f}, "
                f"{len(rows) - len(ratios)} without a peer that arrives"
            )
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    text = [about(results), "", "### In one table", "", overview(results)]
    for name, rows in groups(results).items():
        text += ["", f"### {name[0].upper()}{name[1:]}", "", table(rows)]
    if "iteration" in results:
        text += ["", "### One iteration and the floor under it", "", floor(results["iteration"])]
    if "cold" in results:
        text += ["", "### Cold start", "", cold(results["cold"])]
    if "memory" in results:
        copies = results["memory"]["copies beside the cost"]
        text += [
            "",
            "### Memory",
            "",
            f"Peak growth of the process in a certified solve of a dense float32 cost with n = "
            f"{results['memory']['n']:,}: {copies:.2f} copies of the cost, beside the cost itself.",
        ]
    return "\n".join(text)


def about(results: dict[str, Any]) -> str:
    known = results["about"]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items() if v)
    missing = ", ".join(k for k, v in known["versions"].items() if not v)
    text = f"{known['cpu']}, {known['threads']} threads for everybody, Python {known['python']}; {versions}."
    text += " Small sizes only (`--quick`)." if known.get("quick") else ""
    return text + (f" Not installed: {missing}." if missing else "")


def overview(results: dict[str, Any]) -> str:
    lines = [
        "| work | geometric mean | median | least | with the plan written, least | peers that stall |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in {**groups(results), "hard ones among the entropic": hard(results["rows"])}.items():
        ratios = [r["ratio"] for r in rows if r["ratio"]]
        if not ratios:
            continue
        written = [r["ratio"] * r["entries"][0]["ms"] / r["written_ms"] for r in rows if r["ratio"] and r["written_ms"]]
        stall = sorted({e["who"] for r in rows for e in r["entries"] if e["note"].startswith(("stalls", "garbage"))})
        least = f"{min(written):.2f}" if written else ""
        cells = [
            name,
            f"{geometric(ratios):.1f}",
            f"{median(ratios):.1f}",
            f"{min(ratios):.2f}",
            least,
            ", ".join(stall) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| work | ours, ms | CPU, ms | error | best peer | its ms | its error | ratio | the others, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["entries"][0]
        best = next((e for e in row["entries"] if e["who"] == row["best"]), None)
        rest = [e for e in row["entries"][1:] if e is not best and e["note"] != "not installed"]
        others = ", ".join(
            f"{e['who']} {number(e['ms']) if e['ms'] and not e['note'] else '(' + e['note'] + ')'}" for e in rest
        )
        theirs = (
            f"{best['who']} | {number(best['ms'])} | {best['error']:.0e} | {row['ratio']:.1f}"
            if best
            else "none arrives | | | "
        )
        lines.append(
            f"| {row['work']} | {number(ours['ms'])} | {number(ours['cpu_ms'])} | {ours['error']:.0e} | {theirs} | {others} |"
        )
    memories = {row["work"]: row.get("memory") or {} for row in rows}
    if any(v for m in memories.values() for v in m.values()):
        lines += [
            "",
            "Peak memory, MiB: "
            + "; ".join(
                f"{work}: " + ", ".join(f"{who} {x:.0f}" for who, x in found.items() if x)
                for work, found in memories.items()
            )
            + ".",
        ]
    return "\n".join(lines)


def number(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.0f}" if ms < 10_000 else f"{ms:,.0f}"


def floor(found: list[dict[str, float]]) -> str:
    lines = ["| n | one iteration, ms | reading the kernel, ms | two products in torch, ms |", "|---|---|---|---|"]
    lines += [f"| {x['n']} | {x['ours']:.3f} | {x['read']:.3f} | {x['two products in torch']:.3f} |" for x in found]
    return "\n".join(lines)


def cold(found: dict[str, list[float]]) -> str:
    lines = [
        "| | import, s | first 20 x 20, s | first 1000 x 1000, s | first exact 1000 x 1000, s |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{x:.2f}" for x in times) + " |" for name, times in found.items()]
    return "\n".join(lines)


def write(results: dict[str, Any], docs: Path) -> None:
    """The tables between the markers of the page, the plots and the numbers beside it."""
    path = docs / "performance.md"
    before, _, after = re.split(
        f"({re.escape(BEGIN)}.*?{re.escape(END)})", path.read_text(encoding="utf-8"), flags=re.S
    )
    path.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}", encoding="utf-8")
    (docs / "_static" / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot_ratios(results, docs / "_static" / "ratios.png")
    if "growth" in results:
        plot_growth(results["growth"], docs / "_static" / "growth.png")


def plot_ratios(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(name, [r["ratio"] for r in rows if r["ratio"]]) for name, rows in groups(results).items()]
    found = [(name, ratios) for name, ratios in found if ratios]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.5 * len(found) + 1.2), layout="constrained")
    for k, (_, ratios) in enumerate(found):
        axes.plot(ratios, [k] * len(ratios), "o", color="#1f6f8b", alpha=0.45, markersize=6)
        axes.plot([geometric(ratios)], [k], "|", color="black", markersize=18, markeredgewidth=2)
    axes.axvline(1, color="#b23a48", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("time of the best peer / ours; a point per problem, a bar at the mean")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_growth(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    works = sorted({x["work"] for x in found})
    colours = dict(zip(works, ("#1f6f8b", "#e08e45", "#5b8c5a"), strict=False))
    for who, style in (("iotsolve", "-o"), ("POT", "--s")):
        for work in works:
            points = sorted((x["n"], x["ms"] / 1e3) for x in found if x["who"] == who and x["work"] == work)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colours[work], label=f"{who}, {work}", markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("n: points on either side, uniform in the plane")
    axes.set_ylabel("seconds, certificate included")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

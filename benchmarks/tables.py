"""Tables of ``docs/measured.md``, README and ``docs/guides/slower.md`` from CSV: ``python benchmarks/tables.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402 - needs the repository on the path
from benchmarks.results import Record  # noqa: E402

#: Where all tables stand, where the summary does, and what is slower than torch.
MEASURED, README, SLOWER = ROOT / "docs" / "measured.md", ROOT / "README.md", ROOT / "docs" / "guides" / "slower.md"

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SUMMARY_BEGIN, SUMMARY_END = "<!-- summary:begin -->", "<!-- summary:end -->"
STEP_BEGIN, STEP_END = "<!-- step:begin -->", "<!-- step:end -->"
SWAP_BEGIN, SWAP_END = "<!-- accelerate:begin -->", "<!-- accelerate:end -->"
SBI_BEGIN, SBI_END = "<!-- sbi:begin -->", "<!-- sbi:end -->"
SPLINE_BEGIN, SPLINE_END = "<!-- splines:begin -->", "<!-- splines:end -->"
SLOWER_BEGIN, SLOWER_END = "<!-- slower:begin -->", "<!-- slower:end -->"


def replace_between(document: str, content: str, begin: str = BEGIN, end: str = END) -> str | None:
    """``document`` with ``content`` between the markers, or None if it has no such pair of markers."""
    first, last = document.find(begin), document.find(end)
    if first < 0 or last < first:
        return None
    return f"{document[: first + len(begin)]}\n{content.strip()}\n{document[last:]}"


def step_table(records: Sequence[Record]) -> str:
    """One autoregressive step, ours beside every rival: a line a size and direction."""
    names = ("pyro", "nflows", "zuko", "no mask", "hvae_kernels")
    cells = {(r["features"], r["hidden"], r["batch"], r["direction"], r["implementation"]): r for r in records}
    keys = dict.fromkeys(key[:4] for key in cells if key[3] != "growth")
    rows = []
    for features, hidden, batch, direction in keys:
        line = [cells.get((features, hidden, batch, direction, name)) for name in names]
        times = [results.duration(r["p20_us"]) if r else "" for r in line]
        best = results.times(line[-1]["speedup_vs_best_peer"])
        label = f"d = {features}, hidden {hidden}, batch {batch}"
        rows.append((label, direction.replace("+", " + "), *times, best))
    return results.table(("step", "direction", *names[:-1], "ours", "vs best peer"), rows, "github")


def swap_table(records: Sequence[Record]) -> str:
    """Other libraries' flows before and after ``hk.accelerate``."""
    rows = [
        (
            f"{r['library']}, d = {r['features']}, {r['layers']} x ({r['hidden']}), batch {r['batch']}",
            *(r["direction"], results.duration(r["before_us"]), results.duration(r["after_us"])),
            results.times(r["speedup"]),
        )
        for r in records
    ]
    return results.table(("flow", "direction", "before", "after", "speed-up"), rows, "github")


def sbi_table(records: Sequence[Record], style: str = "github") -> str:
    """Posteriors of sbi before and after ``hk.accelerate``."""
    rows = [
        (
            *(r["model"], r["job"], results.duration(r["before_us"]), results.duration(r["after_us"])),
            *(results.times(r["speedup"]), r["same"]),
        )
        for r in records
    ]
    return results.table(("flow", "job", "before", "after", "speed-up", "the same, by seed"), rows, style)


def spline_table(records: Sequence[Record], style: str = "github") -> str:
    """Whole spline flows: a line a rival, its times beside those of ours."""
    cells = {(r["flow"], r["implementation"], r["direction"]): r for r in records}
    flows = {r["flow"]: r for r in records}
    rows = []
    for flow, implementation in dict.fromkeys(key[:2] for key in cells):
        r = flows[flow]
        size = f"{flow}: d = {r['features']}, {r['layers']} x ({r['hidden']}), batch {r['batch']}"
        line = [cells.get((flow, implementation, direction)) for direction in ("density", "gradient", "sampling")]
        times = [f"{results.duration(c['p20_us'])} ({results.times(c['times_of_ours'])})" if c else "" for c in line]
        rows.append((size, implementation, *times, results.size(line[1]["peak_bytes"]) if line[1] else ""))
    headers = ("flow", "implementation", "density (of ours)", "gradient", "sampling", "memory of a gradient")
    return results.table(headers, rows, style)


def update_flows(document: Path, folder: Path = results.FLOWS) -> str:
    """Rewrite the sections on whole flows of ``document``; returns one sentence that says what happened."""
    text, written = document.read_text(), []
    for prefix, table, markers in (
        ("autoregressive", step_table, (STEP_BEGIN, STEP_END)),
        ("accelerate", swap_table, (SWAP_BEGIN, SWAP_END)),
        ("splines", spline_table, (SPLINE_BEGIN, SPLINE_END)),
        ("sbi", sbi_table, (SBI_BEGIN, SBI_END)),
    ):
        paths = sorted(folder.glob(f"{prefix}-*.csv"))
        content = "\n\n".join(f"{_origin(results.read(path)[0])}\n\n{table(results.read(path))}" for path in paths)
        replaced = replace_between(text, content, *markers) if content else None
        if replaced is not None:
            text = replaced
            written.append(prefix)
    document.write_text(text)
    return f"{document.name}: written from {folder}: {', '.join(written) or 'nothing'}"


def publish(
    name: str,
    origin: Mapping[str, object],
    records: Sequence[Record],
    fields: Sequence[str],
    out: Path | None,
    whole: bool,
) -> None:
    """Write a benchmark's CSV into ``out``; a whole run's otherwise to its committed place, and the tables anew."""
    if out or whole:
        path = (out or results.FLOWS) / f"{name}-{results.stem(origin)}.csv"
        results.write(path, records, fields)
        print(f"wrote {path}")
    if whole and not out:
        print(update_flows(MEASURED))


def _origin(record: Record) -> str:
    commit = f"commit {record['commit']}, {record['date']}"
    return f"{results.machine(record)}, torch {record['torch']}, float32, {commit}:"


def section(folder: Path, link: str) -> str:
    """The section's Markdown: chart and table of every device and instruction set that has a CSV in ``folder``.

    Args:
        folder: where the CSV files and charts are.
        link: the same folder as the README links to it.
    """
    parts = []
    for path in sorted(folder.glob("*.csv")):
        records = results.read(path)
        if records:
            parts.append(_device(path, link, records))
    return "\n\n".join(parts)


def _device(path: Path, link: str, records: Sequence[Record]) -> str:
    first = records[0]
    machine, origin = results.machine(first), f"torch {first['torch']}, commit {first['commit']}, {first['date']}"
    image = path.with_suffix(".svg")
    picture = f"![Time a call on {machine}]({link}/{image.name})\n\n" if image.exists() else ""
    return f"{picture}**{machine}** ([all figures]({link}/{path.name}); {origin}):\n\n{_table(records)}"


def _table(records: Sequence[Record]) -> str:
    cells = {tuple(r[key] for key in results.KEY): r for r in records}
    rows = []
    for record in records:
        op, size, dtype, direction, implementation = (record[key] for key in results.KEY)
        if implementation != "hvae_kernels":
            continue
        rivals = [cells.get((op, size, dtype, direction, name)) for name in ("eager", "torch.compile")]
        rows.append(
            (
                f"`{op}` {size}" + ("" if dtype == "float32" else f", {dtype}"),
                direction.replace("+", " + "),
                *(results.duration(rival["p20_us"]) if rival else "" for rival in rivals),
                results.duration(record["p20_us"]),
                *(results.times(record[f"speedup_vs_{name}"]) for name in ("eager", "compile")),
                results.share(record["share_of_copy"]),
                results.size(record["saved_bytes"]),
            )
        )
    headers = (
        "op, size",
        "direction",
        "eager",
        "compiled",
        "ours",
        "vs eager",
        "vs compiled",
        "of copy",
        "saved",
    )
    return results.table(headers, rows, "github")


def update(document: Path, folder: Path = results.RESULTS) -> str:
    """Rewrite the ops' section of ``document``; returns one sentence that says what happened."""
    if not document.exists():
        return f"{document.name} does not exist yet: no table written"
    link = os.path.relpath(folder.resolve(), document.resolve().parent)
    content = section(folder, link)
    if not content:
        return f"no CSV files in {folder}: {document.name} left as it is"
    text = replace_between(document.read_text(), content)
    if text is None:
        return f"{document.name} has no markers {BEGIN} and {END}: no table written"
    document.write_text(text)
    return f"{document.name}: ops written from {folder}"


# ---- README's summary ----

#: The rows, and what people call them. The last one is where torch's own lines are faster.
SUMMARY = {
    ("gaussian_leapfrog", "(4096, 400), K = 10"): "Hamiltonian flow, 10 tempered steps",
    ("planar_flow", "(4096, 400), K = 30"): "30 planar layers",
    ("rational_quadratic_spline", "(4096, 64), K = 8"): "rational-quadratic splines",
    ("gaussian_mixture_log_prob", "(4096, 40), C = 500"): "mixture of 500 Gaussians",
    ("bernoulli_log_prob", "(40, 256, 784)"): "Bernoulli pixels, 40 samples",
    ("draw_read", "(128, 1, 28, 28), N = 5"): "DRAW's reading attention",
    ("masked_linear", "(128, 1024) to 1024"): "masked linear layer",
    ("affine_autoregressive", "(10, 25)"): "one affine step of a tiny batch",
}
CHART = "summary.svg"


def summary(folder: Path, link: str) -> str:
    """Chart and table of :data:`SUMMARY`, forward + backward in float32, of the newest file of each instruction set.

    Args:
        folder: where the CSV files are, and the chart goes.
        link: the same folder as the README links to it.
    """
    sets: dict[str, list[tuple[str, dict[tuple[str, str], Record]]]] = {}
    for path in sorted(folder.glob("*.csv")):
        found = {
            (r["op"], r["size"]): r
            for r in results.read(path)
            if (r["implementation"], r["direction"], r["dtype"]) == ("hvae_kernels", "forward+backward", "float32")
        }
        if found:
            first = next(iter(found.values()))
            sets.setdefault(first["cpu"] or path.stem, []).append((first["date"], found))
    newest = {name: max(measured, key=lambda dated: dated[0])[1] for name, measured in sets.items()}
    rows = []
    for key, name in SUMMARY.items():
        line = [name, f"`{key[0]}` {key[1]}"]
        for found in newest.values():
            r = found.get(key)
            times = [results.times(r[f"speedup_vs_{rival}"]) for rival in ("eager", "compile")] if r else ["", ""]
            line += [results.duration(r["p20_us"]) if r else "", *times]
        rows.append(line)
    headers = ["", "op"] + [f"{part}{name}" for name in newest for part in ("", "vs eager, ", "vs compiled, ")]
    draw_summary(newest, folder / CHART)
    alt = "Times faster than eager PyTorch and than torch.compile, a bar an op and instruction set"
    return f"![{alt}]({link}/{CHART})\n\n{results.table(headers, rows, 'github')}"


def draw_summary(sets: Mapping[str, Mapping[tuple[str, str], Record]], path: Path) -> None:
    """A bar an op and instruction set: how many times faster than ``torch.compile``; eager as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "hvae_kernels"}):  # the same figures make the same file
        figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
        names = list(SUMMARY.values())[::-1]
        height = 0.8 / max(len(sets), 1)
        for place, (name, found) in enumerate(sets.items()):
            shown = [(i, found[key]) for i, key in enumerate(reversed(SUMMARY)) if key in found]
            shown = [(i, r) for i, r in shown if r["speedup_vs_compile"]]
            at = [i + (len(sets) / 2 - place - 0.5) * height for i, _ in shown]
            colour = ("#d1495b", "#2e6f95", "#8d99ae")[place % 3]
            # from 1, where lengths on a logarithmic axis mean something
            axis.barh(at, [float(r["speedup_vs_compile"]) - 1 for _, r in shown], height, 1, color=colour, label=name)
            axis.plot([float(r["speedup_vs_eager"]) for _, r in shown], at, "k|", markersize=6)
        axis.axvline(1, color="black", linewidth=1)
        ticks = (0.5, 1, 2, 5, 10, 20, 50)
        axis.set(xscale="log", yticks=range(len(names)), yticklabels=names, xlim=(0.5, 100))
        axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("faster than torch.compile (bars), than eager (marks)")
        axis.legend(loc="lower right", fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def update_summary(document: Path, folder: Path = results.RESULTS) -> str:
    """Rewrite the summary of ``document``; returns one sentence that says what happened."""
    link = os.path.relpath(folder.resolve(), document.resolve().parent)
    text = replace_between(document.read_text(), summary(folder, link), SUMMARY_BEGIN, SUMMARY_END)
    if text is None:
        return f"{document.name} has no markers {SUMMARY_BEGIN} and {SUMMARY_END}: no summary written"
    document.write_text(text)
    return f"{document.name}: summary written from {folder}"


# ---- What is slower ----

#: Of the speed of eager torch or of ``torch.compile``: what is nearer to 1 differs from one run to the next.
AS_FAST = 0.95


def slower(folder: Path = results.RESULTS) -> str:
    """A line for whatever a CSV file has below :data:`AS_FAST`."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        for r in results.read(path):
            factors = [r[f"speedup_vs_{rival}"] for rival in ("eager", "compile")]
            if r["implementation"] == "hvae_kernels" and any(f and float(f) < AS_FAST for f in factors):
                case = f"`{r['op']}` {r['size']}" + ("" if r["dtype"] == "float32" else f", {r['dtype']}")
                rows.append(
                    (case, r["direction"].replace("+", " + "), results.machine(r), *map(results.times, factors))
                )
    headers = ("op, size", "direction", "on", "vs eager", "vs compiled")
    return results.table(headers, sorted(rows), "github")


def update_slower(document: Path, folder: Path = results.RESULTS) -> str:
    """Rewrite the table of ``document``; returns one sentence that says what happened."""
    text = replace_between(document.read_text(), slower(folder), SLOWER_BEGIN, SLOWER_END)
    if text is None:
        return f"{document.name} has no markers {SLOWER_BEGIN} and {SLOWER_END}: no table written"
    document.write_text(text)
    return f"{document.name}: written from {folder}"


if __name__ == "__main__":
    print(update(MEASURED))
    print(update_flows(MEASURED))
    print(update_summary(README))
    print(update_slower(SLOWER))

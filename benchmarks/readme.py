"""README's speed and study tables, generated from CSV files and the report: ``python benchmarks/readme.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402 - needs the repository on the path
from benchmarks.results import Record  # noqa: E402

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
STUDY_BEGIN, STUDY_END = "<!-- study:begin -->", "<!-- study:end -->"
STEP_BEGIN, STEP_END = "<!-- step:begin -->", "<!-- step:end -->"
SWAP_BEGIN, SWAP_END = "<!-- accelerate:begin -->", "<!-- accelerate:end -->"
SBI_BEGIN, SBI_END = "<!-- sbi:begin -->", "<!-- sbi:end -->"
SPLINE_BEGIN, SPLINE_END = "<!-- splines:begin -->", "<!-- splines:end -->"


def replace_between(document: str, content: str, begin: str = BEGIN, end: str = END) -> str | None:
    """``document`` with ``content`` between the markers, or None if it has no such pair of markers."""
    first, last = document.find(begin), document.find(end)
    if first < 0 or last < first:
        return None
    return f"{document[: first + len(begin)]}\n{content.strip()}\n{document[last:]}"


def study_section(report: str) -> str:
    """Of a study's ``report.md`` the table of Sigma errors, at its smallest and largest dimension."""
    (table,) = (part for part in report.split("\n## ") if part.startswith("Table 4."))
    title, *lines = (line for line in table.splitlines() if line.startswith(("Table", "|")))
    header, rows = lines[:2], lines[2:]
    dims = [row.split("|")[1].strip() for row in rows]
    shown = [row for row, dim in zip(rows, dims, strict=True) if dim in (dims[0], dims[-1])]
    return "\n".join((f"**{title}**", "", *header, *shown))


def update_study(readme: Path, report: Path) -> str:
    """Rewrite the study's section of ``readme``; returns one sentence that says what happened."""
    document = replace_between(readme.read_text(), study_section(report.read_text()), STUDY_BEGIN, STUDY_END)
    if document is None:
        return f"{readme.name} has no markers {STUDY_BEGIN} and {STUDY_END}: no table written"
    readme.write_text(document)
    return f"{readme.name}: study section written from {report}"


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


def update_flows(readme: Path, folder: Path = results.FLOWS) -> str:
    """Rewrite the sections on autoregressive flows of ``readme``; returns one sentence that says what happened."""
    document, written = readme.read_text(), []
    for prefix, table, markers in (
        ("autoregressive", step_table, (STEP_BEGIN, STEP_END)),
        ("accelerate", swap_table, (SWAP_BEGIN, SWAP_END)),
        ("splines", spline_table, (SPLINE_BEGIN, SPLINE_END)),
        ("sbi", sbi_table, (SBI_BEGIN, SBI_END)),
    ):
        paths = sorted(folder.glob(f"{prefix}-*.csv"))
        content = "\n\n".join(f"{_origin(results.read(path)[0])}\n\n{table(results.read(path))}" for path in paths)
        replaced = replace_between(document, content, *markers) if content else None
        if replaced is not None:
            document = replaced
            written.append(prefix)
    readme.write_text(document)
    return f"{readme.name}: written from {folder}: {', '.join(written) or 'nothing'}"


def publish(
    name: str,
    origin: Mapping[str, object],
    records: Sequence[Record],
    fields: Sequence[str],
    out: Path | None,
    whole: bool,
) -> None:
    """Write a benchmark's CSV into ``out``; a whole run's otherwise to where README is made from, and that anew."""
    if out or whole:
        path = (out or results.FLOWS) / f"{name}-{results.stem(origin)}.csv"
        results.write(path, records, fields)
        print(f"wrote {path}")
    if whole and not out:
        print(update_flows(ROOT / "README.md"))


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


def update(readme: Path, folder: Path = results.RESULTS) -> str:
    """Rewrite the section of ``readme``; returns one sentence that says what happened."""
    if not readme.exists():
        return f"{readme.name} does not exist yet: no table written"
    link = folder.resolve().relative_to(readme.resolve().parent).as_posix()
    content = section(folder, link)
    if not content:
        return f"no CSV files in {folder}: {readme.name} left as it is"
    document = replace_between(readme.read_text(), content)
    if document is None:
        return f"{readme.name} has no markers {BEGIN} and {END}: no table written"
    readme.write_text(document)
    return f"{readme.name}: speed section written from {folder}"


if __name__ == "__main__":
    print(update(ROOT / "README.md"))
    print(update_flows(ROOT / "README.md"))
    print(update_study(ROOT / "README.md", ROOT / "docs" / "gaussian" / "report.md"))

"""Results: one CSV a device and instruction set, the table and the chart made from it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: Of whole flows against other libraries: tables of their own.
FLOWS = RESULTS / "flows"

KEY = ("op", "size", "dtype", "direction", "implementation")
FIELDS = (
    *KEY,
    *("min_us", "p20_us", "p50_us", "p80_us", "gbytes_per_s", "gflops_per_s", "share_of_copy"),
    *("speedup_vs_eager", "speedup_vs_compile", "peak_bytes", "saved_bytes"),
    *("device", "cpu", "threads", "torch", "triton", "python", "commit", "date"),
)

Record = Mapping[str, str]


def slug(name: str) -> str:
    """A device's name as a file name: ``"Intel(R) Xeon(R) Processor"`` becomes ``"intel-xeon-processor"``."""
    name = re.sub(r"\((R|TM|C)\)|@.*", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stem(origin: Mapping[str, object]) -> str:
    """The name of a results file: the device, and of a CPU its threads and the instruction set of the kernels."""
    where = slug(str(origin["device"]))
    return f"{where}-{origin['threads']}-threads-{origin['cpu']}" if origin["cpu"] else where


def machine(origin: Mapping[str, object]) -> str:
    """The same for people."""
    where = str(origin["device"])
    return f"{where}, {origin['threads']} threads, {origin['cpu']}" if origin["cpu"] else where


def text(value: object) -> str:
    """A value as the CSV holds it: floats to four significant digits, nothing for None."""
    if value is None:
        return ""
    return f"{float(f'{value:.4g}'):.10g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[dict[str, str]]:
    """The records of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """New records in place of old ones of the same ops; the ops that were not measured again stay as they were."""
    new = list(new)
    measured = {record["op"] for record in new}
    return [record for record in old if record["op"] not in measured] + new


def write(path: Path, records: Iterable[Record], fields: Sequence[str] = FIELDS) -> None:
    """Write a CSV file with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def duration(microseconds: float | str) -> str:
    """Microseconds for people: ``"8.2 us"``, ``"1.20 ms"``."""
    value = float(microseconds)
    if value < 1000:
        return f"{value:.3g} us"
    return f"{value / 1e3:.3g} ms" if value < 1e6 else f"{value / 1e6:.3g} s"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], style: str = "simple") -> str:
    """A table by tabulate; tab-separated where that is not installed."""
    try:
        from tabulate import tabulate
    except ImportError:
        return "\n".join("\t".join(map(str, row)) for row in (headers, *rows))
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def times(value: str) -> str:
    """A speed-up for people, nothing for none."""
    return f"{float(value):.3g}x" if value else ""


def share(value: str) -> str:
    """A share for people, nothing for none."""
    return f"{100 * float(value):.0f} %" if value else ""


def size(value: str) -> str:
    """Bytes for people, nothing for none."""
    if not value:
        return ""
    number, units = float(value), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while number >= 1000 and unit != "GB":
        number, unit = number / 1000, next(units)
    return f"{number:.3g} {unit}"


def summary(records: Sequence[Record]) -> str:
    """The measurement of one op as a table for the terminal."""
    headers = ("size", "direction", "implementation", "p20", "p50", "p80", "GB/s", "of copy", "eager", "compile")
    rows = [
        (
            *(r["size"], r["direction"], r["implementation"]),
            *(duration(r[f"{p}_us"]) for p in ("p20", "p50", "p80")),
            *(r["gbytes_per_s"], share(r["share_of_copy"]), times(r["speedup_vs_eager"])),
            *(times(r["speedup_vs_compile"]), size(r["peak_bytes"]), size(r["saved_bytes"])),
        )
        for r in records
    ]
    return table((*headers, "peak memory", "saved"), rows)


def chart(records: Sequence[Record], path: Path) -> str | None:
    """Draw forward + backward of every size that has rivals; returns what is missing where it cannot be drawn."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: matplotlib is not installed (pip install 'hvae-kernels[bench]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(records)
    if not panels:
        return "no chart: no op was measured against a rival"
    with plt.rc_context({"svg.hashsalt": "hvae_kernels"}):  # the same figures make the same file
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(8, 0.5 + 1.7 * len(panels)), squeeze=False, layout="constrained"
        )
        for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
            _draw(axis, title, bars)
        axes[-1, 0].set_xlabel("microseconds a call, logarithmic; dashed: copying as many bytes")
        figure.suptitle(f"forward + backward on {machine(records[0])}", fontsize="medium")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
    return None


def _panels(records: Sequence[Record]) -> dict[str, list[Record]]:
    panels: dict[str, list[Record]] = {}
    for record in records:
        if record["direction"] == "forward+backward":
            panels.setdefault(f"{record['op']} {record['size']}, {record['dtype']}", []).append(record)
    return {title: bars for title, bars in panels.items() if any(r["speedup_vs_eager"] for r in bars)}


def _draw(axis, title: str, bars: Sequence[Record]) -> None:
    limit = [float(r["p20_us"]) for r in bars if r["implementation"].startswith("copy")]
    bars = [r for r in bars if not r["implementation"].startswith("copy")][::-1]
    names = [r["implementation"] for r in bars]
    values = [float(r["p20_us"]) for r in bars]
    colours = ["#d1495b" if name.startswith("hvae_kernels") else "#8d99ae" for name in names]
    # dots, not bars: on a logarithmic axis a bar's length means nothing
    axis.hlines(names, 0, values, colors="#d8dce4", linewidth=1)
    axis.scatter(values, names, c=colours, s=60, zorder=3)
    for y, (record, value) in enumerate(zip(bars, values, strict=True)):
        gain = record["speedup_vs_eager"]
        note = f", {float(gain):.3g}x" if gain and record["implementation"] != "eager" else ""
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
        axis.annotate(f"{duration(value)}{note}", (value, y), **place)
    axis.set_xscale("log")
    axis.margins(y=0.25)
    axis.set_xlim(min(values + limit) / 2, max(values) * 8)
    if limit:
        axis.axvline(min(limit), color="black", linestyle="--", linewidth=1)
    axis.set_title(title, fontsize="small", loc="left")
    axis.spines[["top", "right"]].set_visible(False)

"""The benchmarks page: the committed CSV files and a script of our own, both inlined: it works from the disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HERE = Path(__file__).parent
MARK = "<!-- charts -->"
FIELDS = ("p20_us", "p50_us", "share_of_copy", "gbytes_per_s", "gflops_per_s", "peak_bytes", "saved_bytes")


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Put controls, data and script where the page marks it."""
    if MARK not in content:
        return content
    data = json.dumps(runs(), separators=(",", ":")).replace("</", "<\\/")
    parts = (
        f"<style>{(HERE / 'charts.css').read_text()}</style>",
        (HERE / "charts.html").read_text(),
        f'<script type="application/json" id="chart-data">{data}</script>',
        f"<script>{(HERE / 'charts.js').read_text()}</script>",
    )
    return content.replace(MARK, "\n".join(parts))


def runs() -> list[dict[str, Any]]:
    """Each device and instruction set that has a CSV: where its figures come from, and the figures."""
    found = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open(newline="") as file:
            records = list(csv.DictReader(file))
        first = records[0]
        where = f"{first['device']}, {first['threads']} threads" if first["cpu"] else first["device"]
        origins = sorted({_origin(record) for record in records})
        figures = [{**_record(record), "origin": origins.index(_origin(record))} for record in records]
        found.append({"device": where, "set": first["cpu"] or "GPU", "origins": origins, "records": figures})
    return found


def _origin(record: dict[str, str]) -> str:
    return f"torch {record['torch']}, commit {record['commit']}, {record['date']}"


def _record(record: dict[str, str]) -> dict[str, Any]:
    size = record["size"] if record["dtype"] == "float32" else f"{record['size']}, {record['dtype']}"
    figures = {name: float(record[name]) for name in FIELDS if record[name]}
    names = {"op": record["op"], "direction": record["direction"], "name": record["implementation"]}
    return {**names, "size": size, **figures}

"""The comparison: ``python benchmarks/run.py [-k OP] [--quick] [--device cpu|cuda] [--cpu SET] [--out DIR] ...``.

Every op is first compared with its formula in float64; one that fails is not timed, and the exit status is 1. Then
ours, the plain formula, ``torch.compile`` of it, peers and a copy of as many bytes take turns, all sizes of an op in
one run. Ratios are made of 20th percentiles. ``--cpu`` holds ours and rivals to one instruction set. A full run writes
``results/<device>.csv``, of a CPU ``results/<device>-<threads>-threads-<set>.csv``, and its chart, and rewrites
the tables of docs and README's summary; a quick one writes only where ``--out`` says.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's start and stop are no news

from benchmarks import cpu  # noqa: E402 - needs the repository on the path, as the next lines do

if __name__ == "__main__":
    cpu.hold()

import torch  # noqa: E402

import hvae_kernels as hk  # noqa: E402
from benchmarks import gate, memory, registry, results, roofline, tables  # noqa: E402
from benchmarks.registry import DIRECTIONS, Case, Row  # noqa: E402
from benchmarks.results import Record  # noqa: E402
from benchmarks.rivals import COMPILE, COPY, EAGER, Problem  # noqa: E402
from benchmarks.timing import FULL, QUICK, Candidate, Plan, Timing, interleave  # noqa: E402

DTYPE = torch.float32


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, for all rivals alike.

    By default it gives megabytes back at every free and takes them again at the next call: a large result then costs
    thousands of page faults, more than the arithmetic, and the benchmark measures the kernel's page allocator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 30)


def device_name(device: torch.device) -> str:
    """The processor's or GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return " ".join(next(names, platform.machine()).split())


def commit() -> str:
    """The commit measured, marked where the tree has changes; ``COMMIT`` names it where there is no repository.

    What benchmarks write themselves is no change.
    """
    written = (":!benchmarks/results", ":!docs/measured.md", ":!README.md")
    name = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return f"{name}{'-dirty' if changes else ''}" if name else os.environ.get("COMMIT", "unknown")


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def refuse_changes(publishes: bool) -> None:
    """Where tables will be made of the figures, their commit must say what was measured.

    Raises:
        SystemExit: the tree has changes.
    """
    if publishes and commit().endswith("-dirty"):
        raise SystemExit(
            "the tree has changes: commit them, so that the tables name what was measured, or give --out DIR"
        )


def provenance(device: torch.device) -> dict[str, object]:
    """The columns that say where the figures come from."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "cpu": "" if device.type == "cuda" else hk.config()["cpu"]["chosen"] or "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def passed(row: Row, cases: list[Case], device: torch.device) -> list[Case]:
    """The cases whose op is right; says so for each."""
    right = []
    for case in cases:
        verdict = gate.check(row, case, case.dtype, device)
        print(f"  {'right' if verdict.passed else 'WRONG'}: {row.name} {case.label}: {verdict.message}", flush=True)
        right += [case] if verdict.passed else []
    return right


def measure(row: Row, cases: list[Case], device: torch.device, plan: Plan, graphs: bool = False) -> list[Record]:
    """Time all ``cases`` of ``row``, each direction in one interleaved run; one record a candidate."""
    problems = {case.label: Problem(row, case, case.dtype, device) for case in cases}
    origin = provenance(device)
    records = []
    for direction in DIRECTIONS:
        candidates = {label: problem.candidates(direction, graphs) for label, problem in problems.items()}
        flat = [_renamed(c, f"{label}/{c.name}") for label, found in candidates.items() for c in found]
        timings = interleave(flat, device.type, plan)
        print(f"  timed {direction}: {len(flat)} candidates", flush=True)
        for label, problem in problems.items():
            named = {c.name: timings[f"{label}/{c.name}"] for c in candidates[label]}
            for candidate in candidates[label]:
                record = _figures(problem, direction, candidate.name, named)
                record |= _memory(problem, direction, candidate)
                records.append({key: results.text((record | origin).get(key)) for key in results.FIELDS})
    order = {case.label: i for i, case in enumerate(cases)}
    return sorted(records, key=lambda r: (order[r["size"]], DIRECTIONS.index(r["direction"])))


def _renamed(candidate: Candidate, name: str) -> Candidate:
    return Candidate(name, candidate.call, candidate.prepare, candidate.calls)


def _figures(problem: Problem, direction: str, name: str, timings: Mapping[str, Timing]) -> dict[str, object]:
    timing = timings[name]
    # the yardstick of a graph is the copy in a graph: neither waits for launches
    copy = timings.get(f"{COPY} (graph)" if name.endswith("(graph)") else COPY, timings[COPY])
    rivals_ = {"speedup_vs_eager": EAGER, "speedup_vs_compile": COMPILE} if not name.startswith(COPY) else {}
    return {
        **{"op": problem.row.name, "size": problem.case.label, "dtype": str(problem.dtype).removeprefix("torch.")},
        **{"direction": direction, "implementation": name},
        **{"min_us": timing.min, "p20_us": timing.p20, "p50_us": timing.p50, "p80_us": timing.p80},
        "gbytes_per_s": problem.bytes(direction) / timing.p20 / 1e3,
        "gflops_per_s": problem.row.operations(direction, problem.case.sizes) / timing.p20 / 1e3,
        "share_of_copy": copy.p20 / timing.p20,
        **{column: timings[rival].p20 / timing.p20 for column, rival in rivals_.items() if rival in timings},
    }


def _memory(problem: Problem, direction: str, candidate: Candidate) -> dict[str, object]:
    if candidate.name.startswith(COPY) or candidate.name.endswith("(graph)"):
        return {}
    argument = candidate.prepare(0)
    figures: dict[str, object] = {}
    if direction != "backward":  # what is recorded serves a single backward pass, and the measurement calls twice
        figures["peak_bytes"] = memory.peak_bytes(lambda: candidate.call(argument), problem.device.type)
    if direction != "forward":
        figures["saved_bytes"] = memory.saved_bytes(problem.functions[candidate.name], problem.leaves[0])
    return figures


def header(device: torch.device) -> str:
    """Machine, torch and the matrix-product rate, the ceiling for arithmetic as the copy is for bytes."""
    product, flops = roofline.matrix_product(DTYPE, device)
    rate = flops / interleave([product], device.type, QUICK)[product.name].p20 / 1e6
    origin = provenance(device)
    return f"{results.machine(origin)}, torch {origin['torch']}, matrix product {rate:.2f} TFLOP/s in {DTYPE}"


def disturbed(records: list[Record]) -> bool:
    """Whether something else used the machine: one size's copies have about one bandwidth unless they had to wait.

    Of different directions, too, but what the last-level cache holds is copied three to four times as fast as the rest.
    """
    best: dict[str, float] = {}
    typical: dict[str, float] = {}
    waited = False
    for record in records:
        shortest = float(record["min_us"])
        if record["implementation"] == COPY and shortest > 50:  # shorter ones are all call overhead
            moved, middle = float(record["gbytes_per_s"]) * float(record["p20_us"]), float(record["p50_us"])
            size = record["size"]
            typical[size] = min(typical.get(size, math.inf), moved / middle)
            best[size] = max(best.get(size, 0.0), moved / shortest)
            waited = waited or middle > 2 * shortest
    return waited or any(6 * typical[size] < best[size] for size in best)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", dest="pattern", metavar="OP", help="only ops whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where CSV and chart go (default: benchmarks/results)")
    parser.add_argument("--graphs", action="store_true", help="on a GPU: also replayed as CUDA graphs")
    parser.add_argument("--breakdown", action="store_true", help="only show where a small call's microseconds go")
    options = cpu.parse(parser, arguments)
    if options.cpu and options.device != "cpu":
        parser.error("--cpu goes with --device cpu")
    return options


def write(records: list[Record], device: torch.device, folder: Path) -> None:
    """CSV and chart of the device, and the tables where the folder is the committed one."""
    path = folder / f"{results.stem(provenance(device))}.csv"
    merged = results.merge(results.read(path), records)
    results.write(path, merged)
    print(f"wrote {path}")
    problem = results.chart(merged, path.with_suffix(".svg"))
    print(problem or f"wrote {path.with_suffix('.svg')}")
    if folder.resolve() == results.RESULTS.resolve():
        print(tables.update(tables.MEASURED))
        print(tables.update_summary(tables.README))


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 if an op is wrong."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here")
        return 2
    if options.breakdown:
        from benchmarks import breakdown

        return breakdown.main(options.device)
    try:
        rows = registry.select(options.pattern)
    except ValueError as error:
        print(error)
        return 2
    refuse_changes(not options.out and not options.quick)
    keep_freed_memory()
    device = torch.device(options.device)
    print(header(device), flush=True)
    wrong, records = 0, []
    for row in rows:
        cases = [case for case in row.cases if device.type in case.devices]
        right = passed(row, cases, device)
        wrong += len(cases) - len(right)
        plan, graphs = QUICK if options.quick else FULL, options.graphs and device.type == "cuda"
        measured = measure(row, right, device, plan, graphs) if right else []
        print(f"\n{row.name}\n{results.summary(measured)}\n" if measured else f"\n{row.name}: not timed\n")
        if disturbed(measured):
            print("the machine was DISTURBED while copying: do not trust these figures, run again\n")
        records += measured
    if records and (options.out or not options.quick):
        write(records, device, options.out or results.RESULTS)
    if wrong:
        print(f"{wrong} case(s) are WRONG and were not timed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks' own arithmetic: percentiles, tables, the gate. Nothing here is about speed."""

import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hvae.draw.models import Draw

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    accelerate,
    annealed,
    autoregressive,
    breakdown,
    cpu,
    draw,
    gate,
    memory,
    registry,
    results,
    rivals,
    run,
    sbi,
    splines,
    tables,
    timing,
    training_step,
)
from benchmarks.ops.gaussian_leapfrog import GAUSSIAN_LEAPFROG  # noqa: E402
from benchmarks.registry import Case, Row  # noqa: E402
from benchmarks.timing import Candidate, Plan, Timing  # noqa: E402
from hvae_kernels import _extension  # noqa: E402

CPU = torch.device("cpu")
TINY = Case("(5, 3), K = 2", {"batch": 5, "features": 3, "steps": 2})
BRIEF = Plan(rounds=2, turn=0.0, cap=0.0, sample=1e-5, fewest=2)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Each timing collects garbage first: what earlier tests hold need not be looked at a hundred times."""
    gc.collect()
    gc.freeze()


def quick_row(**changes) -> Row:
    return dataclasses.replace(GAUSSIAN_LEAPFROG, cases=(dataclasses.replace(TINY, stock=False),), **changes)


def test_percentiles_interpolate_between_samples():
    taken = Timing((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (taken.min, taken.p50, taken.percentile(100)) == (1.0, 3.0, 5.0)
    assert taken.p20 == pytest.approx(1.8)
    assert taken.p80 == pytest.approx(4.2)
    assert Timing((7.0,)).p80 == 7.0


@pytest.fixture
def take(monkeypatch):
    """Lets seconds pass on the benchmarks' clock, which otherwise stands still."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def take(seconds):
        now[0] += seconds

    return take


def test_candidates_take_turns_and_prepare_is_off_the_clock(monkeypatch, take):
    order = []
    monkeypatch.setattr(timing, "calibrate", lambda *_: 1)

    def candidate(name: str) -> Candidate:
        return Candidate(name, lambda name: (order.append(name), take(3e-6)), lambda i: (take(1.0), name)[1])

    timings = timing.interleave([candidate("a"), candidate("b"), candidate("c")], "cpu", BRIEF)
    assert "".join(order) == "abc" + "bca", "every round starts with another candidate"
    assert timings["a"].samples == pytest.approx((3, 3)), "or the second in prepare was timed"


def test_calls_behind_one_call_share_its_time(take):
    work = Candidate("one", lambda _: take(0.002), lambda i: None)
    many = dataclasses.replace(work, name="many", calls=10)
    timings = timing.interleave([work, many], "cpu", BRIEF)
    assert (timings["one"].min, timings["many"].min) == pytest.approx((2000, 200))


def test_leapfrog_bytes_are_sixteen_and_twenty_four_an_element():
    sizes = {"batch": 7, "features": 11, "steps": 3}
    counted = [GAUSSIAN_LEAPFROG.bytes(direction, 4, sizes) for direction in registry.DIRECTIONS]
    assert counted == [16 * 77, 24 * 77, 40 * 77]
    operations = [GAUSSIAN_LEAPFROG.operations(direction, sizes) for direction in registry.DIRECTIONS]
    assert operations[2] == operations[0] + operations[1]


def test_select_names_the_ops_there_are():
    assert [row.name for row in registry.select("gaussian_leapfrog")] == [
        "gaussian_leapfrog",
        "dense_gaussian_leapfrog",
    ]
    assert [row.name for row in registry.select("dense")] == ["dense_gaussian_leapfrog"]
    assert registry.select(None) == list(registry.ROWS)
    with pytest.raises(ValueError, match="gaussian_leapfrog"):
        registry.select("no such op")


def test_gate_is_green_for_the_op():
    verdict = gate.check(GAUSSIAN_LEAPFROG, TINY, torch.float32, "cpu")
    assert verdict.passed, verdict.message


def test_gate_is_red_for_a_wrong_value():
    def wrong(z, *rest):
        last, rho = GAUSSIAN_LEAPFROG.op(z, *rest)
        return last * (1 + 1e-5), rho

    assert not gate.check(quick_row(op=wrong), TINY, torch.float32, "cpu").passed


def test_gate_is_red_for_a_wrong_gradient_only():
    def wrong(z, rho, precision, *rest):
        held = precision * 0.5 + precision.detach() * 0.5
        return GAUSSIAN_LEAPFROG.op(z, rho, held, *rest)

    verdict = gate.check(quick_row(op=wrong), TINY, torch.float32, "cpu")
    assert not verdict.passed
    assert verdict.message.startswith("result 4"), "the gradient of precision comes after two outputs, z and rho"


def test_gate_is_red_for_nan():
    def wrong(*inputs):
        last, rho = GAUSSIAN_LEAPFROG.op(*inputs)
        return last * float("nan"), rho

    assert not gate.check(quick_row(op=wrong), TINY, torch.float32, "cpu").passed


def test_a_red_gate_is_not_timed_and_fails_the_run(monkeypatch, capsys, tmp_path):
    def wrong(*inputs):
        return GAUSSIAN_LEAPFROG.formula(*(1.001 * x for x in inputs))

    monkeypatch.setattr(registry, "ROWS", (quick_row(op=wrong),))
    monkeypatch.setattr(run, "header", lambda device: "")
    assert run.main(["--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "not timed" in printed
    assert not list(tmp_path.iterdir())


def test_a_green_run_writes_every_column(monkeypatch, capsys, tmp_path):
    row = dataclasses.replace(quick_row(peers={"peer": GAUSSIAN_LEAPFROG.formula}), cases=(TINY,))
    monkeypatch.setattr(registry, "ROWS", (row,))
    monkeypatch.setattr(rivals, "compiled", lambda function: function)  # half a minute of compiling proves nothing here
    monkeypatch.setattr(run, "header", lambda device: "")
    monkeypatch.setattr(run, "QUICK", BRIEF)
    assert run.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    records = results.read(path)
    assert {r["implementation"] for r in records} == {"hvae_kernels", "eager", "torch.compile", "peer", "copy"}
    assert {r["direction"] for r in records} == set(registry.DIRECTIONS)
    assert all(set(r) == set(results.FIELDS) and float(r["p20_us"]) > 0 for r in records)
    assert {r["cpu"] for r in records} == {_extension.cpu_set()}
    assert path.stem.endswith(f"-{torch.get_num_threads()}-threads-{_extension.cpu_set()}")


def test_a_disturbed_machine_is_noticed():
    record = {
        "implementation": "copy",
        "size": "a",
        "gbytes_per_s": "50",
        "min_us": "95",
        "p20_us": "100",
        "p50_us": "110",
    }
    other_op = record | {"implementation": "eager", "p50_us": "1000"}
    tiny = record | {"size": "b", "min_us": "1", "p50_us": "9"}
    assert not run.disturbed([record, other_op, tiny])
    assert run.disturbed([record, record | {"p50_us": "300"}]), "within a direction"
    slow = record | {"gbytes_per_s": "5", "min_us": "990", "p20_us": "1000", "p50_us": "1010"}
    assert run.disturbed([record, slow]), "a whole direction"


def test_csv_round_trip_and_merge(tmp_path):
    def record(op: str, value: str) -> dict[str, str]:
        return dict.fromkeys(results.FIELDS, "") | {"op": op, "p20_us": value}

    path = tmp_path / "folder" / "device.csv"
    results.write(path, [record("a", "1"), record("b", "2")])
    merged = results.merge(results.read(path), [record("b", "3"), record("c", "4")])
    results.write(path, merged)
    assert [(r["op"], r["p20_us"]) for r in results.read(path)] == [("a", "1"), ("b", "3"), ("c", "4")]
    assert results.read(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), (1234567.0, "1235000"), (0.123456, "0.1235"), (0.0, "0"), (26214400, "26214400"), ("x", "x")],
)
def test_text_keeps_four_digits(value, expected):
    assert results.text(value) == expected


def test_units_for_people():
    assert [results.duration(v) for v in (8.19, 1200, 2.5e6)] == ["8.19 us", "1.2 ms", "2.5 s"]
    assert [results.size(v) for v in ("", "0", "26214400", "3e12")] == ["", "0 B", "26.2 MB", "3e+03 GB"]
    assert (results.times("33.333"), results.times(""), results.share("0.856")) == ("33.3x", "", "86 %")


def test_slug_is_a_plain_file_name():
    assert results.slug("Intel(R) Xeon(R) Gold 6354 CPU @ 3.00GHz") == "intel-xeon-gold-6354-cpu"
    assert results.slug("NVIDIA H200") == "nvidia-h200"


def test_files_are_named_by_device_threads_and_instruction_set():
    origin = {"device": "AMD EPYC", "threads": 2, "cpu": "avx2"}
    assert (results.stem(origin), results.machine(origin)) == ("amd-epyc-2-threads-avx2", "AMD EPYC, 2 threads, avx2")
    origin = {"device": "NVIDIA H200", "threads": 8, "cpu": ""}
    assert (results.stem(origin), results.machine(origin)) == ("nvidia-h200", "NVIDIA H200")


def test_tables_show_every_set_of_a_device(tmp_path):
    origin = {"device": "A Device", "threads": "2", "torch": "2.13.0", "commit": "abc", "date": "2026-01-01"}
    key = {
        "op": "an_op",
        "size": "(2, 3)",
        "dtype": "float32",
        "direction": "forward",
        "implementation": "hvae_kernels",
    }
    swap = dict.fromkeys(accelerate.FIELDS, "1") | {"library": "zuko"} | origin
    posterior = dict.fromkeys(sbi.FIELDS, "1") | {"model": "maf"} | origin
    whole = dict.fromkeys(splines.FIELDS, "1") | {"flow": "NSF", "direction": "gradient"} | origin
    for name, us in (("avx2", "20"), ("avx512", "10")):
        measured = dict.fromkeys(results.FIELDS, "") | key | origin | {"cpu": name, "p20_us": us}
        results.write(tmp_path / f"{results.stem(measured)}.csv", [measured])
        flows = tmp_path / f"accelerate-{results.stem(measured)}.csv"
        results.write(tmp_path / "flows" / flows.name, [swap | {"cpu": name}], accelerate.FIELDS)
        flows = tmp_path / "flows" / f"sbi-{results.stem(measured)}.csv"
        results.write(flows, [posterior | {"cpu": name}], sbi.FIELDS)
        flows = tmp_path / "flows" / f"splines-{results.stem(measured)}.csv"
        results.write(flows, [whole | {"cpu": name}], splines.FIELDS)
    text = tables.section(tmp_path, "results")
    assert text.index("A Device, 2 threads, avx2** ([all figures](results/a-device-2-threads-avx2.csv)") < text.index(
        "20 us"
    )
    assert text.index("20 us") < text.index("A Device, 2 threads, avx512**") < text.index("10 us")
    document = tmp_path / "README.md"
    markers = (tables.SWAP_BEGIN, tables.SWAP_END, tables.SPLINE_BEGIN, tables.SPLINE_END)
    document.write_text("\n".join((*markers, tables.SBI_BEGIN, tables.SBI_END)))
    tables.update_flows(document, tmp_path / "flows")
    assert document.read_text().count("| zuko, d = 1") == 2
    assert document.read_text().count("| maf ") == 2
    assert document.read_text().count("| NSF: d = 1") == 2
    assert "A Device, 2 threads, avx2, torch 2.13.0" in document.read_text()


def test_what_is_slower_is_told(tmp_path):
    key = {"op": "an_op", "size": "(2, 3)", "dtype": "float32", "implementation": "hvae_kernels", "cpu": "avx2"}
    speeds = {"forward": ("0.90", "1.5"), "backward": ("1.2", "0.96"), "forward+backward": ("3", "0.5")}
    records = [
        dict.fromkeys(results.FIELDS, "") | key | {"direction": x, "speedup_vs_eager": a, "speedup_vs_compile": b}
        for x, (a, b) in speeds.items()
    ]
    results.write(tmp_path / "a.csv", records)
    told = [line.split("|")[2].strip() for line in tables.slower(tmp_path).splitlines()[2:]]
    assert told == ["forward", "forward + backward"]
    assert tables.slower() in tables.SLOWER.read_text(), "python benchmarks/tables.py"


#: What each of the libraries that rivals are made of goes by, once it has read the environment.
HELD = """
import json, sys
sys.path.insert(0, {root!r})
from benchmarks import cpu
cpu.hold(["--quick", "--cpu", {name!r}])
import torch
from torch._inductor.cpp_builder import _get_cpu_arch_cflags
from torch._inductor.cpu_vec_isa import pick_vec_isa
from benchmarks import run
options = run.parse(["--quick", "--cpu", {name!r}])
arch, width = _get_cpu_arch_cflags("c++"), pick_vec_isa()
print(json.dumps([options.cpu, run.provenance(torch.device("cpu"))["cpu"], torch.backends.cpu.get_cpu_capability(),
                  arch, width.bit_width() if width else 0]))
"""
RIVALS_OF = {
    "baseline": ["DEFAULT", ["march=x86-64"], 0],
    "avx2": ["AVX2", ["march=x86-64-v3"], 256],
    "avx512": ["AVX512", ["march=x86-64-v4"], 512],
}


def python(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in cpu.variables("avx2")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its instruction sets")
@pytest.mark.parametrize("name", [name for name, reason in _extension.cpu_sets().items() if reason is None])
def test_cpu_holds_ours_and_rivals(name):
    result = python("-c", HELD.format(root=str(ROOT), name=name))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [name, name, *RIVALS_OF[name]]


@pytest.mark.parametrize(
    "script",
    [
        "run",
        "accelerate",
        "annealed",
        "autoregressive",
        "draw",
        "hamiltonian",
        "path_gradient",
        "sbi",
        "splines",
        "training_step",
    ],
)
def test_scripts_hold_before_torch_is_imported(script):
    """The environment is set before the line that imports torch, or ``hold`` would raise."""
    result = python(ROOT / "benchmarks" / f"{script}.py", "--cpu", "baseline", "--help")
    assert result.returncode == 0, result.stderr
    assert "--cpu {baseline,avx2,avx512}" in result.stdout


def test_cpu_that_cannot_be_held_is_refused(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="torch is imported already"):
        cpu.hold(["--cpu", "avx2"])
    for name in cpu.variables("avx2"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        run.parse(["--cpu", "baseline"])
    assert "--cpu baseline works on the command line alone" in capsys.readouterr().err
    for name, value in cpu.variables("baseline").items():
        monkeypatch.setenv(name, value)
    assert run.parse(["--cpu", "baseline"]).cpu == "baseline"
    with pytest.raises(SystemExit):
        run.parse(["--cpu", "baseline", "--device", "cuda"])
    assert "--cpu goes with --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(_extension, "why_absent", lambda: "the extension was not built")
    with pytest.raises(SystemExit):
        run.parse(["--cpu", "baseline"])
    assert "--cpu baseline: the extension was not built" in capsys.readouterr().err


def test_our_own_variable_alone_is_no_benchmark(monkeypatch, capsys):
    for name in cpu.variables("avx2"):
        monkeypatch.delenv(name, raising=False)
    cpu.hold([])
    monkeypatch.setenv("HVAE_KERNELS_CPU", "baseline")
    with pytest.raises(SystemExit):
        cpu.hold([])
    assert "HVAE_KERNELS_CPU=baseline holds our kernels alone: --cpu baseline holds rivals" in capsys.readouterr().err


def test_only_what_is_between_the_markers_is_replaced():
    document = f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n"
    once = tables.replace_between(document, "new")
    assert once == f"above\n{tables.BEGIN}\nnew\n{tables.END}\nbelow\n"
    assert tables.replace_between(once, "new") == once
    assert tables.replace_between("no markers", "new") is None
    assert tables.replace_between(f"{tables.END}{tables.BEGIN}", "new") is None


def test_table_comes_from_the_csv(tmp_path):
    def record(implementation: str, **values: str) -> dict[str, str]:
        key = {"op": "an_op", "size": "(2, 3)", "dtype": "float32", "direction": "forward+backward"}
        held = {"device": "A Device", "torch": "2.13.0", "commit": "abc", "date": "2026-01-01", "threads": "2"}
        return dict.fromkeys(results.FIELDS, "") | key | held | {"implementation": implementation} | values

    ours = record("hvae_kernels", p20_us="10", speedup_vs_eager="33.33", share_of_copy="0.856", saved_bytes="0")
    results.write(tmp_path / "results" / "device.csv", [ours, record("eager", p20_us="333.3")])
    document = tmp_path / "README.md"
    assert "does not exist" in tables.update(document, tmp_path / "results")
    document.write_text("no markers")
    assert "no markers" in tables.update(document, tmp_path / "results")
    document.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    tables.update(document, tmp_path / "results")
    (line,) = [line for line in document.read_text().splitlines() if "`an_op`" in line]
    for cell in ("333 us", "10 us", "33.3x", "86 %", "0 B"):
        assert f" {cell} " in line
    assert "results/device.csv" in document.read_text()


def test_chart_is_reproducible(tmp_path):
    pytest.importorskip("matplotlib")
    base = dict.fromkeys(results.FIELDS, "") | {"op": "an_op", "size": "(2, 3)", "direction": "forward+backward"}
    bars = {"hvae_kernels": ("10", "33.3"), "eager": ("333", "1"), "copy": ("5", "")}
    records = [base | {"implementation": n, "p20_us": t, "speedup_vs_eager": s} for n, (t, s) in bars.items()]
    for name in ("a.svg", "b.svg"):
        assert results.chart(records, tmp_path / name) is None
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "no chart" in results.chart([], tmp_path / "c.svg")


def test_saved_bytes_leaves_inputs_out_and_counts_a_storage_once():
    x = torch.randn(100, requires_grad=True)
    assert memory.saved_bytes(lambda x: (x * x,), (x,)) == 0
    assert memory.saved_bytes(lambda x: (x.exp().exp(),), (x,)) == 2 * 400
    assert memory.saved_bytes(lambda x: ((y := x.exp()) * y,), (x,)) == 400


def test_peak_bytes_counts_what_is_held_at_once():
    x = torch.zeros(1000)
    assert memory.peak_bytes(lambda: x.clone(), "cpu") == 4000
    assert memory.peak_bytes(lambda: (x.clone(), x.clone()), "cpu") == 8000
    assert memory.peak_bytes(lambda: [x.clone() is None for _ in range(3)], "cpu") == 4000


def test_breakdown_adds_up_to_the_whole():
    names = ("kernel, forward", "Function, gradients", "op, gradients", "kernel, backward")
    us = dict(zip(names, (3.0, 7.0, 9.0, 5.0), strict=True))
    us |= {"empty Function, autograd.grad": 20.0, "empty Function, engine": 12.0, "op, forward + backward": 40.0}
    assert sum(value for _, value in breakdown.account(us)) == pytest.approx(40.0)


def test_training_loops_find_the_same_bound():
    training_step.agree(dim=5, steps=3)


@pytest.mark.parametrize("attention", [True, False])
def test_both_draws_find_the_same_bound(attention, monkeypatch):
    model = Draw(steps=2, attention=attention, hidden=8, latent=3)
    draw.agree(model)
    write = draw.Plain.write
    monkeypatch.setattr(draw.Plain, "write", lambda self, state: 1.001 * write(self, state))
    with pytest.raises(AssertionError):
        draw.agree(model)


def test_annealed_gradients_are_compared_block_by_block(monkeypatch):
    """The last block is too small to show in a norm of all."""

    def spoiled(problem, decoder):
        *others, last = annealed.RIVALS["store"](problem, decoder)()
        return lambda: (*others, (1 + 1e-6) * last)

    monkeypatch.setitem(annealed.RIVALS, "spoiled", spoiled)
    annealed.agree("mlp", ["store", "states", "reversible"])
    with pytest.raises(AssertionError, match="spoiled: gradient 8 is off by 1e-06"):
        annealed.agree("mlp", ["spoiled"])


def test_gpu_check_is_valid_bash():
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu_check.sh"], check=True)


def test_summary_has_a_column_of_each_set_and_a_row_where_we_lose(tmp_path):
    key, _ = list(tables.SUMMARY.items())[-1]
    for name, date, eager in (("avx2", "02", "0.83"), ("avx512", "02", "0.81"), ("avx512", "01", "0.5")):
        row = {"op": key[0], "size": key[1], "dtype": "float32", "direction": "forward+backward", "cpu": name}
        row |= {"implementation": "hvae_kernels", "p20_us": "140", "speedup_vs_eager": eager, "speedup_vs_compile": "2"}
        results.write(tmp_path / f"{name}-{date}.csv", [dict.fromkeys(results.FIELDS, "") | row | {"date": date}])
    document = tmp_path / "README.md"
    document.write_text("no markers")
    assert "no markers" in tables.update_summary(document, tmp_path)
    document.write_text(f"{tables.SUMMARY_BEGIN}\n{tables.SUMMARY_END}\n")
    tables.update_summary(document, tmp_path)
    (line,) = [line for line in document.read_text().splitlines() if f"`{key[0]}` {key[1]}" in line]
    assert re.sub(" +", " ", line).endswith("| 140 us | 0.83x | 2x | 140 us | 0.81x | 2x |")
    assert (tmp_path / tables.CHART).exists()
    assert len(tables.SUMMARY) <= 8


def test_whole_runs_refuse_a_tree_with_changes(monkeypatch):
    monkeypatch.setattr(run, "commit", lambda: "abc-dirty")
    run.refuse_changes(False)
    for benchmark in (accelerate, autoregressive, sbi, splines):
        monkeypatch.setattr(benchmark.run, "keep_freed_memory", lambda: pytest.fail("it began"))
        with pytest.raises(SystemExit, match="the tree has changes: commit them"):
            benchmark.main([])
    with pytest.raises(SystemExit, match="the tree has changes"):
        run.main([])


def test_sbi_benchmark_measures_every_job(tmp_path, capsys):
    before = Path.cwd()
    assert sbi.main(["--tiny", "--keep", "nsf", "--out", str(tmp_path)]) == 0
    assert Path.cwd() == before
    (path,) = tmp_path.glob("sbi-*.csv")
    records = results.read(path)
    assert [r["model"] for r in records] == ["nsf"] * 3 + ["zuko_nsf"] * 3
    assert {r["layers"] for r in records} == {"5"}
    assert all(
        float(r["speedup"]) == pytest.approx(float(r["before_us"]) / float(r["after_us"]), 1e-2) for r in records
    )
    printed = capsys.readouterr().out
    assert "calibration, 4 posteriors" in printed
    assert "0 of 20 ranks moved" in printed


def test_sbi_benchmark_refuses_what_is_not_the_same():
    same, other = torch.zeros(9, 2), torch.ones(9, 2)
    assert sbi.draws(same, same) == "apart by 0e+00 on average, 0e+00 at most"
    assert sbi.ranks(same, same, 100) == "0 of 18 ranks moved, by 0 of 100 at most"
    with pytest.raises(AssertionError, match=r"samples differ by 1\.0"):
        sbi.draws(same, other)
    with pytest.raises(AssertionError, match=r"ranks moved by 2\.0 on average"):
        sbi.ranks(same, 2 * other, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sbi_benchmark_refuses_trainings_that_part(monkeypatch, dtype):
    class Estimator(torch.nn.Linear):
        def loss(self, theta, x):
            return (theta - self(x)).square().sum(-1)

    def slightly_other(estimator):
        if estimator.weight.dtype is dtype:
            estimator.bias.data += 0.01
        return estimator, None

    draws = [torch.randn(300, 5) for _ in range(4)]
    problem, estimator = sbi.Problem(None, *draws), Estimator(5, 5)
    assert "apart by 0e+00" in sbi.losses(problem, estimator, estimator)
    monkeypatch.setattr(sbi.hk, "accelerate", slightly_other)
    with pytest.raises(AssertionError, match=f"two descents in {dtype}"):
        sbi.losses(problem, estimator, estimator)


def test_spline_benchmark_measures_every_rival(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(splines, "FULL", BRIEF)
    assert splines.main(["--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("splines-*.csv")
    rows = results.read(path)
    names = ["hvae_kernels", "zuko", "zuko, accelerated", "nflows", "nflows, accelerated"]
    if importlib.util.find_spec("flowjax"):
        names.append("flowjax, jitted")
    for size, direction in itertools.product(splines.TINY, ("density", "gradient", "sampling")):
        line = [r for r in rows if (r["flow"], r["direction"]) == (size.name, direction)]
        assert sorted(r["implementation"] for r in line) == sorted(names)
        assert all(float(r["min_us"]) > 0 and bool(r["peak_bytes"]) == (direction == "gradient") for r in line)
    assert "tiny coupling" in capsys.readouterr().out


def test_accelerate_benchmark_measures_every_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerate, "FULL", BRIEF)
    monkeypatch.setattr(accelerate, "SLOW", 0.001)
    assert accelerate.main(["--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("accelerate-*.csv")
    records = results.read(path)
    measured = (*accelerate.LIBRARIES, *accelerate.SPLINES, *accelerate.AFFINE_COUPLING)
    assert [name for name, _ in itertools.groupby(r["library"] for r in records)] == [one.name for one in measured]
    assert path.stem.endswith(f"-threads-{_extension.cpu_set()}")
    assert {r["cpu"] for r in records} == {_extension.cpu_set()}
    assert all(
        float(r["speedup"]) == pytest.approx(float(r["before_us"]) / float(r["after_us"]), 1e-2) for r in records
    )
    printed = capsys.readouterr().out
    assert "training step (samples)" in printed
    assert f" threads, {_extension.cpu_set()}, torch" in printed

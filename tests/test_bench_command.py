"""``python -m hvae_kernels bench``: every op at tiny sizes, the table, the errors. Nothing here is about speed."""

import itertools
import re

import pytest
import torch

from hvae_kernels import __main__, bench, functional

#: Functions that are parts, derivatives or forms of others, or take a function; and classes.
UNTIMED = {
    "constrain_planar",
    "gaussian_leapfrog_with_vjp",
    "gaussian_mixture_responsibilities",
    "leapfrog",
    "planar_flow_with_vjp",
}
TINY = {"batch": 5, "features": 3, "steps": 2, "samples": 4, "inputs": 6, "outputs": 7, "components": 2, "bins": 4}
TINY |= {"side": 6, "filters": 2}


def run(*arguments):
    return __main__.main(["bench", *map(str, arguments)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_every_op_can_be_timed():
    assert set(bench.PROBLEMS) == {name for name in functional.__all__ if name[0].islower()} - UNTIMED


@pytest.mark.parametrize("op", bench.PROBLEMS)
def test_table_of(op, capsys):
    sizes = [(f"--{size}", TINY[size]) for size in bench.PROBLEMS[op].sizes]
    assert run(op, *itertools.chain(*sizes), "--no-compile", "--seconds", "1e-3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{op}: " + ", ".join(f"{name[2:]} {value}" for name, value in sizes) + ", float32"
    assert torch.__version__ in lines[1]
    assert re.fullmatch(r"\| +\| ours +\| eager +\| vs eager +\|", lines[3])
    for line, direction in zip(lines[5:7], bench.DIRECTIONS, strict=True):
        assert re.fullmatch(rf"\| {re.escape(direction)} +(\| [\d.e+]+ (us|ms|s) +){{2}}\| [\d.e+-]+x +\|", line)


def test_compiled_too(capsys):
    assert run("iwae_bound", "--samples", 3, "--batch", 4, "--seconds", "1e-3", "--dtype", "float64") == 0
    printed, said = capsys.readouterr()
    assert "--no-compile" in said
    assert "float64" in printed
    assert re.search(r"\| ours +\| eager +\| compiled +\| vs eager +\| vs compiled +\|", printed)


def test_sizes_are_those_of_the_arguments():
    z, _, _, _, _, tempering = bench.PROBLEMS["gaussian_leapfrog"].make(batch=5, features=3, steps=2)
    assert (z.shape, tempering.shape) == ((5, 3), (2,))


def test_without_an_op_it_lists_them(capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    assert "planar_flow --batch 1024 --features 64 --steps 10\n" in printed
    assert len(printed.splitlines()) == len(bench.PROBLEMS)


def test_an_op_that_is_wrong_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(functional, "iwae_bound", lambda x, implementation=None: x.sum(0) * (1 + (not implementation)))
    assert run("iwae_bound", "--samples", 3, "--batch", 4) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("iwae_bound is WRONG here and was not timed: ")
    assert "|" not in printed


def test_errors_name_what_there_is(capsys, monkeypatch):
    assert "no op 'planar'; there are: gaussian_leapfrog, dense" in refused(capsys, "planar")
    assert "planar_flow has no --bins; it has --batch, --features, --steps" in refused(
        capsys, "planar_flow", "--bins", 3
    )
    for wrong in ("0", "-3", "2.5", "many"):
        message = refused(capsys, "planar_flow", f"--batch={wrong}")
        assert f"argument --batch: expected a whole number of at least 1, got {wrong!r}" in message
    for wrong in ("0", "nan", "inf"):
        assert f"--seconds must be positive and finite, got {float(wrong)}" in refused(
            capsys, "planar_flow", "--seconds", wrong
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: torch sees no GPU here" in refused(capsys, "planar_flow", "--device", "cuda")


def test_without_a_command_it_says_what_runs_where(capsys):
    assert __main__.main([]) == 0
    assert "requested implementation: auto" in capsys.readouterr().out

"""The harness that runs the libraries' own tests with their flows accelerated, on two tests, one of which differs."""

import copy
import dataclasses

import peer_suites
import pytest

TINY = """
import torch
import zuko

def test_there_and_back():
    transform = zuko.flows.MAF(3, transforms=1)().transform
    x = torch.randn(4, 3)
    torch.testing.assert_close(transform.inv(transform(x)), x)

def test_class():
    assert type(zuko.flows.MaskedAutoregressiveTransform(3)).__name__ == "MaskedAutoregressiveTransform"
"""
CLASS = "tests/test_flows.py::test_class"


def test_a_suite_of_two_tests_one_of_which_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(peer_suites.RUNS, "fused")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_flows.py").write_text(TINY)
    assert peer_suites.main(["zuko", "--tests", f"zuko={tmp_path}"]) == 1
    heading, *rows, verdict = capsys.readouterr().out.splitlines()
    assert heading.split() == ["library", "run", "collected", "passed", "swapped", "in", "tests"]
    table = [row.split() for row in rows if row.startswith("zuko")]
    assert table == [
        ["zuko", "plain", "2", "2", "0", "0"],
        ["zuko", "accelerated", "2", "1", "2", "2"],
    ]
    (differs,) = [row.strip() for row in rows if not row.startswith("zuko")]
    assert differs.startswith(f"{CLASS}: passed plain, failed accelerated: AssertionError: assert 'FusedMasked")
    assert verdict.startswith("FAULTS")


#: Of a run in which all is well.
GOOD = {
    "outcomes": {CLASS: "passed", "b": "failed", "c": "passed"},
    "reasons": {"b": "one\ntwo"},
    "left": {"its univariate map is UMNN": 3},
    "swapped": {"MaskedAutoregressiveTransform": 2},
    "tests": [CLASS, "c"],
}


def compared(plain=(), accelerated=(), **fields):
    found = {"plain": copy.deepcopy(GOOD), "accelerated": copy.deepcopy(GOOD) | fields}
    found["plain"]["outcomes"].update(plain)
    found["accelerated"]["outcomes"].update(accelerated)
    lines, is_good = peer_suites.compare("zuko", found)
    return [line.strip() for line in lines if not line.startswith("zuko")], is_good


def test_what_fails_anyway_is_named_and_no_fault():
    assert compared() == (["b: failed in all runs: one"], True)


@pytest.mark.parametrize("after", ["failed", "skipped", "xfailed"])
def test_what_passes_no_more_is_a_fault(after):
    lines, is_good = compared(accelerated={CLASS: after})
    assert (lines[-1], is_good) == (f"{CLASS}: passed plain, {after} accelerated:", False)


def test_what_vanishes_is_a_fault():
    lines, is_good = compared(plain={"d": "passed"})
    assert (lines[-1], is_good) == ("d: passed plain, absent accelerated:", False)


def test_what_passes_now_is_named_and_no_fault():
    assert compared(accelerated={"b": "passed"}) == (["b: failed plain, passed accelerated: one"], True)


def test_a_run_that_swaps_nothing_is_a_fault():
    lines, is_good = compared(swapped={})
    assert ("nothing was swapped" in lines, is_good) == (True, False)


def test_an_error_inside_accelerate_is_a_fault():
    why = "it is not what is known here: StopIteration"
    lines, is_good = compared(left={why: 4})
    assert (lines[-1], is_good) == (f"left alone 4 times: {why}", False)


def test_a_test_that_looks_inside_is_excused_by_its_reason(monkeypatch):
    suite = dataclasses.replace(peer_suites.SUITES["zuko"], looks_inside={"::test_class": "it asserts a class"})
    monkeypatch.setitem(peer_suites.SUITES, "zuko", suite)
    lines, is_good = compared(accelerated={CLASS: "failed"})
    assert (lines[-1], is_good) == (f"{CLASS}: passed plain, failed accelerated: it asserts a class", True)
    assert not compared(accelerated={"c": "failed"})[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flowjax"], "LIBRARY must be one of zuko, nflows, "),
        (["zuko", "--tests", "flowjax=."], "LIBRARY must be one of zuko, nflows, "),
        (["pyro"], "the sdist of pyro holds no tests of flows: give --tests pyro=DIR"),
        (["zuko", "--tests", "."], "--tests must be LIBRARY=DIR, got ."),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        peer_suites.main(arguments)
    assert message in capsys.readouterr().err


def test_a_tree_without_tests_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds none of tests/test_flows\.py"):
        peer_suites.main(["zuko", "--tests", f"zuko={tmp_path}"])

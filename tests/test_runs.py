"""A run's directory: held by one command, its files whole, tied to their run, and checked before they are believed."""

import argparse
import contextlib
import gzip
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from hvae import cli, runs
from hvae.data import mnist
from hvae.runs import StudyError

needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits the size of files")


def open_directory(out, *, seed=1, resume=False):
    args = argparse.Namespace(out=out, command="chess", resume=resume, seed=seed)
    return runs.open_directory(args, seed=seed)


def finished_run(out):
    with open_directory(out) as config:
        runs.save({"x": torch.ones(64)}, out / "jobs" / "one.pt")
        runs.write_results(out, config, [])


def load(out):
    return runs.load(dict, out / "jobs" / "one.pt")["x"]


def partials(folder):
    return [path.name for path in folder.rglob("*partial*")]


# ---- One command at a time ----


def test_a_directory_is_held_by_one_command(tmp_path):
    with open_directory(tmp_path), pytest.raises(StudyError, match="another command is at work in"):
        open_directory(tmp_path, resume=True).__enter__()
    with open_directory(tmp_path, resume=True):
        pass


def test_a_directory_is_free_after_its_command_was_killed(tmp_path):
    hold = f"""
import argparse, os, pathlib
from hvae import runs
args = argparse.Namespace(out=pathlib.Path({str(tmp_path)!r}), command="chess", resume=False, seed=1)
with runs.open_directory(args, seed=1):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", hold], check=False).returncode == -9
    with open_directory(tmp_path):
        pass


def test_writers_of_one_file_do_not_meet(tmp_path):
    errors = []

    def write(letter):
        try:
            for _ in range(200):
                runs.write(tmp_path / "file", letter * 100_000)
                assert set((tmp_path / "file").read_bytes()) in ({letter[0]}, {(b"a", b"b")[letter == b"a"][0]})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert partials(tmp_path) == []


def test_what_a_killed_command_left_half_written_is_in_nobodys_way(tmp_path):
    finished_run(tmp_path)
    left = tmp_path / "jobs" / "one.1-2.partial.pt"
    left.write_bytes(b"PK")
    assert [path.name for path in runs.state_files(tmp_path)] == ["one.pt"]
    with open_directory(tmp_path, resume=True):
        assert not left.exists()
    assert torch.equal(load(tmp_path), torch.ones(64))


# ---- Of this run, and of no other ----


@pytest.mark.parametrize("gone", [[], ["results.json"], ["results.json", "jobs/run.json"]])
def test_jobs_of_another_seed_are_not_taken_over(tmp_path, gone):
    finished_run(tmp_path)
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(StudyError, match="holds results already: add --resume"), open_directory(tmp_path, seed=2):
        pass
    with pytest.raises(StudyError, match="was made with seed 1, not 2"), open_directory(tmp_path, seed=2, resume=True):
        load(tmp_path)
    if len(gone) < 2:  # else the directory is the new seed's, and the file in its way
        with open_directory(tmp_path, resume=True):
            assert torch.equal(load(tmp_path), torch.ones(64))


def test_what_a_run_was_told_and_is_told_no_more_is_refused(tmp_path):
    args = argparse.Namespace(out=tmp_path, command="chess", resume=True)
    with runs.open_directory(args, seed=1, points=5):
        pass
    with pytest.raises(StudyError, match="was made with points 5, not None"), open_directory(tmp_path, resume=True):
        pass


def test_a_file_brought_from_another_run_is_refused(tmp_path):
    finished_run(tmp_path / "one")
    with open_directory(tmp_path / "two", seed=2):
        os.replace(tmp_path / "one" / "jobs" / "one.pt", tmp_path / "two" / "jobs" / "one.pt")
        with pytest.raises(StudyError, match="was made with seed 1, not 2: it is of another run"):
            load(tmp_path / "two")


# ---- Damage ----


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    finished_run(tmp_path)
    path = tmp_path / "jobs" / "one.pt"
    content = path.read_bytes()
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        with contextlib.suppress(StudyError):
            assert torch.equal(load(tmp_path), torch.ones(64))  # zip's own padding and dates


def test_tensors_of_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        finished_run(tmp_path)
    assert load(tmp_path).device.type == "cpu"


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", json.dumps([1]).encode(), b"\xff\xfe"],
)
def test_other_files_in_the_place_of_ours_are_one_sentence(tmp_path, content):
    finished_run(tmp_path)
    for name in ("results.json", "jobs/run.json", "jobs/one.pt"):
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(content)
        message = f"{path.name} is corrupt or not a file of this run"
        with pytest.raises(StudyError, match=message), open_directory(tmp_path, resume=True):
            load(tmp_path)
        path.write_bytes(before)


@needs_posix
@pytest.mark.parametrize("write", ["save", "write_results", "writing"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, write):
    script = f"""
import pathlib, resource, torch
from hvae import runs
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = pathlib.Path({str(tmp_path)!r})
try:
    if {write!r} == "save":
        runs.save({{"x": torch.ones(100_000)}}, path / "one.pt")
    elif {write!r} == "write_results":
        runs.write_results(path, {{}}, [{{"x": "long" * 100_000}}])
    else:
        with runs.writing(path / "one.png") as partial:
            partial.write_bytes(bytes(200_000))
except runs.StudyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"could not write {tmp_path}")
    assert os.listdir(tmp_path) == []


# ---- What is read from disk ----


def test_no_more_is_unzipped_than_the_published_file_has(tmp_path, monkeypatch):
    (tmp_path / f"{mnist.TRAIN.name}.gz").write_bytes(gzip.compress(bytes(1 << 26)))
    sizes = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: sizes.append(size) or read(file, size))
    with pytest.raises(StudyError, match="holds more than the 47040016 bytes"):
        mnist.load(str(tmp_path))
    assert sizes == [47040017]


def test_a_plain_file_that_is_too_long_is_refused(tmp_path):
    (tmp_path / mnist.TEST.name).write_bytes(bytes(8_000_000))
    with pytest.raises(StudyError, match="holds more than the 7840016 bytes"):
        mnist.read(tmp_path / mnist.TEST.name, mnist.TEST)


@pytest.mark.parametrize(
    "place",
    [
        "train-images-idx3-ubyte",
        "train-images.idx3-ubyte",
        "train-images.idx3-ubyte.gz",
        "MNIST/raw/train-images-idx3-ubyte.gz",
        "train-images-idx3-ubyte/train-images-idx3-ubyte",
    ],
)
def test_mnist_files_under_all_their_public_names(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert mnist.find(tmp_path, mnist.TRAIN) == path


# ---- Devices and environment ----


@pytest.mark.parametrize("device", ["cuda:63", "meta", "xpu"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path, capsys, device):
    assert cli.main(["mnist", "--device", device, "--out", str(tmp_path / "run")]) == 1
    assert f"hvae: --device {device} is not available here: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_empty_environment_variables_are_as_good_as_none():
    names = "HVAE_KERNELS_CPU", "HVAE_KERNELS_IMPL", "WORLD_SIZE", "TRITON_INTERPRET"
    script = "import hvae_kernels as hk; from hvae.mnist import distributed; distributed.processes().__enter__()"
    subprocess.run([sys.executable, "-c", script], env=os.environ | dict.fromkeys(names, ""), check=True)


def test_reports_print_in_any_locale(tmp_path):
    script = "import sys; from hvae import cli; cli.main(['report', '\\xfc'])"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert "no results.json in ?" in done.stderr

"""`python -m gmkernels doctor`: every probe, what it says of machines that are not this one, exit codes."""

import argparse
import json
import os
import signal

import pytest
import torch

from gmkernels import _C
from gmkernels.cli import doctor, selftest


def call(capsys, *argv):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    code = doctor.run(parser.parse_args(argv))
    return code, capsys.readouterr().out


def test_text(capsys):
    code, text = call(capsys)
    assert code == 0 and "All self-tests passed." in text
    for word in (*doctor.PROBES, torch.__version__, _C.isa(), *selftest.names()):
        assert word in text


def test_json(capsys):
    code, text = call(capsys, "--json")
    report = json.loads(text)
    assert code == 0 and report["ok"]
    assert not [name for name, part in report.items() if isinstance(part, dict) and "failed" in part]
    cpu = {(r["op"], r["isa"]) for r in report["selftest"] if r["device"] == "cpu"}
    assert cpu == {(op, isa) for op in selftest.names() for isa in _C.isas()}
    assert all(r["error"] <= selftest.TOLERANCE and r["ms"] >= 0 for r in report["selftest"])
    assert report["cuda"]["usable"] == (report["cuda"]["reason"] is None)


def test_every_op_has_a_selftest():
    assert set(selftest.names()) == set(selftest.CASES)


def test_isa_is_left_as_it_was(capsys):
    before = _C.isa()
    call(capsys)
    assert _C.isa() == before


@pytest.mark.parametrize("broken, why", [
    (lambda device: (lambda: torch.ones(3), lambda: torch.tensor([1.0, 1.0, 1.1])), "error above"),
    (lambda device: (lambda: torch.full((3,), torch.nan), lambda: torch.ones(3)), "error above"),
    (lambda device: (lambda: torch.ones(4), lambda: torch.ones(3)), "expected (3,)"),
    (lambda device: (lambda: 1 // 0, lambda: torch.ones(3)), "ZeroDivisionError"),
])
def test_a_broken_op(monkeypatch, capsys, broken, why):
    monkeypatch.setitem(selftest.CASES, "philox_normal", broken)
    code, text = call(capsys)
    assert code == 1
    failed = [line for line in text.splitlines() if " FAILED " in line and "philox_normal" in line]
    assert len(failed) == len(_C.isas()) and all(why in line for line in failed)
    assert f"{len(failed)} of" in text and "passed" not in text


def test_an_op_that_kills_the_process(monkeypatch, capsys):
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    monkeypatch.setitem(selftest.CASES, "philox_normal", lambda device: (kill, None))
    code, text = call(capsys)
    assert code == 1 and "killed by SIGKILL in philox_normal" in text


def test_an_op_that_nobody_tests(monkeypatch, capsys):
    monkeypatch.delitem(selftest.CASES, "philox_normal")
    code, text = call(capsys)
    assert code == 0 and "no self-test" in text


def test_a_probe_that_fails(monkeypatch, capsys):
    monkeypatch.setitem(doctor.PROBES, "openmp", lambda: 1 // 0)
    monkeypatch.setitem(doctor.PROBES, "cuda", lambda: 1 // 0)
    code, text = call(capsys)
    assert code == 0 and text.count("cannot tell: ZeroDivisionError") == 2


BUILT = {"built_with": True, "runtime": "13.0", "driver": "12.4", "torch": "12.8", "archs": "90"}


@pytest.mark.parametrize("info, probed, words", [
    ({"built_with": False}, (0, 0, 0, None), "no CUDA kernels"),
    ({}, (13000, 0, 0, "insufficient"), "no NVIDIA driver"),
    ({}, (13000, 12040, 0, "insufficient"), "too old: it serves CUDA 12.4, the kernels were built with CUDA 13.0"),
    ({}, (13000, 13000, 0, "no CUDA-capable device"), "the CUDA driver says: no CUDA-capable device"),
    ({}, (13000, 13000, 0, None), "shows no GPU"),
    ({"torch": None}, (13000, 13000, 1, None), "is a CPU build"),
])
def test_why_no_cuda(info, probed, words):
    assert words in doctor.no_cuda_because({**BUILT, **info}, probed)


def test_an_older_minor_version_of_the_driver_serves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.no_cuda_because(BUILT, (13010, 13000, 1, None)) is None


@pytest.mark.parametrize("archs, gpu, served", [
    ("90", (9, 0), True), ("90", (8, 9), False), ("90", (10, 0), True), ("90-real", (10, 0), False),
    ("80-real", (8, 9), True), ("86-real", (8, 0), False), ("75-real 120", (12, 1), True),
    ("75-real 120", (7, 0), False), ("90a", (9, 0), True), ("90a", (10, 0), False),
    ("80-virtual", (9, 0), True), ("native", (8, 9), True), (None, (9, 0), False),
])
def test_which_gpus_a_build_serves(archs, gpu, served):
    assert doctor.serves(archs, *gpu) is served


def test_openmp_runtimes():
    maps = """7f00-7f01 r-xp 0 00:00 1 /x/torch/lib/libgomp.so.1
7f01-7f02 r--p 0 00:00 1 /x/torch/lib/libgomp.so.1
7f02-7f03 r-xp 0 00:00 2 /x/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0
7f03-7f04 r-xp 0 00:00 3 /opt/intel/libiomp5.so
7f04-7f05 r-xp 0 00:00 4 /usr/lib/libm.so.6
7f05-7f06 r-xp 0 00:00 5 /usr/lib/llvm-14/lib/libomp.so.5
"""
    assert doctor.openmp_runtimes(maps) == [
        "/opt/intel/libiomp5.so", "/usr/lib/llvm-14/lib/libomp.so.5", "/x/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0",
        "/x/torch/lib/libgomp.so.1",
    ]

"""tests/gpu/check.py loses nothing: what fails, hangs or raises costs itself, and OUT holds the rest."""

import json
import re
import sys
import time

import pytest

from gpu import check

PASSED = "3 passed, 1 skipped in 0.1s"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU on which every command is played: `said` maps a part of a command to (output, status)."""
    commands, said = [], {}

    def execute(command, env, file, limit):
        text = " ".join(command)
        commands.append(text)
        output, code = next((value for part, value in said.items() if part in text), (PASSED, 0))
        if callable(output):
            output = output()
        file.write(output)
        file.flush()
        return code

    site = tmp_path / "site/gmkernels"
    site.mkdir(parents=True)
    (site / "_C.cpython-312-x86_64-linux-gnu.so").touch()
    for name, value in {"BUILD": tmp_path, "SITE": tmp_path / "site", "RESULTS": tmp_path / "results",
                        "execute": execute, "gpu": lambda: ("NVIDIA H200", "9.0", "580.1"), "nvcc": lambda: "nvcc",
                        "tool": lambda name: f"/bin/{name}",
                        "said": lambda *c: "  --kernel-regex arg\n" if "--help" in c else "x"}.items():
        monkeypatch.setattr(check, name, value)
    monkeypatch.setattr(check.tree, "install", lambda *a: None)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["check.py", "--out", str(tmp_path / "out"), *arguments])
        status = check.main()
        steps = json.loads((tmp_path / "out/steps.json").read_text())["steps"]
        return status, {f"{s['phase']}: {s['name']}": s["ok"] for s in steps}

    go.commands, go.said, go.out = commands, said, tmp_path / "out"
    return go


def test_every_phase(machine, tmp_path, monkeypatch):
    def stores():
        (tmp_path / "results/nvidia-h200-abc.json").write_text("{}")
        return "stored"

    machine.said["gmkernels bench"] = (stores, 0)
    status, steps = machine()
    assert status == 0 and all(steps.values())
    assert {name.partition(":")[0] for name in steps} == set(check.PHASES)
    text = "\n".join(machine.commands)
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in text and "-arch=sm_90" in text
    for name in check.TOOLS:
        assert re.search(rf"--tool {name} --error-exitcode 1 --kernel-regex kns=gmk ", text)
    assert "-k cuda and not huge tests/test_gmm.py" in text and "gpu.rehearse" not in text
    files = {p.name for p in machine.out.iterdir()}
    assert files == {"bench.json", "steps.json", *(f"{phase}.log" for phase in check.PHASES)} and len(files) <= 8
    assert (machine.out / "bench.json").read_text() == "{}"


def test_what_fails_costs_itself(machine, capsys):
    machine.said.update({"backend.module()": ("g++: no", 1), "test_gmm": ("1 failed", 1),
                         "racecheck": ("hazard", 1), "test_random": ("4 skipped", 0)})
    status, steps = machine()
    assert status == 1
    bad = {name for name, ok in steps.items() if not ok}
    assert bad == {"build: emulator", "tests: gmm", "tests: gmm: no test ran", "tests: random: no test ran",
                   "sanitize: racecheck"}
    assert steps["bench: all families"] and steps["tests: masked_conv"] and steps["sanitize: synccheck"]
    printed = capsys.readouterr().out
    assert "FAILED: build: emulator; tests: gmm" in printed and "hazard" in printed


def test_what_raises_costs_its_phase(machine, monkeypatch):
    def raises(run):
        raise KeyError("typo")

    monkeypatch.setitem(check.PHASE, "sanitize", raises)
    status, steps = machine()
    assert status == 1 and [name for name, ok in steps.items() if not ok] == ["sanitize: raised"]
    assert steps["bench: all families"] and "typo" in (machine.out / "sanitize.log").read_text()


def test_without_a_module_nothing_is_tried(machine, tmp_path):
    (module,) = (tmp_path / "site/gmkernels").iterdir()
    module.unlink()
    status, steps = machine("tests", "bench")
    assert status == 1 and steps == {"tests: raised": False, "bench: raised": False} and not machine.commands


def test_a_module_that_does_not_compile_is_not_the_one_before(machine):
    machine.said["ninja -C"] = ("error: expected", 1)
    status, steps = machine()
    assert status == 1 and not steps["build: module"] and not steps["tests: raised"] and not steps["bench: raised"]


def test_the_time_is_over(machine):
    status, steps = machine("--seconds", "5", "primitives", "tests")
    assert status == 1 and not any(steps.values()) and not machine.commands
    status, steps = machine("primitives")  # steps of earlier calls stay
    assert status == 0 and steps["primitives: against the emulator"] and "tests: gmm" in steps


def test_a_hanging_step_is_interrupted_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "GRACE_SECONDS", 2)
    program = """
import sys, time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("stored", flush=True)
    if sys.argv[1] == "deaf":
        time.sleep(60)
"""
    for how in ("polite", "deaf"):
        with open(tmp_path / how, "w") as file:
            start = time.monotonic()
            assert check.execute([sys.executable, "-c", program, how], None, file, 3) == 124
            assert time.monotonic() - start < 30
        assert (tmp_path / how).read_text() == "begun\nstored\n"
    with open(tmp_path / "none", "w") as file:
        assert check.execute([str(tmp_path / "no such program")], None, file, 3) == 127


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "LOG_BYTES", 1000)
    log = tmp_path / "a.log"
    log.write_text("first\n" + "x" * 5000 + "\nlast\n")
    check.shorten(log)
    text = log.read_text()
    assert text.startswith("first\n") and text.endswith("\nlast\n") and "bytes left out" in text and len(text) < 1100


def test_a_torn_record_is_no_obstacle(tmp_path):
    (tmp_path / "steps.json").write_text('{"steps": [')
    assert check.read_steps(tmp_path / "steps.json") == []

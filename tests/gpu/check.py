"""What to run when a GPU is at hand (make gpu-check), and the same without one as far as it goes (make gpu-check-dry).

    python3 tests/gpu/check.py                       every phase, in order
    python3 tests/gpu/check.py build primitives      only these; build/gpu keeps what an earlier call built
    python3 tests/gpu/check.py --out DIR             logs and numbers: 7 files at most (default build/gpu/out)
    python3 tests/gpu/check.py --seconds 570         ends by itself before the machine ends it
    python3 tests/gpu/check.py --dry                 no GPU: compiles all, rehearses the tests, checks the commands

    build        the module and tests/gpu/primitives.cu for this GPU, the emulator beside them, `doctor`
    primitives   cuda/prims.cuh on the GPU against the emulator (tests/test_primitives.py)
    tests        the tests' `cuda` param
    sanitize     compute-sanitizer, its four tools, on every op's self-test
    bench        python -m gmkernels bench --device cuda -> bench/results/<gpu>-<commit>.json

Needs no network and installs nothing: the Python that runs it has torch, numpy, scikit-learn, pybind11, cmake and
ninja; nvcc is on PATH. Without pytest, hypothesis, scipy, compute-sanitizer or g++, only what needs them fails. A step
that fails, hangs or raises costs itself: the phases behind it go on with what there is. OUT/steps.json holds the
command, exit status and seconds of every step, over all calls; the last lines on the screen are a table of them.
A step whose time is over is interrupted first (the benchmark then stores the rows it has), and killed 20 s later.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import tree  # noqa: E402

BUILD = ROOT / "build/gpu"
SITE = BUILD / "site"
RESULTS = ROOT / "bench/results"
BENCH = [sys.executable, "-m", "gmkernels", "bench", "--device", "cuda", "--json", RESULTS]
PHASES = ("build", "primitives", "tests", "sanitize", "bench")
NEEDED = ("torch", "numpy", "pybind11")
WANTED = ("pytest", "hypothesis", "scipy", "sklearn")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEP_SECONDS = 540  # a device call ends after 600
GRACE_SECONDS = 20  # from the interrupt to the kill
LOG_BYTES = 4 << 20  # of one phase; its beginning and its end are kept
SELFTEST = """
import sys
from gmkernels.cli import selftest
results = selftest.run("cuda")
for r in results:
    print(r["op"], "ok" if r["ok"] else r["why"], flush=True)
sys.exit(any(r["ok"] is not True for r in results))
"""
BENCH_CASES = """
import sys
from gmkernels import bench
from gmkernels.bench import suite
for family, module in suite.families().items():
    assert module.OPS and callable(module.cases), family
    print(family, *module.OPS)
"""


class Run:
    def __init__(self, out, dry, seconds=None):
        self.out, self.dry, self.failed = Path(out), dry, []
        self.end = None if seconds is None else time.monotonic() + seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.record = self.out / "steps.json"
        self.before = read_steps(self.record)
        self.steps = []
        self.environment = environment()
        paths = [SITE, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(str(p) for p in paths if p), "PYTHONUNBUFFERED": "1",
                                 "GMK_PRIMITIVES": str(BUILD / "libprimitives.so")}

    def step(self, phase, name, command, may_exit=(0,), **env):
        """Runs a command into OUT/<phase>.log; its end is printed when it fails."""
        log = self.out / f"{phase}.log"
        command = [str(c) for c in command]
        limit = STEP_SECONDS if self.end is None else min(STEP_SECONDS, self.end - time.monotonic() - GRACE_SECONDS)
        if limit < 1:
            self.add(phase, name, False, None, 0, command=" ".join(command)[:500], last=["not run: the time is over"])
            return ""
        print(f"  ...    {phase}: {name}", flush=True)
        start = time.monotonic()
        with open(log, "a") as file:
            file.write(f"\n=== {name}: {' '.join(command)}\n")
            file.flush()
            at = file.tell()
            code = execute(command, self.env | env, file, limit)
        ok = code in may_exit
        said = tail(log, at)
        self.add(phase, name, ok, code, time.monotonic() - start, command=" ".join(command)[:500],
                 last=said.strip().splitlines()[-1:])
        if not ok:
            print("    " + "\n    ".join(line[:300] for line in said.strip().splitlines()[-25:]), flush=True)
        shorten(log)
        return said

    def add(self, phase, name, ok, code, seconds, **more):
        self.steps.append({"phase": phase, "name": name, "dry": self.dry, "ok": ok, "exit": code,
                           "seconds": round(seconds, 1)} | more)
        text = json.dumps({"environment": self.environment, "steps": self.before + self.steps}, indent=1)
        self.record.write_text(text + "\n")
        print(f"  {'ok    ' if ok else 'FAILED'} {phase}: {name}, {seconds:.1f} s, exit {code}", flush=True)
        if not ok:
            self.failed.append(f"{phase}: {name}")

    def table(self):
        for step in self.steps:
            last = "" if step["ok"] else " ".join(step.get("last", []))[:100]
            ok = "ok    " if step["ok"] else "FAILED"
            print(f"{ok} {step['seconds']:6.1f} s  {step['phase']}: {step['name']}  {last}".rstrip())


def read_steps(record):
    try:
        return json.loads(record.read_text())["steps"]
    except (OSError, ValueError, KeyError):  # none yet, or a call was killed while it wrote
        return []


def _interruptible():
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def execute(command, env, file, limit):
    """The exit status; 124 after `limit` seconds, 127 if there is no such program."""
    try:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_interruptible)
    except OSError as error:
        file.write(f"{error}\n")
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        return 124
    finally:  # what it started goes with it
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def tail(log, at):
    with open(log, "rb") as file:
        file.seek(max(at, log.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")


def shorten(log):
    """OUT comes back whole or not at all: a log that is too large would be left out."""
    size = log.stat().st_size
    if size > LOG_BYTES:
        with open(log, "rb") as file:
            first = file.read(LOG_BYTES // 4)
            file.seek(size - LOG_BYTES // 2)
            last = file.read()
        log.write_bytes(first + f"\n... {size - len(first) - len(last)} bytes left out ...\n".encode() + last)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", nargs="*", help=f"default: all of {', '.join(PHASES)}")
    parser.add_argument("--out", default=BUILD / "out")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, help="end by then; what was not reached is marked so in steps.json")
    parser.add_argument("--commit", help="where git does not tell: written into the results")
    args = parser.parse_args()
    if unknown := set(args.phase) - set(PHASES):
        parser.error(f"unknown phase {', '.join(sorted(unknown))}; known: {', '.join(PHASES)}")
    if not args.dry and not gpu():
        parser.error("nvidia-smi shows no GPU; --dry does what can be done without one")
    if args.commit:
        os.environ["GMK_COMMIT"] = args.commit
    run = Run(args.out, args.dry, args.seconds)
    for phase in PHASES:
        if not args.phase or phase in args.phase:
            print(f"== {phase}", flush=True)
            start = time.monotonic()
            try:
                if phase != "build" and not list((SITE / "gmkernels").glob("_C.*.so")):
                    raise RuntimeError("no module in build/gpu/site: the phase `build` failed or was not run")
                PHASE[phase](run)
            except Exception:  # noqa: BLE001  whatever it is, the other phases are still worth their minutes
                text = traceback.format_exc()
                with open(run.out / f"{phase}.log", "a") as file:
                    file.write(text)
                print(text, flush=True)
                run.add(phase, "raised", False, 1, time.monotonic() - start, last=text.strip().splitlines()[-1:])
    run.table()
    print(f"== {'FAILED: ' + '; '.join(run.failed) if run.failed else 'all ok'}; {run.record}")
    return int(bool(run.failed))


def gpu():
    """(name, generation, driver) of the first GPU, or None."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
        name, generation, driver = (part.strip() for part in line.split(","))
        return (name, generation, driver) if re.fullmatch(r"\d+\.\d+", generation) else None
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def environment():
    release = re.search(r"release ([\d.]+)", said(nvcc() or "nvcc", "--version") or "")
    return {"gpu": gpu(), "python": platform.python_version(), "nvcc": release and release[1],
            "commit": os.environ.get("GMK_COMMIT") or said("git", "describe", "--always", "--dirty"),
            "system": platform.platform(), "cores": os.cpu_count()}


def nvcc():
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def tool(name):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which(name, path=path)


# phases --------------------------------------------------------------------------------------------------------------


def borrow(builds, to):
    """What the wheel's build compiled, for a build that has not begun. ninja compiles again what is older than its
    sources or was made by another command: the bindings, whose pybind11 was elsewhere."""
    wheels = sorted(builds.glob("cp*/.ninja_log"))
    if not wheels or to.exists():
        return
    wheel = wheels[-1].parent
    for path in [*wheel.glob(".ninja_*"), *wheel.glob("CMakeFiles/**/*.o")]:
        target = to / path.relative_to(wheel)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)  # with its time, by which ninja knows it


def phase_build(run):
    for name in ("cmake", "ninja", "nvcc", "g++", "compute-sanitizer"):
        found = nvcc() if name == "nvcc" else tool(name)
        if not found and not (run.dry and name == "compute-sanitizer"):
            run.add("build", f"{name} is missing", False, 127, 0)
    run.step("build", "Python packages", [sys.executable, "-c", f"import {', '.join(NEEDED)}; import torch as t; "
                                          "print(t.__version__, t.version.cuda, t.cuda.is_available())"])
    for name in WANTED:
        if importlib.util.find_spec(name) is None:
            run.add("build", f"Python package {name} is missing: tests that need it will not run", False, 1, 0)
    found = gpu()
    arch = os.environ.get("CUDAARCHS") or (found[1].replace(".", "") if found else "90")
    if run.dry:
        borrow(ROOT / "build", BUILD / "module")
    run.step("build", f"configure for sm_{arch}",
             [tool("cmake") or "cmake", "-S", ROOT, "-B", BUILD / "module", "-G", "Ninja",
              f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release",
              f"-DPython_EXECUTABLE={sys.executable}", "-DGMKERNELS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}",
              f"-DCMAKE_CUDA_ARCHITECTURES={arch}", "-DCMAKE_CXX_COMPILER=g++"])
    run.step("build", "module", [tool("ninja") or "ninja", "-C", BUILD / "module"])
    if not run.steps[-1]["ok"]:
        shutil.rmtree(SITE, ignore_errors=True)  # what an earlier call built is not what is to be checked
        raise RuntimeError("the module was not built")
    run.step("build", "primitives", [nvcc() or "nvcc", "-shared", "-Xcompiler", "-fPIC", "-std=c++17",
                                     f"-arch=sm_{arch}", "-I", ROOT / "csrc", "-I", ROOT / "tests/simt",
                                     "-o", BUILD / "libprimitives.so", ROOT / "tests/gpu/primitives.cu"])
    tree.install(tool("cmake"), BUILD / "module", SITE)
    run.step("build", "emulator", [sys.executable, "-c", "from simt import backend; backend.module()"],
             PYTHONPATH=f"{SITE}{os.pathsep}{ROOT / 'tests'}")
    run.step("build", "doctor", [sys.executable, "-m", "gmkernels", "doctor"])


def pytest(run, phase, name, *arguments, **env):
    said = run.step(phase, name, [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--durations=10",
                                  "--continue-on-collection-errors", *arguments], **env)
    if said and not re.search(r"\d+ passed", said):  # all skipped is no success
        run.add(phase, f"{name}: no test ran", False, 1, 0)


def phase_primitives(run):
    if run.dry:
        run.step("primitives", "collect", [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only",
                                           "-q", "tests/test_primitives.py"])
    else:
        pytest(run, "primitives", "against the emulator", "tests/test_primitives.py")


def phase_tests(run):
    plugin = ["-p", "gpu.rehearse"] if run.dry else []
    env = {"PYTHONPATH": f"{run.env['PYTHONPATH']}{os.pathsep}{ROOT / 'tests'}"}  # of the plugin
    families = sorted({path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")} - {"cuda"})
    for family in families:  # one step each: a hang costs one family
        files = [p.relative_to(ROOT) for p in sorted((ROOT / "tests").glob(f"test_{family}*.py"))]
        pytest(run, "tests", f"{'rehearse ' if run.dry else ''}{family}", *plugin, "-m", "not slow",
               "-k", "cuda and not huge", *files, **env)


def phase_sanitize(run):
    program = tool("compute-sanitizer") or "compute-sanitizer"
    if run.dry:
        run.step("sanitize", "the program parses", [sys.executable, "-c", f"compile({SELFTEST!r}, 'selftest', 'exec')\n"
                 "from gmkernels.cli import selftest\nmissing = set(selftest.names()) - set(selftest.CASES)\n"
                 "assert not missing, f'no self-test: {missing}'"])
        return
    options = said(program, "--help") or ""
    # Only our kernels: torch's own are not our concern, and initcheck would go through each of them.
    only = next((word for word in ("--kernel-regex", "--kernel-name", "--filter") if word in options), None)
    for name in TOOLS:
        run.step("sanitize", name, [program, "--tool", name, "--error-exitcode", "1",
                                    *([only, "kns=gmk"] if only else []), sys.executable, "-c", SELFTEST],
                 PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # an allocation for each tensor: memcheck sees its end


def phase_bench(run):
    if run.dry:
        run.step("bench", "families and ops", [sys.executable, "-c", BENCH_CASES])
        said = run.step("bench", "refuses without a GPU", BENCH, may_exit=(0, 2) if gpu() else (2,))
        if not gpu() and "torch finds no GPU" not in said:
            run.add("bench", "refuses for another reason", False, 1, 0)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}
    run.step("bench", "all families", BENCH)
    for path in sorted(RESULTS.glob("*.json")):
        if before.get(path) != path.stat().st_mtime_ns:
            shutil.copy(path, run.out / "bench.json")


PHASE = {"build": phase_build, "primitives": phase_primitives, "tests": phase_tests, "sanitize": phase_sanitize,
         "bench": phase_bench}


if __name__ == "__main__":
    sys.exit(main())

"""What to run when a GPU is at hand (make gpu-check), and the same without one as far as it goes (make gpu-check-dry).

    python3 tests/gpu/check.py                       every phase, in order
    python3 tests/gpu/check.py build primitives      only these; build/gpu keeps what an earlier call built
    python3 tests/gpu/check.py --out DIR             logs and numbers: 7 files at most (default build/gpu/out)
    python3 tests/gpu/check.py --dry                 no GPU: compiles all, collects the tests, checks the commands

    build        the module and tests/gpu/primitives.cu for this GPU, the emulator beside them, `doctor`
    primitives   cuda/prims.cuh on the GPU against the emulator (tests/test_primitives.py)
    tests        the tests' `cuda` param
    sanitize     compute-sanitizer, its four tools, on every op's self-test
    bench        python -m gmkernels bench --device cuda -> bench/results/<gpu>-<commit>.json

Needs no network and installs nothing: the Python that runs it has torch, numpy, scikit-learn, pytest, pybind11, cmake
and ninja; nvcc is on PATH. OUT/steps.json holds the command, exit status and seconds of every step, over all calls.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import tree  # noqa: E402

BUILD = ROOT / "build/gpu"
SITE = BUILD / "site"
RESULTS = ROOT / "bench/results"
BENCH = [sys.executable, "-m", "gmkernels", "bench", "--device", "cuda", "--json", RESULTS]
PHASES = ("build", "primitives", "tests", "sanitize", "bench")
NEEDED = ("torch", "numpy", "sklearn", "pytest", "hypothesis", "pybind11")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEP_SECONDS = 540  # a device call ends after 600
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
    def __init__(self, out, dry):
        self.out, self.dry, self.failed = Path(out), dry, []
        self.out.mkdir(parents=True, exist_ok=True)
        self.record = self.out / "steps.json"
        self.steps = json.loads(self.record.read_text())["steps"] if self.record.exists() else []
        paths = [SITE, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(str(p) for p in paths if p), "PYTHONUNBUFFERED": "1",
                                 "GMK_PRIMITIVES": str(BUILD / "libprimitives.so")}

    def step(self, phase, name, command, may_exit=(0,), **env):
        """Runs a command into OUT/<phase>.log; its end is printed when it fails."""
        log = self.out / f"{phase}.log"
        start = time.monotonic()
        with open(log, "a") as file:
            file.write(f"\n=== {name}: {' '.join(map(str, command))}\n")
            file.flush()
            at = file.tell()
            try:
                code = subprocess.run([str(c) for c in command], env=self.env | env, cwd=ROOT, stdin=subprocess.DEVNULL,
                                      stdout=file, stderr=subprocess.STDOUT, timeout=STEP_SECONDS).returncode
            except subprocess.TimeoutExpired:
                code = 124
            except OSError as error:
                file.write(str(error))
                code = 127
        ok = code in may_exit
        said = log.read_text(errors="replace")[at:]
        self.add(phase, name, ok, code, time.monotonic() - start, command=" ".join(map(str, command))[:500],
                 last=said.strip().splitlines()[-1:])
        if not ok:
            print("    " + "\n    ".join(said.strip().splitlines()[-40:]), flush=True)
        return said

    def add(self, phase, name, ok, code, seconds, **more):
        self.steps.append({"phase": phase, "name": name, "dry": self.dry, "ok": ok, "exit": code,
                           "seconds": round(seconds, 1)} | more)
        self.record.write_text(json.dumps({"environment": environment(), "steps": self.steps}, indent=1) + "\n")
        print(f"  {'ok    ' if ok else 'FAILED'} {phase}: {name}, {seconds:.1f} s, exit {code}", flush=True)
        if not ok:
            self.failed.append(f"{phase}: {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", nargs="*", help=f"default: all of {', '.join(PHASES)}")
    parser.add_argument("--out", default=BUILD / "out")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.phase) - set(PHASES):
        parser.error(f"unknown phase {', '.join(sorted(unknown))}; known: {', '.join(PHASES)}")
    if not args.dry and not gpu():
        parser.error("nvidia-smi shows no GPU; --dry does what can be done without one")
    run = Run(args.out, args.dry)
    for phase in PHASES:
        if not args.phase or phase in args.phase:
            print(f"== {phase}", flush=True)
            globals()["phase_" + phase](run)
            if run.failed and phase == "build":
                break
    print(f"== {'FAILED: ' + '; '.join(run.failed) if run.failed else 'all ok'}; {run.record}")
    return int(bool(run.failed))


def gpu():
    """(name, generation) of the first GPU, or None."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        return [part.strip() for part in line.split(",")]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def environment():
    def said(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return None

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


def phase_build(run):
    wanted = [name for name in ("cmake", "ninja", "g++") if not tool(name)] + ([] if nvcc() else ["nvcc"])
    wanted += [] if run.dry or tool("compute-sanitizer") else ["compute-sanitizer"]
    run.add("build", f"tools{': missing ' + ', '.join(wanted) if wanted else ''}", not wanted, len(wanted), 0)
    run.step("build", "Python packages", [sys.executable, "-c", f"import {', '.join(NEEDED)}; import torch as t; "
                                          "print(t.__version__, t.version.cuda, t.cuda.is_available())"])
    if run.failed:
        return
    found = gpu()
    arch = os.environ.get("CUDAARCHS") or (found[1].replace(".", "") if found else "90")
    run.step("build", f"configure for sm_{arch}",
             [tool("cmake"), "-S", ROOT, "-B", BUILD / "module", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
              "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", "-DGMKERNELS_CUDA=ON",
              f"-DCMAKE_CUDA_COMPILER={nvcc()}", f"-DCMAKE_CUDA_ARCHITECTURES={arch}"])
    if run.failed:
        return
    run.step("build", "module", [tool("ninja"), "-C", BUILD / "module"])
    run.step("build", "primitives", [nvcc(), "-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-arch=sm_{arch}",
                                     "-I", ROOT / "csrc", "-I", ROOT / "tests/simt", "-o", BUILD / "libprimitives.so",
                                     ROOT / "tests/gpu/primitives.cu"])
    if run.failed:
        return
    tree.install(tool("cmake"), BUILD / "module", SITE)
    run.step("build", "emulator", [sys.executable, "-c", "from simt import backend; backend.module()"],
             PYTHONPATH=f"{SITE}{os.pathsep}{ROOT / 'tests'}")
    run.step("build", "doctor", [sys.executable, "-m", "gmkernels", "doctor"])


def pytest(run, phase, name, *arguments):
    collect = ["--collect-only", "-q"] if run.dry else ["-ra", "--durations=10"]
    said = run.step(phase, f"{'collect ' if run.dry else ''}{name}",
                    [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *collect, *arguments])
    if not run.dry and " passed" not in said:  # all skipped is no success
        run.add(phase, f"{name}: no test ran", False, 1, 0)


def phase_primitives(run):
    pytest(run, "primitives", "against the emulator", "tests/test_primitives.py")


def phase_tests(run):
    families = sorted({path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")} - {"cuda"})
    for family in families:  # one step each: a hang costs one family
        files = [p.relative_to(ROOT) for p in sorted((ROOT / "tests").glob(f"test_{family}*.py"))]
        pytest(run, "tests", family, "-m", "not slow", "-k", "cuda", *files)


def phase_sanitize(run):
    program = tool("compute-sanitizer")
    if run.dry:
        run.step("sanitize", "the program parses", [sys.executable, "-c", f"compile({SELFTEST!r}, 'selftest', 'exec')\n"
                 "from gmkernels.cli import selftest\nmissing = set(selftest.names()) - set(selftest.CASES)\n"
                 "assert not missing, f'no self-test: {missing}'"])
        return
    options = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
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
    RESULTS.mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}
    run.step("bench", "all families", BENCH)
    for path in sorted(RESULTS.glob("*.json")):
        if before.get(path) != path.stat().st_mtime_ns:
            shutil.copy(path, run.out / "bench.json")


if __name__ == "__main__":
    sys.exit(main())

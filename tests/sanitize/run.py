"""Builds the CPU code under a sanitizer and runs the families' tests on it.

    python tests/sanitize/run.py address     ASan and UBSan       (make sanitize-address)
    python tests/sanitize/run.py thread      TSan                 (make sanitize-thread)

The module is built without CUDA into build/sanitize/<which>; the sanitizer's run time is preloaded, because neither
Python nor torch has it. First the canaries: calls that are wrong by their addresses must be reported, else nothing
below means anything. Then tests/test_<family>*.py, CPU only, two tests at a time, without those that spend their time
outside of our kernels (ELSEWHERE).

address: torch's allocations come from ASan's malloc, so that one byte past a tensor is seen. Leaks are not looked for:
Python and torch never free everything. All instruction sets with ASan, the base one with UBSan too; there all the tests
run, on the wider ones those that go through shapes (the `isa` fixture has taken the others there already).

thread: the base instruction set, in which TSan sees every access. OpenMP is tests/sanitize/openmp.cpp, because TSan
cannot see libgomp's barriers, and every team has all its threads however small the work. A driver in C++ would need its
own list of shapes and arguments for each op; in Python the tests are the driver, and a new family is covered by
existing. Python and torch are not instrumented, so tsan.supp silences what torch's own threads copy.

AVX-512's masked loads and stores are not seen by either sanitizer (GCC instruments no masked access): the same tests on
the base instruction set see those tails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tree  # noqa: E402

OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=66:allocator_may_return_null=1:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=66",
    },
    # intercept_tls_get_addr=0: TSan takes a thread-local block whose address ends in 010 for one with a header of
    # glibc 2.19's in front, and resets the range that it reads there: one block in 256, of whatever size comes out.
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0:intercept_tls_get_addr=0:"
                               f"suppressions={HERE / 'tsan.supp'}"},
}
LIBRARIES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}

# Inductor's g++ would run under the sanitizer too, and makes no code of ours; gradcheck is thousands of calls at one
# shape, which other tests of gradients have; sizes that nobody has ("huge") are beyond a sanitizer's own limit; the
# rest is torch, a peer or a child process.
ELSEWHERE = ("simt", "cuda", "huge", "emulator", "compile", "opcheck", "gradcheck", "second_derivatives", "diffusers",
             "scikit_learn", "nothing_of_size")

# name: (what the report must say, a pattern; the call)
CANARIES = {
    "address": {
        "write past a tensor": ("AddressSanitizer: (heap-buffer-overflow|unknown-crash)", """
            out = torch.empty(250)
            _C.philox_fill_cpu(out.data_ptr(), 0, 0, 1, 256, 0, 0, 0, 0, 1)"""),
        "signed overflow": ("signed integer overflow", """
            out = torch.empty(4)
            _C.philox_fill_cpu(out.data_ptr(), 0, 0, 1 << 62, 4, 0, 0, 0, 0, 1)"""),
    },
    "thread": {
        "static loop: a thread writes what its neighbour reads": ("data race", """
            x = torch.zeros(1 << 16)
            def backend(name, outs, ins, scalars):
                addresses = [0 if t is None else t.data_ptr() for t in (*outs, *ins)]
                addresses[0] = x.data_ptr() + 4096
                _C.diffusion_step_cpu(*addresses, *scalars, 2)
            Kernel.backend = backend
            ops.diffusion_step(x[:-1024], x[:-1024].clone(), torch.ones(8))"""),
        "dynamic loop: a thread writes what its neighbour reads": ("data race", """
            x = torch.zeros(1 << 13)
            def backend(name, outs, ins, scalars):
                addresses = [0 if t is None else t.data_ptr() for t in (*outs, *ins)]
                addresses[0] = x.data_ptr() + 4096
                getattr(_C, name + "_cpu")(*addresses, *scalars, 2)
            Kernel.backend = backend
            ops.masked_conv2d(x[:4096].view(1, 1, 64, 64), torch.zeros(1, 1, 3, 3))"""),
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=OPTIONS)
    parser.add_argument("--no-tests", action="store_true", help="build and canaries only")
    parser.add_argument("pytest", nargs="*", help="instead of the families' tests (after --): tests/test_random.py -x")
    args = parser.parse_args()

    build, site = ROOT / "build/sanitize" / args.which, ROOT / "build/sanitize" / args.which / "site"
    compile_module(args.which, build)
    tree.install(tool("cmake"), build, site)
    if args.which == "thread":
        no_libgomp(site)
    environment = env(args.which, build, site)
    canaries(args.which, environment, build)
    if args.no_tests:
        return 0
    failed = False
    for isa in isas(environment):
        failed |= tests(environment | {"GMKERNELS_ISA": isa}, build, args.pytest, isa)
    return int(failed)


def tool(name):
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    return path or sys.exit(f"{name} is not installed")


def compile_module(which, build):
    say(f"{which}: build in {build.relative_to(ROOT)}")
    start = time.monotonic()
    subprocess.run([tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                    f"-DPython_EXECUTABLE={sys.executable}", "-DGMKERNELS_CUDA=OFF", f"-DGMKERNELS_SANITIZE={which}"],
                   check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tool("ninja"), "-C", build, "--quiet"], check=True)
    say(f"{which}: built in {time.monotonic() - start:.0f} s")


def env(which, build, site):
    compiler = os.environ.get("CXX", "g++").split()[0]
    paths = [subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
             .stdout.strip() for name in LIBRARIES[which]]
    missing = [path for path in paths if not os.path.isabs(path)]
    if missing:
        sys.exit(f"{compiler} has no {', '.join(missing)}: install its sanitizer libraries")
    options = {key: f"{value}:log_path={build / 'report'}" for key, value in OPTIONS[which].items()}
    return os.environ | options | {"LD_PRELOAD": " ".join(map(os.path.realpath, paths)), "PYTHONPATH": str(site),
                                   "PYTHONMALLOC": "malloc", "PYTHONDONTWRITEBYTECODE": "1"}


def run(command, environment, build, **options):
    """The finished process and the sanitizer's reports. No address randomisation: TSan's shadow needs its place."""
    for old in build.glob("report.*"):
        old.unlink()
    fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    done = subprocess.run([*fixed, *map(str, command)], env=environment, cwd=ROOT, **options)
    return done, "\n".join(path.read_text(errors="replace") for path in sorted(build.glob("report.*")))


def no_libgomp(site):
    """An OpenMP function that openmp.cpp lacks would be taken, unseen by TSan, from torch's libgomp."""
    (module,) = (site / "gmkernels").glob("_C.*.so")
    names = subprocess.run(["nm", "-D", "--undefined-only", module], check=True, capture_output=True, text=True).stdout
    missing = re.findall(r"\b(?:GOMP|omp)_\w+", names)
    if missing:
        sys.exit(f"tests/sanitize/openmp.cpp lacks {', '.join(missing)}")


def canaries(which, environment, build):
    start = "import torch\nfrom gmkernels import _C, ops\nfrom gmkernels._call import Kernel\n"
    for name, (expected, call) in CANARIES[which].items():
        for isa in isas(environment):
            done, report = run([sys.executable, "-c", start + textwrap.dedent(call)],
                               environment | {"GMKERNELS_ISA": isa}, build, capture_output=True, text=True)
            said = report + done.stderr
            if done.returncode == 0 or not re.search(expected, said) or "csrc/" not in said:
                sys.exit(f"canary not reported: {name} ({isa}): exit {done.returncode}\n{said[-4000:]}")
        say(f"{which}: canary reported: {name}")


def isas(environment):
    code = "from gmkernels import _C; print(*_C.isas())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.split()


def family_tests():
    families = sorted({path.parent.name for path in (ROOT / "csrc").glob("*/*_cpu.cpp")})
    return [path for family in families for path in sorted((ROOT / "tests").glob(f"test_{family}*.py"))]


def tests(environment, build, chosen, isa):
    which = " and ".join(f"not {word}" for word in ELSEWHERE) + ("" if isa == "base" else " and (cpu or any)")
    # --capture=sys: UBSan writes to the real stderr and ends the process. -n 2: a worker that died is replaced.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", "-m", "not slow", "-k", which,
               "-W", "ignore", "-n", "2", *(chosen or family_tests())]
    start = time.monotonic()
    # Two workers with two threads each: none may spin while it waits for the other.
    done, report = run(command, environment | {"OMP_WAIT_POLICY": "passive"}, build)
    say(f"tests on {isa}: exit {done.returncode}, {time.monotonic() - start:.0f} s")
    if report:
        print(report[:20000], flush=True)
    return done.returncode != 0 or bool(report)


def say(text):
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What was built: no torch in it, nothing shared between instruction sets, one OpenMP runtime, forks, imports."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.utils.data

from gmkernels import _C, ops
from gmkernels.cli import doctor

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc").glob("*/*_cpu.cpp"))
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")


def needs(*tools):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def python(code, timeout=60, **environment):
    """A fresh interpreter; the same gmkernels as here."""
    here = str(Path(importlib.util.find_spec("gmkernels").origin).parents[1])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "PYTHONPATH": here, **environment})


# the module -----------------------------------------------------------------------------------------------------------


@linux
@needs("nm")
def test_no_torch_symbol():
    names = output("nm", "-D", "-C", _C.__file__)
    assert "PyInit__C" in names
    assert not [line for line in names.splitlines() if "c10::" in line or "at::" in line or "torch" in line]


@linux
@needs("readelf")
def test_needs_only_what_every_machine_has():
    needed = {line.split("[")[1].rstrip("]") for line in output("readelf", "-d", _C.__file__).splitlines()
              if "(NEEDED)" in line}
    assert any(name.startswith("libgomp") for name in needed)
    assert {name.split(".so")[0] for name in needed} <= {"libgomp", "libm", "libc", "libpthread", "libdl", "librt",
                                                        "ld-linux-x86-64", "ld-linux-aarch64"}


def test_only_python_sees_the_module():
    """Exported names could be taken for those of another library in the process."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    defined = [line.split()[-1] for line in output("nm", "-D", "--defined-only", _C.__file__).splitlines()]
    assert [name for name in defined if "gmk" in name] == [] and "PyInit__C" in defined


def weak_symbols(source, folder):
    """Of one kernel file. Compiled without optimisation: what might be emitted is, inlined or not."""
    compiled = folder / "kernel.o"
    flags = ["-std=c++17", "-O0", "-w", "-fPIC", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-march=x86-64-v4"]
    subprocess.run(["g++", *flags, "-DGMK_ISA=avx512", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(compiled)],
                   check=True)
    symbols = [line.split()[-2:] for line in output("nm", "--defined-only", str(compiled)).splitlines()]
    return [name for kind, name in symbols if kind in ("W", "V", "u") and name != "DW.ref.__gxx_personality_v0"]


@x86
@needs("g++", "nm")
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_share_no_code_between_instruction_sets(source, tmp_path):
    """The linker keeps one copy of a weak symbol, perhaps the AVX-512 one, and the base path would run it."""
    assert weak_symbols(source, tmp_path) == []


@x86
@needs("g++", "nm")
def test_a_shared_template_would_be_seen(tmp_path):
    source = tmp_path / "bad.cpp"
    source.write_text("template <class T> T twice(T x) { return x + x; }\nfloat f(float x) { return twice(x); }\n")
    assert any("twice" in line for line in weak_symbols(source, tmp_path))


@x86
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_include_c_headers_only(source):
    included = {line.split("<")[1].split(">")[0] for line in source.read_text().splitlines()
                if line.startswith("#include <")}
    assert all(name.endswith(".h") for name in included), included


# the process ----------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("first", ["", "import torch", "import numpy"])
def test_one_openmp_runtime(first):
    """gmkernels imports torch before its own module, whoever came first."""
    use = "import gmkernels\ngmkernels.ops.philox_normal((1 << 16,))\nprint(open('/proc/self/maps').read())"
    done = python(f"{first}\n{use}")
    assert done.returncode == 0, done.stderr
    runtimes = doctor.openmp_runtimes(done.stdout)
    assert len(runtimes) == 1 and "torch" in runtimes[0], runtimes


@linux
def test_import_brings_no_estimators():
    """They load on first use; scikit-learn's wheel also brings a second OpenMP runtime."""
    done = python("import gmkernels, sys\nprint([m for m in ('sklearn', 'scipy', 'diffusers') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_import_is_quick():
    """At most 0.3 s over `import torch`; the best of a few tries, as other programs run too."""
    code = ("import time, torch\nstarted = time.perf_counter()\nimport gmkernels\n"
            "print(time.perf_counter() - started)")
    best = float("inf")
    for _ in range(6):
        done = python(code)
        assert done.returncode == 0, done.stderr
        best = min(best, float(done.stdout))
        if best <= 0.3:
            break
    assert best <= 0.3


@pytest.mark.parametrize("isa", _C.isas())
def test_isa_from_the_environment(isa):
    done = python("import gmkernels; print(gmkernels._C.isa())", GMKERNELS_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_isa():
    done = python("import gmkernels", GMKERNELS_ISA="sse9")
    assert done.returncode != 0
    assert "ImportError: GMKERNELS_ISA must be one of" in done.stderr and "got 'sse9'" in done.stderr


FALL_BACK = """
import torch, warnings, gmkernels
from gmkernels import _call
op = _call.Op("strict_probe(Tensor x) -> Tensor", outputs=lambda x, out=None: torch.empty_like(x),
              launch=lambda out, x: None, reference=lambda x: x + 1, kernel=None, dtypes=(torch.float32,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.zeros(2, dtype=torch.float16)
    print(op(x).tolist(), op(x).tolist(), len(caught))
"""


def test_no_kernel_runs_the_reference_with_one_warning():
    done = python(FALL_BACK)
    assert done.stdout.strip() == "[1.0, 1.0] [1.0, 1.0] 1", done.stderr


def test_strict():
    done = python(FALL_BACK, GMKERNELS_STRICT="1")
    assert done.returncode != 0 and "GMKERNELS_STRICT is set" in done.stderr and "float16" in done.stderr
    assert python(FALL_BACK, GMKERNELS_STRICT="0").returncode == 0


# forks ----------------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, torch, gmkernels
from gmkernels import ops
torch.set_num_threads(2)
def draw():
    x = ops.philox_normal((1 << 18,), seed=3)
    ops.diffusion_step(x, x, torch.tensor([1.0, 0.5, 0.5, 0.5, 0, 0, 0, 0]), out=x)
    ops.ema_update_([x], [ops.philox_normal((1 << 18,), seed=4)], 0.5)
    return x.numpy().tobytes()
want = draw()  # a parallel region in the parent
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if draw() == want else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_a_parallel_region():
    done = python(FORK)
    assert done.stdout.strip() == "0", done.stdout + done.stderr


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return ops.philox_normal((1 << 16,), seed=i)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork")
    want = torch.stack([Noise()[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(Noise(), batch_size=2, num_workers=2, multiprocessing_context=method,
                                         timeout=120)
    assert torch.equal(torch.cat(list(loader)), want)


def test_the_wheel_names_this_python():
    assert _C.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))

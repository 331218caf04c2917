"""What nvcc's report and the disassembly say of every kernel, without a GPU.

    python tests/cuda_static/check.py                 all GPU generations, with disassembly   (make cuda-static)
    python tests/cuda_static/check.py --archs 90 --no-sass                                    (in .ci/run)
    python tests/cuda_static/check.py --write         makes budget.json anew                  (make cuda-budget)

Every csrc/*/*.cu is compiled for each generation with warnings as errors. Then
  - registers, stack, spills and static shared memory of each kernel must not be more than in budget.json, and the
    kernels must be those in budget.json: a change there is a diff to look at, not an accident;
  - no kernel may spill or have a stack frame, but those in LOCAL below, with the reason, nor more static shared memory
    than STATIC_SHARED, which counts with what a launch asks for;
  - the disassembly must hold the instructions of ASKED below, and no local-memory access (LDL, STL) outside LOCAL.
cuobjdump and nvdisasm are not part of every CUDA install: else those of this Python's packages are taken (torch for
CUDA brings triton, which has them), else NVIDIA's wheels, 6 MB, downloaded once to build/cuda_static. Where none can be
had, the check fails and says so: --no-sass goes without. Without nvcc nothing is checked, and a line says that.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/cuda_static"
BUDGET = HERE / "budget.json"
WHEELS = ("nvidia-cuda-cuobjdump==13.4.92", "nvidia-cuda-nvdisasm==13.5.37")
ARCHS = ("75", "80", "90", "100", "120")
STATIC_SHARED = 8 << 10  # bytes, at most

# Kernels that may have local memory, and why. A pattern of the name as budget.json writes it.
LOCAL = {
    r"^denoising_loss_kernel<(double|f16), true>": "nvcc 13 spills 8 bytes (f16, sm_80), 16 (float64, sm_120)",
    r"^quantile_kernel<double>": "nvcc 13 spills 24 bytes on sm_100",
}

# Instructions as the disassembly writes them, from their beginning.
LOAD_128 = r"LDG\.E\.(\w+\.)*128"
STORE_128 = r"STG\.E\.(\w+\.)*128"
COPY_128 = r"LDGSTS\.E\.(\w+\.)*128"  # cp.async of 16 bytes, sm_80 and later
MMA_BF16 = r"HMMA\.16816\.F32\.BF16"
MMA_F16 = r"HMMA\.16816\.F32$"
MMA_TF32 = r"HMMA\.1688\.F32\.TF32"


@dataclass(frozen=True)
class Asked:
    kernel: str  # a pattern of the whole name, as budget.json writes it
    least: dict  # instruction pattern -> at least how many; "(a|b)": one or the other
    since: int = 75  # GPU generation; mma of these shapes and cp.async: 80


ASKED = (
    # x, model_output, uncond, three histories, noise, variance; out, x0
    Asked(r"diffusion_step_kernel<(float|.*bf16|.*f16), true, \w+>", {LOAD_128: 8, STORE_128: 2}),
    Asked(r"philox_fill_kernel<float>", {STORE_128: 1}),
    # x0, noise; x_t, target. pred, x0; the gradient. x0, x1; x_t, u
    Asked(r"(add_noise|flow_pair)_kernel<(float|.*bf16|.*f16), true>", {LOAD_128: 2, STORE_128: 2}),
    Asked(r"denoising_loss_kernel<(float|.*bf16|.*f16), true>", {LOAD_128: 2, STORE_128: 1}),
    # three products for every block of P: x and P to shared memory 16 bytes at a time, grad_x back in whole packs
    Asked(r"gmm_matrix_log_prob_kernel<\d+, false>", {MMA_TF32: 24, COPY_128: 3, r"LDS\.128": 4}, since=80),
    Asked(r"gmm_matrix_log_prob_kernel<\d+, true>", {MMA_TF32: 8, COPY_128: 3, r"LDS\.64": 4}, since=80),
    Asked(r"gmm_matrix_grad_x_kernel<\d+>", {MMA_TF32: 84, COPY_128: 3, r"LDS\.128": 15, STORE_128: 1}, since=80),
    Asked(r"gmm_matrix_statistics_kernel<\d+, false>", {MMA_TF32: 30, COPY_128: 1, LOAD_128: 1}, since=80),
    Asked(r"gmm_matrix_statistics_kernel<\d+, true>", {MMA_TF32: 10, COPY_128: 1, LOAD_128: 1}, since=80),
    Asked(r"gmm_diagonal_(log_prob|statistics)_kernel", {LOAD_128: 1, r"LDS\.(U\.)?128": 8}),
    Asked(r"gmm_diagonal_grad_x_kernel", {LOAD_128: 1, STORE_128: 1, r"LDS\.(U\.)?128": 8}),
    # eight centres or points for one number of x: two reads at one address per warp, float64 four
    Asked(r"kmeans_(assign|look)_kernel<.*>", {r"LDS\.(U\.)?128": 4}),
    Asked(r"kmeans_assign_kernel<.*>", {LOAD_128: 1, r"STS\.128": 1}),
    # a chunk: two steps of V / 2 x 8 tiles, three products each in float32; image and weight by cp.async
    Asked(r"masked_conv2d_(kernel|products_kernel)<float, \d, \d, (true|false)>", {MMA_TF32: 96}, since=80),
    Asked(r"masked_conv2d_(kernel|products_kernel)<bf16, \d, \d, (true|false)>", {MMA_BF16: 64}, since=80),
    Asked(r"masked_conv2d_(kernel|products_kernel)<f16, \d, \d, (true|false)>", {MMA_F16: 64}, since=80),
    Asked(r"masked_conv2d_(kernel|products_kernel)<.*, true>", {COPY_128: 4}, since=80),
    Asked(r"masked_conv2d_kernel<.*>", {STORE_128: 1}),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(ARCHS), help="comma-separated")
    parser.add_argument("--no-sass", action="store_true", help="no disassembly")
    parser.add_argument("--write", action="store_true", help="write budget.json instead of comparing with it")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    archs = args.archs.split(",")
    if args.write and archs != list(ARCHS):
        parser.error("--write takes all generations")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        print("cuda-static: skipped, no nvcc")
        return 0

    start = time.monotonic()
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    cubins = [(arch, source, BUILD / f"sm_{arch}" / f"{source.stem}.cubin") for arch in archs for source in sources]
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(lambda job: compile_kernels(nvcc, *job), cubins))
    found = {arch: {} for arch in archs}
    for (arch, _, _), report in zip(cubins, reports, strict=True):
        found[arch] |= report
    print(f"cuda-static: {len(cubins)} compilations, {sum(map(len, found.values()))} kernels for "
          f"sm_{', sm_'.join(archs)}, {time.monotonic() - start:.0f} s")

    version = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    wrong = [line for arch in archs for look in (local_memory, static_shared) for line in look(arch, found[arch])]
    if not args.no_sass:
        tool = cuobjdump()
        if tool is None:
            wrong.append(f"no disassembly: neither cuobjdump and nvdisasm nor {' and '.join(WHEELS)} can be had here "
                         "(--no-sass goes without)")
        else:
            with ThreadPoolExecutor(args.jobs) as pool:
                lists = pool.map(lambda job: instructions(tool, job[2]), cubins)
                for (arch, _, _), listing in zip(cubins, lists, strict=True):
                    wrong += disassembly(arch, listing)
            wrong += out_of_date(found)
    if args.write:
        BUDGET.write_text(dump({"nvcc": version[1], "kernels": found}))
        print(f"cuda-static: wrote {BUDGET.relative_to(ROOT)}")
    else:
        budget = json.loads(BUDGET.read_text())
        if budget["nvcc"] != version[1]:
            print(f"cuda-static: numbers not compared: the budget is of nvcc {budget['nvcc']}, this is {version[1]}")
        else:
            wrong += [line for arch in archs for line in compare(arch, found[arch], budget["kernels"][arch])]
    for line in wrong:
        print(f"cuda-static: {line}")
    print(f"cuda-static: {'FAILED' if wrong else 'clean'}, {time.monotonic() - start:.0f} s")
    return int(bool(wrong))


def compile_kernels(nvcc, arch, source, cubin):
    """kernel -> {"registers", "stack", "spills", "shared"}, from ptxas."""
    cubin.parent.mkdir(parents=True, exist_ok=True)
    # Not -Xptxas -warn-spills,-warn-lmem-usage: as errors they would know no exceptions, and -v says it in numbers.
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin",
               "-I", ROOT / "csrc", "-o", cubin, source]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        name = os.path.relpath(source, ROOT)
        sys.exit(f"cuda-static: sm_{arch} {name} does not compile:\n{done.stdout}{done.stderr}")
    kernels = {}
    entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, "
    entry += r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    for match in re.finditer(entry + r".*?Used (\d+) registers([^\n]*)", done.stderr, re.S):
        mangled, stack, stores, loads, registers, rest = match.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[mangled] = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads),
                            "shared": int(shared[1]) if shared else 0}
    if len(kernels) != done.stderr.count("Compiling entry function"):
        sys.exit(f"cuda-static: ptxas reports in words that are not known here:\n{done.stderr[:2000]}")
    names = demangle(kernels)
    return {names[mangled]: numbers for mangled, numbers in kernels.items()}


def demangle(mangled):
    """Names as in the source: the namespaces and the argument list go, for they hold nothing but a hash of the path."""
    mangled = list(mangled)
    if not mangled:
        return {}
    done = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True)
    names = {}
    for name, full in zip(mangled, done.stdout.splitlines(), strict=True):
        short = re.sub(r"^void ", "", full)
        short = re.sub(r"(gmk::|\(anonymous namespace\)::|_GLOBAL__N_\w+::|_INTERNAL_\w+::)", "", short)
        names[name] = re.sub(r"\((int|bool|unsigned int)\)", "", short.partition("(" if "<" not in short else ">(")[0]
                             + (">" if ">(" in short else ""))
    if len(set(names.values())) != len(mangled):
        sys.exit(f"cuda-static: two kernels of one name: {sorted(names.values())}")
    return names


def allowed_local(kernel):
    return any(re.search(pattern, kernel) for pattern in LOCAL)


def local_memory(arch, kernels):
    for name, numbers in kernels.items():
        if (numbers["stack"] or numbers["spills"]) and not allowed_local(name):
            yield f"sm_{arch} {name}: {numbers['stack']} bytes of stack, {numbers['spills']} of spills"


def static_shared(arch, kernels):
    for name, numbers in kernels.items():
        if numbers["shared"] > STATIC_SHARED:
            yield (f"sm_{arch} {name}: {numbers['shared']} bytes of static shared memory, {STATIC_SHARED} are what"
                   " launch_kernel (csrc/cuda/prims.cuh) leaves room for")


def cuobjdump():
    """A cuobjdump with nvdisasm, which it calls, beside it or on PATH; None where there is none."""
    site = Path(sysconfig.get_path("purelib"))
    folders = [None, "/usr/local/cuda/bin", *sorted(site.glob("nvidia/cu*/bin")), site / "triton/backends/nvidia/bin"]
    for folder in [*folders, BUILD / "tools"]:
        path = os.environ.get("PATH", "") if folder is None else str(folder)
        if (tool := shutil.which("cuobjdump", path=path)) and shutil.which("nvdisasm", path=search_path(tool)):
            return tool
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([sys.executable, "-m", "pip", "--no-input", "-q", "download", "--no-deps", "-d", wheels,
                        *WHEELS], stderr=subprocess.DEVNULL)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if "/bin/" in name:
                        target = BUILD / "tools" / Path(name).name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.read(name))
                        target.chmod(0o755)
    return shutil.which("cuobjdump", path=str(BUILD / "tools"))


def search_path(tool):
    return f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def instructions(tool, cubin):
    """kernel -> its instructions."""
    environment = os.environ | {"PATH": search_path(tool)}
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"cuda-static: {tool} failed on {cubin}:\n{done.stderr}")
    parts = re.split(r"Function : (\S+)", done.stdout)[1:]
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    names = demangle(code)
    return {names[mangled]: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)
            for mangled, text in code.items()}


def disassembly(arch, kernels, rules=ASKED):
    for name, code in kernels.items():
        local = sum(op.startswith(("LDL", "STL")) for op in code)
        if local and not allowed_local(name):
            yield f"sm_{arch} {name}: {local} accesses of local memory (LDL, STL)"
        for rule in rules:
            if applies(rule, arch) and re.fullmatch(rule.kernel, name):
                for pattern, least in rule.least.items():
                    count = sum(bool(re.match(pattern, op)) for op in code)
                    if count < least:
                        yield f"sm_{arch} {name}: {count} instructions {pattern}, at least {least} are asked for"


def applies(rule, arch):
    return int(arch) >= rule.since


def out_of_date(found, rules=ASKED):
    """Rules that look at no kernel."""
    for arch, kernels in found.items():
        looked = [(rule.kernel, re.fullmatch) for rule in rules if applies(rule, arch)]
        for pattern, match in [*looked, *((pattern, re.search) for pattern in LOCAL)]:
            if not any(match(pattern, name) for name in kernels):
                yield f"sm_{arch}: no kernel is called {pattern}: a rule of check.py is out of date"


def compare(arch, kernels, budget):
    for name in sorted(budget.keys() - kernels.keys()):
        yield f"sm_{arch} {name}: in the budget, but there is no such kernel (make cuda-budget)"
    for name in sorted(kernels.keys() - budget.keys()):
        yield f"sm_{arch} {name}: not in the budget (make cuda-budget)"
    for name in sorted(kernels.keys() & budget.keys()):
        for what, number in kernels[name].items():
            if number > budget[name][what]:
                yield f"sm_{arch} {name}: {what} {budget[name][what]} -> {number}"


def dump(budget):
    """JSON with a line for each kernel, so that a diff reads as one."""
    archs = []
    for arch, kernels in budget["kernels"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels))
        archs.append(f'  "{arch}": {{\n{lines}\n  }}')
    return f'{{\n "nvcc": "{budget["nvcc"]}",\n "kernels": {{\n' + ",\n".join(archs) + "\n }\n}\n"


if __name__ == "__main__":
    sys.exit(main())

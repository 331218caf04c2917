"""What nvcc's report and the disassembly say of every kernel, without a GPU.

    python tests/cuda_static/check.py                 all GPU generations, with disassembly   (make cuda-static)
    python tests/cuda_static/check.py --archs 90 --no-sass                                    (in .ci/run)
    python tests/cuda_static/check.py --write         makes budget.json anew                  (make cuda-budget)

Every csrc/*/*.cu is compiled for each generation with warnings as errors. Then
  - registers, stack, spills and static shared memory of each kernel must not be more than in budget.json, and the
    kernels must be those in budget.json: a change there is a diff to look at, not an accident;
  - no kernel may spill or have a stack frame, but those in LOCAL below, with the reason;
  - the disassembly must hold the instructions of ASKED below, and no local-memory access (LDL, STL) outside LOCAL.
cuobjdump is not part of every CUDA install; the triton wheel's is taken (downloaded once to build/cuda_static).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/cuda_static"
BUDGET = HERE / "budget.json"
TRITON = "triton==3.9.0"
ARCHS = ("75", "80", "90", "100", "120")

# Kernels that may have local memory, and why. A pattern of the name as budget.json writes it.
LOCAL = {
    r"masked_conv2d_kernel<double>": "float64 is a plain path, not tuned: 56 bytes are spilled on sm_90",
}

# kernel pattern: {instruction pattern: at least how many}
ASKED = {
    # x, model_output, uncond, three histories, noise, variance; out, x0
    r"diffusion_step_kernel<(float|.*bf16|.*f16), \d, true>": {r"LDG\.E\.128": 8, r"STG\.E\.128": 2},
    r"philox_fill_kernel<float>": {r"STG\.E\.128": 1},
    # four rows or four components' parameters at a time; grad_x leaves in whole packs
    r"gmm_diagonal_(log_prob|grad_x|statistics)_kernel": {r"LDG\.E\.128": 1, r"LDS\.(U\.)?128": 8},
    r"gmm_diagonal_grad_x_kernel": {r"STG\.E\.128": 1},
}
# From sm_80 on: three products of tf32 for every block of P, and x and P straight to shared memory.
ASKED_80 = {
    r"gmm_matrix_(log_prob|grad_x)_kernel<\d+>": {r"HMMA\.1688\.F32\.TF32": 24, r"LDGSTS\.E\..*128": 3, r"LDS\.128": 4},
    r"gmm_matrix_grad_x_kernel<\d+>": {r"STG\.E\.128": 1},
    r"gmm_matrix_statistics_kernel<\d+>": {r"HMMA\.1688\.F32\.TF32": 30, r"LDG\.E\.128": 1, r"LDGSTS\.E\..*128": 1},
}


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
    wrong = [line for arch in archs for line in local_memory(arch, found[arch])]
    if not args.no_sass:
        tool = cuobjdump()
        if tool is None:
            print(f"cuda-static: no disassembly: neither cuobjdump nor {TRITON} can be had here")
        else:
            with ThreadPoolExecutor(args.jobs) as pool:
                lists = pool.map(lambda job: instructions(tool, job[2]), cubins)
                for (arch, _, _), listing in zip(cubins, lists, strict=True):
                    wrong += disassembly(arch, listing)
            asked_for(found, wrong)
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
        sys.exit(f"cuda-static: sm_{arch} {source.relative_to(ROOT)} does not compile:\n{done.stdout}{done.stderr}")
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


def cuobjdump():
    tool = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if tool:
        return tool
    folder = BUILD / "tools"
    names = [f"triton/backends/nvidia/bin/{name}" for name in ("cuobjdump", "nvdisasm")]
    if not all((folder / Path(name).name).exists() for name in names):
        wheels = BUILD / "wheels"
        subprocess.run([sys.executable, "-m", "pip", "--no-input", "-q", "download", "--no-deps", "-d", wheels, TRITON],
                       stderr=subprocess.DEVNULL)
        wheel = next(wheels.glob("triton-*.whl"), None) if wheels.exists() else None
        if wheel is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in names:
                target = folder / Path(name).name
                target.write_bytes(archive.read(name))
                target.chmod(0o755)
        shutil.rmtree(wheels)
    return str(folder / "cuobjdump")


def instructions(tool, cubin):
    """kernel -> its instructions."""
    path = f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode:
        sys.exit(f"cuda-static: {tool} failed on {cubin}:\n{done.stderr}")
    parts = re.split(r"Function : (\S+)", done.stdout)[1:]
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    names = demangle(code)
    return {names[mangled]: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)
            for mangled, text in code.items()}


def disassembly(arch, kernels):
    for name, code in kernels.items():
        local = sum(op.startswith(("LDL", "STL")) for op in code)
        if local and not allowed_local(name):
            yield f"sm_{arch} {name}: {local} accesses of local memory (LDL, STL)"
        for pattern, wanted in [*ASKED.items(), *(ASKED_80.items() if int(arch) >= 80 else ())]:
            if re.fullmatch(pattern, name):
                for op, least in wanted.items():
                    count = sum(bool(re.match(op, o)) for o in code)
                    if count < least:
                        yield f"sm_{arch} {name}: {count} instructions {op}, at least {least} are asked for"


def asked_for(found, wrong):
    for pattern in [*ASKED, *ASKED_80, *LOCAL]:
        for arch, kernels in found.items():
            if not any(re.search(pattern, name) for name in kernels):
                wrong.append(f"sm_{arch}: no kernel is called {pattern}: a rule of check.py is out of date")


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

"""`python -m gmkernels doctor`: what runs on this machine and, where something does not, why.

Every probe is on its own: one that fails on a strange machine says so and the others still report.
"""

import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

from .. import _C, __version__, _call
from . import selftest
from .machine import cpu_model

RIVALS = ("numpy", "scikit-learn", "scipy", "diffusers", "safetensors", "rich")


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--no-selftest", action="store_true", help="only look, run no op")


def run(args):
    report = {name: _guarded(probe) for name, probe in PROBES.items()}
    report["selftest"] = [] if args.no_selftest else _selftests(report["cuda"])
    report["warnings"] = [w for part in report.values() if isinstance(part, dict) for w in part.pop("warnings", [])]
    report["ok"] = all(result["ok"] is not False for result in report["selftest"])
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0 if report["ok"] else 1


def _guarded(probe):
    try:
        return probe()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


# probes ---------------------------------------------------------------------------------------------------------------


def _software():
    return {
        "gmkernels": __version__,
        "from": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "compiler": _C.compiler,
    }


def _cpu():
    return {
        "model": cpu_model(),
        "isa": _C.isa(),
        "available": list(_C.isas()),
        "GMKERNELS_ISA": os.environ.get("GMKERNELS_ISA"),
    }


def _threads():
    threads = _call.threads()
    team = _C.openmp_threads(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    warnings = []
    if team != threads:
        warnings.append(f"asked OpenMP for {threads} threads and got {team}: OMP_THREAD_LIMIT, or OMP_DYNAMIC")
    if threads > cores:
        warnings.append(f"{threads} threads on {cores} cores: torch.set_num_threads({cores}) will be faster")
    return {
        "torch": threads,
        "openmp_team": team,
        "cores": cores,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "warnings": warnings,
    }


def _openmp():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return {"runtimes": None, "note": "no /proc/self/maps here, so it cannot be told"}
    runtimes = openmp_runtimes(maps.read_text())
    warnings = []
    if len(runtimes) > 1:
        warnings.append(
            f"{len(runtimes)} OpenMP runtimes in one process: they do not share threads, and forked workers may hang. "
            "Import torch first"
        )
    return {"runtimes": runtimes, "warnings": warnings}


def openmp_runtimes(maps):
    """Paths of the OpenMP runtimes in the text of /proc/<pid>/maps, each once."""
    return sorted({m[0] for m in re.finditer(r"/\S*/lib(?:gomp|i?omp\d*)\b[^/\s]*\.so[^/\s]*", maps)})


def _cuda():
    info = {"built_with": bool(_C.with_cuda), "archs": getattr(_C, "cuda_archs", None), "torch": torch.version.cuda}
    probed = _C.cuda_probe() if _C.with_cuda else (0, 0, 0, None)
    info["runtime"], info["driver"] = _version(probed[0]), _version(probed[1])
    info["devices"] = []
    info["reason"] = no_cuda_because(info, probed)
    if info["reason"] is None:
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            served = serves(info["archs"], p.major, p.minor)
            info["devices"].append({"name": p.name, "arch": f"{p.major}{p.minor}", "served": served,
                                    "memory_gb": round(p.total_memory / 2**30, 1)})
        lacking = [d for d in info["devices"] if not d["served"]]
        if lacking and len(lacking) == len(info["devices"]):
            info["reason"] = (
                f"{lacking[0]['name']} is GPU generation {lacking[0]['arch']} and the build has {info['archs']}: "
                f"build again with CUDAARCHS={lacking[0]['arch']}"
            )
    info["usable"] = info["reason"] is None
    return info


def no_cuda_because(info, probed):
    """Why no CUDA kernel can run here, in plain words; None where nothing speaks against it."""
    runtime, driver, devices, error = probed
    if not info["built_with"]:
        why = getattr(_C, "cuda_missing", "unknown")
        return f"this build has no CUDA kernels: {why} (GMKERNELS_CUDA=ON builds them or says why not)"
    if driver == 0:
        return "no NVIDIA driver on this machine"
    if driver // 1000 < runtime // 1000:  # within one major version, an older driver serves a newer runtime
        return (
            f"the NVIDIA driver is too old: it serves CUDA {info['driver']}, the kernels were built with "
            f"CUDA {info['runtime']}; update the driver or build with nvcc {driver // 1000}.x"
        )
    if error:
        return f"the CUDA driver says: {error}"
    if devices == 0:
        return f"the driver shows no GPU (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r})"
    if info["torch"] is None:
        return f"there is a GPU, but torch {torch.__version__} is a CPU build: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"there is a GPU, but torch (CUDA {info['torch']}) cannot use it: torch.cuda.is_available() is False"
    return None


def serves(archs, major, minor):
    """Does a build for `archs` ("75-real 90 120") run on a GPU of this compute capability?

    Machine code runs within its major version on the same or a later minor; PTX (no "-real") on anything later.
    """
    for arch in re.split(r"[ ;]+", archs or ""):
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if not found:  # "native", "all": built for what was there
            if arch in ("native", "all", "all-major"):
                return True
            continue
        built = int(found[1]), int(found[2])
        if found[3]:
            if built == (major, minor):
                return True
        elif found[4] != "-virtual" and built[0] == major and built[1] <= minor:
            return True
        elif found[4] != "-real" and built <= (major, minor):
            return True
    return False


def _version(number):
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _installed():
    versions = {}
    for name in RIVALS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


PROBES = {
    "software": _software,
    "cpu": _cpu,
    "threads": _threads,
    "openmp": _openmp,
    "cuda": _cuda,
    "installed": _installed,
}


def _selftests(cuda):
    try:
        results = selftest.run("cpu")
        if cuda.get("usable"):
            results += selftest.run("cuda")
    except Exception as error:
        results = [{"op": "self-test", "device": "", "isa": None, "ok": False, "error": None, "ms": None,
                    "why": f"{type(error).__name__}: {error}"}]
    return results


# text -----------------------------------------------------------------------------------------------------------------


def _text(report):
    lines = []
    for head, write in (("software", _software_lines), ("cpu", _cpu_lines), ("threads", _thread_lines),
                        ("openmp", _openmp_lines), ("cuda", _cuda_lines), ("installed", _installed_lines)):
        part = report[head]
        texts = [f"cannot tell: {part['failed']}"] if "failed" in part else write(part)
        lines += [f"{head if i == 0 else '':<10} {text}" for i, text in enumerate(texts)]
    if report["selftest"]:
        lines += ["", "self-test: largest error against the reference in float64, and the time of a small call"]
        lines += [_selftest_line(result) for result in report["selftest"]]
    lines += [""] + [f"warning: {w}" for w in report["warnings"]]
    failed = sum(result["ok"] is False for result in report["selftest"])
    if failed:
        lines.append(f"{failed} of {len(report['selftest'])} self-tests FAILED: do not trust these ops here")
    elif report["selftest"]:
        lines.append("All self-tests passed.")
    return "\n".join(lines)


def _software_lines(p):
    return [f"gmkernels {p['gmkernels']}, torch {p['torch']}, Python {p['python']}", p["platform"], f"from {p['from']}"]


def _cpu_lines(p):
    forced = f", by GMKERNELS_ISA={p['GMKERNELS_ISA']}" if p["GMKERNELS_ISA"] else ""
    return [p["model"], f"{p['isa']} kernels{forced} (available: {', '.join(p['available'])}; GMKERNELS_ISA chooses)"]


def _thread_lines(p):
    omp = f", OMP_NUM_THREADS={p['OMP_NUM_THREADS']}" if p["OMP_NUM_THREADS"] else ""
    return [f"{p['torch']} by torch.get_num_threads(), {p['openmp_team']} given by OpenMP, {p['cores']} cores{omp}"]


def _openmp_lines(p):
    return [p["note"]] if p["runtimes"] is None else p["runtimes"] or ["no runtime found in this process"]


def _cuda_lines(p):
    built = [f"built with CUDA {p['runtime']} for GPU generations {p['archs']}"] if p["built_with"] else []
    if not p["usable"]:
        return [f"not used: {p['reason']}", *built]
    lines = [f"driver for CUDA {p['driver']}, torch for CUDA {p['torch']}", *built]
    return lines + [f"{d['name']}, generation {d['arch']}, {d['memory_gb']} GB"
                    + ("" if d["served"] else ": NOT in the build") for d in p["devices"]]


def _installed_lines(p):
    return [", ".join(f"{name} {version or 'not installed'}" for name, version in p.items())]


def _selftest_line(r):
    where = r["isa"] or r["device"]
    state = {True: "ok", False: "FAILED", None: "-"}[r["ok"]]
    numbers = f"{r['error']:8.1e}  {r['ms']:7.2f} ms" if r["error"] is not None else ""
    return f"  {r['op']:<28} {where:<7} {state:<7} {numbers}" + (f"  {r['why']}" if r["why"] else "")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m gmkernels doctor")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))

"""Where and with what a result was measured."""

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .. import _C, __version__
from ..cli.machine import cpu_model

RIVALS = ("numpy", "scikit-learn", "scipy", "diffusers")


def environment(device):
    env = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gmkernels": __version__,
        "commit": commit(),
        "device": str(device),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": f"gcc {_C.compiler}" if _C.compiler[0].isdigit() else _C.compiler,
        "compiler_of_torch": _torch_compiler(),
        "compiler_of_torch_compile": _output(os.environ.get("CXX", "g++"), "--version").partition("\n")[0] or "none",
        "rivals": {name: _version(name) for name in RIVALS},
    }
    if torch.device(device).type == "cuda":
        env["gpu"] = torch.cuda.get_device_name(device)
        env["cuda"] = {"torch": torch.version.cuda, "archs": getattr(_C, "cuda_archs", None)}
        env["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip()
    return env


def machine(env):
    """A file name's worth: "xeon-8481c-2t-avx512", "nvidia-h200"."""
    if env.get("gpu"):
        return _slug(env["gpu"])
    words = re.sub(r"\((r|tm)\)|\bcpu\b|processor|@.*|\d+-core", " ", env["cpu"], flags=re.I)
    return _slug(f"{words} {env['threads']}t {env['isa']}")


def describe(env):
    """Lines for the head of the table."""
    rivals = ", ".join(f"{name} {version}" for name, version in env["rivals"].items())
    lines = [
        f"gmkernels {env['gmkernels']} ({env['commit'] or 'no checkout'}), {env['date']}",
        f"CPU    {env['cpu']}, {env['isa']}, {env['threads']} threads of {env['cores']} cores, {env['memory_gb']} GB,"
        f" load {env['load_before'][0]}",
    ]
    if env.get("gpu"):
        lines.append(f"GPU    {env['gpu']}, driver {env['driver']}, CUDA {env['cuda']['torch']}")
    lines += [
        f"torch  {env['torch']} ({env['compiler_of_torch']}), python {env['python']}, kernels by {env['compiler']},",
        f"       torch.compile by {env['compiler_of_torch_compile']}",
        f"rivals {rivals}",
    ]
    return lines


def commit():
    """GMK_COMMIT, else of the checkout that this file is in: short, "-dirty" with uncommitted changes, or None."""
    if os.environ.get("GMK_COMMIT"):
        return os.environ["GMK_COMMIT"]
    here = Path(__file__).resolve().parent
    top = _output("git", "-C", str(here), "rev-parse", "--show-toplevel").strip()
    if not top or not (Path(top) / "bench" / "case.py").is_file():  # some other project's checkout
        return None
    head = _output("git", "-C", top, "rev-parse", "--short=9", "HEAD").strip()
    changed = _output("git", "-C", top, "status", "--porcelain", "--untracked-files=no").strip()
    return f"{head}-dirty" if head and changed else head or None


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _torch_compiler():
    found = re.search(r"^\s*- (GCC|clang|Clang)[ -]?([\d.]+)", torch.__config__.show(), re.M)
    return f"{found[1].lower()} {found[2]}" if found else "compiler unknown"


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

"""What this machine is, for doctor and the benchmark's environment block."""

import platform
import re
from pathlib import Path


def cpu_model():
    try:
        info = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        )
    except OSError:
        info = {}
    name = info.get("model name") or info.get("Model") or platform.processor() or platform.machine()
    if "model" in info and not re.search(r"\d", name):  # a hypervisor's anonymous Xeon: say at least which model
        name += f" (family {info.get('cpu family')}, model {info['model']})"
    return name

"""The mutants that no test kills, by name, each with a reason: survivors.toml.

    [[group]]
    kind = "equivalent"       # behaves the same for every input: not counted.  "hole": it does not; counted as survived
    reason = "..."
    names = ["gmm.cu:kernel:operator:hash#1", ...]
"""

from pathlib import Path

import tomllib

FILE = Path(__file__).with_name("survivors.toml")


def load(path=FILE):
    """{name: {"kind", "reason"}}"""
    listed = {}
    groups = tomllib.loads(path.read_text()).get("group", []) if path.exists() else []
    for group in groups:
        kind, reason = group["kind"], group["reason"]
        if kind not in ("equivalent", "hole") or not reason.strip():
            raise ValueError(f"survivors.toml: a group needs a reason and a kind, equivalent or hole, got {kind!r}")
        for name in group["names"]:
            if name in listed:
                raise ValueError(f"survivors.toml: {name} is listed twice")
            listed[name] = {"kind": kind, "reason": reason}
    return listed


def stale(listed, names):
    return set(listed) - set(names)

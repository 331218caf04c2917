"""The mutants that no test kills, by name, each with a reason: survivors_of/<source>.toml.

    [[group]]
    kind = "equivalent"       # behaves the same for every input: not counted.  "hole": it does not; counted as survived
    reason = "..."
    names = ["gmm.cu:kernel:operator:hash#1", ...]     # file:function:operator:hash of the line#which
"""

from pathlib import Path

import tomllib

FOLDER = Path(__file__).with_name("survivors_of")


def load(folder=FOLDER):
    """{name: {"kind", "reason"}}"""
    listed = {}
    for path in sorted(folder.glob("*.toml")):
        for group in tomllib.loads(path.read_text())["group"]:
            kind, reason = group["kind"], group["reason"]
            if kind not in ("equivalent", "hole") or not reason.strip():
                raise ValueError(f"{path.name}: a group needs a reason and a kind, equivalent or hole, got {kind!r}")
            for name in group["names"]:
                if name in listed:
                    raise ValueError(f"{path.name}: {name} is listed twice")
                if name.split(":")[0] != path.stem:
                    raise ValueError(f"{path.name}: {name} is of another source")
                listed[name] = {"kind": kind, "reason": reason}
    return listed


def stale(listed, names):
    return set(listed) - set(names)

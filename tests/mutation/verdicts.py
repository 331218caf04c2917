"""Verdicts of earlier runs, and how long they hold.

A killed mutant stays killed while the test that killed it, its source, the object code of that family and the emulator
are what they were; one that survived is still one while all the tests it was shown are. Where a verdict does not hold
any more, it says which test to begin with. `killers.txt` keeps that under version control: a line per test, then its
mutants.
"""

import hashlib
import json
import threading
from pathlib import Path

from simt import backend

from .build import ROOT
from .source import Source
from .tests import TESTS, family_of, state_of

KILLERS = Path(__file__).with_name("killers.txt")


class Cache:
    """The last verdict on each mutant, one a line."""

    def __init__(self, path):
        self.path, self.rows, self.lock = path, {}, threading.Lock()
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[row["name"]] = row
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row):
        with self.lock:
            self.rows[row["name"]] = row
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")


class Present:
    """What the verdicts on mutants of a source depend on, as it is now."""

    def __init__(self, path, builder, families):
        self.path, self.builder, self.families = path, builder, families
        self.states = {}

    def of(self, family=None):
        """A hash of the source, the objects it goes into (of one family, or all), the emulator and Python around it."""
        if family not in self.states:
            digest = hashlib.sha256(" ".join(t.text for t in Source(self.path.read_text()).tokens).encode())
            for name in self.builder.objects(self.path):
                if family in (None, self.builder.commands[0][name][0].split("/")[-2]):
                    digest.update(self.builder.bare(backend.BUILD / name))
            for f in _around(self.families if family is None else {family}):
                digest.update(f.read_bytes())
            self.states[family] = digest.hexdigest()[:16]
        return self.states[family]

    def depends(self, row, tests=()):
        """What to remember with a verdict."""
        if row["test"]:
            return {"of": self.of(family_of(row["test"], self.families)), "by": state_of(row["test"])}
        return {"of": self.of(), **({"tests": " ".join(sorted(map(state_of, tests)))} if tests else {})}

    def holds(self, row):
        """Is it sure that the verdict would be the same again? Without a look at new tests."""
        if not row["test"]:
            return row["of"] == self.of()
        try:
            return row["of"] == self.of(family_of(row["test"], self.families)) and row["by"] == state_of(row["test"])
        except FileNotFoundError:
            return False

    def unseen(self, row, tests):
        """The tests that a survivor has not been shown yet."""
        seen = set(row.get("tests", "").split())
        return [t for t in tests if state_of(t) not in seen]


def _around(families):
    python = ROOT / "python" / "gmkernels"
    files = [TESTS / "conftest.py", *TESTS.glob("*cases.py"), python / "_call.py"]
    files += [f for f in (TESTS / "simt").iterdir() if f.suffix in (".py", ".h", ".cpp")]
    files += [f for name in families for f in python.rglob(f"{name}*.py")]
    return sorted(files)


def killers(path=KILLERS):
    """{mutant: test}"""
    found, test = {}, None
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("  "):
            found[line.strip()] = test
        else:
            test = line
    return found


def write_killers(rows, path=KILLERS, present=()):
    """`present`: names of all mutants. Of those that `rows` says nothing of, what the file says stays."""
    known, by = {row["name"] for row in rows}, {}
    for name, test in killers(path).items():
        if name in present and name not in known:
            by.setdefault(test, []).append(name)
    for row in rows:
        if row["test"]:
            by.setdefault(row["test"], []).append(row["name"])
    path.write_text("".join(f"{test}\n" + "".join(f"  {n}\n" for n in sorted(by[test])) for test in sorted(by)))

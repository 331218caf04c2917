"""The tests that a source concerns: in a process that is ready to run them, in the order in which they notice most."""

import ast
import functools
import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from simt import SCHEDULES

from .build import ROOT

TESTS = ROOT / "tests"


def families_of(path, builder):
    """The families that a source goes into; "simt", the primitives' own tests, only of cuda/."""
    families = {builder.commands[0][o][0].split("/")[-2] for o in builder.objects(path)}
    return families if path.parent.name == "cuda" else families - {"simt"}


def files_of(families):
    return [f for name in sorted(families) for f in sorted(TESTS.glob(f"test_{name}*.py"))]


def family_of(test, families):
    """Of a test's id: tests/test_gmm_huge.py::test_x[simt] -> gmm."""
    name = Path(test.split("::")[0]).stem.removeprefix("test_")
    return max((f for f in families if name.startswith(f)), key=len, default=None)


@functools.cache
def _parts(file):
    """The text of a test file without its tests, and {test: its text}."""
    text = Path(file).read_text()
    lines, parts = text.split("\n"), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            parts[node.name] = "\n".join(lines[first : node.end_lineno])
            lines[first : node.end_lineno] = [""] * (node.end_lineno - first)
    return "\n".join(line for line in lines if line), parts


def state_of(test):
    """A short hash of a test: its own text, and its file without the other tests."""
    file, name = test.split("::", 1)
    common, parts = _parts(str(ROOT / file))
    return hashlib.sha256(f"{test}\n{parts.get(name.split('[')[0], '')}\n{common}".encode()).hexdigest()[:8]


class Tests:
    """The tests of a source file; what is known of each."""

    def __init__(self, files, library):
        """`library`: the emulator without a mutant."""
        self.files, self.library = [str(f) for f in files], str(library)
        self.seconds, self.passed = {}, set()  # of tests without a mutant; (test, schedule)
        self.kills = {}  # (function or "", test) -> mutants
        self.lock, self.baseline = threading.Lock(), threading.Lock()
        self.answers, self.called = {}, {}  # called: test -> kernels
        self._start()

    def _start(self):
        down, up = os.pipe(), os.pipe()
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mutation.worker", str(down[0]), str(up[1]), *self.files], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, pass_fds=(down[0], up[1]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.close(down[0])
        os.close(up[1])
        self.inbox, self.outbox = os.fdopen(down[1], "w"), os.fdopen(up[0])
        first = self.outbox.readline()
        if not first:
            raise RuntimeError(f"no tests could be collected of {self.files}:\n{self.process.communicate()[0]}")
        self.ids = json.loads(first)
        self.number = {name: i for i, name in enumerate(self.ids)}
        threading.Thread(target=lambda: [None for _ in self.process.stdout], daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.outbox:
            answer = json.loads(line)
            self.answers[answer["id"]].put(answer)
        for waiting in list(self.answers.values()):
            waiting.put(None)

    def _send(self, message):
        with self.lock:
            print(json.dumps(message), file=self.inbox, flush=True)

    def _ask(self, library, order, limits, schedule, alive=None, seen=False):
        waiting = queue.SimpleQueue()
        with self.lock:
            number = len(self.answers)
            self.answers[number] = waiting
        job = {"id": number, "library": str(library), "tests": list(order), "limits": limits, "schedule": schedule,
               "alive": alive, "seen": seen}
        self._send(job)
        answer = waiting.get()
        if answer is None:
            raise RuntimeError(f"the process of {self.files} has ended")
        return answer

    def warm(self, names):
        """What each of these tests calls: {id: kernels}."""
        with self.baseline:
            new = [self.number[name] for name in names if name not in self.called]
            if new:
                waiting = self.answers["warm"] = queue.SimpleQueue()
                self._send({"warm": self.library, "tests": new})
                self.called.update((self.ids[int(i)], names) for i, names in waiting.get()["called"].items())
        return self.called

    def ensure(self, tests, schedule):
        """Without a mutant these tests pass; how long each takes."""
        with self.baseline:
            new = [i for i in tests if (i, schedule) not in self.passed]
            if not new:
                return
            got = self._ask(self.library, new, [60.0] * len(new), schedule)
            if got["verdict"] != "survived":
                test = "a fork" if got["test"] is None else self.ids[got["test"]]
                raise RuntimeError(f"{test} fails without a mutant: {got['verdict']}, {schedule}")
            for test, s in got["seconds"].items():
                self.seconds[int(test)] = max(s, self.seconds.get(int(test), 0.01))
            self.passed.update((i, schedule) for i in new)

    def seen(self, library, names):
        """{test: numbers of the places that it comes by}, from a library with marks."""
        order = [self.number[n] for n in names]
        got = self._ask(library, order, [60 + 100 * self.seconds[i] for i in order], SCHEDULES[0], seen=True)
        if got["test"] is not None:
            raise RuntimeError(f"{self.ids[got['test']]} fails in a library with marks: {got['verdict']}")
        return {self.ids[int(i)]: numbers for i, numbers in got["seen"].items()}

    def _ordered(self, tests, function, first=None):
        """`first`, if it is there; then those that have noticed most mutants, of this function above all, in the least
        time."""

        def worth(i):
            kills = self.kills.get(("", i), 0) + 20 * self.kills.get((function, i), 0)
            return (kills + 0.3) / (self.seconds[i] + 0.02)

        first = self.number.get(first)
        return sorted(tests, key=lambda i: (i == first, worth(i)), reverse=True)

    def best(self, names, function, first=None, seconds=float("inf")):
        """These tests, `first` and the best ones first, as many as take so long, but one."""
        order = self._ordered([self.number[n] for n in names], function, first)
        total = itertools.accumulate(self.seconds[i] for i in order)
        return [self.ids[i] for place, (i, s) in enumerate(zip(order, total, strict=True)) if not place or s <= seconds]

    def run(self, library, schedule=SCHEDULES[0], names=None, function="", alive=None, first=None):
        """The verdict, and the test it is from. `names`: only these tests; `first`: the one to begin with. `alive`: the
        numbers of those that are, in a library of many."""
        tests = range(len(self.ids)) if names is None else [self.number[n] for n in names]
        self.ensure(tests, schedule)
        order = self._ordered(tests, function, first)
        got = self._ask(library, order, [3 + 10 * self.seconds[i] for i in order], schedule, alive)
        if got["test"] is None:
            return got["verdict"], None
        with self.lock:
            for key in (("", got["test"]), (function, got["test"])):
                self.kills[key] = self.kills.get(key, 0) + 1
        return got["verdict"], self.ids[got["test"]]

    def stop(self):
        self.inbox.close()
        self.process.wait()

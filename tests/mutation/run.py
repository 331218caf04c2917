"""Mutants against tests: who notices what."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simt import SCHEDULES

from .build import CSRC, ROOT, Builder, Compiled, sources
from .operators import mutants

TESTS = ROOT / "tests"
FOLDER = Path(os.environ.get("GMK_MUTANTS", ROOT / "build" / "mutants"))


def all_mutants(family=""):
    """[(path, Mutant)]. family: the name of a folder or of a file in csrc/, or nothing for all."""
    return [(path, m) for path in sources() if family in ("", path.parent.name, path.name)
            for m in mutants(path.name, path.read_text())]


def tests_of(path, builder):
    """The test files of the families that a source goes into."""
    families = {builder.commands[0][o][0].split("/")[-2] for o in builder.objects(path)}
    files = [f for name in sorted(families) for f in sorted(TESTS.glob(f"test_{name}*.py"))]
    if "simt" in families and path.parent.name == "cuda":  # tests/simt/bugs.cu: the primitives' own tests
        files.append(TESTS / "test_simt.py")
    return files


class Tests:
    """The tests of one source file, in processes that are ready to run them; and what is known of each."""

    def __init__(self, files, library):
        """`library`: the emulator without a mutant."""
        self.files, self.library = [str(f) for f in files], library
        self.ids, self.seconds, self.kills = [], {}, {}
        self.lock = threading.Lock()
        self.first, self.checked = threading.Lock(), set()
        self.idle, self.started = [], []

    def start(self):
        down, up = os.pipe(), os.pipe()
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "mutation.worker", str(down[0]), str(up[1]), *self.files], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, pass_fds=(down[0], up[1]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.close(down[0])
        os.close(up[1])
        worker = process, os.fdopen(down[1], "w"), os.fdopen(up[0])
        first = worker[2].readline()
        if not first:
            raise RuntimeError(f"no tests could be collected of {self.files}:\n{process.communicate()[0]}")
        threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True).start()
        self.ids = json.loads(first)
        print(self.library, file=worker[1], flush=True)
        self.started.append(worker)
        return worker

    def baseline(self, schedule=SCHEDULES[0]):
        """Without a mutant every test passes; how long each takes."""
        with self.first:
            if schedule in self.checked:
                return
            got = self._ask(self.library, range(len(self.ids)), [30.0] * len(self.ids), schedule)
            if got["verdict"] != "survived":
                raise RuntimeError(f"{self.ids[got['test']]} fails without a mutant: {got['verdict']}, {schedule}")
            for test, s in got["seconds"].items():
                self.seconds[int(test)] = max(s, self.seconds.get(int(test), 0.01))
            self.checked.add(schedule)

    def run(self, library, schedule):
        """A verdict. First the tests that have noticed most mutants in the least time."""
        self.baseline(schedule)

        def worth(i):
            return (self.kills.get(i, 0) + 0.3) / (self.seconds[i] + 0.02)

        order = sorted(range(len(self.ids)), key=worth, reverse=True)
        got = self._ask(library, order, [3 + 10 * self.seconds[i] for i in order], schedule)
        with self.lock:
            if got["test"] is not None:
                self.kills[got["test"]] = self.kills.get(got["test"], 0) + 1
        return got["verdict"], self.ids[got["test"]] if got["test"] is not None else None

    def _ask(self, library, order, limits, schedule):
        with self.lock:
            worker = self.idle.pop() if self.idle else None
        worker = worker or self.start()
        job = {"library": str(library), "tests": list(order), "limits": limits, "schedule": schedule}
        print(json.dumps(job), file=worker[1], flush=True)
        answer = json.loads(worker[2].readline())
        with self.lock:
            self.idle.append(worker)
        return answer

    def stop(self):
        for process, inbox, outbox in self.started:
            inbox.close()
            outbox.close()
            process.wait()


def state_of(files):
    """A hash of everything that a verdict depends on."""
    digest = hashlib.sha256()
    common = [TESTS / "conftest.py", *TESTS.glob("*cases.py"), *(TESTS / "simt").glob("*")]
    common += (ROOT / "python").rglob("*.py")
    for f in [*sorted(common), *files]:
        digest.update(open(f, "rb").read() if os.path.isfile(f) else b"")
    return digest.hexdigest()[:16]


class Cache:
    """Verdicts of earlier runs, one a line, for the same mutant of the same sources under the same tests."""

    def __init__(self, path):
        self.path, self.known, self.lock = path, {}, threading.Lock()
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.known[row["key"]] = row
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, key, row):
        with self.lock, open(self.path, "a") as f:
            f.write(json.dumps({**row, "key": key}) + "\n")


def run(family="", sample=0, seed=0, jobs=2, operator="", names=(), again=False, say=print):
    """[{"name", "file", "function", "operator", "line", "what", "verdict", "test", "seconds"}], a row per mutant."""
    chosen = [(p, m) for p, m in all_mutants(family)
              if operator in ("", m.operator) and (not names or m.name in names)]
    if sample:
        chosen = random.Random(seed).sample(chosen, min(sample, len(chosen)))
    cache = Cache(FOLDER / "verdicts.jsonl")
    rows, began = [], time.monotonic()
    by_path = {}
    for path, m in chosen:
        by_path.setdefault(path, []).append(m)
    for path, some in by_path.items():
        rows += _run_file(path, some, jobs, cache, again, say)
    say(f"{len(rows)} mutants, {time.monotonic() - began:.0f} s")
    return rows


def known():
    """What earlier runs have found out about the present sources and tests: rows; and how many mutants there are."""
    cache, rows, total = Cache(FOLDER / "verdicts.jsonl"), [], 0
    for path in sources():
        builder = Builder(FOLDER / "0")
        state = _state(path, builder, tests_of(path, builder))
        names = [m.name for m in mutants(path.name, path.read_text())]
        rows += [cache.known[f"{state} {name}"] for name in names if f"{state} {name}" in cache.known]
        total += len(names)
    return rows, total


def _state(path, builder, files):
    objects = set(builder.objects(path))
    involved = [p for p, users in builder.users.items() if objects & set(users)]
    return state_of([*files, *sorted(p for p in involved if p.startswith(str(ROOT)))])


def _run_file(path, some, jobs, cache, again, say):
    builders = [Builder(FOLDER / f"{i}") for i in range(jobs)]
    files = tests_of(path, builders[0])
    text = path.read_text()
    objects = builders[0].objects(path)
    state = _state(path, builders[0], files)
    rows = [cache.known.get(f"{state} {m.name}") for m in some]
    rows = [None if again else row for row in rows]
    if all(rows):
        return rows
    plain = Builder(FOLDER / "plain")
    original = plain.compile(objects=objects)
    tests = Tests(files, plain.link(original))
    tests.idle.append(tests.start())
    tests.baseline()
    say(f"{path.relative_to(CSRC)}: {rows.count(None)} mutants to run, {len(rows)} in all, {len(tests.ids)} tests of "
        f"{sum(tests.seconds.values()):.1f} s of CPU time")
    free = list(builders)
    lock = threading.Lock()
    done = [len(rows) - rows.count(None)]

    def one(n):
        if rows[n] is not None:
            return
        with lock:
            builder = free.pop()
        m, start = some[n], time.monotonic()
        row = {"name": m.name, "file": m.file, "function": m.function, "operator": m.operator, "line": m.line,
               "what": m.what, "test": None}
        try:
            row.update(_verdict(builder, path, m.apply(text), original, tests))
        finally:
            with lock:
                free.append(builder)
                done[0] += 1
        row["seconds"] = round(time.monotonic() - start, 2)
        rows[n] = row
        cache.add(f"{state} {m.name}", row)
        if row["verdict"] == "survived" or done[0] % 50 == 0:
            say(f"  {done[0]}/{len(rows)} {row['verdict']}: {m.name} line {m.line}: {m.what}")

    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, range(len(some))))
    finally:
        tests.stop()
    return rows


def _verdict(builder, path, text, original, tests):
    try:
        objects = builder.compile(path, text)
        if objects == original:
            return {"verdict": "same code"}
        library = builder.link([o for o in objects if objects[o] != original[o]])
    except Compiled:
        return {"verdict": "invalid"}
    for schedule in SCHEDULES:  # the others, for what the first one lets through
        verdict, test = tests.run(library, schedule)
        if verdict != "survived":
            return {"verdict": verdict, "test": test, **({} if schedule == SCHEDULES[0] else {"schedule": schedule})}
    return {"verdict": "survived"}




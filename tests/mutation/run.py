"""Mutants against tests: who notices what."""

import fcntl
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from simt import SCHEDULES, backend

from .build import CSRC, ROOT, Builder, Compiled, sources
from .operators import mutants
from .tests import Tests, families_of, family_of, files_of
from .together import Together
from .verdicts import Cache, Present, killers

OTHER_SCHEDULES = [s for s in SCHEDULES[1:] if ":" not in s]  # for what the first one lets through
SCHEDULED = {"barrier", "syncwarp", "fence", "wait", "mask"}  # only these can depend on it
OTHERS = 20  # tests, the best ones: the detector of races needs no luck
NARROW = 5  # CPU seconds of tests without large indices, for a narrow integer
FOLDER = Path(os.environ.get("GMK_MUTANTS", ROOT / "build" / "mutants"))


def all_mutants(family=""):
    """[(path, Mutant)]. family: the name of a folder or of a file in csrc/, or nothing for all."""
    return [(path, m) for path in sources() if family in ("", path.parent.name, path.name)
            for m in mutants(path.name, path.read_text())]


@contextmanager
def _alone():
    """Two runs at a time would compile in the same folders."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SystemExit(f"another run of mutants is at work in {FOLDER}; GMK_MUTANTS names another") from error
        yield


@_alone()
def run(family="", sample=0, seed=0, jobs=2, operator="", names=(), again=False, listed=(), recorded=False,
        say=print):
    """[{"name", "file", "function", "operator", "line", "what", "verdict", "test", "seconds"}], a row per mutant.
    `listed`: known survivors, which are not run. `recorded`: only mutants that are in killers.txt."""
    hints = killers()
    chosen = [(p, m) for p, m in all_mutants(family)
              if operator in ("", m.operator) and (not names or m.name in names) and (not recorded or m.name in hints)]
    if sample:
        drawn = set(draw([m.name for _, m in chosen], sample, seed))
        chosen = [(p, m) for p, m in chosen if m.name in drawn]
    cache = Cache(FOLDER / "verdicts.jsonl")
    rows, began = [], time.monotonic()
    by_path = {}
    for path, m in chosen:
        by_path.setdefault(path, []).append(m)
    ready = {}  # files of tests -> Tests
    try:
        for path, some in by_path.items():
            rows += [{**_row(m), "verdict": "survived"} for m in some if m.name in listed]
            some = [m for m in some if m.name not in listed]
            if some:
                rows += _File(path, jobs, cache, hints, ready, say).run(some, again)
    finally:
        for tests in ready.values():
            tests.stop()
    say(f"{len(rows)} mutants, {time.monotonic() - began:.0f} s")
    return rows


def draw(names, count, seed):
    """A random sample that changes little when mutants come and go, and contains every smaller one."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count]


def known():
    """What earlier runs have found out about the present sources and tests: rows; and how many mutants there are."""
    cache, rows, total = Cache(FOLDER / "verdicts.jsonl"), [], 0
    builder = Builder(FOLDER / "known")  # a folder of its own: a run may be at work in the others
    builder.plant(None, None)
    for path in sources():
        present = Present(path, builder, families_of(path, builder))
        some = list(mutants(path.name, path.read_text()))
        found = [cache.rows.get(m.name) for m in some]
        rows += [{**row, **_row(m), "test": row["test"]} for row, m in zip(found, some, strict=True)
                 if row and present.holds(row)]
        total += len(some)
    return rows, total


def _row(m):
    return {"name": m.name, "file": m.file, "function": m.function, "operator": m.operator, "line": m.line,
            "what": m.what, "test": None}


class _File:
    """The mutants of one source."""

    def __init__(self, path, jobs, cache, hints, ready, say):
        self.path, self.jobs, self.cache, self.hints, self.ready, self.say = path, jobs, cache, hints, ready, say
        self.text = path.read_text()
        self.lines = self.text.split("\n")
        self.plain = Builder(FOLDER / "plain")
        self.plain.plant(None, None)
        self.families = families_of(path, self.plain)
        self.objects = [o for family in sorted(self.families) for o in self.of(family)]
        self.present = Present(path, self.plain, self.families)

    def run(self, some, again):
        self.again = again
        rows = [self.cache.rows.get(m.name) for m in some]
        rows = [{**row, **_row(m), "test": row["test"]} if row and not again and self.present.holds(row) else None
                for row, m in zip(rows, some, strict=True)]
        if all(row and row["verdict"] != "survived" for row in rows):
            return rows
        self.original = self.plain.compile(self.objects)
        files = tuple(files_of(self.families))
        if files not in self.ready:
            self.ready[files] = Tests(files, backend.module().__file__)
        self.tests = self.ready[files]
        # a survivor stays one until there are new tests
        rows = [None if row and row["verdict"] == "survived" and self.present.unseen(row, self.shown(m)) else row
                for row, m in zip(rows, some, strict=True)]
        self.say(f"{self.path.relative_to(CSRC)}: {rows.count(None)} of {len(rows)} mutants, "
                 f"{len(self.tests.ids)} tests")
        self.few = rows.count(None) < 10  # not worth warming up
        alive = set()  # in a library of many, all tests have passed
        if not self.few:
            for n, verdict in Together(self).run([(n, some[n]) for n, row in enumerate(rows) if row is None]):
                if verdict["test"]:
                    rows[n] = self.keep(some[n], verdict)
                else:
                    alive.add(n)
        free, lock, done = [Builder(FOLDER / f"{i}") for i in range(self.jobs)], threading.Lock(), [0]
        began = time.monotonic()

        def one(n):
            with lock:
                builder = free.pop()
            start = time.monotonic()
            try:
                verdict = self.verdict(builder, some[n], n in alive)
            finally:
                with lock:
                    free.append(builder)
            verdict["seconds"] = round(time.monotonic() - start, 2)
            row = rows[n] = self.keep(some[n], verdict)
            done[0] += 1
            if row["verdict"] == "survived" or done[0] % 50 == 0:
                self.say(f"  {done[0]}, {time.monotonic() - began:.0f} s, {row['verdict']}: {row['name']} "
                         f"line {row['line']}: {row['what']}")

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(one, sorted((n for n, row in enumerate(rows) if row is None), key=self.survived(some))))
        return rows

    def keep(self, m, verdict):
        row = {**_row(m), **verdict}
        row.update(self.present.depends(row, self.shown(m) if row["verdict"] == "survived" else ()))
        self.cache.add(row)
        return row

    def survived(self, some):
        """The slow ones last."""
        return lambda n: self.cache.rows.get(some[n].name, {}).get("verdict") == "survived"

    def hint(self, m):
        """The test that killed it last time."""
        hint = self.cache.rows.get(m.name, {}).get("test") or self.hints.get(m.name)
        return hint if hint in self.tests.number else None

    def unseen(self, m):
        """The tests that it has to meet: all, or those that are newer than its survival."""
        return self.present.unseen(self.cache.rows[m.name], self.shown(m)) if self.lived(m) else self.shown(m)

    def lived(self, m):
        """Has it survived, as far as its source goes? Then it is known that its object code is another one."""
        before = self.cache.rows.get(m.name)
        return before and before["verdict"] == "survived" and not self.again and self.present.holds(before)

    def verdict(self, builder, m, alive):
        if alive and self.lived(m) and m.operator not in SCHEDULED:
            return {"verdict": "survived"}
        hint = self.hint(m)
        shown = self.unseen(m)
        builder.plant(self.path, m.apply(self.text))
        made, families = {}, sorted(self.families, key=self.size)
        if hint:
            families.sort(key=lambda f: f != family_of(hint, self.families))
        try:
            # One after the other: most mutants are killed before all is compiled. All device functions are inlined
            # (GMK_DEV, GMK_HD), so no object has the code of another one's.
            for family in families:
                made.update(builder.compile(self.of(family)))
                library, changed = self.link(builder, made)
                changed = set(changed) & set(self.of(family))
                if alive:
                    continue
                if changed and hint and family == families[0]:
                    verdict, test = self.tests.run(library, SCHEDULES[0], [hint], m.function)
                    if test:
                        return {"verdict": verdict, "test": test}
                if changed:
                    names = self.reach(shown, changed)
                    if m.operator == "narrow" and not self.few:
                        names = self.wide(names, m)
                    verdict, test = self.tests.run(library, SCHEDULES[0], names, m.function)
                    if test:
                        return {"verdict": verdict, "test": test}
        except Compiled:
            return {"verdict": "invalid"}
        if library is None:
            return {"verdict": "same code"}
        names = self.reach(shown, [o for o in made if made[o] != self.original[o]])
        names = self.tests.best(names, m.function)[:OTHERS]
        for schedule in OTHER_SCHEDULES if m.operator in SCHEDULED else ():
            verdict, test = self.tests.run(library, schedule, names, m.function)
            if test:
                return {"verdict": verdict, "test": test, "schedule": schedule}
        return {"verdict": "survived"}

    def shown(self, m):
        """The tests that a mutant meets: those of many gigabytes only if it may lose the high half of an index."""
        huge = m.operator == "narrow" or ">> 32" in self.lines[m.line - 1]
        return [t for t in self.tests.ids if huge or "_huge.py::" not in t]

    def wide(self, names, m):
        """The tests with large indices, and the best of the others: little else can tell the width of an integer."""
        self.tests.ensure([self.tests.number[t] for t in names], SCHEDULES[0])
        small = [t for t in names if "_huge.py::" not in t]
        return [t for t in names if t not in small] + self.tests.best(small, m.function, self.hint(m), NARROW)

    def reach(self, names, changed):
        """Those of the tests that call a kernel in one of the changed objects."""
        if self.few:
            return names
        called, behind = self.tests.warm(names), self.plain.behind
        objects = {t: set().union(*(behind.get(kernel, self.objects) for kernel in called.get(t, ())))
                   for t in names}
        return [t for t in names if objects[t] & set(changed)]

    def of(self, family):
        return [o for o in self.plain.objects(self.path) if self.plain.commands[0][o][0].split("/")[-2] == family]

    def size(self, family):
        return sum(len(self.original[o]) for o in self.of(family))

    def link(self, builder, made):
        """The module with the objects that have changed, or None if there are none; and these."""
        changed = [o for o in made if made[o] != self.original[o]]
        return (builder.link(changed) if changed else None), changed

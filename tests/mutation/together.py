"""Mutants by the dozen: compiled together (schema.py), told apart at run time, one fork of the tests for each.

Those that the best tests let through then meet the other tests by the half dozen: most of them are equivalent.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

from simt import SCHEDULES

from .build import Builder, Compiled
from .schema import PRELUDE, Schema, blamed, overlap

MOST = 60  # in one library
CONTROL = 10  # tests that a library without any mutant has to pass
QUICK = 1.5  # CPU seconds of the best tests, that each mutant meets alone
GROUP = 6  # that meet all others at once


class Together:
    def __init__(self, file):
        self.file, self.schema = file, Schema(file.text)
        self.names = [t for t in file.tests.ids if "_huge.py::" not in t]

    def run(self, some):
        """Yields (n, {"verdict", "test"}) of those of `some`, [(n, mutant)], that can be compiled so; no test: it
        lives."""
        some = [(n, m) for n, m in some if self.schema.segment(m) and not self.huge(m)]
        count = -(-len(some) // MOST)
        batches = [some[i::count] for i in range(count)]  # neighbours in different ones
        self.file.tests.warm(self.names)  # else every fork does what torch does at a first call: half a second
        self.file.tests.ensure([self.file.tests.number[t] for t in self.names], SCHEDULES[0])
        folder, lock = self.file.plain.folder.parent, threading.Lock()
        self.meets = self.meeting(Builder(folder / "together0"), some)
        free = [Builder(folder / f"together{i}") for i in range(self.file.jobs)]

        def one(batch):
            with lock:
                builder = free.pop()
            try:
                return self.batch(builder, batch)
            finally:
                with lock:
                    free.append(builder)

        with ThreadPoolExecutor(self.file.jobs) as pool:
            for answers in pool.map(one, batches):
                killed = sum(bool(verdict["test"]) for _, verdict in answers)
                self.file.say(f"  {killed} of {len(answers)} that were compiled together are killed")
                yield from answers

    def meeting(self, builder, some):
        """{n: the tests that come by the place of mutant n}, of those where this can be compiled."""
        library, inside, _ = self.compile(builder, some, self.schema.marked)
        if library is None:
            return {}
        seen = self.file.tests.seen(library, self.names)
        by = {n: [] for n, _ in inside}
        for test in self.names:
            for number in seen[test]:
                by[number - 1].append(test)
        share = sum(map(len, by.values())) / max(1, len(by) * len(self.names))
        self.file.say(f"  {len(by)} places, met by {share:.0%} of the tests, {sum(not t for t in by.values())} by none")
        return by

    def huge(self, m):
        """Meets the tests of many gigabytes, which are not run here."""
        return len(self.file.shown(m)) > len(self.names)

    def batch(self, builder, batch):
        answers = []
        waiting = [batch]
        while waiting:
            library, inside, left = self.compile(builder, waiting.pop())
            if left:
                waiting.append(left)
            if library is None:
                continue
            best = self.file.tests.best(self.names, "")[:CONTROL]
            verdict, test = self.file.tests.run(library, names=best, alive=())
            if test:
                raise RuntimeError(f"{self.file.path.name}: {test} fails in a library of many mutants, none of them "
                                   f"alive: {verdict}")
            quiet = []
            for n, m in inside:
                met = set(self.meets.get(n, self.names))
                names = [t for t in self.file.unseen(m) if t in met]
                few = self.file.tests.best(names, m.function, self.file.hint(m), QUICK)
                verdict, test = self.alive(library, [n], few, self.file.hint(m), m.function)
                if test:
                    answers.append((n, {"verdict": verdict, "test": test}))
                else:
                    quiet.append((n, m, set(names) - set(few)))
            for group in self.groups(quiet):
                answers += self.all_of(library, group)
        return answers

    def alive(self, library, numbers, names, first=None, function=""):
        if not names:
            return "survived", None
        return self.file.tests.run(library, names=names, function=function, alive=[n + 1 for n in numbers], first=first)

    def groups(self, quiet):
        """By a few, whose places are apart: one would hide the other."""
        groups = []
        for n, m, names in quiet:
            place = self.schema.segment(m)
            for group in groups:
                if len(group) < GROUP and not any(overlap(place, self.schema.segment(other)) for _, other, _ in group):
                    group.append((n, m, names))
                    break
            else:
                groups.append([(n, m, names)])
        return groups

    def all_of(self, library, group, first=None):
        """Nobody notices all of them at once: nobody notices one. (If two make up for each other, both are said to
        live: the error is on the side of too many survivors.)"""
        names = set().union(*(names for _, _, names in group))
        verdict, test = self.alive(library, [n for n, _, _ in group], [t for t in self.names if t in names], first)
        if test is None or len(group) == 1:
            return [(n, {"verdict": verdict, "test": test}) for n, _, _ in group]
        half = len(group) // 2
        return self.all_of(library, group[:half], test) + self.all_of(library, group[half:], test)

    def compile(self, builder, batch, render=None):
        """The library, the mutants that are in it, and those to try again without these. The compiler's complaints tell
        which cannot be in any."""
        left = []
        while batch:
            text, lines = (render or self.schema.render)([(n + 1, m) for n, m in batch])
            builder.plant(self.file.path, text)
            (builder.folder / "schema.h").write_text(PRELUDE)
            flags = ["-Werror=vla", "-fmax-errors=0", "-include", str(builder.folder / "schema.h")]
            inside = set().union(*lines.values(), ())
            batch = [(n, m) for n, m in batch if n + 1 in inside]
            try:
                made = builder.compile(self.file.objects, flags)
                return builder.link(list(made)), batch, left
            except Compiled as refused:
                bad = blamed(str(refused), builder.changed[self.file.path], lines)
            if bad & inside:
                batch = [(n, m) for n, m in batch if n + 1 not in bad]
            else:  # something far away
                half = len(batch) // 2
                left += batch[half:] if half else []
                batch = batch[:half]
        return None, [], left

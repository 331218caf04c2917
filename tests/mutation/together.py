"""Mutants by the dozen: compiled together (schema.py), told apart at run time, one fork of the tests for each."""

import threading
from concurrent.futures import ThreadPoolExecutor

from simt import SCHEDULES

from .build import Builder, Compiled
from .schema import PRELUDE, Schema, blamed

MOST = 60  # in one library
CONTROL = 10  # tests that a library without any mutant has to pass


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
            verdict, test = self.file.tests.run(library, names=best, mutant=0)
            if test:
                raise RuntimeError(f"{self.file.path.name}: {test} fails in a library of many mutants, none of them "
                                   f"alive: {verdict}")
            for n, m in inside:
                names = self.meets.get(n, self.names)
                verdict, test = "survived", None
                if names:
                    verdict, test = self.file.tests.run(library, names=names, function=m.function, mutant=n + 1,
                                                        first=self.file.hint(m))
                answers.append((n, {"verdict": verdict, "test": test}))
        return answers

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

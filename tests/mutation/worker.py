"""A pytest process that has collected the tests once, and runs some of them for each mutant in a fork of itself.

Started by tests.py as `python -m mutation.worker <file descriptor in> <out> <tests...>`. It writes the ids of its
tests; then it reads a job a line, {"id", "library", "tests": [numbers, in order], "limits": [CPU seconds], "schedule",
"alive": numbers of mutants, where the library has many, "seen": whether it has marks}, and answers {"id", "verdict",
"test", "seconds": {number: CPU seconds}, "seen": {number: marks}} when it is done, several jobs at a time. The job
{"warm": library, "tests"} runs these once in the process itself, so that later forks inherit what torch does at a first
call; it answers which kernels each of them calls.

Time is CPU time, and memory is counted: a machine that is busy or a process that is stopped for a while changes no
verdict.
"""

import ctypes
import importlib.util
import json
import os
import resource
import select
import signal
import sys

import pytest
import torch
from _pytest.runner import runtestprotocol

from .schema import NUMBERS

CLOCK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
TICK = 0.2  # seconds between two looks at the children
MOST_IDLE = 100  # looks at a test that sleeps, and has not computed since the look before: it waits for itself
MOST_MEMORY = 3 << 30


class Worker:
    def __init__(self, inbox, outbox):
        self.inbox, self.outbox = inbox, os.fdopen(outbox, "w")
        self.causes = {}

    def say(self, message):
        self.outbox.write(json.dumps(message) + "\n")
        self.outbox.flush()

    def pytest_collection_modifyitems(self, items):
        items[:] = [i for i in items if "simt" in i.nodeid.split("::", 1)[1] or "emulator" in i.name
                    or i.path.name == "test_simt.py"]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        outcome = yield
        if call.excinfo is not None and outcome.get_result().failed:
            self.causes[item] = _cause(call.excinfo.value)

    def pytest_runtestloop(self, session):
        self.say([item.nodeid for item in session.items])
        torch.set_num_threads(1)  # libgomp's threads do not survive a fork
        torch.set_num_threads = lambda n: None
        self.serve(session.items)
        return True

    def serve(self, items):
        children, text, is_open = {}, "", True
        while is_open or children:
            ready = select.select([*children, *([self.inbox] if is_open else [])], [], [], TICK)[0]
            if self.inbox in ready:
                data = os.read(self.inbox, 1 << 20).decode()
                is_open = bool(data)
                text += data
                while "\n" in text:
                    line, text = text.split("\n", 1)
                    job = json.loads(line)
                    if "warm" in job:
                        self.warm(items, job)
                    else:
                        child = Child(self, items, job)
                        children[child.pipe] = child
            for pipe, child in list(children.items()):
                answer = child.look(pipe in ready)
                if answer:
                    del children[pipe]
                    self.say(answer)

    def warm(self, items, job):
        from simt import backend

        _use(job["warm"])
        called, call = {}, backend._run
        backend._run = lambda options, name, *a: (names.add(name), call(options, name, *a))[1]
        chosen = [(i, items[i]) for i in job["tests"]]
        for (i, item), (_, following) in zip(chosen, [*chosen[1:], (None, None)], strict=True):
            names = set()
            _again(item)
            runtestprotocol(item, log=False, nextitem=following)
            called[i] = sorted(names)
        backend._run = call
        self.say({"id": "warm", "called": called})

    def run(self, items, job, out):
        """In the child."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["GMK_SIMT_SCHEDULE"] = job["schedule"]
        _use(job["library"])
        if job["alive"] is not None:
            array = _array(job["library"], "gmk_mutants_alive")
            for n in job["alive"]:
                array[n] = 1
        marks = _array(job["library"], "gmk_mutants_seen") if job["seen"] else ()
        order = [items[i] for i in job["tests"]]
        for item, following, number in zip(order, [*order[1:], None], job["tests"], strict=True):
            out.write(f"start {number}\n")
            out.flush()
            _again(item)
            if marks:
                ctypes.memset(marks, 0, NUMBERS)
            reports = runtestprotocol(item, log=False, nextitem=following)
            if any(r.failed for r in reports):
                out.write(f"failed {self.causes[item]}\n")
                out.flush()
                return
            if marks:
                out.write(f"seen {json.dumps([i for i, mark in enumerate(bytes(marks)) if mark])}\n")
        out.write("passed\n")
        out.flush()


class Child:
    """A fork of the worker with a mutant, and what is known of it."""

    def __init__(self, worker, items, job):
        self.job, self.limits = job, dict(zip(job["tests"], job["limits"], strict=True))
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                worker.run(items, job, os.fdopen(write, "w"))
            finally:
                os._exit(0)
        os.close(write)
        self.seconds, self.text, self.current, self.began, self.cpu, self.idle = {}, "", None, 0.0, 0.0, 0
        self.seen = {}

    def look(self, ready):
        """The answer, or None while there is none."""
        data = os.read(self.pipe, 65536).decode() if ready else None
        state, cpu, memory = _process(self.pid)
        self.idle = self.idle + 1 if state == "S" and cpu == self.cpu and not ready else 0
        self.cpu = cpu
        verdict = self.read(data or "")
        if verdict is None and data == "":
            verdict = "crash"
        if verdict is None and self.current is not None and cpu - self.began > self.limits[self.current]:
            verdict = "timeout"
        if verdict is None and self.idle > MOST_IDLE:
            verdict = "timeout waiting"
        if verdict is None and memory > MOST_MEMORY:
            verdict = "memory"
        return verdict and self.end(verdict)

    def read(self, data):
        self.text += data
        verdict = None
        while "\n" in self.text:
            line, self.text = self.text.split("\n", 1)
            word, _, rest = line.partition(" ")
            if self.current is not None:
                self.seconds[self.current] = round(self.cpu - self.began, 3)
            if word == "seen":
                self.seen[self.current] = json.loads(rest)
            elif word == "start":
                self.current, self.began = int(rest), self.cpu
            else:
                verdict = rest if word == "failed" else "survived"
        return verdict

    def end(self, verdict):
        os.kill(self.pid, signal.SIGKILL)  # of a zombie: nothing
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.pipe)
        if verdict == "crash" and os.WIFSIGNALED(status):
            verdict = f"crash {signal.Signals(os.WTERMSIG(status)).name}"
        test = self.current if verdict != "survived" else None
        return {"id": self.job["id"], "verdict": verdict, "test": test, "seconds": self.seconds, "seen": self.seen}


def _again(item):
    item._initrequest()  # it may have run before


def _process(pid):
    """State, CPU seconds, and bytes in memory that are not a file's."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    with open(f"/proc/{pid}/statm") as f:
        _, resident, shared, *_ = map(int, f.read().split())
    return fields[0], (int(fields[11]) + int(fields[12])) / CLOCK, (resident - shared) * PAGE


def _cause(error):
    """What has noticed the mutant: "report race uninitialised", "numeric", or the name of an exception."""
    for e in (error, *getattr(error, "exceptions", ())):
        if hasattr(e, "reports"):
            return "report " + " ".join(sorted({r.kind for r in e.reports}))
    return "numeric" if isinstance(error, AssertionError) else type(error).__name__


def _array(library, name):
    return (ctypes.c_ubyte * NUMBERS).in_dll(ctypes.CDLL(library), name)


def _use(library):
    """The emulator's module is this file from now on."""
    from simt import backend

    # pybind11 gives back the module it has for a name: another name, whose last part says which symbol to call
    spec = importlib.util.spec_from_file_location(f"of_{os.getpid()}._simt", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__file__ == library
    backend.module = lambda: module


if __name__ == "__main__":
    files = sys.argv[3:]
    worker = Worker(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[worker]))

"""A pytest process that has collected the tests once, and runs them again for each mutant in a fork of itself.

Started by run.py as `python -m mutation.worker <file descriptor in> <out> <tests...>`. It writes the ids of its tests;
reads the path of the emulator without a mutant, and runs all tests once, so that a fork inherits what torch does at a
first call; then reads a job a line, {"library", "tests": [numbers, in order], "limits": [CPU seconds],
"schedule"}, and answers {"verdict", "test", "seconds": {number: CPU seconds}}.
"""

import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time

import pytest
import torch
from _pytest.runner import runtestprotocol

CLOCK = os.sysconf("SC_CLK_TCK")
MOST_WALL = 20  # seconds of a test that does not even compute: it waits for itself


class Worker:
    def __init__(self, inbox, outbox):
        self.inbox, self.outbox = os.fdopen(inbox), os.fdopen(outbox, "w")
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
        _use(self.inbox.readline().strip())
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            runtestprotocol(item, log=False, nextitem=following)
        for line in self.inbox:
            self.say(self.job(session.items, json.loads(line)))
        return True

    def job(self, items, job):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                self.run(items, job, os.fdopen(write, "w"))
            finally:
                os._exit(0)
        os.close(write)
        try:
            return self.watch(child, read, job)
        finally:
            os.close(read)

    def run(self, items, job, out):
        """In the child."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["GMK_SIMT_SCHEDULE"] = job["schedule"]
        _use(job["library"])
        order = [items[i] for i in job["tests"]]
        for item, following, number in zip(order, [*order[1:], None], job["tests"], strict=True):
            out.write(f"start {number}\n")
            out.flush()
            item._initrequest()  # it has run before
            reports = runtestprotocol(item, log=False, nextitem=following)
            if any(r.failed for r in reports):
                out.write(f"failed {self.causes[item]}\n")
                out.flush()
                return
        out.write("passed\n")
        out.flush()

    def watch(self, child, read, job):
        limits = dict(zip(job["tests"], job["limits"], strict=True))
        seconds, text, current, began, wall = {}, "", None, 0.0, time.monotonic()
        verdict = None
        while verdict is None:
            ready = select.select([read], [], [], 0.2)[0]
            data = os.read(read, 65536).decode() if ready else None
            cpu = _cpu(child)
            if data == "":
                verdict = "crash"
                break
            text += data or ""
            while "\n" in text:
                line, text = text.split("\n", 1)
                word, _, rest = line.partition(" ")
                if current is not None:
                    seconds[current] = cpu - began
                if word == "start":
                    current, began, wall = int(rest), cpu, time.monotonic()
                else:
                    verdict = rest if word == "failed" else "survived"
            if verdict is None and current is not None and (
                    cpu - began > limits[current] or time.monotonic() - wall > MOST_WALL + 3 * limits[current]):
                verdict = "timeout"
                os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if verdict == "crash" and os.WIFSIGNALED(status):
            verdict = f"crash {signal.Signals(os.WTERMSIG(status)).name}"
        return {"verdict": verdict, "test": current if verdict != "survived" else None, "seconds": seconds}


def _cpu(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK


def _cause(error):
    """What has noticed the mutant: "report race uninitialised", "numeric", or the name of an exception."""
    for e in (error, *getattr(error, "exceptions", ())):
        if hasattr(e, "reports"):
            return "report " + " ".join(sorted({r.kind for r in e.reports}))
    return "numeric" if isinstance(error, AssertionError) else type(error).__name__


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

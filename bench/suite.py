"""Runs the cases of every bench_<family>.py and turns each into a row: a dict that is printed, stored and compared."""

import importlib
import pkgutil
import shutil
import sys
import time
from contextlib import contextmanager

import torch

from .ceilings import binding, ceilings
from .environment import environment
from .timing import Spread, describe, measure, ratio, thread_count

FORMAT = 1  # of the JSON
QUICK_SECONDS = 160  # of the whole run with --quick, of the promised 180
CASE_SECONDS = {True: 1.5, False: 8.0}  # of sampling, by quick; warm-up and compilation come on top
SPENT = "not run: the time of --quick is spent"
_CEILING = "ceiling "


class UnknownOp(ValueError):
    pass


def families():
    """name -> module of every bench_<family>.py."""
    package = importlib.import_module(__package__)
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("bench_"))
    return {n.removeprefix("bench_"): importlib.import_module(f"{__package__}.{n}") for n in names}


def choose(wanted, modules, device):
    """(modules to run, ops to keep) for the names that were typed: of ops, or of whole families. None: all."""
    if not wanted:
        return modules, set()
    known = {family: sorted(_ops(module, device)) for family, module in modules.items()}
    ops = {op for of_family in known.values() for op in of_family}
    unknown = [w for w in wanted if w not in ops and w not in known]
    if unknown:
        raise UnknownOp(f"unknown op {', '.join(unknown)}; known: {', '.join(sorted(ops))}"
                        f" (or a family: {', '.join(sorted(known))})")
    keep = {op for w in wanted for op in known.get(w, [w])}
    return {family: module for family, module in modules.items() if keep & set(known[family])}, keep


def _ops(module, device):
    return getattr(module, "OPS", None) or {case.op for case in module.cases(True, device)}


class Progress:
    """What is going on: one line that is rewritten on a terminal, one line per finished case elsewhere."""

    def __init__(self, stream=None):
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.width = shutil.get_terminal_size().columns - 1
        self.start = time.monotonic()
        self.title = ""

    def case(self, case):
        threads = f", {case.threads} thread{'s' * (case.threads > 1)}" if case.threads else ""
        self.title = f"{case.op}  {case.name}{threads}"
        self.step("")

    def step(self, text):
        if self.live:
            self._write(f"\r\033[K{self._line(text)[:self.width]}")

    def done(self, text):
        self._write((f"\r\033[K{self._line(text)[:self.width]}\n") if self.live else f"{self._line(text)}\n")

    def _line(self, text):
        return f"{time.monotonic() - self.start:6.1f} s  {self.title}  {text}".rstrip()

    def _write(self, text):
        self.stream.write(text)
        self.stream.flush()


def run(modules, keep=None, quick=False, device="cpu", progress=None, seconds=None, case_seconds=None):
    """The result: {"format", "environment", "rows", "crashes", "seconds"}."""
    progress = progress or Progress()
    start = time.monotonic()
    deadline = start + (seconds or (QUICK_SECONDS if quick else float("inf")))
    case_seconds = case_seconds or CASE_SECONDS[quick]
    env = environment(device) | {"quick": quick, "ops": sorted(keep) if keep else []}
    rows, crashes = [], []
    for family, module in modules.items():
        try:
            for case in module.cases(quick, device):
                if not keep or case.op in keep:
                    progress.case(case)
                    row = run_case(case, case_seconds, device, deadline, progress.step) | {"family": family}
                    rows.append(row)
                    if "error_text" in row:
                        crashes.append(f"{case.op} {case.name}: {row['error_text']}")
                    progress.done(_short(row))
                del case  # and its data, before the next one's are made
        except KeyboardInterrupt:
            crashes.append("interrupted: what follows was not measured")
            progress.done("interrupted")
            break
        except Exception as error:  # noqa: BLE001  one family's trouble must not cost the others their numbers
            crashes.append(f"bench_{family}.py: {describe(error)}")
            progress.title = f"bench_{family}.py"
            progress.done(f"stopped: {describe(error)}")
    return {"format": FORMAT, "environment": env, "rows": rows, "crashes": crashes,
            "seconds": round(time.monotonic() - start, 1)}


def run_case(case, budget, device="cpu", deadline=float("inf"), step=lambda text: None):
    """One row. After the deadline: the fewest rounds that give a spread, and no compiling."""
    late = time.monotonic() > deadline
    if "torch._dynamo" in sys.modules:  # else the ninth case of one function would silently run uncompiled
        torch._dynamo.reset()
    row = {"op": case.op, "name": case.name, "dtype": case.dtype, "threads": case.threads or torch.get_num_threads(),
           "note": case.note, "rivals": {}}
    calls = {"ours": case.ours}
    for name, rival in case.rivals.items():
        if not callable(rival):
            row["rivals"][name] = {"absent": str(rival)}
        elif late and "compile" in name:
            row["rivals"][name] = {"absent": SPENT}
        else:
            row["rivals"][name] = {}
            calls[name] = rival
    with thread_count(row["threads"]):
        found = ceilings(case, device)
        calls |= {_CEILING + name: ceiling.call for name, ceiling in found.items()}
        left = max(0.0, deadline - time.monotonic())
        times = measure(calls, min(budget, left), device, step)
        for name in case.parts.keys() & times.samples.keys():  # a rival that would take minutes: on a part, scaled
            times.samples[name] = {r: seconds / case.parts[name] for r, seconds in times.samples[name].items()}
        if "ours" not in times.samples:
            return row | {"error_text": times.errors["ours"]}
        _rate(row, case, times, found)
        for key, error in (("error", case.error), ("rival_error", case.rival_error)):
            if error is not None:
                step(f"{key} against float64")
                with _expected(row, key):
                    row[key] = float(error())
    return row


@contextmanager
def _expected(row, key):
    try:
        yield
    except Exception as error:  # noqa: BLE001
        row[key] = describe(error)


def _rate(row, case, times, found):
    ours = times.samples["ours"]
    row["others"] = times.others
    row["ours"] = times.spread("ours").as_dict() | {"inner": times.inner["ours"], "first": times.first["ours"]}
    for name, entry in row["rivals"].items():
        if name in times.samples:
            entry |= times.spread(name).as_dict() | {"inner": times.inner[name], "first": times.first[name]}
            entry["ratio"] = ratio(times.samples[name], ours).as_dict()
        elif name in times.errors:
            entry["error"] = times.errors[name]
    measured = {name: entry for name, entry in row["rivals"].items() if "ratio" in entry}
    row["fastest"] = min(measured, key=lambda name: measured[name]["median"]) if measured else None

    names = {name: _CEILING + name for name in found}
    row["ceilings"] = {
        name: {"rate": found[name].amount / times.spread(key).median, "unit": found[name].unit}
        | times.spread(key).as_dict()
        for name, key in names.items() if key in times.samples
    }
    bound = binding(found, {name: c["median"] for name, c in row["ceilings"].items()})
    if bound:
        row["bound"] = bound
        row["share"] = ratio(times.samples[names[bound]], ours, found[bound].scale).as_dict()
    row["rates"] = {unit: amount / row["ours"]["median"] for unit, amount in (
        ("B/s", case.bytes), ("FLOP/s", case.flops), ("exp/s", case.exps), ("normals/s", case.normals)) if amount}

    row["goals"] = [_goal(name, least, _of_rival(row, name)) for name, least in case.goals.items()]
    if case.share_goal:
        share = Spread.from_dict(row["share"]) if "share" in row else None
        row["goals"].append(_goal("ceiling", case.share_goal, share))


def _of_rival(row, name):
    name = row["fastest"] if name == "fastest" else name
    entry = row["rivals"].get(name, {})
    return Spread.from_dict(entry["ratio"]) if "ratio" in entry else None


def _goal(against, least, got):
    """reached: by the median. within: the goal lies inside the spread, so this run cannot tell."""
    if got is None:
        return {"against": against, "least": least, "reached": None, "within": False}
    return {"against": against, "least": least, "got": got.median, "p25": got.p25, "p75": got.p75,
            "reached": got.median >= least, "within": got.holds(least)}


def _short(row):
    if "error_text" in row:
        return f"FAILED {row['error_text']}"
    text = f"{row['ours']['median'] * 1e3:.4g} ms"
    if row["fastest"]:
        text += f", {row['rivals'][row['fastest']]['ratio']['median']:.2f}x {row['fastest']}"
    return text

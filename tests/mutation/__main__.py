"""python -m mutation: plant, build, test, summarise. `make mutants`."""

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict

from . import survivors
from .build import ROOT
from .run import FOLDER, all_mutants, known, run
from .verdicts import write_killers

LEAST = 0.95  # of the mutants that behave differently


def main(argv=None):
    p = argparse.ArgumentParser(prog="mutation", description=__doc__)
    p.add_argument("--family", default="", help="a folder or a file of csrc/: random, gmm.cu")
    p.add_argument("--operator", default="", help="barrier, bound, narrow, ...")
    p.add_argument("--name", action="append", default=[], help="a mutant; may be repeated")
    p.add_argument("--sample", type=int, default=0, help="so many at random, but no listed survivors; 0: all")
    p.add_argument("--seed", type=int, default=0, help="of the sample")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--recorded", action="store_true", help="only those that killers.txt knows")
    p.add_argument("--again", action="store_true", help="also what earlier runs have found out")
    p.add_argument("--list", action="store_true", help="only name them")
    p.add_argument("--record", action="store_true", help="write what is known of the present sources into the docs")
    p.add_argument("--results", default=str(FOLDER / "results.json"))
    a = p.parse_args(argv)
    if a.list:
        for _, m in all_mutants(a.family):
            if a.operator in ("", m.operator):
                print(f"{m.name}  line {m.line}: {m.what}")
        return 0
    if a.record:
        rows, total = known()
        write_killers(rows, present={m.name for _, m in all_mutants()})
        record(rows, total, survivors.load())
        return 0
    listed = survivors.load()
    rows = run(a.family, a.sample, a.seed, a.jobs, a.operator, a.name, a.again, listed if a.sample else (),
               a.recorded, lambda t: print(t, flush=True))
    with open(a.results, "w") as f:
        json.dump(rows, f, indent=1)
    return judge(rows, listed, complete=not (a.sample or a.operator or a.name or a.family))


def judge(rows, listed, complete=False, say=print):
    """Prints the summary; 0 if every survivor is explained and, of a complete run, enough of the others are killed."""
    counts = table(rows, listed)
    say(summary(counts))
    unexplained = [r for r in rows if r["verdict"] == "survived" and r["name"] not in listed]
    for r in unexplained:
        say(f"SURVIVED {r['name']}  line {r['line']}: {r['what']}")
    verdicts = {r["name"]: r["verdict"] for r in rows}
    for name in sorted(listed):
        if verdicts.get(name, "survived") not in ("survived", "same code"):
            say(f"note: {name} is listed as a survivor, but is killed now ({verdicts[name]})")
    if complete:
        for name in sorted(survivors.stale(listed, [r["name"] for r in rows])):
            say(f"note: {name} is listed as a survivor, but there is no such mutant any more")
    killed, alive, rate = counts["all"]["killed"], len(unexplained), rate_of(counts["all"])
    say(f"{killed} killed of {killed + counts['all']['survived']} that behave differently: {rate:.1%}")
    return int(bool(alive) or complete and rate < LEAST)


def table(rows, listed):
    """{group: counts of killed, survived, equivalent (listed as such), same code, invalid}, and of what killed them."""
    counts = defaultdict(Counter)
    for r in rows:
        v = r["verdict"]
        what = {"survived": "survived", "same code": "same code", "invalid": "invalid"}.get(v, "killed")
        if what == "survived" and listed.get(r["name"], {}).get("kind") == "equivalent":
            what = "equivalent"
        for group in ("all", "source " + r["file"], "operator " + r["operator"]):
            counts[group][what] += 1
        if what == "killed":
            counts["killed by " + v.split(" ")[0]]["killed"] += 1
    return counts


def rate_of(counts):
    different = counts["killed"] + counts["survived"]
    return counts["killed"] / different if different else 1.0


DOCS = ROOT / "docs" / "mutation.md"
RESULTS = ROOT / "tests" / "mutation" / "results.json"
BEGIN, END = "<!-- python -m mutation --record -->\n", "<!-- end -->\n"


def record(rows, total, listed):
    counts = {group: dict(c) for group, c in sorted(table(rows, listed).items())}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    made = {"commit": commit.strip(), "run": len(rows), "mutants": total, "counts": counts}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + recorded() + END + rest.partition(END)[2])


def recorded():
    """The part of the docs that is made from results.json."""
    r = json.loads(RESULTS.read_text())
    return f"At {r['commit']}, {r['run']} of {r['mutants']} mutants have been run:\n\n{summary(r['counts'])}\n"


def summary(counts):
    """A Markdown table."""
    counts = {group: Counter(c) for group, c in counts.items()}
    columns = ("killed", "survived", "equivalent", "same code", "invalid")
    lines = ["| | " + " | ".join(columns) + " | kill rate |", "|---" * (len(columns) + 2) + "|"]
    for group in ["all", *sorted(g for g in counts if g.startswith(("source ", "operator ")))]:
        c = counts[group]
        lines.append(f"| {group} | " + " | ".join(str(c[k]) for k in columns) + f" | {rate_of(c):.1%} |")
    killers = sorted(g for g in counts if g.startswith("killed by "))
    by = ", ".join(f"{g.removeprefix('killed by ')} {counts[g]['killed']}" for g in killers)
    return "\n".join([*lines, "", f"Killed by: {by}."])


if __name__ == "__main__":
    sys.exit(main())

"""Writes the benchmark tables of README.md and docs/*.md from the results of record, bench/results/*.json.

    <!-- bench:begin NAME -->
    (generated)
    <!-- bench:end -->

NAME is an op, or `summary` (a line per row that has goals), or `goals` (a line each), or `environment`; with " cuda"
behind it, of a GPU run.

    python -m gmkernels.bench.tables            rewrite
    python -m gmkernels.bench.tables --check    exit 1 where a table is not what the results say
"""

import argparse
import json
import re
import sys
from pathlib import Path

from . import report
from .environment import describe

_BLOCK = re.compile(r"^(<!-- bench:begin ([^>\n]*) -->\n).*?^(<!-- bench:end -->)$", re.S | re.M)
_MARKER = re.compile(r"^<!-- bench:(begin|end)", re.M)  # at the start of a line: prose may talk about them
NONE = {"cpu": "No result of record yet.", "cuda": "Not yet run on a GPU."}


class BadMarker(ValueError):
    pass


def results(folder):
    """Stored results, newest first; of one date, the file name decides."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda r: (r["environment"]["date"], r["file"]), reverse=True)


def rewrite(text, stored):
    """`text` with every block replaced by what `stored` results say."""
    replaced, count = _BLOCK.subn(lambda m: m[1] + generate(m[2], stored) + m[3], text)
    if 2 * count != len(_MARKER.findall(text)):
        raise BadMarker("every `<!-- bench:begin NAME -->` line needs its `<!-- bench:end -->`")
    return replaced


def generate(name, stored):
    what, _, device = name.partition(" ")
    device = device or "cpu"
    if device not in NONE:
        raise BadMarker(f"`{name}`: the device must be cpu or cuda")
    stored = [r for r in stored if r["environment"]["device"].split(":")[0] == device]
    if what in ("summary", "goals", "environment"):  # of a whole run, if there is one
        whole = [r for r in stored if not r["environment"]["ops"]] or stored
    else:
        whole = [r for r in stored if any(row["op"] == what for row in r["rows"])]
        if stored and not whole:
            raise BadMarker(f"`{name}`: no result of record has this op")
    if not whole:
        return NONE[device] + "\n"
    result = whole[0]
    if what == "environment":
        return "```\n" + "\n".join(describe(result["environment"])) + "\n```\n"
    table = _summary(result) if what == "summary" else _goals(result) if what == "goals" else _op(what, result)
    return "\n".join([_caption(result), "", *table]) + "\n"


def _caption(result):
    env = result["environment"]
    where = env.get("gpu") or f"{env['cpu']}, {env['isa']}, {env['threads']} threads"
    quick = ", `--quick`" if env["quick"] else ""
    return (f"*{where}; torch {env['torch']}; {env['date'][:10]}, commit {env['commit'] or 'unknown'}{quick}; "
            f"from `bench/results/{result['file']}`. A ratio is the rival's time over ours.*")


def _op(op, result):
    rows = [row for row in result["rows"] if row["op"] == op]
    rivals = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    lines = _header("case", "ours", *rivals, "of the ceiling", "error against float64")
    for row in rows:
        cells = [report.label(row, result["environment"]["threads"])]
        if "ours" not in row:
            lines.append(_cells(*cells, "failed", *[""] * (len(rivals) + 2)))
            continue
        cells.append(report.seconds(row["ours"]["median"]))
        cells += [_rival(row["rivals"].get(name)) for name in rivals]
        cells.append(report.share(row))
        error = row.get("error", "")
        cells.append(f"{error:.1e}" if isinstance(error, float) else error)
        lines.append(_cells(*cells))
    return lines


def _rival(entry):
    if entry is None:
        return ""
    if "ratio" not in entry:
        return "failed" if "error" in entry else entry["absent"]
    equal = " (=)" * (entry["ratio"]["p25"] <= 1.0 <= entry["ratio"]["p75"])
    return f"{entry['ratio']['median']:.2f}x{equal}"


def _summary(result):
    lines = _header("op", "case", "ours", "fastest rival", "of the ceiling", "goals reached")
    for row in result["rows"]:
        goals, fastest = row.get("goals"), row.get("fastest")
        if goals:
            lines.append(_cells(
                f"`{row['op']}`", report.label(row, result["environment"]["threads"]),
                report.seconds(row["ours"]["median"]), f"{fastest} {_rival(row['rivals'][fastest])}" if fastest else "",
                report.share(row), f"{sum(goal['reached'] is True for goal in goals)} of {len(goals)}"))
    return lines


def _goals(result):
    lines = _header("op", "case", "ours", "goal", "measured", "spread", "reached")
    for row in result["rows"]:
        for goal in row.get("goals", ()):
            measured, spread = "not measured", ""
            if goal["reached"] is not None:
                percent = goal["against"] == "ceiling"
                form = "{:.0%}" if percent else "{:.2f}x"
                measured = form.format(goal["got"])
                spread = f"{form.format(goal['p25'])} to {form.format(goal['p75'])}"
            lines.append(_cells(
                f"`{row['op']}`", report.label(row, result["environment"]["threads"]),
                report.seconds(row["ours"]["median"]), report.goal_text(goal), measured, spread, report.verdict(goal)))
    return lines


def _header(*cells):
    return [_cells(*cells), "|" + "---|" * len(cells)]


def _cells(*cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m gmkernels.bench.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is stale")
    parser.add_argument("--root", type=Path, default=Path("."), help="the checkout (default: here)")
    args = parser.parse_args(argv)
    pages = [page for page in (args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))) if page.is_file()]
    if not pages:
        parser.error(f"no README.md or docs in {args.root.resolve()}")
    stored, status = results(args.root / "bench" / "results"), 0
    for page in pages:
        text = page.read_text()
        try:
            wanted = rewrite(text, stored)
        except BadMarker as error:
            print(f"{page}: {error}", file=sys.stderr)
            status = 1
            continue
        if wanted != text and args.check:
            print(f"{page}: a benchmark table is not what bench/results says; run python -m gmkernels.bench.tables",
                  file=sys.stderr)
            status = 1
        elif wanted != text:
            page.write_text(wanted)
            print(f"{page}: rewritten")
    return status


if __name__ == "__main__":
    sys.exit(main())

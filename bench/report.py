"""The table that a person reads: 120 columns, rows grouped by op."""

import textwrap

from .environment import describe as describe_environment

WIDTH = 120
BUSY = 0.15  # cores
_COLUMNS = (("", 40), ("ours", 9), ("spread", 15), ("fastest rival", 22), ("ratio", 7), ("ceiling", 13), ("goal", 8))


def table(result):
    env = result["environment"]
    lines = [*describe_environment(env), ""]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        lines += [_line([op, *(title for title, _ in _COLUMNS[1:])]), "-" * WIDTH]
        for row in rows:
            lines += _row(row, env["threads"])
        lines.append("")
    lines += [
        "spread: quartiles of the samples. ratio: rival's median / ours. [ ]: quartiles of the ratios within rounds.",
        "(=): equal, the spreads overlap; at a goal: the goal lies within the spread. ceiling: floor time / our time.",
        "",
        *summary(result),
    ]
    return "\n".join(line.rstrip() for line in lines)


def summary(result):
    """Goals reached and missed, by name."""
    threads = result["environment"]["threads"]
    goals = [(row, goal) for row in result["rows"] for goal in row.get("goals", ())]
    lines = []
    for row, goal in goals:
        if goal["reached"] is not True:
            got = "not measured" if goal["reached"] is None else f"got {goal_number(goal, goal['got'])}"
            lines.append(f"  {verdict(goal):7s} {row['op']} {label(row, threads)}: {goal_text(goal)}, {got}")
    verdicts = [verdict(goal) for _, goal in goals]
    counts = [(sum(v.startswith("yes") for v in verdicts), "reached"), (verdicts.count("no"), "missed"),
              (verdicts.count("no (=)"), "missed by less than the spread"), (verdicts.count("unknown"), "not measured")]
    text = ", ".join(f"{count} {word}" for count, word in counts if count or word in ("reached", "missed"))
    lines.insert(0, f"goals: {text}; {len(result['rows'])} rows in {result['seconds']:.0f} s")
    noisy = sum(map(disturbed, result["rows"]))
    if noisy:
        lines.append(f"  not quiet: in {noisy} rows other processes took more than {BUSY} cores; repeat them")
    return lines + [f"  CRASH   {crash}" for crash in result["crashes"]]


def _row(row, threads):
    name = label(row, threads)
    if "error_text" in row:
        return [f"  {name}", *_wrapped(f"FAILED: {row['error_text']}")]
    ours = row["ours"]
    fastest = row["rivals"].get(row["fastest"], {})
    cells = [
        f"  {name}",
        seconds(ours["median"]),
        span(ours["p25"], ours["p75"]),
        row["fastest"] or "none",
        f"{fastest['ratio']['median']:.2f}x" if fastest else "",
        share(row),
        overall(row),
    ]
    lines = [_line(cells)] if len(cells[0]) < _COLUMNS[0][1] else [cells[0], _line(["", *cells[1:]])]
    parts = [rival_text(name, entry) for name, entry in row["rivals"].items()]
    goals = [f"goal {goal_text(goal)}: {verdict(goal)}" for goal in row.get("goals", ())]
    lines += _wrapped(" · ".join(parts))
    lines += _wrapped(" · ".join(goals + _extras(row)))
    return lines


def label(row, threads):
    """The case's name, with the dtype if it is not float32 and the threads if they are not the run's."""
    name = row["name"] + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
    return name + ("" if row["threads"] == threads else f", {row['threads']} thread{'s' * (row['threads'] > 1)}")


def _extras(row):
    extras = [f"{rate(amount, unit)}" for unit, amount in row["rates"].items()]
    extras += [f"{name} {rate(c['rate'], c['unit'])}" for name, c in row["ceilings"].items()]
    for key, text in (("error", "error"), ("rival_error", "rival's error")):
        if key in row:
            value = row[key]
            extras.append(f"{text} {value:.1e}" if isinstance(value, float) else f"{text}: {value}")
    if disturbed(row):
        extras.append(f"other processes took {row['others']:.1f} cores meanwhile")
    return extras + ([row["note"]] if row["note"] else [])


def disturbed(row):
    """Was the machine busy with something else, so that this row means little?"""
    return (row.get("others") or 0.0) > BUSY


def rival_text(name, entry):
    if "absent" in entry:
        return f"{name}: {entry['absent']}"
    if "error" in entry:
        return f"{name}: failed, {entry['error']}"
    r = entry["ratio"]
    equal = " (=)" if r["p25"] <= 1.0 <= r["p75"] else ""
    return f"{name} {r['median']:.2f}x [{r['p25']:.2f} {r['p75']:.2f}]{equal}"


def goal_text(goal):
    return f"{goal_number(goal, goal['least'])} {goal['against']}"


def goal_number(goal, value):
    return f"{value:.0%} of" * (goal["against"] == "ceiling") or f"{value:.3g}x"


def verdict(goal):
    if goal["reached"] is None:
        return "unknown"
    return ("yes" if goal["reached"] else "no") + (" (=)" if goal["within"] else "")


def overall(row):
    """One word for all goals of a row: the worst of them."""
    goals = row.get("goals") or []
    order = ["no", "no (=)", "unknown", "yes (=)", "yes"]
    return min((verdict(goal) for goal in goals), key=order.index, default="")


def share(row):
    """How much of the ceiling, and of which."""
    return f"{row['share']['median']:.0%} {row['bound']}" if "share" in row else ""


def span(low, high):
    (a, unit_a), (b, unit_b) = seconds(low).split(), seconds(high).split()
    return f"{a} - {b} {unit_b}" if unit_a == unit_b else f"{a} {unit_a} - {b} {unit_b}"


def seconds(value):
    for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if value >= factor or name == "ns":
            return f"{value / factor:.3g} {name}"


def rate(value, unit):
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, "")):
        if value >= factor or factor == 1.0:
            return f"{value / factor:.3g} {prefix}{unit}"


def _line(cells):
    out = ""
    for i, (cell, (_, width)) in enumerate(zip(cells, _COLUMNS, strict=True)):
        cell = cell if i == 0 or len(cell) <= width else cell[: width - 1] + "…"
        left = i in (0, 3, 5, 6)
        out += (f"{cell:<{width}}" if left else f"{cell:>{width}}") + ("  " if i in (2, 4) else " ")
    return out.rstrip()


def _wrapped(text):
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6) if text else []

"""Two results side by side, by the ratios of each run to its own rivals. Absolute times never meet."""

from .timing import Spread


def key(row):
    return row["op"], row["name"], row["dtype"], row["threads"]


def compare(now, before):
    """(lines to print, whether a ratio got worse). Worse: smaller, and the spreads do not overlap."""
    old = {key(row): row for row in before["rows"]}
    lines, worse = [_head(now, before)], []
    better = same = 0
    for row in now["rows"]:
        was = old.pop(key(row), None)
        if was is None:
            lines.append(f"  new     {row['op']} {row['name']}")
            continue
        if "error_text" in row and "error_text" not in was:
            worse.append(f"  WORSE   {row['op']} {row['name']}: now fails, {row['error_text']}")
            continue
        for name, entry in row["rivals"].items():
            then = was["rivals"].get(name, {}).get("ratio")
            if then is None or "ratio" not in entry:
                continue
            a, b = Spread.from_dict(entry["ratio"]), Spread.from_dict(then)
            text = (f"{row['op']} {row['name']}: {a.median:.2f}x [{a.p25:.2f} {a.p75:.2f}] {name},"
                    f" was {b.median:.2f}x [{b.p25:.2f} {b.p75:.2f}]")
            if a.overlaps(b):
                same += 1
            elif a.median < b.median:
                worse.append(f"  WORSE   {text}")
            else:
                better += 1
                lines.append(f"  better  {text}")
    filtered = set(now["environment"].get("ops") or [])
    gone = [k for k in old if not filtered or k[0] in filtered]
    if now["environment"].get("quick") == before["environment"].get("quick"):
        lines += [f"  gone    {k[0]} {k[1]}" for k in gone]
    lines += worse
    lines.append(f"  {len(worse)} worse, {better} better, {same} equal (spreads overlap)")
    return lines, bool(worse)


def _head(now, before):
    then, here = before["environment"], now["environment"]
    text = f"against {then['commit'] or then['gmkernels']} of {then['date']}"
    different = [name for name in ("cpu", "isa", "torch", "device") if then.get(name) != here.get(name)]
    if different:
        text += " (not the same: " + ", ".join(f"{name}, {then.get(name)}" for name in different) + ")"
    return text

"""`python -m gmkernels score`: how usual every row of a CSV file is, and which are anomalies."""

import argparse
import math

import numpy as np

from . import fitting
from . import table as tables

ADDED = ("log_density", "anomaly")
_FOLDS = 5
_SHARE = 0.01
_SHOWN = 10


def add_arguments(parser):
    tables.add_arguments(parser, "the table with two more columns, log_density and anomaly; - is standard output")
    fitting.add_arguments(parser)
    parser.add_argument("--normal", metavar="CSV", help="rows known to be normal, to learn from instead of FILE's own")
    parser.add_argument("--contamination", metavar="SHARE", type=float,
                        help="share of normal rows that may be flagged; default 0.01, or one row's share")


def run(args):
    return fitting.run("score", _score, args)


def _score(args):
    if args.contamination is not None and not 0 < args.contamination < 1:
        raise tables.Refused(f"--contamination must be between 0 and 1, got {args.contamination}")
    table = tables.read(args)
    for name in ADDED:
        if name in table.header:
            raise tables.Refused(f"{table.path} already has a column {name!r}")
    lines = table.about()
    if args.normal is None:
        x = table.matrix()
        density, flagged, notes = _among_themselves(args, x)
    else:
        normal = tables.read(argparse.Namespace(**{**vars(args), "file": args.normal}))
        x, reference = _same_columns(table, normal)
        lines += normal.about()[:1]
        density, flagged, notes = _beside(args, x, reference)
    empty = np.isnan(x).all(1)
    lines += notes
    if empty.any():
        lines.append(f"note: {empty.sum()} rows have no number and get no score")
    if (np.isnan(x).any(1) & ~empty).any():
        lines.append("note: rows with holes are scored by what they have, which is easier; mind them apart")
    lines.append(f"flagged: {flagged.sum()} of {len(x)} rows")
    order = [i for i in np.argsort(density, kind="stable") if not empty[i]]
    lines.append("strangest rows (* flagged):")
    lines += [f"  {'*' if flagged[i] else ' '} line {table.lines[i]}: log density {density[i]:.2f}"
              + _named(table, table.rows[i]) for i in order[:_SHOWN]]
    if args.output is not None:
        cells = [["" if empty[i] else f"{density[i]:.4f}".replace(".", table.decimal) for i in range(len(x))],
                 ["" if empty[i] else str(int(flagged[i])) for i in range(len(x))]]
        tables.write(table, args.output, list(zip(ADDED, cells, strict=True)))
        lines += [] if args.output == "-" else [f"wrote {args.output}"]
    return lines


def _named(table, row):
    """Ids and text of a row, to find it by."""
    cells = [f"{c.name}={row[i].strip()[:30]}" for i, c in enumerate(table.columns)
             if c.kind == "text" or c.kind.startswith("id")]
    return "".join(f", {cell}" for cell in cells[:3])


def _among_themselves(args, x):
    """Every row by a mixture of the others (folds): a row cannot make itself usual. The strangest share is flagged."""
    here = ~np.isnan(x).all(1)
    n = int(here.sum())
    share = _share(args, n, f"{n} rows")
    z, density = fitting.Standard(x)(x), np.full(len(x), np.nan)
    fold = np.full(len(x), -1)
    fold[here] = np.random.default_rng(args.seed).permutation(n) % min(_FOLDS, n)
    for i in range(min(_FOLDS, n)):
        others = here & (fold != i)
        gm, notes = fitting.mixture(args, _with_every_column(z, others))
        density[fold == i] = gm.score_samples(z[fold == i])
    least = math.floor(share * (n + 1) + 1e-9)
    limit = np.sort(density[here])[least - 1]
    flagged = here & (density <= limit)
    return density, flagged, [notes[0] + f", each row scored by a mixture of the other {_FOLDS - 1} of {_FOLDS} parts",
                              f"threshold: log density {limit:.2f}, the strangest {share:.2%} of these very rows are"
                              " flagged; --normal CSV calibrates on rows that are known to be normal"]


def _with_every_column(z, chosen):
    """The chosen rows; a column that none of them knows gets its mean, 0, in the first of them."""
    part = z[chosen].copy()
    part[0, np.isnan(part).all(0)] = 0.0
    return part


def _beside(args, x, reference):
    """A mixture of two thirds of the normal rows; the rest calibrates its threshold."""
    reference = reference[~np.isnan(reference).all(1)]
    order = np.random.default_rng(args.seed).permutation(len(reference))
    held = len(reference) // 3
    share = _share(args, held, f"the {held} rows of --normal that calibrate")
    standard = fitting.Standard(reference)
    z = standard(reference)[order]
    gm, notes = fitting.mixture(args, _with_every_column(z[held:], slice(None)))
    gm.fit_threshold(z[:held], share)
    density = gm.score_samples(standard(x))
    flagged = (gm.predict_outlier(standard(x)) == -1) & ~np.isnan(x).all(1)
    return density, flagged, notes + [f"threshold: log density {-gm.threshold_:.2f}, calibrated on {held} normal rows"
                                      f" that the mixture has not seen: at most {share:.2%} of normal rows are flagged"]


def _share(args, n, what):
    share = args.contamination
    if share is None:
        return max(_SHARE, 1 / (n + 1))
    if math.floor(share * (n + 1) + 1e-9) < 1:
        raise tables.Refused(f"--contamination {share:g} needs at least {math.ceil(1 / share - 1 - 1e-9)} rows; {what}"
                             " are too few")
    return share


def _same_columns(table, normal):
    """Both as numbers, the columns that vary in the normal rows."""
    names = [normal.columns[i].name for i in normal.numbers()]
    by_name = {column.name: column for column in table.columns}
    for name in names:
        if name not in by_name:
            raise tables.Refused(f"{table.path} has no column {name!r}, which {normal.path} has")
        if by_name[name].values is None and by_name[name].kind != "without any value":
            raise tables.Refused(f"{table.path}: column {name!r} is {by_name[name].kind}, but numbers in {normal.path}")
    nothing = np.full(len(table.rows), np.nan)
    x = np.stack([nothing if by_name[name].values is None else by_name[name].values for name in names], axis=1)
    return x, normal.matrix()

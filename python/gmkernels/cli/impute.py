"""`python -m gmkernels impute`: fills the holes of a CSV file with what a Gaussian mixture expects there."""

import textwrap

import numpy as np

from . import fitting
from . import table as tables

_HIDDEN = 0.1  # share of the known numbers that the check hides


def add_arguments(parser):
    tables.add_arguments(parser, "where the filled table goes; - is standard output")
    fitting.add_arguments(parser)


def run(args):
    return fitting.run("impute", _impute, args)


def _impute(args):
    if args.output is None:
        raise tables.Refused("say where the filled table goes: -o OUT (- is standard output)")
    table = tables.read(args)
    x, lines = table.matrix(), table.about()
    lost = np.isnan(x)
    constant = [(i, column) for i, column in enumerate(table.columns) if column.kind == "constant"]
    if lost.any():
        standard = fitting.Standard(x)
        gm, notes = fitting.mixture(args, standard(x))
        full = standard.back(gm.impute(standard(x)))
        for place, i in enumerate(table.numbers()):
            for row in np.flatnonzero(lost[:, place]):
                table.rows[row][i] = table.text(full[row, place], standard.scale[place])
        rows = lost.any(1).sum()
        lines += notes + [f"filled in: {lost.sum()} of {lost.size} numbers, in {rows} row{'' if rows == 1 else 's'}"]
        counts = [f"{table.columns[i].name!r} {lost[:, place].sum()}" for place, i in enumerate(table.numbers())
                  if lost[:, place].any()]
        lines += textwrap.wrap(", ".join(counts), 100, initial_indent="  ", subsequent_indent="  ",
                               break_long_words=False, break_on_hyphens=False)
        if lost.all(1).any():
            lines.append(f"note: {lost.all(1).sum()} rows have no number; they got the means")
        lines += _check(args, x, standard)
    else:
        lines.append("filled in: nothing, no number is missing")
    for i, column in constant:
        empty = np.flatnonzero(np.isnan(column.values))
        if len(empty):
            known = next(j for j, value in enumerate(column.values) if value == value)
            for row in empty:
                table.rows[row][i] = table.rows[known][i]
            lines.append(f"filled in: {len(empty)} in {column.name!r}, the constant {table.rows[known][i].strip()}")
    tables.write(table, args.output)
    return lines + ([] if args.output == "-" else [f"wrote {args.output}"])


def _check(args, x, standard):
    """How good it is here: known numbers hidden, filled in, compared; beside the mean of the column."""
    rng = np.random.default_rng([args.seed, 1])  # not the numbers that may have made the holes
    hidden = ~np.isnan(x) & (rng.random(x.shape) < _HIDDEN)
    given = np.where(hidden, np.nan, x)
    usable = ~np.isnan(given).all(0)
    usable[usable] = np.nanstd(given[:, usable], 0) > 0
    if hidden.sum() < 20 or not usable.all():
        return []
    inner = fitting.Standard(given)
    try:
        gm, _ = fitting.mixture(args, inner(given))
    except tables.Refused:
        return []
    full = inner.back(gm.impute(inner(given)))
    error, plain = (np.sqrt(np.mean((((guess - x) / standard.scale)[hidden]) ** 2))
                    for guess in (full, np.broadcast_to(inner.mean, x.shape)))
    return [f"check: {hidden.sum()} known numbers hidden and filled in again: typical error {error:.2f} standard"
            f" deviations (by the column means: {plain:.2f})"]

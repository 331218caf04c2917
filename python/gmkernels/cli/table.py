"""CSV files for `impute` and `score`: read as text, columns told apart, written back with other cells as they were."""

import codecs
import csv
import io
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MISSING = ("", "?", "na", "n/a", "#n/a", "nan", "null", "none", "<na>")  # compared in lower case, without blanks
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ID = re.compile(r"(?i:(.*[_\- .])?(id|uuid|guid|index|idx|key|row|nr|no|unnamed: 0))|.*[a-z]I[dD]")


class Refused(Exception):
    """What the user can mend: printed without a traceback, exit code 2."""


def add_arguments(parser, output):
    parser.add_argument("file", help="the CSV file; - is standard input")
    parser.add_argument("-o", "--output", metavar="OUT", help=output)
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--skip", metavar="COLUMN", action="append", default=[], help="pass this column through")
    parser.add_argument("--use", metavar="COLUMN", action="append", default=[],
                        help="a number, although it looks like an id")
    parser.add_argument("--missing", metavar="MARK", action="append", default=[],
                        help="also a mark of a missing value, e.g. -999 (always: empty, ?, NA, NaN, null, None)")
    parser.add_argument("--delimiter", metavar="C", help="default: the one of , ; | and tab that the first line has")
    parser.add_argument("--decimal", metavar="C", default=".", choices=[".", ","], help="the decimal mark, . or ,")
    parser.add_argument("--encoding", default="utf-8", help="default: utf-8, or what the file's byte order mark says")
    parser.add_argument("--no-header", action="store_true", help="the first line is data; columns are called 1, 2, ...")


@dataclass
class Column:
    name: str
    kind: str = "number"  # or why it is passed through
    values: np.ndarray | None = None  # numbers, NaN where missing


@dataclass
class Table:
    path: str
    header: list  # without blanks around
    rows: list  # lists of text
    lines: list  # of every row, where it ends in the file
    delimiter: str
    newline: str
    encoding: str
    decimal: str
    first: list | None = None  # the header as it was
    columns: list = field(default_factory=list)

    def numbers(self):
        return [i for i, column in enumerate(self.columns) if column.kind == "number"]

    def matrix(self):
        """[rows, numeric columns], NaN where missing."""
        return np.stack([self.columns[i].values for i in self.numbers()], axis=1)

    def text(self, number, scale):
        """A number with six digits of its column's spread."""
        digits = 5 - math.floor(math.log10(scale)) if scale > 0 else 15
        return repr(round(float(number), digits)).replace(".", self.decimal)

    def about(self):
        """Lines of the report: what was read and what is passed through."""
        mark = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}.get(self.delimiter, repr(self.delimiter))
        lines = [f"{self.path}: {len(self.rows)} rows, {len(self.header)} columns ({mark}-separated, {self.encoding})"]
        named = [self.columns[i].name for i in self.numbers()]
        lines.append(f"numbers: {len(named)} columns: {_some(named)}")
        for column in self.columns:
            if column.kind != "number":
                lines.append(f"passed through: {column.name!r} ({column.kind})")
        return lines


def _some(names, most=8):
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# read -----------------------------------------------------------------------------------------------------------------


def read(args):
    """A `Table` with its columns told apart; Refused where that cannot be."""
    path = args.file
    shown = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"{shown}: {error.strerror or error}") from None
    text, encoding = _decode(data, args.encoding, shown)
    if not text.strip():
        raise Refused(f"{shown} is empty")
    if "\0" in text:
        raise Refused(f"{shown} is not a text file (it has zero bytes)")
    delimiter = _delimiter(args.delimiter, text)
    rows, lines = _rows(text, delimiter, shown)
    ends = re.search(r"\r\n|\n|\r", text)
    if args.no_header:
        first, header, what = None, [str(i + 1) for i in range(len(rows[0]))], "first row"
    else:
        first, rows, lines, what = rows[0], rows[1:], lines[1:], "header"
        header = [name.strip() for name in first]
        _check_header(header, shown)
    if not rows:
        raise Refused(f"{shown} has a header and no rows")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise Refused(f"{shown}, line {line}: {len(row)} cells, but the {what} has {len(header)}")
    table = Table(shown, header, rows, lines, delimiter, ends[0] if ends else "\n", encoding, args.decimal, first)
    _columns(table, args)
    return table


def _decode(data, encoding, shown):
    if data.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return data.decode(encoding), encoding
    except LookupError:
        raise Refused(f"--encoding {encoding}: no encoding of that name") from None
    except UnicodeError as error:
        line = data[: getattr(error, "start", 0)].count(b"\n") + 1
        raise Refused(f"{shown}, line {line}: not {encoding} text; give --encoding (latin-1 or cp1252 is common)"
                      ) from None


def _delimiter(asked, text):
    if asked is not None:
        asked = "\t" if asked in ("\\t", "tab") else asked
        if len(asked) != 1 or asked in '"\r\n':
            raise Refused(f"--delimiter must be one character (or tab), got {asked!r}")
        return asked
    first = re.sub(r'"[^"]*"', "", text.lstrip("\r\n")).splitlines()[:1]
    return max(",;\t|", key=(first or [""])[0].count)


def _rows(text, delimiter, shown):
    rows, lines = [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:  # not a blank line
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise Refused(f"{shown}, line {reader.line_num}: {error} (is a quote not closed?)") from None
    return rows, lines


def _check_header(header, shown):
    seen = {}
    for place, name in enumerate(header, 1):
        if name in seen:
            raise Refused(f"{shown}: columns {seen[name]} and {place} have the same name {name!r}")
        seen[name] = place
    if all(_NUMBER.fullmatch(name) for name in header):
        raise Refused(f"{shown}: every cell of the first line is a number; if there is no header, give --no-header")


def _columns(table, args):
    for option in ("skip", "use"):
        for name in getattr(args, option):
            if name not in table.header:
                raise Refused(f"--{option} {name}: no such column; there are {_some(table.header, 30)}")
    marks = {mark.strip().lower() for mark in (*MISSING, *args.missing)}
    marks |= {float(mark) for mark in marks if _NUMBER.fullmatch(mark)}  # -999 is -999.0 too
    for i, name in enumerate(table.header):
        cells = [row[i].strip() for row in table.rows]
        table.columns.append(_column(table, name, cells, marks, name in args.skip, name in args.use))
    if not table.numbers():
        raise Refused(f"{table.path} has no column of numbers to learn from: "
                      + "; ".join(f"{column.name!r} is {column.kind}" for column in table.columns[:8]))


def _column(table, name, cells, marks, skip, use):
    if skip:
        return Column(name, "as asked")
    values, strange, count = np.full(len(cells), np.nan), [], 0
    for i, cell in enumerate(cells):
        plain = cell.replace(",", ".") if table.decimal == "," else cell
        number = float(plain) if _NUMBER.fullmatch(plain) else math.inf
        if cell.lower() in marks or number in marks:
            continue
        count += 1
        if math.isfinite(number):
            values[i] = number
        else:
            strange.append(i)
    if not count:
        return Column(name, "without any value")
    if 2 * len(strange) > count and not use:
        return Column(name, "text")
    if strange:
        found = ", ".join(f"{cells[i][:30]!r} in line {table.lines[i]}" for i in strange[:3])
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        hint = ""
        if table.decimal == "." and all(_NUMBER.fullmatch(cells[i].replace(",", ".", 1)) for i in strange):
            hint = " --decimal , reads decimal commas."
        raise Refused(f"{table.path}: column {name!r} has {count - len(strange)} numbers, but also {found}{more}. Mend"
                      f" them, or give --missing MARK for a mark of missing values, --skip {name!r} to pass it through."
                      f"{hint}")
    if not use and len(cells) > 2 and count == len(cells):
        whole = all(re.fullmatch(r"[+-]?\d+", cell) for cell in cells)
        if whole and (np.diff(values) == 1).all():
            return Column(name, "id: counts the rows")
        if whole and _ID.fullmatch(name) and len(set(cells)) == len(cells):
            return Column(name, "id: distinct whole numbers, and its name")
    seen = values[~np.isnan(values)]
    if (seen == seen[0]).all():
        return Column(name, "constant", values)
    with np.errstate(over="ignore", invalid="ignore"):
        if not 0 < np.std(seen) < math.inf:
            raise Refused(f"{table.path}: the numbers of column {name!r} are too large or too close to compute with;"
                          f" scale them, or --skip {name!r}")
    return Column(name, "number", values)


# write ----------------------------------------------------------------------------------------------------------------


def check_output(args):
    """Now, not after the fit."""
    out = args.output
    if out in (None, "-"):
        return
    path = Path(out)
    if args.file != "-" and path.exists() and Path(args.file).exists() and path.samefile(args.file):
        raise Refused(f"-o {out} is the input")
    if path.is_dir():
        raise Refused(f"-o {out} is a folder")
    if not path.absolute().parent.is_dir():
        raise Refused(f"-o {out}: no folder {path.absolute().parent}")
    if path.exists() and not args.force:
        raise Refused(f"{out} exists; --force overwrites it")


def write(table, output, more=()):
    """The table, and further columns (name, cells)."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=table.delimiter, lineterminator=table.newline)
    if table.first:
        writer.writerow([*table.first, *(name for name, _ in more)])
    for i, row in enumerate(table.rows):
        writer.writerow([*row, *(cells[i] for _, cells in more)])
    data = text.getvalue().encode(table.encoding)
    if output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = Path(output)
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise Refused(f"-o {output}: {error.strerror or error}") from None

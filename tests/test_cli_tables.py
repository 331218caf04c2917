"""`python -m gmkernels impute` and `score`: what comes out, what is refused, with nothing but the csv module beside."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gmkernels import GaussianMixture, _call, cli
from gmkernels.cli import table
from mixture_data import holes, rows

X = rows(90)
HOLES = holes(X, 0.2)


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny steps: threads that wait for a busy machine take minutes."""
    torch.set_num_threads(1)


def lines(x=HOLES, header="a,b,c", mark=""):
    return [header] + [",".join(mark if np.isnan(v) else repr(float(v)) for v in row) for row in x]


def write(folder, text, name="in.csv", encoding="utf-8", end="\n"):
    path = folder / name
    text = text if isinstance(text, str) else end.join([*text, ""])
    path.write_bytes(text.encode(encoding))
    return str(path)


def numbers(path, skip=1):
    with open(path, newline="") as file:
        return np.array([[float(cell) for cell in row] for row in list(csv.reader(file))[skip:]])


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out.csv")


@pytest.fixture
def ok(capsys):
    def run(*argv):
        assert cli.main([str(a) for a in argv]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys, out):
    """The message; exit code 2, no traceback, nothing written."""

    def run(command, *argv):
        more = () if "-o" in argv else ("-o", out)
        assert cli.main([command, *(str(a) for a in argv), *more]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"python -m gmkernels {command}: ")
        assert not more or not os.path.exists(out)
        return said.err

    return run


# impute ---------------------------------------------------------------------------------------------------------------


def test_impute(tmp_path, ok, out):
    """The numbers of the estimator on standardised columns; every other cell as it was."""
    said = ok("impute", write(tmp_path, lines()), "-o", out)
    got, known = numbers(out), ~np.isnan(HOLES)
    assert (got[known] == X[known]).all()
    scale = np.nanstd(HOLES, 0)
    z = (HOLES - np.nanmean(HOLES, 0)) / scale
    want = GaussianMixture(3, covariance_type="tied", random_state=0).fit(z).impute(z) * scale + np.nanmean(HOLES, 0)
    np.testing.assert_allclose(got, want, atol=1e-5 * scale.max())
    lost = (~known).sum()
    assert f"filled in: {lost} of 270 numbers" in said and f"'b' {(~known)[:, 1].sum()}" in said
    assert "90 rows, 3 columns (comma-separated, utf-8)" in said and f"wrote {out}" in said and "check: " in said


def test_check_is_honest(tmp_path, ok, out):
    """The error it promises is about the error there is; beside the mean it says 1."""
    base = rows(400, d=5, seed=3)
    wide = np.hstack([base, base @ np.random.RandomState(0).randn(5, 4) + np.random.RandomState(1).randn(400, 4)])
    said = ok("impute", write(tmp_path, lines(holes(wide, 0.15), "a,b,c,d,e,f,g,h,i")), "-o", out)
    promised, plain = (float(word.strip(")")) for word in (said.split("typical error ")[1].split()[0],
                                                          said.split("column means: ")[1].split()[0]))
    lost = np.isnan(holes(wide, 0.15))
    error = np.sqrt(np.mean(((numbers(out) - wide) / wide.std(0))[lost] ** 2))
    assert error == pytest.approx(promised, rel=0.2) and plain == pytest.approx(1.0, abs=0.1) and promised < 0.6


def test_options(tmp_path, ok, out):
    path = write(tmp_path, lines())
    ok("impute", path, "-o", out, "--components", 2, "--covariance", "full", "--seed", 5)
    scale = np.nanstd(HOLES, 0)
    z = (HOLES - np.nanmean(HOLES, 0)) / scale
    want = GaussianMixture(2, random_state=5).fit(z).impute(z) * scale + np.nanmean(HOLES, 0)
    np.testing.assert_allclose(numbers(out), want, atol=1e-5 * scale.max())
    assert "1 component, diag covariance" in ok("impute", path, "-o", out, "--force", "--components", 1, "--covariance",
                                                "diag")


def test_text_and_ids_pass_through(tmp_path, ok, out):
    """Quoted commas, quotes and line ends in cells; ids of three kinds; a column without values, one of one value."""
    text = ["row,customer_id,name,a,b,c,empty,one"]
    for i, line in enumerate(lines()[1:]):
        text.append(f'{i + 1},{7 * i * i},"Doe, ""J""\n{i}",{line},,' + ("" if i == 5 else "1.50"))
    path = write(tmp_path, text)
    said = ok("impute", path, "-o", out)
    for named in ("'row' (id: counts the rows)", "'customer_id' (id: distinct whole numbers, and its name)",
                  "'name' (text)", "'empty' (without any value)", "'one' (constant)",
                  "filled in: 1 in 'one', the constant 1.50"):
        assert named in said
    before, after = (list(csv.reader(open(name, newline=""))) for name in (path, out))
    assert before[0] == after[0] and len(after) == 91 and after[1][2] == 'Doe, "J"\n0'
    for a, b in zip(before[1:], after[1:], strict=True):
        assert a[:3] == b[:3] and b[6] == "" and b[7] == "1.50"
        assert all(x == y for x, y in zip(a[3:6], b[3:6], strict=True) if x) and all(b[3:6])


def test_use_and_skip(tmp_path, ok, out):
    text = ["year,humid,c"] + [f"{2000 + i},{(i * 37) % 101},{x!r}" for i, x in enumerate(X[:, 0].tolist())]
    path = write(tmp_path, text)
    assert "'year' (id: counts the rows)" in ok("impute", path, "-o", out)
    said = ok("impute", path, "-o", out, "--force", "--use", "year", "--skip", "c")
    assert "numbers: 2 columns: 'year', 'humid'" in said and "'c' (as asked)" in said and "filled in: nothing" in said


@pytest.mark.parametrize("name, is_id", [
    ("id", True), ("ID", True), ("user_id", True), ("userId", True), ("Order No", True), ("Unnamed: 0", True),
    ("humid", False), ("acid", False), ("width", False), ("grid", False), ("widow", False)])
def test_names_of_ids(name, is_id):
    cells = [str(i * i) for i in range(5)]
    made = table._column(table.Table("x", [], [], [], ",", "\n", "utf-8", "."), name, cells, set(), False, False)
    assert (made.kind != "number") == is_id


@pytest.mark.parametrize("mark", ["", "NA", " n/a ", "NaN", "null", "None", "?"])
def test_marks_of_missing_values(tmp_path, ok, out, mark):
    ok("impute", write(tmp_path, lines(mark=mark)), "-o", out)
    known = ~np.isnan(HOLES)
    assert (numbers(out)[known] == X[known]).all()


def test_own_mark(tmp_path, ok, out):
    path = write(tmp_path, lines(mark="-999.0"))
    ok("impute", path, "-o", out, "--missing", "-999", "--missing", "lost")
    assert np.abs(numbers(out)).max() < 30
    assert "filled in: nothing" in ok("impute", path, "-o", out, "--force")  # it was a number


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_delimiters(tmp_path, ok, out, delimiter):
    """Found in the first line outside quotes, and kept."""
    text = [line.replace(",", delimiter) for line in lines(header='"a,;|x",b,c'.replace('"a,;|x"', "A"))]
    text[0] = text[0].replace("A", '"x,y;z,|;,|"')
    ok("impute", write(tmp_path, text), "-o", out)
    with open(out, newline="") as file:
        assert next(csv.reader(file, delimiter=delimiter)) == ["x,y;z,|;,|", "b", "c"]


def test_decimal_commas(tmp_path, ok, refused, out):
    text = [line.replace(",", ";").replace(".", ",") for line in lines()]
    path = write(tmp_path, text)
    assert "no column of numbers" in refused("impute", path)
    ok("impute", path, "-o", out, "--decimal", ",")
    with open(out) as file:
        assert "." not in file.read()
    mixed = write(tmp_path, ["a;b"] + [f"{i};{i * i if i % 5 else '1,5'}" for i in range(30)], "mixed.csv")
    assert "--decimal , reads decimal commas" in refused("impute", mixed, "-o", str(tmp_path / "no.csv"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_encodings_and_line_ends(tmp_path, ok, out, encoding, end):
    """As they came, so they go: Excel's byte order mark too."""
    path = write(tmp_path, lines(header="\u00e4,b,c"), encoding=encoding, end=end)
    ok("impute", path, "-o", out, *(("--encoding", encoding) if encoding == "latin-1" else ()))
    data = open(out, "rb").read()
    text = data.decode(encoding)
    assert text.startswith("\u00e4,b,c" + end) and text.count(end) == 91
    assert data[:2] == open(path, "rb").read()[:2]


def test_no_header_blank_lines_few_rows(tmp_path, ok, out):
    said = ok("impute", write(tmp_path, "\n1,2\n\n3,\n5,7\n\n\n"), "-o", out, "--no-header")
    assert "2 columns" in said and "1 component" in said
    got = numbers(out, skip=0)
    assert got.shape == (3, 2) and (got[[0, 2]] == [[1, 2], [5, 7]]).all() and got[1, 1] == pytest.approx(4.5, abs=0.1)


def test_row_without_numbers(tmp_path, ok, out):
    said = ok("impute", write(tmp_path, [*lines(), ",,"]), "-o", out)
    assert "1 rows have no number; they got the means" in said
    assert (np.abs(numbers(out)[-1] - np.nanmean(HOLES, 0)) < 0.5).all()


def test_output(tmp_path, ok, refused, out, capsys):
    path = write(tmp_path, lines())
    before = open(path, "rb").read()
    assert "say where the filled table goes" in _said(capsys, "impute", path)
    assert f"-o {path} is the input" in refused("impute", path, "-o", path)
    assert f"-o {path} is the input" in refused("impute", path, "-o", path, "--force")
    assert "is a folder" in refused("impute", path, "-o", tmp_path)
    assert "no folder" in refused("impute", path, "-o", tmp_path / "none" / "out.csv")
    ok("impute", path, "-o", out)
    first = open(out, "rb").read()
    assert "exists; --force overwrites it" in _said(capsys, "impute", path, "-o", out)
    ok("impute", path, "-o", out, "--force", "--components", 1)
    assert open(out, "rb").read() != first and open(path, "rb").read() == before
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "out.csv"]  # no leftovers


def _said(capsys, *argv):
    assert cli.main(list(argv)) == 2
    return capsys.readouterr().err


def test_the_program(tmp_path):
    """As it is typed, through pipes: the table on standard output, the report on the other."""
    package = os.path.dirname(os.path.dirname(_call.__file__))
    done = subprocess.run([sys.executable, "-m", "gmkernels", "impute", "-", "-o", "-"], text=True, capture_output=True,
                          input="\n".join(lines()), check=True,
                          env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"})
    assert done.stdout.count("\n") == 91 and done.stdout.startswith("a,b,c\n")
    assert "filled in:" in done.stderr and "standard input: 90 rows" in done.stderr


# refused --------------------------------------------------------------------------------------------------------------

GOOD = lines()
BAD = {
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "header only": ("a,b\n", "has a header and no rows"),
    "short row": ([*GOOD[:5], "1.0,2.0", *GOOD[5:]], "line 6: 2 cells, but the header has 3"),
    "long row": ([*GOOD, "1,2,3,4"], "line 92: 4 cells, but the header has 3"),
    "after a quoted line end": (['"a\nb",c', '"x\ny",1', "1"], "line 5: 1 cells, but the header has 2"),
    "quote": ([*GOOD[:3], '"1,2,3'] + GOOD[3:], "(is a quote not closed?)"),
    "duplicate": (["a,b,a", "1,2,3"], "columns 1 and 3 have the same name 'a'"),
    "two without a name": ([",b,", "1,2,3"], "columns 1 and 3 have the same name ''"),
    "header is data": (["1,2.5", "3,4"], "if there is no header, give --no-header"),
    "text": (["a,b", "x,y", "z,w"], "no column of numbers to learn from: 'a' is text; 'b' is text"),
    "constant": (["a,b", "1,x", "1.0,y", "1,z"], "no column of numbers to learn from: 'a' is constant; 'b' is text"),
    "nothing": (["a", "NA", "?"], "no column of numbers to learn from: 'a' is without any value"),
    "some text": ([*GOOD, "high,1,2", "1,1,2", "low,1,2"],
                  "column 'a' has {} numbers, but also 'high' in line 92, 'low' in line 94. Mend them,"),
    "infinite": ([*GOOD, "inf,1,2"], "'inf' in line 92"),
    "too large": ([*GOOD, "1e999,1,2"], "'1e999' in line 92"),
    "overflow": ([*GOOD, "1e300,1,2"], "numbers of column 'a' are too large"),
    "underscores": ([*GOOD, "1_000,1,2"], "'1_000' in line 92"),
    "one row": (["a,b", "1,2"], "no column of numbers to learn from: 'a' is constant"),
    "zero bytes": ("a,b\n1,\0\n", "is not a text file"),
}


@pytest.mark.parametrize("command", ["impute", "score"])
@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, refused, name, command):
    text, said = BAD[name]
    path = write(tmp_path, text)
    assert said.format(int((~np.isnan(HOLES[:, 0])).sum()) + 1) in refused(command, path)


@pytest.mark.parametrize("command", ["impute", "score"])
def test_refused_arguments(tmp_path, refused, command):
    latin = write(tmp_path, lines(header="\u00e4,b,c"), "latin.csv", "latin-1")
    path = write(tmp_path, lines())
    for argv, said in (
        ([str(tmp_path / "no.csv")], "no.csv: No such file or directory"),
        ([str(tmp_path)], "Is a directory"),
        ([path, "--skip", "z"], "--skip z: no such column; there are 'a', 'b', 'c'"),
        ([path, "--use", "z"], "--use z: no such column"),
        ([path, "--delimiter", "ab"], "--delimiter must be one character"),
        ([path, "--delimiter", ";"], "no column of numbers"),
        ([path, "--encoding", "klingon"], "no encoding of that name"),
        ([path, "--components", "0"], "--components must be at least 1, got 0"),
        ([path, "--components", "100"], "too few for 100 components"),
        ([path, "--seed", "-1"], "--seed must be between 0"),
        ([latin], "line 1: not utf-8 text; give --encoding"),
    ):
        assert said in refused(command, *argv)


# score ----------------------------------------------------------------------------------------------------------------


def test_score(tmp_path, ok, out):
    """A row that is far off is found, though the mixture could have kept a component for it."""
    x = np.vstack([rows(150), [[60.0, -60.0, 60.0]], holes(rows(20, seed=9), 0.3)])
    path = write(tmp_path, ["name," + line if i == 0 else f"n{i}," + line for i, line in enumerate(lines(x))])
    said = ok("score", path, "-o", out)
    made = list(csv.DictReader(open(out, newline="")))
    assert len(made) == 171 and list(made[0]) == ["name", "a", "b", "c", "log_density", "anomaly"]
    density = np.array([float(row["log_density"]) for row in made])
    flags = np.array([row["anomaly"] for row in made])
    assert density.argmin() == 150 and flags[150] == "1" and (flags == "1").sum() == 1  # floor(0.01 * 172)
    assert "flagged: 1 of 171 rows" in said and "* line 152: log density" in said and "name=n151" in said
    assert "rows with holes are scored by what they have" in said
    many = ok("score", path, "--contamination", 0.1)
    assert "flagged: 17 of 171 rows" in many and "wrote" not in many


def test_score_is_held_out(tmp_path, ok, out):
    """Densities are those of mixtures that have not seen the row: on new rows of the same kind they are the same."""
    old, new = rows(60, d=6, seed=1), rows(60, d=6, seed=1)
    ok("score", write(tmp_path, lines(old, "a,b,c,d,e,f")), "-o", out, "--components", 3, "--covariance", "full")
    density = [float(row["log_density"]) for row in csv.DictReader(open(out, newline=""))]
    z = (new - old.mean(0)) / old.std(0)
    seen = GaussianMixture(3, random_state=0).fit(z).score_samples(z)
    assert np.mean(density) < np.mean(seen) - 1


def test_normal_rows(tmp_path, ok, refused, out):
    """Calibrated: of rows like the normal ones few are flagged, of others all. Columns are found by name."""
    normal = write(tmp_path, lines(holes(rows(900, seed=0), 0.02)), "normal.csv")
    rng = np.random.RandomState(0)
    usual, odd = rows(900, seed=0)[rng.permutation(900)[:300]], rows(30, seed=0) * [1, -1, 1]
    x = np.vstack([usual, odd])[:, ::-1]
    path = write(tmp_path, lines(x, "c,b,a"))
    said = ok("score", path, "--normal", normal, "-o", out)
    flags = np.array([row["anomaly"] == "1" for row in csv.DictReader(open(out, newline=""))])
    assert flags[300:].all() and flags[:300].mean() < 0.02 and "calibrated on 300 normal rows" in said
    wide = rows(2100, d=8, seed=4)  # 100 rows, 135 numbers: they look usual only to the mixture that has seen them
    small = write(tmp_path, lines(wide[:150], "a,b,c,d,e,f,g,h"), "small.csv")
    new = write(tmp_path, lines(wide[150:], "a,b,c,d,e,f,g,h"), "new.csv")
    said = ok("score", new, "--normal", small, "--covariance", "full", "--contamination", 0.1)
    assert int(said.split("flagged: ")[1].split()[0]) < 0.2 * 1950
    few = write(tmp_path, lines(X[:30]), "few.csv")
    os.remove(out)
    assert "needs at least 99 rows; the 10 rows of --normal that calibrate are too few" in refused(
        "score", path, "--normal", few, "--contamination", "0.01")
    ok("score", path, "--normal", few)  # one row's share
    other = write(tmp_path, lines(X, "a,b,x"), "other.csv")
    assert f"{other} has no column 'c', which {normal} has" in refused("score", other, "--normal", normal)
    words = write(tmp_path, ["a,b,c"] + [f"{a!r},{b!r},word" for a, b, _ in X.tolist()], "words.csv")
    assert "column 'c' is text, but numbers in" in refused("score", words, "--normal", normal)
    assert "none.csv: No such file" in refused("score", path, "--normal", tmp_path / "none.csv")


def test_score_edges(tmp_path, ok, refused, out):
    """Rows without numbers have no score; a file that was scored is not scored over; three rows are enough."""
    said = ok("score", write(tmp_path, [*lines(X), ",,"]), "-o", out)
    assert "1 rows have no number and get no score" in said
    assert list(csv.reader(open(out, newline="")))[-1] == [""] * 5
    again = str(tmp_path / "again.csv")
    assert "already has a column 'log_density'" in refused("score", out, "-o", again)
    os.remove(out)
    path = write(tmp_path, lines(X[:3]), "three.csv")
    assert "flagged: 1 of 3 rows" in ok("score", path)
    assert "needs at least 99 rows; 3 rows are too few" in refused("score", path, "--contamination", "0.01")
    for share in ("0", "1", "nan"):
        assert "--contamination must be between 0 and 1" in refused("score", path, "--contamination", share)


def test_column_that_a_part_does_not_know(tmp_path, ok):
    """Two known cells in a column: the mixture of some parts has seen one of them or none."""
    x = np.hstack([X, np.full((90, 1), np.nan)])
    x[[3, 4], 3] = 1.0, 2.0
    said = ok("score", write(tmp_path, lines(x, "a,b,c,d")))
    assert "flagged:" in said and "nan" not in said


"""Mutants that are compiled together do what each of them does alone."""

import ctypes
import shutil
import subprocess

import pytest

from mutation.operators import mutants
from mutation.schema import NUMBERS, PRELUDE, Schema, blamed

TEXT = """
struct Point { long x, y; };
static long calls = 0;
static void __syncthreads() { calls += 1000; }
template <int kFirst> static long sum(const long* a, int n) {
  long total = 0;
  for (int i = kFirst; i < n; ++i) total += a[i];
  return total;
}
extern "C" long f(int n, int m) {
  long a[8][8] = {}, out = 0;
  calls = 0;
  const int size = 4;
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j) a[i][j] = i * 8 + j;
  Point p = {n, m};
  // a comment, with a comma
  p.x += a[1][2] - (n < 2 ? m : 3);
  p.y -= n == m ? 7 : 9;
  if (n > 1 && m != 0)
    p.y = -p.y * 2 +  // half of it
          sum<0>(a[n % 4], m < 3 ? m + 1 : 4);
  else
    out = 5;
  __syncthreads();
  return out + p.x * 100 + p.y + calls;
}
"""
INPUTS = [(n, m) for n in range(4) for m in range(4)]


def built(folder, name, text, *flags):
    """The library and nothing, or nothing and what g++ complains of."""
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(text)
    done = subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-w", *flags, str(source), "-o", str(library)],
                          capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr
    library = ctypes.CDLL(str(library))
    library.f.restype = ctypes.c_long
    return library, None


def built_of(folder, schema, render):
    """The library, its text, {line: numbers}, the (number, mutant) in it, and the numbers that g++ does not take."""
    some = [(n, m) for n, m in enumerate(mutants("f.cu", TEXT), 1) if schema.segment(m)]
    refused = set()
    for _ in range(9):
        some = [(n, m) for n, m in some if n not in refused]
        text, lines = render(some)
        library, complaints = built(folder, "many", PRELUDE.replace("\n", " ") + text, "-Werror=vla")
        if library:
            return library, text, lines, some, refused
        bad = blamed(complaints, folder / "many.cpp", lines)
        assert bad
        refused |= bad
    raise AssertionError(complaints)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_together_as_alone(tmp_path):
    schema = Schema(TEXT)
    many, text, lines, some, refused = built_of(tmp_path, schema, schema.render)
    assert text.count("\n") == TEXT.count("\n")  # reports of the emulator name the same lines
    assert set().union(*lines.values()) == {n for n, _ in some}
    assert all("a[8][8]" in TEXT.split("\n")[m.line - 1] or "p = {n, m}" in TEXT.split("\n")[m.line - 1]
               for n, m in enumerate(mutants("f.cu", TEXT), 1) if n in refused)
    plain, _ = built(tmp_path, "plain", TEXT)
    assert [many.f(*i) for i in INPUTS] == [plain.f(*i) for i in INPUTS]
    alive, differ = (ctypes.c_ubyte * NUMBERS).in_dll(many, "gmk_mutants_alive"), 0
    for number, m in some:
        one, _ = built(tmp_path, f"m{number}", m.apply(TEXT))
        alive[number] = 1
        alone = [one.f(*i) for i in INPUTS]
        assert [many.f(*i) for i in INPUTS] == alone, m.what
        alive[number] = 0
        differ += alone != [plain.f(*i) for i in INPUTS]
    assert differ > 20


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_marks_say_which_places_are_met(tmp_path):
    schema = Schema(TEXT)
    library, _, _, some, _ = built_of(tmp_path, schema, schema.marked)
    marks = (ctypes.c_ubyte * NUMBERS).in_dll(library, "gmk_mutants_seen")
    plain, _ = built(tmp_path, "plain", TEXT)
    seen = {}
    for i in INPUTS:
        ctypes.memset(marks, 0, len(marks))
        assert library.f(*i) == plain.f(*i)
        seen[i] = {n for n, mark in enumerate(bytes(marks)) if mark}
    for number, m in some:
        one, _ = built(tmp_path, f"m{number}", m.apply(TEXT))
        missed = [i for i in INPUTS if one.f(*i) != plain.f(*i) and number not in seen[i]]
        assert not missed, m.what
    either = {m.what: {i for i in INPUTS if n in seen[i]} for n, m in some}
    assert either["5 -> 6"] == {(n, m) for n, m in INPUTS if not (n > 1 and m != 0)}
    assert either["4 -> 5"] == {(n, m) for n, m in INPUTS if n > 1 and m >= 3}


def whole(text, what):
    """The expression of `text` that is replaced for the mutant `what`."""
    schema = Schema(text)
    (m,) = [m for m in mutants("f.cu", text) if m.what == what]
    place = schema.segment(m)
    return place and text[slice(*place)]


@pytest.mark.parametrize("statement, what, wanted", [
    ("x = a + b * c;", "+ -> -", "a + b * c"),
    ("x += a[i + 1] * c;", "+ -> -", "i + 1"),
    ("x -= a;", "-= -> +=", "x -= a"),
    ("x -= a == 0 ? b : c;", "-= -> +=", "x -= a == 0 ? b : c"),
    ("x -= a == 0 ? b : c;", "== -> !=", "a == 0"),
    ("y = f(a, b);", "f: a <-> b", "f(a, b)"),
    ("x = u ? a - 1 : c;", "- -> +", "a - 1"),
    ("for (int i = 0; i < n; ++i) x = 1;", "for (i < n) -> false", "i < n"),
    ("for (int i = 0; i < n; ++i) x += v;", "+= -> -=", "x += v"),
    ("if (a) __syncthreads();", "__syncthreads() deleted", "__syncthreads()"),
    ("p[i][j] = 1;", "[i] <-> [j]", "p[i][j]"),
    ("return a - b;", "- -> +", "a - b"),
    ("int64_t x = n;", "int64_t -> int32_t, before x", None),
])
def test_the_expression_around(statement, what, wanted):
    got = whole(f"void f() {{ {statement} }}", what)
    assert got == wanted


def test_nothing_outside_of_functions():
    assert whole("const int kRows = a + b;", "+ -> -") is None

"""The mutation operators on small snippets, and the list of survivors. Nothing is compiled."""

import os

import pytest

from mutation import survivors
from mutation.operators import OPERATORS, mutants
from mutation.source import Source


def changed(text, operator):
    """What an operator makes of a text: the set of new texts."""
    return {m.apply(text) for m in mutants("f.cu", text) if m.operator == operator}


@pytest.mark.parametrize("operator, text, wanted", [
    ("barrier", "a(); __syncthreads(); b();", {"a(); ; b();"}),
    ("barrier", "if (n) __syncthreads();", {"if (n) ;"}),
    ("barrier", "if (__syncthreads_or(x)) y();", set()),
    ("syncwarp", "; __syncwarp(mask); b();", {"; ; b();"}),
    ("fence", "; __threadfence(); __threadfence_block();", {"; ; __threadfence_block();", "; __threadfence(); ;"}),
    ("wait", "; cp_async_wait<2>(); cp_async_commit();", {"; ; cp_async_commit();", "; cp_async_wait<2>(); ;"}),
    ("wait", "{ gmk_simt::async_wait(groups); }", {"{ ; }"}),
    ("bound", "x = i < n;", {"x = i <= n;", "x = i < (n) - 1;"}),
    ("bound", "for (; i <= n + m; ) {}", {"for (; i < n + m; ) {}", "for (; i <= (n + m) + 1; ) {}"}),
    ("bound", "f(a >= b && c);", {"f(a > b && c);", "f(a >= (b) - 1 && c);"}),
    ("bound", "template <class T> f<T> x(a<b>(c));", set()),
    ("compare", "x = a == b;", {"x = a != b;"}),
    ("compare", "x = !a;", {"x = a;"}),
    ("sign", "x = a + b;", {"x = a - b;"}),
    ("sign", "x -= -a;", {"x += -a;", "x -= a;"}),
    ("arithmetic", "x = e / n; y = e % n;", {"x = e % n; y = e % n;", "x = e / n; y = e / n;"}),
    ("arithmetic", "T* const p = &q;", set()),
    ("swap", "x = blockIdx.x;", {"x = blockIdx.y;"}),
    ("swap", "x = a[i][j + 1];", {"x = a[j + 1][i];"}),
    ("swap", "x = f(row, column, 1);", {"x = f(column, row, 1);", "x = f(row, 1, column);"}),
    ("swap", "x = f(a, g(b, c));", {"x = f(g(b, c), a);", "x = f(a, g(c, b));"}),
    ("swap", "x = fma(a, b, c);", {"x = fma(a, c, b);"}),
    ("swap", "int f(int a, int b);", set()),
    ("swap", "GMK_SHARED(a, b);", set()),
    ("narrow", "x = int64_t(i) * n;", {"x = int32_t(i) * n;"}),
    ("constant", "x = 0;", {"x = 1;"}),
    ("constant", "x = 1u;", {"x = 0u;", "x = 2u;"}),
    ("constant", "x = 16;", {"x = 17;", "x = 15;"}),
    ("constant", "x = 0.5f;", {"x = (2 * 0.5f);"}),
    ("constant", "x = 0x40u;", {"x = 65u;", "x = 0u;"}),
    ("mask", "f(kFullWarp, v);", {"f(0x0000ffffu, v);", "f(0xfffffffeu, v);"}),
    ("drop", "if (a) b();", {"if (false) b();"}),
    ("drop", "for (int i = 0; i < n; ++i) b();", {"for (int i = 0; false; ++i) b();"}),
    ("drop", "if (const Status s = f()) return s;", set()),
    ("guard", "if (a) b();", {"if (true) b();"}),
    ("guard", "x = a && b < c && d;", {"x = true && b < c && d;", "x = a && true && d;", "x = a && b < c && true;"}),
    ("guard", "x = a || b;", {"x = false || b;", "x = a || false;"}),
    ("choice", "x = a < b ? c : d;", {"x = true ? c : d;", "x = false ? c : d;"}),
])
def test_operator(operator, text, wanted):
    assert changed(text, operator) == wanted


def test_every_operator_has_a_case():
    (mark,) = test_operator.pytestmark
    assert {case[0] for case in mark.args[1] if case[2]} == set(OPERATORS)


def test_no_mutants_where_the_emulator_sees_no_code():
    text = """
// a < b
/* x = 1; */
#define N 3
#include <stdint.h>
const char* s = "i < n";
#ifndef GMK_SIMT
int a = 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
int b = 1;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
int c = 1;
#else
int d = 1;
#endif
#ifdef __CUDA_ARCH__
int e = 1;
#endif
"""
    assert {m.line for m in mutants("f.cu", text)} == {12}


KERNEL = """namespace gmk {
namespace {
constexpr int kTile = 64;
struct alignas(16) Pack {
  int v[4];
  int size() const { return 4; }
};
template <class T, int n = 2>
__global__ void __launch_bounds__(256) scale_kernel(Args a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  auto f = [&](int k) { return k + 1; };
  if (i < a.size) a.out[i] = 2.0f * a.x[i];
}
}  // namespace
Status scale_cuda(const Args& a) { return a.size <= 0 ? kOk : launch(a); }
}  // namespace gmk
"""


def test_names_say_where():
    assert {m.function for m in mutants("f.cu", KERNEL)} == {"-", "Pack", "Pack::size", "scale_kernel", "scale_cuda"}
    assert all(m.name.startswith(f"f.cu:{m.function}:{m.operator}:") for m in mutants("f.cu", KERNEL))


def test_names_are_unique_and_survive_edits_elsewhere():
    names = [m.name for m in mutants("f.cu", KERNEL)]
    assert len(set(names)) == len(names) > 20
    moved = KERNEL.replace("int size() const { return 4; }", "").replace("  if (i < a", "\n    if (i <  a")
    kept = {m.name for m in mutants("f.cu", moved)}
    assert {n for n in names if ":Pack" not in n} == {n for n in kept if ":Pack" not in n}


def test_two_mutants_never_are_the_same_text():
    texts = [m.apply(KERNEL) for m in mutants("f.cu", KERNEL)]
    assert len(set(texts)) == len(texts) and KERNEL not in texts


def test_brackets_of_the_real_sources_match():
    from pathlib import Path

    for path in (Path(__file__).parents[1] / "csrc").glob("*/*.cu*"):
        s = Source(path.read_text())
        assert s.tokens and all(s.match[s.match[i]] == i for i in s.match)


def test_a_survivor_needs_a_reason(tmp_path):
    file = tmp_path / "f.cu.toml"
    file.write_text('[[group]]\nkind = "equivalent"\nreason = "the grid is larger"\nnames = ["f.cu:a", "f.cu:b"]\n')
    assert survivors.load(tmp_path)["f.cu:b"]["reason"] == "the grid is larger"
    assert survivors.stale(survivors.load(tmp_path), ["f.cu:a"]) == {"f.cu:b"}
    for bad in ('[[group]]\nkind = "equivalent"\nreason = " "\nnames = []',
                '[[group]]\nkind = "so"\nreason = "r"\nnames = []',
                '[[group]]\nkind = "hole"\nreason = "r"\nnames = ["f.cu:a", "f.cu:a"]',
                '[[group]]\nkind = "hole"\nreason = "r"\nnames = ["g.cu:a"]'):
        file.write_text(bad)
        with pytest.raises(ValueError, match="f.cu.toml"):
            survivors.load(tmp_path)
    survivors.load()


def row(verdict, name="m"):
    return {"name": name, "file": "f.cu", "operator": "bound", "verdict": verdict, "line": 1, "what": "< -> <="}


def test_judgement():
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation.__main__ import judge

    killed = [row("numeric"), row("report race"), row("timeout"), row("crash SIGFPE"), row("invalid"), row("same code")]
    said = []
    assert judge(killed, {}, say=said.append) == 0 and "4 killed of 4" in said[-1]
    alive = row("survived", "alive")
    assert judge([*killed, alive], {}, say=said.append) == 1
    assert judge([*killed, alive], {"alive": {"kind": "equivalent"}}, say=said.append) == 0
    hole = {"alive": {"kind": "hole"}}
    assert judge([*killed, alive], hole, say=said.append) == 0
    assert judge([*killed, alive], hole, complete=True, say=said.append) == 1  # 4 of 5
    assert judge([*killed * 5, alive], hole, complete=True, say=said.append) == 0  # 20 of 21
    assert any("SURVIVED alive" in text for text in said)


def test_a_verdict_depends_on_its_test_and_what_the_tests_share(tmp_path, monkeypatch):
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation import tests

    monkeypatch.setattr(tests, "ROOT", tmp_path)
    file = tmp_path / "test_f.py"

    def states(text):
        file.write_text(text)
        tests._parts.cache_clear()
        return [tests.state_of(f"test_f.py::{name}") for name in ("test_a[simt-1]", "test_a[simt-2]", "test_b")]

    text = "N = 3\n\n@mark\ndef test_a(n):\n    f(n)\n\ndef test_b():\n    f(1)\n"
    first = states(text)
    assert len(set(first)) == 3
    added = states(text + "\n\ndef test_c():\n    pass\n")
    assert added == first
    changed = states(text.replace("f(1)", "f(2)"))
    assert changed[:2] == first[:2] and changed[2] != first[2]
    for other in (text.replace("@mark", "@skip"), text.replace("f(n)", "f(-n)")):
        assert [a == b for a, b in zip(states(other), first, strict=True)] == [False, False, True]
    assert not set(states(text.replace("N = 3", "N = 4"))) & set(first)
    tests._parts.cache_clear()


def test_a_sample_changes_little():
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation.run import draw

    names = [f"f.cu:kernel:sign:{i}#1" for i in range(500)]
    some = draw(names, 40, 0)
    assert len(set(some)) == 40 and some != draw(names, 40, 1) and set(some) < set(draw(names, 80, 0))
    assert len(set(some) - set(draw(names[5:], 40, 0))) < 5


def test_killers_are_read_as_written(tmp_path):
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation.verdicts import killers, write_killers

    file = tmp_path / "killers.txt"
    rows = [{**row("numeric", name), "test": test} for name, test in (("m1", "t.py::a[x y]"), ("m0", "t.py::b"),
                                                                      ("m2", "t.py::b"), ("alive", None))]
    assert killers(file) == {}
    write_killers(rows, file)
    assert file.read_text() == "t.py::a[x y]\n  m1\nt.py::b\n  m0\n  m2\n"
    assert killers(file) == {"m1": "t.py::a[x y]", "m0": "t.py::b", "m2": "t.py::b"}


def test_the_docs_show_the_recorded_results():
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation.__main__ import BEGIN, DOCS, END, recorded

    assert BEGIN + recorded() + END in DOCS.read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation import run

    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "sources", lambda: [])
    return tmp_path


def test_two_runs_do_not_work_in_one_folder(folder):
    from mutation import run

    said = []
    run.run(say=said.append)
    with run._alone(), pytest.raises(SystemExit, match="another run of mutants is at work"):
        run.run(say=said.append)
    run.run(say=said.append)
    assert len(said) == 2


def test_a_look_at_what_is_known_leaves_a_run_alone(folder):
    from mutation import run

    for name in ("0", "plain", "together0"):
        (folder / name).mkdir()
        (folder / name / "mutant.cu").write_text("at work")
    assert run.known() == ([], 0)
    assert all((folder / name / "mutant.cu").exists() for name in ("0", "plain", "together0"))


@pytest.mark.slow
def test_a_sample_of_all_mutants(capsys):
    """What tests have killed once, they kill still: the same ones until a kernel changes. `make mutants` runs all."""
    pytest.importorskip("simt.backend", reason="no emulator", exc_type=ImportError)
    from mutation.__main__ import main

    status = main(["--sample", "40", "--recorded", "--again", "--results", os.devnull])
    assert status == 0, capsys.readouterr().out

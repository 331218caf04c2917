"""The benchmark suite, on fake cases: the arithmetic, the verdicts, the exit codes, the generated tables."""

import copy
import io
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from gmkernels import cli
from gmkernels.bench import ceilings, compare, report, suite, tables, timing
from gmkernels.bench.case import Case
from gmkernels.bench.timing import Spread


def fail():
    raise RuntimeError("two\nlines")


def fast():
    return sum(range(1000))


def slow():
    time.sleep(0.006)


def family(*cases, ops=None):
    return SimpleNamespace(OPS=ops or tuple({c.op for c in cases}), cases=lambda quick, device: iter(cases))


def quiet():
    return SimpleNamespace(case=lambda case: None, step=lambda text: None, done=lambda text: None, title="")


def run(*cases, **options):
    return suite.run({"fake": family(*cases)}, progress=quiet(), case_seconds=0.05, **options)


def case(**options):
    return Case(**{"op": "fake_op", "name": "small", "ours": fast, "rivals": {"slow": slow}, **options})


@pytest.fixture(scope="module")
def result():
    return run(
        case(goals={"slow": 2.0, "fastest": 1e9, "gone": 1.0}, error=lambda: 1e-7, rival_error=fail,
             rivals={"slow": slow, "gone": "not installed", "broken": fail}),
        case(name="sized", bytes=8e6, flops=1e6, share_goal=1e-9),
    )


def test_a_rival_timed_on_a_part_is_scaled():
    whole, part = (run(case(parts=parts))["rows"][0]["rivals"]["slow"] for parts in ({}, {"slow": 0.01, "gone": 0.5}))
    assert whole["median"] < 0.1 < 0.5 < part["median"]
    assert part["ratio"]["median"] > 20 * whole["ratio"]["median"]


# numbers -------------------------------------------------------------------------------------------------------------


def test_spread_is_quartiles_of_sorted_samples():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert spread == Spread(median=3.0, min=1.0, p25=2.0, p75=4.0, n=5)
    assert Spread.of([1.0, 2.0]).median == 1.5
    assert Spread.from_dict(json.loads(json.dumps(spread.as_dict()))) == spread


@pytest.mark.parametrize("other, expected", [((4.0, 5.0), True), ((4.1, 5.0), False), ((2.5, 3.5), True)])
def test_overlap(other, expected):
    a, b = Spread(3.0, 1.0, 2.0, 4.0, 5), Spread(0.0, 0.0, *other, 5)
    assert a.overlaps(b) is expected and b.overlaps(a) is expected


def test_ratio_pairs_rounds():
    # the machine is ten times slower in round 1: for both, so the ratio does not move
    ours, rival = {0: 1.0, 1: 10.0, 2: 1.0, 3: 1.0}, {0: 3.0, 1: 30.0, 2: 3.0}
    got = timing.ratio(rival, ours)
    assert (got.median, got.p25, got.p75, got.n) == (3.0, 3.0, 3.0, 3)
    assert timing.ratio(rival, ours, scale=0.5).median == 1.5
    with pytest.raises(ValueError):
        timing.ratio({7: 1.0}, ours)


def test_spread_of_a_ratio_holds_the_ratio():
    got = timing.ratio({0: 1.0, 1: 8.0, 2: 9.0}, {0: 10.0, 1: 1.0, 2: 9.0})
    assert got.p25 <= got.median <= got.p75


def test_measure_interleaves_and_loops_short_calls():
    seen = []
    times = timing.measure({"ours": lambda: seen.append("ours"), "slow": slow}, budget=0.05)
    assert times.inner["ours"] > 100 and times.inner["slow"] == 1
    assert len(times.samples["ours"]) >= timing.MIN_ROUNDS
    assert set(range(timing.MIN_ROUNDS)) <= times.samples["slow"].keys() <= times.samples["ours"].keys()
    assert times.spread("ours").median < 1e-4 < 6e-3 <= times.spread("slow").min


def test_a_slow_rival_does_not_eat_the_rounds(monkeypatch):
    now = [0.0]  # a clock that only the callables move: nothing here depends on the load of the machine

    def takes(seconds):
        def call():
            now[0] += seconds
        return call

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0))
    times = timing.measure({"ours": takes(1e-3), "quick": takes(1e-3), "slow": takes(60e-3)}, budget=0.6)
    samples = {name: len(taken) for name, taken in times.samples.items()}
    assert samples["slow"] >= timing.MIN_ROUNDS and samples["quick"] == samples["ours"] > 5 * samples["slow"]
    assert times.spread("slow").median == pytest.approx(60e-3)


def test_a_callable_that_fails_later_is_out():
    left = iter(range(8))
    times = timing.measure({"ours": fast, "tired": lambda: next(left)}, budget=0.05)
    assert "StopIteration" in times.errors["tired"] and "tired" not in times.samples and times.samples["ours"]


@pytest.mark.parametrize("library", [True, False])
def test_threads_are_set_and_restored(library, monkeypatch):
    if not library:
        monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    before, seen = torch.get_num_threads(), []
    run(case(ours=lambda: seen.append(torch.get_num_threads()), rivals={}, threads=1))
    assert set(seen) == {1} and torch.get_num_threads() == before


def test_cuda_clock_flushes_before_every_call_and_times_only_the_call(monkeypatch):
    """On fake events: what is recorded when. (No GPU needed.)"""
    log, seen = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append(self)

        def elapsed_time(self, end):  # milliseconds
            assert log.index(end) == log.index(self) + 2 and log[log.index(self) + 1] == "call"
            return 3.0

    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    clock = timing._CudaClock("cpu")

    def call():
        log.append("call")
        seen.append(int(clock.trash.sum()))
        clock.trash.fill_(1)

    assert clock.sample(call, 4) == pytest.approx(3e-3)
    assert seen == [0] * 4 and log[-1] == "synchronize" and log.count("synchronize") == 1
    assert not clock.warms(1e-9)


def test_ceiling_scales_and_binds():
    sized = case(bytes=8e6, flops=1e9, exps=1e5, normals=1e5)
    found = ceilings.ceilings(sized, "cpu")
    assert set(found) == {"copy_", "mm", "exp", "normals"}
    assert found["copy_"].amount == 8e6 and found["copy_"].scale == 1.0
    assert found["mm"].scale == pytest.approx(1e9 / found["mm"].amount)
    assert ceilings.binding(found, {"copy_": 1.0, "mm": 0.5 / found["mm"].scale}) == "copy_"
    assert ceilings.binding(found, {"copy_": 1.0, "mm": 2.0 / found["mm"].scale}) == "mm"
    assert ceilings.binding({}, {}) is None


# rows ----------------------------------------------------------------------------------------------------------------


def test_row(result):
    row = result["rows"][0]
    assert row["rivals"]["slow"]["ratio"]["median"] == pytest.approx(
        row["rivals"]["slow"]["median"] / row["ours"]["median"])
    assert row["rivals"]["gone"] == {"absent": "not installed"}
    assert row["rivals"]["broken"] == {"error": "RuntimeError: two lines"}
    assert row["fastest"] == "slow" and row["error"] == 1e-7 and row["rival_error"] == "RuntimeError: two lines"
    verdicts = {goal["against"]: goal["reached"] for goal in row["goals"]}
    assert verdicts == {"slow": True, "fastest": False, "gone": None}
    sized = result["rows"][1]
    assert sized["bound"] in ("copy_", "mm") and sized["goals"][0]["reached"] is True
    assert sized["rates"]["B/s"] == pytest.approx(8e6 / sized["ours"]["median"])
    assert result["crashes"] == []


def test_a_goal_inside_the_spread_says_so():
    goal = suite._goal("r", 3.0, Spread(2.9, 2.0, 2.8, 3.1, 9))
    assert report.verdict(goal) == "no (=)"
    assert report.verdict(suite._goal("r", 2.7, Spread(2.9, 2.0, 2.8, 3.1, 9))) == "yes"
    assert report.verdict(suite._goal("r", 3.2, Spread(2.9, 2.0, 2.8, 3.1, 9))) == "no"


def test_a_crash_is_kept_and_the_rest_goes_on():
    def cases(quick, device):
        yield case(ours=fail)
        yield case(name="second")
        raise OSError("no picture")

    got = suite.run({"fake": SimpleNamespace(cases=cases)}, progress=quiet(), case_seconds=0.02)
    assert "two lines" in got["crashes"][0] and "no picture" in got["crashes"][1]
    assert [row["name"] for row in got["rows"] if "ours" in row] == ["second"]
    assert "FAILED" in report.table(got)


def test_interrupted_runs_keep_what_they_have():
    def cases(quick, device):
        yield case()
        raise KeyboardInterrupt

    got = suite.run({"a": SimpleNamespace(cases=cases), "b": family(case())}, progress=quiet(), case_seconds=0.02)
    assert len(got["rows"]) == 1 and "interrupted" in got["crashes"][0]


def test_one_case_alive_at_a_time():
    import weakref

    alive, counts = weakref.WeakSet(), []

    class Data:
        pass

    def one():
        data = Data()
        alive.add(data)
        return case(ours=lambda: data, rivals={})

    def cases(quick, device):
        for _ in range(3):
            counts.append(len(alive))
            yield one()

    suite.run({"a": SimpleNamespace(cases=cases)}, progress=quiet(), case_seconds=0.02)
    assert counts == [0, 0, 0]


def test_after_the_deadline_rows_are_short_but_there():
    got = run(case(rivals={"slow": slow, "torch.compile": slow}), seconds=1e-9)
    row = got["rows"][0]
    assert row["ours"]["n"] == timing.MIN_ROUNDS and "ratio" in row["rivals"]["slow"]
    assert row["rivals"]["torch.compile"] == {"absent": suite.SPENT}


def test_table_fits_and_tells(result):
    text = report.table(result)
    assert max(map(len, text.splitlines())) <= 120
    for part in ("gone: not installed", "broken: failed, RuntimeError: two lines", "goal 2x slow: yes", "error 1.0e-07",
                 "goals: 2 reached, 1 missed, 1 not measured"):
        assert part in text


def test_a_busy_machine_is_told(result):
    busy = copy.deepcopy(result)
    for row, others in zip(busy["rows"], (0.0, 1.3), strict=True):
        row["others"] = others
    text = " ".join(report.table(busy).split())
    assert text.count("took 1.3 cores meanwhile") == 1 and "in 1 rows other processes" in text
    busy["rows"][1]["others"] = None
    assert "other processes" not in report.table(busy)


def test_own_work_is_not_that_of_others(monkeypatch):
    stat = "cpu  100 20 30 4000 500 1 2 3 7 7\ncpu0 1 2 3\n"  # idle and waiting are nobody's work; guests are in user
    monkeypatch.setattr(timing, "open", lambda path: io.StringIO(stat), raising=False)
    monkeypatch.setattr(timing.time, "process_time", lambda: 0.5)
    assert timing._seconds_of_others() == pytest.approx(156 / os.sysconf("SC_CLK_TCK") - 0.5)
    monkeypatch.setattr(timing, "open", lambda path: io.StringIO("intr 1\n"), raising=False)
    assert timing._seconds_of_others() is None
    monkeypatch.undo()
    assert timing.measure({"ours": lambda: time.sleep(0.01)}, budget=0.05).others >= 0.0


def test_spans_have_the_units_they_need():
    assert report.span(1.2e-3, 3.4e-3) == "1.2 - 3.4 ms"
    assert report.span(0.8e-3, 1.5e-3) == "800 us - 1.5 ms"


def test_progress_lines():
    class Stream(list):
        write = list.append

        def flush(self):
            pass

        def isatty(self):
            return self.tty

    for tty in (False, True):
        stream = Stream()
        stream.tty = tty
        suite.run({"fake": family(case())}, progress=suite.Progress(stream), case_seconds=0.02)
        assert ("\r" in "".join(stream)) is tty
        assert stream[-1].endswith("\n") and "fake_op  small" in stream[-1] and "x slow" in stream[-1]


# comparison ----------------------------------------------------------------------------------------------------------


def scaled(result, factor):
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        for entry in row["rivals"].values():
            if "ratio" in entry:
                entry["ratio"] |= {k: entry["ratio"][k] * factor for k in ("median", "min", "p25", "p75")}
    return changed


def test_compare(result):
    lines, worse = compare.compare(result, result)
    assert not worse and "0 worse, 0 better, 2 equal" in lines[-1]
    lines, worse = compare.compare(scaled(result, 0.01), result)
    assert worse and sum("WORSE" in line for line in lines) == 2
    lines, worse = compare.compare(scaled(result, 100.0), result)
    assert not worse and "2 better" in lines[-1]
    slower = copy.deepcopy(result)  # a machine half as fast: absolute times do not count
    for row in slower["rows"]:
        row["ours"] |= {k: row["ours"][k] * 2 for k in ("median", "min", "p25", "p75")}
    assert not compare.compare(slower, result)[1]


def test_compare_overlapping_is_equal():
    def one(p25, median, p75):
        return {"environment": {"commit": "c", "date": "d", "ops": []}, "rows": [
            {"op": "o", "name": "n", "dtype": "float32", "threads": 2,
             "rivals": {"r": {"ratio": Spread(median, p25, p25, p75, 9).as_dict()}}}]}

    assert not compare.compare(one(1.0, 1.5, 2.1), one(2.0, 3.0, 4.0))[1]
    assert compare.compare(one(1.0, 1.5, 1.9), one(2.0, 3.0, 4.0))[1]


# command line --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(suite, "families", lambda: {"fake": family(case()), "other": family(case(op="other_op"))})
    monkeypatch.setattr(suite, "CASE_SECONDS", {True: 0.02, False: 0.02})


def test_json_round_trip_and_against(fakes, tmp_path, capsys):
    path = tmp_path / "r.json"
    assert cli.main(["bench", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "fake_op" in out and "other_op" in out
    stored = json.loads(path.read_text())
    assert {row["op"] for row in stored["rows"]} == {"fake_op", "other_op"} and stored["environment"]["quick"]
    assert report.table(stored) in out

    path.write_text(json.dumps(scaled(stored, 100.0)))
    assert cli.main(["bench", "fake_op", "--against", str(path)]) == 1
    out = capsys.readouterr().out
    assert "WORSE   fake_op" in out and "other_op" not in out
    path.write_text(json.dumps(scaled(stored, 0.01)))
    assert cli.main(["bench", "other", "--against", str(path)]) == 0  # a family's name
    assert "better  other_op" in capsys.readouterr().out


def test_json_into_a_folder_is_named_after_machine_and_commit(fakes, tmp_path):
    assert cli.main(["bench", "fake_op", "--json", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    env = json.loads(path.read_text())["environment"]
    assert path.stem.endswith(env["commit"] or env["gmkernels"]) and env["isa"] in path.stem


@pytest.mark.parametrize("arguments, expected", [
    (["gmm_lob_prop"], "unknown op gmm_lob_prop; known: fake_op, other_op"),
    (["--device", "mps"], "must be cpu or cuda"),
    (["--device", "nonsense"], "must be cpu or cuda"),
    (["--against", "/nowhere.json"], "/nowhere.json"),
    (["--json", "/nowhere/r.json"], "no folder /nowhere"),
])
def test_bad_arguments(fakes, capsys, arguments, expected):
    assert cli.main(["bench", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_against_something_else(fakes, tmp_path, capsys):
    (tmp_path / "x.json").write_text("[1]")
    assert cli.main(["bench", "--against", str(tmp_path / "x.json")]) == 2
    assert "not a result" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(fakes, capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_crash_exits_1(monkeypatch, fakes, capsys):
    monkeypatch.setattr(suite, "families", lambda: {"fake": family(case(ours=fail))})
    assert cli.main(["bench"]) == 1
    assert "CRASH" in capsys.readouterr().out


def test_usage(capsys):
    assert cli.main([]) == 2 and "usage" in capsys.readouterr().err
    for arguments, code in ((["nonsense"], 2), (["--version"], 0), (["bench", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code
    assert "--against" in capsys.readouterr().out


@pytest.mark.parametrize("name, module", suite.families().items())
def test_families_say_their_ops_and_measure_right_ones(name, module):
    import gmkernels
    from gmkernels import ops

    found = set()
    for case in module.cases(True, "cpu"):
        found.add(case.op)
        assert case.error is None or case.error() < 1e-4, case.name
    assert set(module.OPS) == found
    assert all(any(hasattr(where, op) for where in (ops, gmkernels, gmkernels.models)) for op in module.OPS)


# generated tables ----------------------------------------------------------------------------------------------------

PAGE = "# T\n\n<!-- bench:begin {} -->\nstale\n<!-- bench:end -->\n\ntail\n"


@pytest.fixture
def checkout(tmp_path, result):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results" / "m-abc.json").write_text(json.dumps(result))
    return tmp_path


def test_tables_check_finds_a_stale_table_and_rewriting_cures_it(checkout, capsys):
    (checkout / "README.md").write_text(PAGE.format("goals"))
    (checkout / "docs" / "fake.md").write_text(PAGE.format("fake_op"))
    root = ["--root", str(checkout)]
    assert tables.main(["--check", *root]) == 1
    assert "stale" in (checkout / "README.md").read_text() and "README.md" in capsys.readouterr().err
    assert tables.main(root) == 0
    assert tables.main(["--check", *root]) == 0
    text = (checkout / "docs" / "fake.md").read_text()
    assert "stale" not in text and text.endswith("-->\n\ntail\n")
    assert "| small | " in text and "not installed" in text and "failed" in text and "m-abc.json" in text
    assert "| `fake_op` | small |" in (checkout / "README.md").read_text()
    (checkout / "docs" / "fake.md").write_text(text.replace("| small | ", "| small | 9"))  # a number typed by hand
    assert tables.main(["--check", *root]) == 1


def test_tables_take_the_newest_result(checkout, result):
    newer = scaled(result, 1.0)
    newer["environment"] = newer["environment"] | {"date": "2999-01-01T00:00:00Z", "commit": "fffffff"}
    (checkout / "bench" / "results" / "a-fff.json").write_text(json.dumps(newer))
    stored = tables.results(checkout / "bench" / "results")
    assert "commit fffffff" in tables.generate("fake_op", stored)
    assert tables.generate("goals cuda", stored) == tables.NONE["cuda"] + "\n"
    assert tables.generate("goals", []) == tables.NONE["cpu"] + "\n"


def test_the_summary_has_a_line_per_row_with_goals(result):
    table = tables.generate("summary", [result | {"file": "m-abc.json"}])
    with_goals = [row for row in result["rows"] if row.get("goals")]
    assert table.count("| `") == len(with_goals) > 0
    for row in with_goals:
        (line,) = [line for line in table.splitlines() if f"`{row['op']}` | {row['name']}" in line]
        reached = sum(bool(goal["reached"]) for goal in row["goals"])
        assert line.endswith(f"| {reached} of {len(row['goals'])} |")
        assert f"| {row['fastest']} " in line


def test_prose_about_markers_is_left_alone(checkout):
    text = "between `<!-- bench:begin NAME -->` and `<!-- bench:end -->`\n"
    assert tables.rewrite(text, []) == text


@pytest.mark.parametrize("text", [PAGE.format("no_such_op"), PAGE.format("goals tpu"), "<!-- bench:begin goals -->\n",
                                  "<!-- bench:begin goals -->\n" + PAGE.format("goals")])
def test_bad_markers(checkout, text, capsys):
    (checkout / "README.md").write_text(text)
    assert tables.main(["--root", str(checkout)]) == 1
    assert "README.md" in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == text


def test_a_folder_that_is_not_there_yet_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "families", lambda: {})
    folder = tmp_path / "new"
    cli.main(["bench", "--quick", "--json", f"{folder}/", "no_such_op"])
    assert folder.is_dir()

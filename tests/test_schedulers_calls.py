"""How the drop-in schedulers call the kernel: the short way and the long way agree, and an error changes nothing."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

from gmkernels import _C, _call, ops  # noqa: E402
from gmkernels.schedulers import _base  # noqa: E402
from scheduler_cases import model  # noqa: E402
from test_schedulers import NAMES, NOISY, STEPS, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SHORT = pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FIRST, SECOND = [1.1, -0.4, 0.3, 0.6, 0.2, -0.1, 0.05, 0.0], [0.0, 1.0, 0.7, 0.5, -0.2, 0.0, 0.0, 0.0]


def tensors(count, shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


def twice(x, m, history, then, out=None, x0_out=None, rows=(FIRST, SECOND), grad=True):
    a, b = (torch.tensor(r) if isinstance(r, list) else r for r in rows)
    return _C.diffusion_two_steps_plain(x, m, a, history, b, then, out, x0_out, grad)


def one_by_one(x, m, history, then):
    out, x0 = ops.diffusion_step(x, m, torch.tensor(FIRST), history=history, return_x0=True)
    return ops.diffusion_step(out, x0, torch.tensor(SECOND), history=then), out, x0


# two steps in one call -----------------------------------------------------------------------------------------------


@SHORT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (), (1,), (5, 1031), (3, 40961)])
def test_two_steps_in_one_call_are_two_steps(dtype, shape, isa):
    x, m, h1, h2, h3 = tensors(5, shape, dtype)
    want = one_by_one(x, m, (h1, h2, h3), (h2,))
    for count in (1, 2):
        torch.set_num_threads(count)
        got = twice(x, m, (h1, h2, h3), (h2,))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    last, dead = h1.clone(), h3.clone()  # what is read for the last time may be written
    got = twice(x, m, (last, h2, dead), (h2,), out=last, x0_out=dead)
    assert got[1] is last and got[2] is dead
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@SHORT
def test_two_steps_stand_aside():
    x, m, h = tensors(3, (4, 6))
    assert twice(x, m, (h, None), ()) is not None
    both, row = torch.zeros(5, 6), torch.tensor(SECOND)
    graph = m.clone().requires_grad_()
    for args in (
        {"x": x.t().contiguous().t()}, {"x": x.numpy()}, {"m": m.double()}, {"m": m[:2]}, {"m": torch._neg_view(m)},
        {"m": graph}, {"history": [h]}, {"then": (h[:2],)}, {"then": (None, torch._neg_view(h))}, {"then": (graph,)},
        {"rows": (FIRST, row[:7])}, {"rows": (FIRST, row.double())},
        {"then": (both[1:],), "out": both[:4]},  # another thread might not have read it yet
        {"then": (both[1:],), "x0_out": both[:4]}, {"out": both[:4], "rows": (FIRST, both.view(-1)[:8])},
    ):  # fmt: skip
        before = both.clone()
        assert twice(**{"x": x, "m": m, "history": (h,), "then": ()} | args) is None and torch.equal(both, before)
    with pytest.raises(TypeError, match="9 arguments"):
        _C.diffusion_two_steps_plain(x)


@SHORT
def test_same_floats():
    x, m = tensors(2, (2, 3))
    assert _C.same_floats(x) and _C.same_floats(x, m, x) and _C.same_floats(x, m.requires_grad_())
    for other in (m[:1], m.double(), m.long(), torch.ones(3, 2).t(), torch._neg_view(x), None, 1, x.numpy()):
        assert not _C.same_floats(x, other) and not _C.same_floats(other, x)
    assert not _C.same_floats(x.long(), x.long())


# the short way and the long way --------------------------------------------------------------------------------------


def run(s, shape=(2, 3, 8, 8), dtype=torch.float32, after=lambda s, i: s):
    """Every sample, and what a user can see of the history, of a whole run."""
    torch.manual_seed(0)
    x, seen = tensors(1, shape, dtype)[0], []
    for i, t in enumerate(s.timesteps):
        x = s.step(model(x, t), t, x).prev_sample
        kept = [*(getattr(s, "model_outputs", None) or ()), getattr(s, "last_sample", None), getattr(s, "sample", None)]
        seen.append((x, [None if h is None else (h, h.clone()) for h in kept], getattr(s, "lower_order_nums", None)))
        s = after(s, i)
    return seen


def same(a, b):
    assert len(a) == len(b)
    for (x, kept, lower), (y, other, lower2) in zip(a, b, strict=True):
        assert torch.equal(x, y) and x.dtype is y.dtype and lower == lower2
        for h, g in zip(kept, other, strict=True):
            assert (h is None) == (g is None)
            # and nobody has written into what the user holds
            assert h is None or (torch.equal(h[0], g[1]) and torch.equal(h[1], g[1]) and h[0].dtype is g[0].dtype)


@SHORT
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_are_the_same_to_the_bit(name, dtype, kernel_calls, monkeypatch):
    configs = [{}, NOISY.get(name, {})]
    if "solver_order" in make(name).config:
        configs += [{"solver_order": order} for order in (1, 3)]
    for config in configs:
        short = run(make(name, **config), dtype=dtype)
        assert kernel_calls == [] or dtype is not torch.float32 or config.get("solver_order") == 3
        with monkeypatch.context() as patch:
            for where in (_base, _call):
                patch.setattr(where, "plain_eager", lambda: False)
            same(run(make(name, **config), dtype=dtype), short)
        assert kernel_calls
        kernel_calls.clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_made_in_the_middle_goes_on(name):
    def saved(s, i):
        return (pickle.loads(pickle.dumps(s)), copy.deepcopy(s))[i % 2] if i in (2, 3) else s

    runs = []
    for after in ({}, {"after": saved}):
        torch.manual_seed(0)
        runs.append(run(make(name, **NOISY.get(name, {})), **after))
    same(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_the_middle_changes_nothing(name):
    if name in NOISY and name != "DPMSolverMultistepScheduler":
        pytest.skip("noise: the seed is drawn once")
    shape = (2, 4, 8, 8)

    def wrong(s, i):
        x, m = tensors(2, shape)
        t = s.timesteps[min(i + 1, len(s.timesteps) - 1)]
        state = {k: list(v) if isinstance(v, list) else v for k, v in vars(s).items() if k != "_plan"}
        for bad, error in ((m[:, :2], ValueError), (m.long(), TypeError), (m.numpy(), (TypeError, AttributeError))):
            if i < 3:
                with pytest.raises(error):
                    s.step(bad, t, x)
        for k, v in state.items():
            now = vars(s)[k]
            if isinstance(v, list):
                assert len(v) == len(now) and all(a is b or a == b for a, b in zip(v, now, strict=True)), k
            elif not isinstance(v, torch.Tensor):
                assert now is v or now == v or k == "_step_index", k
        return s

    steps = STEPS.get(name, 5)
    same(run(make(name, steps), shape), run(make(name, steps), shape, after=wrong))

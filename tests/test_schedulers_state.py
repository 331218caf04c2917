"""The drop-in schedulers where their state is not that of an ordinary run: against diffusers, draws included."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from gmkernels import schedulers  # noqa: E402
from scheduler_cases import relative  # noqa: E402
from test_schedulers import ALWAYS_READY, NAMES, make, pair  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")


def both(name, **config):
    return getattr(schedulers, name)(**config), getattr(diffusers, name)(**config)


def step(s, i, x, m, **options):
    """(the next sample, the number that the generator gives after it)"""
    g = torch.Generator().manual_seed(0)
    if hasattr(s, "scale_model_input"):
        s.scale_model_input(x, s.timesteps[i])
    return s.step(m, s.timesteps[i], x, generator=g, **options).prev_sample, torch.randn(1, generator=g)


def agree(ours, theirs, *args, limit=2e-6, **options):
    (got, drawn), (want, other) = step(ours, *args, **options), step(theirs, *args, **options)
    assert got.dtype is want.dtype and relative(got, want) <= limit
    assert torch.equal(drawn, other)


# what is drawn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_first", VARIANCES)
@pytest.mark.parametrize("then", VARIANCES)
def test_a_variance_type_that_changes(at_first, then):
    x, m = pair()
    for change in (lambda s: s.register_to_config(variance_type=then), lambda s: setattr(s, "variance_type", then)):
        runs = []
        for s in both("DDPMScheduler", variance_type=at_first):
            s.set_timesteps(10)
            change(s)
            outputs = torch.cat([m, 0.3 * m], 1) if s.variance_type.startswith("learned") else m
            try:
                runs.append(step(s, 3, x, outputs))
            except TypeError:  # a learned variance that nobody has split off
                runs.append(None)
        assert (runs[0] is None) == (runs[1] is None)
        if runs[0] is not None:
            assert relative(runs[0][0], runs[1][0]) < 2e-6 and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_drawn_in_the_dtype_of_the_models_output(dtype):
    x, m = pair()
    ours, theirs = both("DDPMScheduler")
    for s in (ours, theirs):
        s.set_timesteps(10)
    agree(ours, theirs, 2, x.double(), m.to(dtype), limit=2e-6 if dtype is torch.float32 else 2e-2)


def test_noise_is_drawn_where_its_factor_is_zero():
    x, m = pair()
    ours, theirs = both("DDPMScheduler", num_train_timesteps=100, trained_betas=[0.01] * 50 + [0.0] * 50,
                        variance_type="fixed_large")  # fmt: skip
    for s in (ours, theirs):
        s.set_timesteps(100)
    for i in (0, 60, 99):
        agree(ours, theirs, i, x, m)
    for name in ("EulerDiscreteScheduler", "EDMEulerScheduler"):
        ours, theirs = both(name)
        for s in (ours, theirs):
            s.set_timesteps(5)
        for i, s_noise in enumerate((0.0, 1.0, 0.0)):
            agree(ours, theirs, i, x, m, s_churn=2.0, s_noise=s_noise)


# what changes under a plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_a_schedule_that_changes_in_inference_mode(name, theirs):
    """`theirs`: it is a tensor without a version, made in inference mode by the user."""
    source = "alphas_cumprod" if name == "DDIMScheduler" else "sigmas"
    x, m = pair()
    results = []
    with torch.inference_mode():
        for s in both(name):
            s.set_timesteps(5)
            if theirs:
                setattr(s, source, getattr(s, source).clone())
            results.append([])
            for i, factor in enumerate((1.0, 0.5, 0.9)):
                getattr(s, source).mul_(factor)
                s.is_scale_input_called = True
                results[-1].append(s.step(m, s.timesteps[i], x).prev_sample)
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 2e-6
    assert relative(results[0][0], results[0][2]) > 1e-3


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_an_end_that_is_given(name):
    results = []
    for s in both(name, **{"skip_prk_steps": True} if name == "PNDMScheduler" else {}):
        s.set_timesteps(5)
        x, m = pair()
        s.final_alpha_cumprod = torch.tensor(0.5 if name == "PNDMScheduler" else 0.9999)
        for t in s.timesteps:
            x = s.step(m, t, x).prev_sample
        results.append(x)
    assert relative(*results) < 2e-6


# what has no schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALWAYS_READY if n != "HeunDiscreteScheduler"])
def test_a_step_on_the_schedule_of_training(name):
    x, m = pair()
    agree(*both(name), 3, x, m)


def test_linear_multisteps_before_runge_kutta():
    x, m = pair()
    for s in both("PNDMScheduler", skip_prk_steps=False):
        s.set_timesteps(10)
        with pytest.raises(ValueError, match="can only be run AFTER"):
            s.step_plms(m, s.timesteps[0], x)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_times_beyond_training(name):
    """A schedule may have some; only their own steps cannot be done."""
    x, m = pair()
    config = {"steps_offset": 5, "timestep_spacing": "leading"}
    if name == "PNDMScheduler":
        config = {"steps_offset": 5, "skip_prk_steps": True}
    results = []
    for s in both(name, **config):
        s.set_timesteps(500)
        beyond = [i for i, t in enumerate(s.timesteps.tolist()) if t >= 1000]
        assert beyond[:2] == [0, 1]
        for i in beyond:
            with pytest.raises(IndexError):
                s.step(m, s.timesteps[i], x)
        results.append(s.step(m, s.timesteps[len(beyond) + 2], x, **{} if name == "PNDMScheduler" else
                              {"generator": torch.Generator().manual_seed(0)}).prev_sample)
    assert relative(*results) < 2e-6


def test_every_scheduler_is_copied_without_its_plan():
    for name in NAMES:
        s = make(name)
        assert s._plan is not None and s.__getstate__()["_plan"] is None and s._plan is not None

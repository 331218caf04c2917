"""The drop-in schedulers beside diffusers' own: whole runs with the same noise, and the coefficients one by one."""

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from gmkernels import schedulers  # noqa: E402
from scheduler_cases import grid, relative, sample  # noqa: E402

GRID = list(grid())
STEPS = {"LCM": (4,)}  # of 50 original ones


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers: deprecated algorithms, custom timesteps
        yield


def both(name, config):
    return [getattr(module, name + "Scheduler")(**config) for module in (schedulers, diffusers)]


def agree(name, config, step, steps, dtype=torch.float32):
    """The distance of the final samples, of the largest value on the way. The generators end in the same state."""
    (got, ours, _), (want, theirs, largest) = (sample(s, steps, dtype=dtype, **step) for s in both(name, config))
    assert got.dtype is want.dtype and torch.equal(ours.get_state(), theirs.get_state())
    return relative(got, want, largest)


def limit(name, config):
    """2e-6; 5e-6 where the values pass a clip; 1e-5 where third order solvers subtract what is almost equal."""
    clips = config.get("clip_sample", name in ("DDPM", "DDIM")) or config.get("thresholding")
    third = config.get("solver_order") == 3 or config.get("predict_x0") is False
    if name == "DPMSolverSinglestep" and third and str(config.get("algorithm_type")).startswith("sde"):
        return 1e-3  # its weights cancel most of all: 2e-6 with the state in float64, from the same coefficients
    return 1e-5 if third else 5e-6 if clips else 2e-6


@pytest.mark.parametrize("name", sorted({name for name, *_ in GRID}))
def test_runs_are_diffusers(name):
    """Four to seven configs of each; the whole grid is slow."""
    cases = [case for case in GRID if case[0] == name]
    stride = max(1, len(cases) // 4)
    for _, config, step in cases[::stride]:
        for steps in STEPS.get(name, (12,)):
            assert agree(name, config, step, steps) < limit(name, config), (config, step)


@pytest.mark.parametrize("name, config", [
    ("UniPCMultistep", {"disable_corrector": [0, 2, 3]}), ("UniPCMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"solver_order": 3, "use_lu_lambdas": True}), ("PNDM", {"skip_prk_steps": True}),
    ("DPMSolverMultistep", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}), ("PNDM", {}),
    ("DPMSolverSinglestep", {"solver_order": 3}), ("DPMSolverSinglestep", {"solver_order": 3, "solver_type": "heun"}),
])  # fmt: skip
def test_fields_that_a_few_steps_depend_on(name, config):
    for steps in (9, 20):
        assert agree(name, config, {}, steps) < limit(name, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, *_ in GRID}))
def test_runs_are_diffusers_whole_grid(name):
    for i, (_, config, step) in enumerate(case for case in GRID if case[0] == name):
        steps = STEPS.get(name, (10, 50) if i % 5 == 0 else (10,))
        for n in steps:
            assert agree(name, config, step, n) < limit(name, config), (config, step, n)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "LCM"])
def test_float64_runs_have_diffusers_own_coefficients(name):
    """diffusers keeps the state in float64 here, so that only a difference of coefficients would be seen."""
    cases = [case for case in GRID if case[0] == name]
    for _, config, step in cases[:: max(1, len(cases) // 3)]:
        assert agree(name, config, step, STEPS.get(name, (20,))[0], torch.float64) < 1e-12, (config, step)


UNIT = torch.eye(4).reshape(4, 4, 1, 1)  # stream j is 1 in its element j: the result is the coefficients


def probe(scheduler, i, t, state):
    for name, value in state.items():
        setattr(scheduler, name, value)
    x, m = UNIT[:1], UNIT[1:2]
    return scheduler.step(m, t, x, return_dict=False)[0].flatten()


@pytest.mark.parametrize("config", [
    {"solver_order": 3}, {"solver_order": 3, "prediction_type": "v_prediction"}, {"solver_type": "heun"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3, "prediction_type": "sample"},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0},
])  # fmt: skip
def test_dpm_coefficients_by_unit_tensors(config):
    ours, theirs = both("DPMSolverMultistep", config)
    for s in (ours, theirs):
        s.set_timesteps(20)
    order = config.get("solver_order", 2)
    for i, t in enumerate(ours.timesteps):
        for filled in range(min(i, order - 1) + 1):
            history = [None, UNIT[3:], UNIT[2:3]][3 - order :]  # m2, m1; the newest last
            got, want = (probe(s, i, t, {"_step_index": i, "lower_order_nums": filled, "model_outputs": list(history)})
                         for s in (ours, theirs))  # fmt: skip
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize("config", [{}, {"solver_type": "bh1", "predict_x0": False, "final_sigmas_type": "sigma_min"},
                                    {"prediction_type": "v_prediction", "use_karras_sigmas": True}])
def test_unipc_coefficients_by_unit_tensors(config):
    ours, theirs = both("UniPCMultistep", config)
    for s in (ours, theirs):
        s.set_timesteps(20)
    for i, t in enumerate(ours.timesteps):
        for before in range(min(i, 2) + 1):
            state = {"_step_index": i, "lower_order_nums": before, "this_order": min(before, 2),
                     "last_sample": UNIT[2:3] if before else None}
            got, want = (probe(s, i, t, state | {"model_outputs": [0.5 * UNIT[2:3], UNIT[3:]], "timestep_list": [0, 0]})
                         for s in (ours, theirs))  # fmt: skip
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * want.abs().max().item())
            torch.testing.assert_close(ours.last_sample, theirs.last_sample, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name, config", [
    ("DDPM", {"clip_sample": False}), ("DDPM", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("DDIM", {"clip_sample": False}), ("DDIM", {"clip_sample": False, "prediction_type": "sample"}),
    ("EulerDiscrete", {}), ("EulerDiscrete", {"prediction_type": "v_prediction"}), ("FlowMatchEulerDiscrete", {}),
    ("EDMEuler", {}),
])  # fmt: skip
def test_coefficients_by_unit_tensors(name, config):
    ours, theirs = both(name, config)
    for s in (ours, theirs):
        s.set_timesteps(25)
        s.is_scale_input_called = True
    for i, t in enumerate(ours.timesteps[:-1] if name == "DDPM" else ours.timesteps):
        results = []
        for s in (ours, theirs):
            extra = {"generator": torch.Generator().manual_seed(i)} if name == "DDPM" else {}
            s._step_index = i
            results.append(s.step(UNIT[1:2], t, UNIT[:1], return_dict=False, **extra)[0].flatten())
        torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6 * results[1].abs().max().item())


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances(variance_type):
    from scheduler_cases import model

    results = []
    for s in both("DDPM", {"variance_type": variance_type}):
        s.set_timesteps(10)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 8, 8, generator=g)
        for t in s.timesteps:
            v = torch.sin(x) if variance_type == "learned_range" else torch.sin(x) ** 2
            x = s.step(torch.cat([model(x, t), v], 1), t, x, generator=g).prev_sample
        results.append(x)
    assert relative(*results) < 2e-6


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "LCM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "EDMEuler",
                                  "HeunDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep",
                                  "EDMDPMSolverMultistep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_add_noise(name, dtype):
    ours, theirs = both(name, {})
    for s in (ours, theirs):
        s.set_timesteps(10)
    x, z = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    t = ours.timesteps[torch.tensor([0, 3, 8, 9])]
    tolerance = {torch.bfloat16: 8e-3, torch.float32: 2e-7}.get(dtype, 1e-15)
    for times in (t, t[2:3]):
        got, want = ours.add_noise(x, z, times), theirs.add_noise(x, z, times)
        assert got.dtype is dtype and relative(got, want) < tolerance
        if hasattr(theirs, "get_velocity"):
            assert relative(ours.get_velocity(x, z, times), theirs.get_velocity(x, z, times)) < tolerance
    for one, other in ((x[:1], z[:1]), (x[:1], z), (x, z[:1])):
        assert relative(ours.add_noise(one, other, t), theirs.add_noise(one, other, t)) < tolerance
    with pytest.raises(ValueError, match="original_samples, noise and timesteps must broadcast"):
        ours.add_noise(x, z, t[:3])


def test_scale_noise_of_flow_matching():
    ours, theirs = both("FlowMatchEulerDiscrete", {"shift": 2.0})
    for s in (ours, theirs):
        s.set_timesteps(10)
    x, z = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t = ours.timesteps[torch.tensor([0, 3, 8, 9])]
    assert relative(ours.scale_noise(x, t, z), theirs.scale_noise(x, t, z)) < 2e-7
    for s in (ours, theirs):
        s.set_begin_index(4)
    assert relative(ours.scale_noise(x, t, z), theirs.scale_noise(x, t, z)) < 2e-7
    assert not hasattr(ours, "add_noise") and not hasattr(theirs, "add_noise")


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep", "FlowMatchEulerDiscrete"])
def test_runs_that_begin_in_the_middle(name):
    """As image-to-image does: a later time, with and without set_begin_index."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for begin in (True, False):
        results = []
        for s in both(name, {}):
            s.set_timesteps(20)
            if begin:
                s.set_begin_index(12)
            y = x
            for t in s.timesteps[12:]:
                scaled = s.scale_model_input(y, t) if hasattr(s, "scale_model_input") else y
                y = s.step(torch.sin(scaled), t, y).prev_sample
            results.append(y)
        assert relative(*results) < 2e-6


@pytest.mark.parametrize("config, times", [({}, [900, 500, 300, 20]), ({"variance_type": "fixed_large"}, [999, 0])])
def test_custom_timesteps(config, times):
    for name in ("DDPM", "DPMSolverMultistep"):
        config = config if name == "DDPM" else {}
        results = [sample(s, set_timesteps={"timesteps": times})[0] for s in both(name, config)]
        assert relative(*results) < 2e-6


def test_ddpm_without_set_timesteps_and_ddim_off_the_schedule():
    x, m = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for name, prepare, times in (("DDPM", False, (0, 1, 731, 999)), ("DDIM", True, (999, 733, 3, 0))):
        ours, theirs = both(name, {})
        for t in times:
            results = []
            for s in (ours, theirs):
                if prepare:
                    s.set_timesteps(20)
                results.append(s.step(m, t, x, generator=torch.Generator().manual_seed(t)).prev_sample)
            assert relative(*results) < 2e-6

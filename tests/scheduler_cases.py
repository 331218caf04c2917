"""What the tests of the drop-in schedulers share: a nonlinear toy model, sampling loops, and a grid of configs."""

import itertools

import torch

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
CHURN = {"s_churn": 10.0, "s_tmin": 0.1, "s_noise": 1.01}
DPM_SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_lu_lambdas": True}, {"use_exponential_sigmas": True},
              {"use_beta_sigmas": True}, {"timestep_spacing": "trailing", "euler_at_final": True},
              {"final_sigmas_type": "sigma_min"}, {"rescale_betas_zero_snr": True}, {"lambda_min_clipped": -5.1},
              {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading", "steps_offset": 1})  # fmt: skip


def model(x, t):
    """Nonlinear, and of a slope below one: it does not blow up what two float32 computations differ by."""
    return 0.6 * torch.tanh(x * 0.5 + 0.3 * float(t) / 1000) + 0.1 * torch.sin(x)


def sample(scheduler, steps=50, seed=0, shape=(2, 3, 8, 8), dtype=torch.float32, set_timesteps=None, generator=True,
           **step):
    """A whole run: (final sample, generator, the largest value on the way)."""
    arguments = {"num_inference_steps": steps} if set_timesteps is None else set_timesteps
    scheduler.set_timesteps(**arguments)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    if generator and "generator" in scheduler.step.__code__.co_varnames:
        step["generator"] = g
    largest = 0.0
    for t in scheduler.timesteps:
        x = scheduler.step(model(scale(x, t), t), t, x, **step).prev_sample
        largest = max(largest, x.abs().nan_to_num().max().item())
    return x, g, largest


def relative(got, want, largest=0.0):
    """Of the largest value; where one is not a number the other must not be either."""
    got, want = got.double(), want.double()
    bad = want.isnan()
    assert torch.equal(got.isnan(), bad)
    if bad.all():
        return 0.0
    return ((got - want)[~bad].abs().max() / want[~bad].abs().max().clamp(min=largest)).item()


def product(*axes):
    """Every combination of dicts, one of each axis."""
    for parts in itertools.product(*axes):
        yield {k: v for part in parts for k, v in part.items()}


def _axis(name, values):
    return [{name: v} for v in values]


def grid():
    """(scheduler, config, arguments of step): the fields that change the arithmetic, in combinations that matter."""
    post = [{"clip_sample": True, "clip_sample_range": 0.9}, {"clip_sample": False}, {"thresholding": True}]
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("timestep_spacing", SPACINGS), post,
                     _axis("variance_type", ("fixed_small", "fixed_small_log", "fixed_large"))):
        yield "DDPM", c, {}
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("timestep_spacing", SPACINGS), post,
                     [{}, {"set_alpha_to_one": False, "steps_offset": 1}]):
        for step in product(_axis("eta", (0.0, 0.6)), _axis("use_clipped_model_output", (False, True))):
            yield "DDIM", c, step
    for c in product(_axis("prediction_type", ("sample", "v_prediction")), [{"rescale_betas_zero_snr": True}],
                     _axis("timestep_spacing", SPACINGS)):
        yield "DDPM", c, {}
        yield "DDIM", c, {}
    ends = _axis("final_sigmas_type", ("zero", "sigma_min"))
    sigmas = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("timestep_spacing", SPACINGS),
                     sigmas + [{"interpolation_type": "log_linear"}], ends):
        yield "EulerDiscrete", c, {}
        yield "EulerDiscrete", c, CHURN
    yield "EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {}
    for c in product(_axis("prediction_type", ("epsilon", "v_prediction")), _axis("timestep_spacing", SPACINGS),
                     _axis("rescale_betas_zero_snr", (False, True))):
        yield "EulerAncestralDiscrete", c, {}
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("timestep_spacing", SPACINGS),
                     [*sigmas, {"clip_sample": True}]):
        yield "HeunDiscrete", c, {}
    for c in product(_axis("prediction_type", ("epsilon", "v_prediction")),
                     _axis("sigma_schedule", ("karras", "exponential")), ends):
        yield "EDMEuler", c, {}
        yield "EDMEuler", c, CHURN
        for solver in product(_axis("algorithm_type", ("dpmsolver++", "sde-dpmsolver++")),
                              _axis("solver_type", ("midpoint", "heun")), _axis("solver_order", (1, 2, 3))):
            if (solver["algorithm_type"], solver["solver_order"]) != ("sde-dpmsolver++", 3):  # diffusers has none
                yield "EDMDPMSolverMultistep", c | solver, {}
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("solver_type", ("midpoint", "heun")),
                     _axis("solver_order", (1, 2, 3)), DPM_SIGMAS + ({"thresholding": True},),
                     _axis("algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))):
        yield "DPMSolverMultistep", c, {}
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("solver_type", ("midpoint", "heun")),
                     _axis("solver_order", (1, 2)), [{}, {"thresholding": True}],
                     _axis("algorithm_type", ("dpmsolver", "sde-dpmsolver")), [{"final_sigmas_type": "sigma_min"}]):
        yield "DPMSolverMultistep", c, {}
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("solver_type", ("midpoint", "heun")),
                     _axis("solver_order", (1, 2, 3)), _axis("lower_order_final", (True, False)),
                     [{"algorithm_type": a} for a in ("dpmsolver++", "sde-dpmsolver++")]
                     + [{"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
                        {"use_karras_sigmas": True}, {"thresholding": True}, {"use_exponential_sigmas": True}]):
        yield "DPMSolverSinglestep", {"final_sigmas_type": "zero"} | c, {}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    yield "DPMSolverMultistep", flow, {}
    yield "DPMSolverSinglestep", flow, {}
    for c in product(_axis("prediction_type", PREDICTIONS), _axis("solver_type", ("bh1", "bh2")),
                     _axis("solver_order", (1, 2, 3)), _axis("predict_x0", (True, False)),
                     [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}, {"disable_corrector": [0, 7]},
                      {"final_sigmas_type": "sigma_min"}]):
        if c["solver_type"] == "bh2" or c.get("final_sigmas_type"):  # bh1 ends in NaN at sigma = 0
            yield "UniPCMultistep", c, {}
    yield "UniPCMultistep", flow, {}
    yield "UniPCMultistep", {"thresholding": True}, {}
    yield "UniPCMultistep", {"thresholding": True, "solver_order": 3}, {}
    for c in product(_axis("prediction_type", ("epsilon", "v_prediction")), _axis("timestep_spacing", SPACINGS),
                     _axis("skip_prk_steps", (True, False)), [{}, {"set_alpha_to_one": True, "steps_offset": 1}]):
        if c["skip_prk_steps"] or c["timestep_spacing"] == "leading":
            yield "PNDM", c, {}
    for c in product(_axis("prediction_type", PREDICTIONS), [{}, {"clip_sample": True}, {"thresholding": True},
                                                             {"set_alpha_to_one": False}, {"timestep_scaling": 3.0}]):
        yield "LCM", c, {}
    for c in ({}, {"shift": 3.0}, {"stochastic_sampling": True}, {"invert_sigmas": True}, {"shift_terminal": 0.1},
              {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}):
        yield "FlowMatchEulerDiscrete", c, {}
    for c in ({}, {"shift": 3.0}):
        yield "FlowMatchHeunDiscrete", c, {}
        yield "FlowMatchHeunDiscrete", c, CHURN

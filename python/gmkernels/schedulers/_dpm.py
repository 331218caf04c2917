"""The steps of DPM-Solver and DPM-Solver++, ODE and SDE, as weights; Lu et al. 2022, in diffusers' float32 roundings.

    x_t = x w_x + D0 k0 + D1 k1 + D2 k2 + z s, with differences D of the converted outputs m0 (now), m1, m2 (before)

All quantities are tensors over the steps of a schedule. lambda is log(alpha / sigma).
"""

import torch


class Levels:
    """alpha, sigma, lambda at every noise level of a schedule; `flow`: alpha = 1 - sigma; `edm`: alpha = 1."""

    def __init__(self, sigmas, kind):
        self.alpha, self.sigma = signal_and_noise(sigmas, kind)
        self.lam = self.alpha.log() - self.sigma.log()

    def at(self, index):
        part = object.__new__(Levels)
        part.alpha, part.sigma, part.lam = (t[index] for t in (self.alpha, self.sigma, self.lam))
        return part


def signal_and_noise(sigma, kind):
    if kind == "edm":
        return torch.ones_like(sigma), sigma
    if kind == "flow":
        return 1 - sigma, sigma
    alpha = 1 / (sigma**2 + 1) ** 0.5
    return alpha, sigma * alpha


def conversion(kind, to_noise, now, sigma, name):
    """(A, B) of the converted output A x + B model_output: x0, or the noise if `to_noise`."""
    zero, one = torch.zeros_like(now.alpha), torch.ones_like(now.alpha)
    if to_noise:
        if kind == "epsilon":
            return zero, one
        if kind == "sample":
            return 1 / now.sigma.double(), -now.alpha.double() / now.sigma.double()
        if kind == "v_prediction":
            return now.sigma, now.alpha
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction for {name}, got {kind!r}")
    if kind == "epsilon":
        return 1 / now.alpha.double(), -now.sigma.double() / now.alpha.double()
    if kind == "sample":
        return zero, one
    if kind == "v_prediction":
        return now.alpha, -now.sigma
    if kind == "flow_prediction":
        return one, -sigma
    raise ValueError(f"prediction_type must be epsilon, sample, v_prediction or flow_prediction for {name},"
                     f" got {kind!r}")


def update(algorithm, to, start, h):
    """{x, k0, midpoint, heun, k2, s} of a step of log-SNR `h` from `start` to `to`; k1 is `midpoint` or `heun`."""
    alpha, sigma = to.alpha, to.sigma
    if algorithm == "dpmsolver++":
        e = torch.exp(-h) - 1
        return {"x": sigma / start.sigma, "k0": -alpha * e, "midpoint": -0.5 * (alpha * e),
                "heun": alpha * (e / h + 1), "k2": -alpha * ((e + h) / h**2 - 0.5), "s": 0.0}
    if algorithm == "dpmsolver":
        e = torch.exp(h) - 1
        return {"x": alpha / start.alpha, "k0": -sigma * e, "midpoint": -0.5 * (sigma * e),
                "heun": -sigma * (e / h - 1), "k2": -sigma * ((e - h) / h**2 - 0.5), "s": 0.0}
    if algorithm == "sde-dpmsolver++":
        e = 1 - torch.exp(-2 * h)
        return {"x": sigma / start.sigma * torch.exp(-h), "k0": alpha * e, "midpoint": 0.5 * (alpha * e),
                "heun": alpha * (e / (-2 * h) + 1), "k2": alpha * ((e - 2 * h) / (2 * h) ** 2 - 0.5),
                "s": sigma * torch.sqrt(e)}
    if algorithm == "sde-dpmsolver":  # diffusers has no third order
        e = torch.exp(h) - 1
        return {"x": alpha / start.alpha, "k0": -2 * (sigma * e), "midpoint": -sigma * e,
                "heun": -2 * (sigma * (e / h - 1)), "k2": torch.full_like(h, torch.nan),
                "s": sigma * torch.sqrt(torch.exp(2 * h) - 1)}
    raise ValueError("algorithm_type must be dpmsolver, dpmsolver++, sde-dpmsolver or sde-dpmsolver++,"
                     f" got {algorithm!r}")


def double(weights):
    return {name: w.double() if isinstance(w, torch.Tensor) else w for name, w in weights.items()}


def multistep(algorithm, solver, order, to, now, before, before2):
    """(weight of x, weights of m0, m1, m2, s). The differences are taken over earlier steps."""
    h = to.lam - now.lam
    w = double(update(algorithm, to, now, h))
    if order == 1:
        return w["x"], [w["k0"]], w["s"]
    r0 = ((now.lam - before.lam) / h).double()
    if order == 2:
        k1 = w[solver] / r0
        return w["x"], [w["k0"] + k1, -k1], w["s"]
    r1 = ((before.lam - before2.lam) / h).double()
    p = w["heun"] * (1 + r0 / (r0 + r1)) + w["k2"] / (r0 + r1)  # of (m0 - m1) / r0
    q = -(w["heun"] * r0 + w["k2"]) / (r0 + r1)  # of (m1 - m2) / r1
    return w["x"], [w["k0"] + p / r0, q / r1 - p / r0, -q / r1], w["s"]


def shifted(levels, count, by):
    """`levels` `by` steps before each of `count` steps; before the first ones there are none, and any will do."""
    return levels.at([max(i - by, 0) for i in range(count)])


def singlestep(algorithm, solver, order, to, now, before, start):
    """(weight of the sample at `start`, weights of m0, m1, m2, s): the differences are taken from m at `start`."""
    h = to.lam - start.lam
    w = double(update(algorithm, to, start, h))
    if order == 1:
        return w["x"], [w["k0"]], w["s"]
    r0 = ((now.lam - start.lam) / h).double()
    if order == 2:
        k1 = w[solver] / r0
        return w["x"], [k1, w["k0"] - k1], w["s"]
    r1 = ((before.lam - start.lam) / h).double()
    if solver == "midpoint":
        p, q = 0.0, w["heun"]
    else:
        p = (w["heun"] * r0 - 2 * w["k2"]) / (r0 - r1)  # of (m1 - m2) / r1
        q = (2 * w["k2"] - w["heun"] * r1) / (r0 - r1)  # of (m0 - m2) / r0
    return w["x"], [q / r0, p / r1, w["k0"] - p / r1 - q / r0], w["s"]

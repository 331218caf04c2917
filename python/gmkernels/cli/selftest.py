"""What `doctor` runs: every op once, on every instruction set, against its reference in plain torch.

A new op is one entry of CASES: device -> (the call, the same by the reference in float64).
"""

import contextlib
import inspect
import math
import os
import signal
import sys
import time
import warnings

import torch

from .. import _C, ops, reference

TOLERANCE = 2e-5  # of max |got - want| / max(1, max |want|), float32


def _data(device, *shape, seed=0):
    return ops.philox_normal(shape, seed=seed, stream=256, device=device)


def _in_float64(*tensors):
    return [t.cpu().double() for t in tensors]


def _philox_normal(device):
    return (
        lambda: ops.philox_normal((3, 1001), seed=7, device=device),
        lambda: reference.random.philox_normal((3, 1001), seed=7),
    )


def _philox_uniform(device):
    return (
        lambda: ops.philox_uniform((3, 1001), seed=7, device=device),
        lambda: reference.random.philox_uniform((3, 1001), seed=7),
    )


def _diffusion_step(device):
    x, m = _data(device, 3, 4, 333), _data(device, 3, 4, 333, seed=1)
    c = torch.tensor([1.2, -0.7, 0.3, 0.6, 0.0, 0.0, 0.0, 0.5], device=device)
    return (
        lambda: ops.diffusion_step(x, m, c, clip=1.0, noise=True, seed=7, step=3),
        lambda: reference.diffusion.diffusion_step(
            *_in_float64(x, m, c), low=-1.0, high=1.0, noise=True, seed=7, step=3
        )[0],
    )


def _mixture(device):
    log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device).log()
    chol = torch.triu(0.2 * _data(device, 4, 5, 5, seed=2), 1) + 1.5 * torch.eye(5, device=device)
    return log_weights, 3 * _data(device, 4, 5, seed=1), chol


def _gmm_log_prob(device):
    args = (_data(device, 1001, 5), *_mixture(device))
    return (
        lambda: ops.gmm_log_prob(*args, covariance_type="full"),
        lambda: reference.gmm.gmm_log_prob(*_in_float64(*args), covariance_type="full"),
    )


def _gmm_responsibilities(device):
    args = (_data(device, 301, 5), *_mixture(device))
    return (
        lambda: ops.gmm_responsibilities(*args),
        lambda: reference.gmm_em.gmm_responsibilities(*_in_float64(*args)),
    )


def _gmm_em_statistics(device):
    args = (_data(device, 3001, 5), *_mixture(device))
    return (
        lambda: ops.gmm_em_statistics(*args).sums / 3001,
        lambda: reference.gmm_em.gmm_em_statistics(*_in_float64(*args), None, None, None, "full")[0] / 3001,
    )


def _gmm_m_step(device):
    stat = ops.gmm_em_statistics(_data(device, 3001, 5), *_mixture(device))
    want = reference.gmm_em.gmm_m_step(*_in_float64(stat.sums, stat.shift), "full", 4, 1e-6, torch.float64)
    return lambda: ops.gmm_m_step(stat).precisions_cholesky, lambda: want[4]


def _gmm_fit(device):
    x, means = _data(device, 2, 301, 5), _data(device, 2, 4, 5, seed=1)
    nothing, options = (None,) * 4, (4, "full", 5, 0, 0, 1, 0, 1e-3, 1e-6)
    wide = _in_float64(x, means)
    return (
        lambda: ops.gmm_fit(x, 4, init=means, max_iter=5).precisions_cholesky,
        lambda: reference.gmm_fit.gmm_fit(wide[0], *nothing, wide[1], None, *options)[4],
    )


def _gmm_score(device):
    args = (_data(device, 301, 5), *_mixture(device))
    ones, nothing = torch.ones(301, dtype=torch.float64), None
    return (
        lambda: ops.gmm_score(*args),
        lambda: reference.gmm.gmm_log_prob_backward(ones, nothing, *_in_float64(*args), "full", True, False)[0],
    )


def _gmm_sample(device):
    args = _mixture(device)
    log_weights, means, chol = _in_float64(*args)
    cdf = log_weights.softmax(-1).cumsum(-1)
    return (
        lambda: ops.gmm_sample(301, *args, seed=7)[0],
        lambda: reference.gmm.gmm_sample(means, chol, cdf / cdf[-1], None, 301, 7, "full")[0],
    )


def _gmm_posterior_mean(device):
    x, mixture = _data(device, 301, 5), _mixture(device)
    return (
        lambda: ops.gmm_posterior_mean(x, *mixture, noise_std=0.5),
        lambda: ops.gmm_posterior_mean(*_in_float64(x, *mixture), noise_std=0.5),
    )


def _in_both(op, x, mixture):
    """On the device, and in float64."""
    return lambda: op(x, *mixture), lambda: op(*_in_float64(x, *mixture))


def _gmm_marginal(device):
    return _in_both(lambda x, *mixture: ops.gmm_log_prob(x[:, [3, 0]], *ops.gmm_marginal([3, 0], *mixture)),
                    _data(device, 301, 5), _mixture(device))


def _gmm_condition(device):
    return _in_both(lambda x, *mixture: ops.gmm_condition(x[:, [3, 0]], [3, 0], *mixture).means,
                    _data(device, 301, 5), _mixture(device))


def _gmm_impute(device):
    x = _data(device, 301, 5)
    return _in_both(ops.gmm_impute, torch.where(x > 1, torch.nan, x), _mixture(device))


def _kmeans(device):
    x = _data(device, 3001, 5)
    start = x[:7].clone()
    return (
        lambda: ops.kmeans(x, init=start, max_iter=1).centers,
        lambda: reference.kmeans.kmeans(*_in_float64(x, start), None, 1, 0.0)[0],
    )


def _kmeans_plus_plus(device):
    x = _data(device, 3001, 5)
    u = ops.philox_uniform(1 + 6 * 3, seed=7, stream=256, dtype=torch.float64)
    return (
        lambda: ops.kmeans_plus_plus(x, 7, uniforms=u.to(device))[0],
        lambda: reference.kmeans.kmeans_plus_plus(*_in_float64(x, u), None, 7, 3)[0],
    )


def _noising(device):
    angle = torch.linspace(0.2, 1.4, 7, dtype=torch.float64)
    schedule = torch.stack((angle.cos(), angle.sin()), 1).float().to(device)
    return _data(device, 3, 4, 9, 11), torch.tensor([0, 6, 3], device=device), schedule


def _add_noise(device):
    args = _noising(device)
    x0, t, schedule = (a.cpu() for a in args)
    return (
        lambda: torch.stack(ops.add_noise(*args, seed=7, target="v")),
        lambda: torch.stack(reference.noising.add_noise_target(x0.double(), t, schedule.double(), target=2, seed=7)),
    )


def _denoising_loss(device):
    args = _data(device, 3, 4, 9, 11, seed=1), *_noising(device)
    pred, x0, t, schedule = (a.cpu() for a in args)
    return (
        lambda: ops.denoising_loss(*args, 7),
        lambda: reference.noising.denoising_loss(pred.double(), x0.double(), t, schedule.double(), seed=7)[0],
    )


def _flow_pair(device):
    x0, x1, t = _data(device, 3, 4, 9), _data(device, 3, 4, 9, seed=1), torch.tensor([0.0, 0.3, 1.0], device=device)
    return (
        lambda: torch.stack(ops.flow_pair(x0, x1, t, 0.1, seed=7)),
        lambda: torch.stack(reference.noising.flow_pair(*_in_float64(x0, x1, t), sigma=0.1, seed=7)),
    )


def _ema_update_(device):
    values = [_data(device, 3, 5, seed=1), _data(device, 70, seed=2)]

    def moved(update, dtype):
        ema = [_data(device, *v.shape).to(dtype) for v in values]
        update(ema, [v.to(dtype) for v in values], 0.9)
        return torch.cat([e.flatten() for e in ema])

    return lambda: moved(ops.ema_update_, torch.float32), lambda: moved(reference.ema.ema_update_, torch.float64)


def _pixels(device):
    """Parameters of 4 components, and x on the grid of 256 values."""
    x = (127.5 + 60 * _data(device, 2, 3, 9, 11, seed=1)).round().clamp(0, 255) / 127.5 - 1
    return _data(device, 2, 40, 9, 11), x


def _discretized_logistic_mixture_nll(device):
    params, x = _pixels(device)
    f = reference.likelihood.discretized_logistic_mixture_nll
    return (
        lambda: ops.discretized_logistic_mixture_nll(params, x, 4, reduction="none"),
        lambda: f(*_in_float64(params, x), 4, "openai", -1.0, 1.0, 256, "none", 0)[0],
    )


def _discretized_logistic_mixture_sample(device):
    params, _ = _pixels(device)
    f = reference.likelihood.discretized_logistic_mixture_sample
    return (
        lambda: ops.discretized_logistic_mixture_sample(params, 4, seed=7),
        lambda: f(*_in_float64(params), None, 4, "openai", -1.0, 1.0, 256, 3, 7, 1.0),
    )


def _discretized_logistic_nll(device):
    params, x = _pixels(device)
    options = {"reduction": "none"}
    return _in_both(lambda p, x: ops.discretized_logistic_nll(p[:, :3], p[:, 3:6], x, **options), params, (x,))


def _categorical_nll(device):
    logits, x = _data(device, 2, 17, 9, 11), (_data(device, 2, 9, 11, seed=1).abs() * 4).long()
    return (
        lambda: ops.categorical_nll(logits, x, reduction="none"),
        lambda: -torch.log_softmax(logits.cpu().double(), 1).gather(1, x.cpu()[:, None])[:, 0],
    )


def _gaussian_nll(device):
    x, mean, log_std = (_data(device, 2, 99, seed=seed) for seed in range(3))
    return (
        lambda: ops.gaussian_nll(mean, log_std, x, reduction="none"),
        lambda: sum(0.5 * math.log(2 * math.pi) + s + 0.5 * ((x - m) / s.exp()).square()
                    for x, m, s in [_in_float64(x, mean, log_std)]),
    )


def _bernoulli_nll(device):
    logits, x = _data(device, 2, 99), (_data(device, 2, 99, seed=1) > 0).float()
    return (
        lambda: ops.bernoulli_nll(logits, x, reduction="none"),
        lambda: -torch.distributions.Bernoulli(logits=logits.cpu().double()).log_prob(x.cpu().double()),
    )


def _masked_conv2d(device):
    x, bias = _data(device, 2, 9, 11, 13), _data(device, 16, seed=2)
    weight = _data(device, 16, 9, 3, 3, seed=1) / 6
    taps = reference.masked_conv.taps(3, 3, "B")
    return (
        lambda: ops.masked_conv2d(x, weight, bias, "B", gate="tanh_sigmoid"),
        lambda: reference.masked_conv.masked_conv2d(*_in_float64(x, weight, bias), None, None, taps, (1, 1),
                                                    "tanh_sigmoid"),
    )


def _pixelcnn_sample(device):
    c, e, levels, shapes = 8, 8, 4, (16, 8)

    def w(seed, *shape):
        return _data(device, *shape, seed=seed) / math.prod(shape[1:]) ** 0.5

    weights = ops.PixelCNNWeights(
        (w(1, 16, 1, 3, 3), w(2, 16, c, 3, 3)), (w(3, 16, 1, 1, 3), w(4, 16, c, 1, 3)), (w(5, *shapes), w(6, *shapes)),
        (w(7, c, c), w(8, c, c)), w(9, 2, 1, 16), w(10, 2, 1, 16), w(11, 2, c), w(12, e, c), w(13, e), w(14, levels, e),
        w(15, levels),
    )
    u = ops.philox_uniform((3, 1, 4, 4), seed=7, stream=256)
    return (
        lambda: ops.pixelcnn_sample(weights, 3, (1, 4, 4), levels=levels, uniforms=u.to(device), return_logits=True)[1],
        lambda: reference.pixelcnn.pixelcnn_sample(weights.to("cpu"), 3, (1, 4, 4), levels, uniforms=u)[1],
    )


CASES = {
    "philox_normal": _philox_normal,
    "philox_uniform": _philox_uniform,
    "diffusion_step": _diffusion_step,
    "add_noise": _add_noise,
    "denoising_loss": _denoising_loss,
    "flow_pair": _flow_pair,
    "ema_update_": _ema_update_,
    "bernoulli_nll": _bernoulli_nll,
    "categorical_nll": _categorical_nll,
    "gaussian_nll": _gaussian_nll,
    "discretized_logistic_nll": _discretized_logistic_nll,
    "discretized_logistic_mixture_nll": _discretized_logistic_mixture_nll,
    "discretized_logistic_mixture_sample": _discretized_logistic_mixture_sample,
    "gmm_condition": _gmm_condition,
    "gmm_em_statistics": _gmm_em_statistics,
    "gmm_impute": _gmm_impute,
    "gmm_fit": _gmm_fit,
    "gmm_log_prob": _gmm_log_prob,
    "gmm_m_step": _gmm_m_step,
    "gmm_marginal": _gmm_marginal,
    "gmm_posterior_mean": _gmm_posterior_mean,
    "gmm_responsibilities": _gmm_responsibilities,
    "gmm_sample": _gmm_sample,
    "gmm_score": _gmm_score,
    "kmeans": _kmeans,
    "kmeans_plus_plus": _kmeans_plus_plus,
    "masked_conv2d": _masked_conv2d,
    "pixelcnn_sample": _pixelcnn_sample,
}


def names():
    """Every public op; one without an entry is reported as not tested."""
    return [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]


def run(device="cpu"):
    """One result per op and instruction set: {op, device, isa, ok, error, ms, why}."""
    results = []
    before = _C.isa()
    try:
        for isa in _C.isas() if device == "cpu" else [None]:
            culprit = _survives(isa) if isa else None
            if isa:
                _C.set_isa(isa)
            for name in names():
                result = {"op": name, "device": device, "isa": isa, "ok": False, "error": None, "ms": None, "why": None}
                if culprit:
                    result["why"] = culprit
                elif name not in CASES:
                    result.update(ok=None, why="no self-test")
                else:
                    result.update(_check(name, device))
                results.append(result)
    finally:
        _C.set_isa(before)
    return results


def _check(name, device):
    try:
        ours, in_float64 = CASES[name](device)
        ours()
        started = time.perf_counter()
        got = ours().cpu()  # which waits for a GPU
        ms = (time.perf_counter() - started) * 1e3
        want = in_float64().cpu().double()
        if got.shape != want.shape:
            return {"why": f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"}
        error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1.0)).item()
    except Exception as failed:  # whatever it is, the other ops are still worth a look
        return {"why": f"{type(failed).__name__}: {failed}"}
    ok = error <= TOLERANCE  # false for NaN
    return {"ok": ok, "error": error, "ms": ms, "why": None if ok else f"error above {TOLERANCE:g}"}


def _survives(isa):
    """None, or how a child process died of this instruction set (SIGILL under some hypervisors, a hang)."""
    if not hasattr(os, "fork"):
        return None
    sys.stdout.flush()
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 of fork beside threads: the child runs alone
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            torch.set_num_threads(1)  # libgomp hangs in a forked child whose parent has run a parallel region
            _C.set_isa(isa)
            for name in names():
                os.write(write, name.encode() + b"\n")
                if name in CASES:
                    with contextlib.suppress(Exception):  # the real run reports it
                        CASES[name]("cpu")[0]()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        last = (pipe.read().split() or ["start"])[-1]
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return None
    number = os.WTERMSIG(status)
    return "it hung" if number == signal.SIGALRM else f"killed by {signal.Signals(number).name} in {last}"

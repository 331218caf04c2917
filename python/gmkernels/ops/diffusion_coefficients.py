"""The coefficients ``(A, B, c0, c1, c2, c3, c4, s)`` of well-known samplers for :func:`diffusion_step`, in float64.

Plain Python floats: ``torch.tensor(ddim(...))`` for the batch, ``torch.tensor([ddim(...), ...])`` for one row a sample.
``a`` is the cumulative alpha (``alphas_cumprod``) of the current time, ``a_next`` that of the time stepped to, 1 at the
end; ``sigma`` is the noise level of :math:`x = x_0 + \\sigma n`. Names and conventions are those of diffusers.
"""

from math import expm1, inf, log, sqrt


def prediction(a, prediction_type="epsilon"):
    """(A, B) of x0 = A x + B m where :math:`x = \\sqrt a x_0 + \\sqrt{1 - a} n`."""
    alpha, sigma = sqrt(a), sqrt(1.0 - a)
    if prediction_type == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    if prediction_type == "sample":
        return 0.0, 1.0
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


def ddpm(a, a_next, prediction_type="epsilon", variance_type="fixed_small"):
    """Ho et al. 2020, equation 7; ``variance_type`` fixed_small or fixed_large."""
    alpha = a / a_next
    beta = 1.0 - alpha
    if variance_type not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance_type must be fixed_small or fixed_large, got {variance_type!r}")
    variance = beta if variance_type == "fixed_large" else (1.0 - a_next) / (1.0 - a) * beta
    c0, c1 = sqrt(a_next) * beta / (1.0 - a), sqrt(alpha) * (1.0 - a_next) / (1.0 - a)
    return [*prediction(a, prediction_type), c0, c1, 0.0, 0.0, 0.0, sqrt(variance) if a_next < 1.0 else 0.0]


def ddim(a, a_next, prediction_type="epsilon", eta=0.0):
    """Song et al. 2021, equation 12. The noise estimate is that of the (clipped) x0."""
    std = eta * sqrt((1.0 - a_next) / (1.0 - a) * (1.0 - a / a_next))
    c1 = sqrt((1.0 - a_next - std * std) / (1.0 - a))
    return [*prediction(a, prediction_type), sqrt(a_next) - c1 * sqrt(a), c1, 0.0, 0.0, 0.0, std]


def dpmpp_2m(a, a_next, a_before=None, prediction_type="epsilon"):
    """Lu et al. 2022, DPM-Solver++(2M), midpoint: h1 is the x0 of the step before, taken at ``a_before``.

    First order without ``a_before``, and at the end (``a_next`` = 1), where only the first order has a limit.
    """

    def half_log_snr(a):
        return inf if a == 1.0 else 0.5 * log(a / (1.0 - a))

    h = half_log_snr(a_next) - half_log_snr(a)
    c = -sqrt(a_next) * expm1(-h)
    second = 0.0
    if a_before is not None and h < inf:
        second = 0.5 * c * h / (half_log_snr(a) - half_log_snr(a_before))
    ratio = sqrt((1.0 - a_next) / (1.0 - a))
    return [*prediction(a, prediction_type), c + second, ratio, -second, 0.0, 0.0, 0.0]


def euler(sigma, sigma_next, prediction_type="epsilon", eta=0.0):
    """Karras et al. 2022, algorithm 2 without churn; eta = 1 is the ancestral sampler of k-diffusion."""
    up = eta * sqrt(sigma_next**2 * (sigma**2 - sigma_next**2)) / sigma
    ratio = sqrt(sigma_next**2 - up**2) / sigma
    if prediction_type == "v_prediction":
        A, B = 1.0 / (sigma**2 + 1.0), -sigma / sqrt(sigma**2 + 1.0)
    elif prediction_type == "sample":
        A, B = 0.0, 1.0
    elif prediction_type == "epsilon":
        A, B = 1.0, -sigma
    else:
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")
    return [A, B, 1.0 - ratio, ratio, 0.0, 0.0, 0.0, up]


def flow_euler(t, t_next):
    """Flow matching, :math:`x = (1 - t) x_0 + t n` and m the velocity n - x0: x + (t_next - t) m."""
    return euler(t, t_next)

"""The weights of UniPC's predictor and corrector; Zhao et al. 2023, in diffusers' float32 roundings."""

import torch

from ._dpm import shifted


def predictor(levels, count, order, solver, to_x0, corrected=False):
    """(weight of x, weights of m0, m1, ...) of the step from each level to the next."""
    now, to = shifted(levels, count, 0), levels.at(slice(1, None))
    before = [shifted(levels, count, k) for k in range(1, order)]
    x, m, residual = _weights(now, to, before, order, solver, to_x0, correct=False)
    if order == 1 and not corrected:
        m[0] = m[0] + 0 * residual  # diffusers adds it: with bh1, sigma = 0 at the end is not a number
    return x, m


def corrector(levels, count, order, solver, to_x0):
    """(weight of the last sample, weights of m0, m1, ..., weight of the new output) of the step that led to each level.

    Row 0 has no step before it, and is not used."""
    now, to = shifted(levels, count, 1), shifted(levels, count, 0)
    before = [shifted(levels, count, k + 1) for k in range(1, order)]
    return _weights(now, to, before, order, solver, to_x0, correct=True)


def _weights(now, to, before, order, solver, to_x0, correct):
    h = to.lam - now.lam
    rks = [(b.lam - now.lam) / h for b in before] + [torch.ones_like(h)]
    signed = -h if to_x0 else h
    phi_1 = torch.expm1(signed)
    phi_k = phi_1 / signed - 1
    scale = signed if solver == "bh1" else phi_1
    R, b, factorial = [], [], 1
    for i in range(1, order + 1):
        R.append(torch.stack([rk ** (i - 1) for rk in rks], -1))
        b.append(phi_k * factorial / scale)
        factorial *= i + 1
        phi_k = phi_k / signed - 1 / factorial
    R, b = torch.stack(R, -2), torch.stack(b, -1)
    if correct:
        rhos = torch.full_like(b, 0.5) if order == 1 else _solve(R, b)
    elif order <= 2:
        rhos = torch.full_like(b[:, 1:], 0.5)
    else:
        rhos = _solve(R[:, :-1, :-1], b[:, :-1])
    x, front = (to.sigma / now.sigma, to.alpha) if to_x0 else (to.alpha / now.alpha, to.sigma)
    m0, residual, rhos = -(front * phi_1).double(), -(front * scale).double(), rhos.double()
    earlier = [residual * rhos[:, k] / rks[k].double() for k in range(order - 1)]
    m0 = m0 - sum(earlier)
    if not correct:
        return x.double(), [m0, *earlier], residual
    last = residual * rhos[:, -1]
    return x.double(), [m0 - last, *earlier], last


def _solve(R, b):
    """Rows that no step uses may be singular."""
    return torch.linalg.solve_ex(R, b.unsqueeze(-1)).result.squeeze(-1)

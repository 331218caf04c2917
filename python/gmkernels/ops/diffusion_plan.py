"""All steps of a sampling run, prepared."""

import torch

from .. import _C, _call
from .._call import check_int, check_tensor, split_seed
from .diffusion import COEFFICIENTS, diffusion_step

_plain = _C.diffusion_step_plain


class DiffusionPlan:
    r"""The coefficients of all steps of a run on their device, so that a step is one call with its index.

    ``plan(x, model_output, i)`` is ``diffusion_step(x, model_output, coefficients[i], step=i, ...)`` with what is the
    same for all steps given once: the noise of step i is that of ``step=i`` under the plan's seed.

    Args:
        coefficients: ``[steps, 8]``, the rows of :func:`diffusion_step` in the order of the run; copied to ``device``
            in float32, float64 for ``dtype=torch.float64``.
        noise: True draws noise where a row's last coefficient is not 0.
        seed: as in :func:`diffusion_step`; None draws one now. An int64 tensor is used as it is at every step.
        clip, guidance_scale, guidance_rescale, dynamic_threshold: as in :func:`diffusion_step`.
        device, dtype: those of x.

    A step is called with ``(x, model_output, i)`` and any of ``uncond, history, variance, return_x0, out, x0_out, mask,
    known, known_scale, known_x0``. i: an int in ``[0, steps)``, or an int64 tensor ``[]`` on x's device, which the
    kernel reads there (not with ``guidance_rescale`` or ``dynamic_threshold``). To hold a whole step in one CUDA graph,
    let i be such a tensor that the graph itself moves on (``i.add_(1)``), and the seed one too.

    Errors: those of :func:`diffusion_step`; ``IndexError`` for an int outside the plan.

    >>> table = torch.tensor([[2.0, -1, 0.5, 0.5, 0, 0, 0, 0.1], [1.0, -0.5, 1, 0, 0, 0, 0, 0]])
    >>> plan = DiffusionPlan(table, noise=True, seed=0)
    >>> x = plan(torch.ones(2, 3), torch.zeros(2, 3), 0)
    """

    def __init__(self, coefficients, *, noise=False, seed=None, clip=None, guidance_scale=1.0, guidance_rescale=0.0,
                 dynamic_threshold=None, device=None, dtype=torch.float32):
        check_tensor("coefficients", coefficients)
        width = len(COEFFICIENTS)
        if coefficients.dim() != 2 or coefficients.shape[1] != width or not coefficients.is_floating_point():
            raise ValueError(f"coefficients must be floating [steps, 8], got {coefficients.dtype} "
                             f"{tuple(coefficients.shape)}")
        if not isinstance(noise, bool):
            raise TypeError(f"noise must be a bool, got {type(noise).__name__}")
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.coefficients = coefficients.detach().to(device or coefficients.device, wide, copy=True).contiguous()
        if noise and not isinstance(seed, torch.Tensor):
            seed = split_seed(seed, None)[1]
        self.noise, self.seed = noise, seed if noise else None
        self.clip, self.guidance_scale = clip, guidance_scale
        self.guidance_rescale, self.dynamic_threshold = guidance_rescale, dynamic_threshold
        self._rows = self.coefficients.unbind()
        self._simple = not guidance_rescale and dynamic_threshold is None

    def __len__(self):
        return len(self._rows)

    def __call__(self, x, model_output, i, *, uncond=None, history=(), variance=None, return_x0=False, out=None,
                 x0_out=None, **known):
        if type(i) is int and 0 <= i < len(self._rows):
            row = self._rows[i]
            if self._simple and not known and _call.plain_eager():
                result = _plain(x, model_output, row, uncond, self.guidance_scale, history, variance, self.clip,
                                self.noise, self.seed, i, return_x0, out, x0_out, torch.is_grad_enabled())
                if result is not None:
                    return result
        elif isinstance(i, torch.Tensor):
            row = self.coefficients
        else:
            i = check_int("i", i, -(2**63), 2**63)
            if not 0 <= i < len(self._rows):
                raise IndexError(f"i must be in [0, {len(self._rows)}), a step of the plan, got {i}")
            row = self._rows[i]
        if not self._simple:
            known = known | {"guidance_rescale": self.guidance_rescale, "dynamic_threshold": self.dynamic_threshold}
        if known.get("known_scale", (1.0, 0.0))[1] and not self.noise:
            raise ValueError("known_scale must have no noise in a plan without noise, which has no seed")
        return diffusion_step(x, model_output, row, uncond=uncond, guidance_scale=self.guidance_scale, history=history,
                              variance=variance, clip=self.clip, noise=self.noise, seed=self.seed, step=i,
                              return_x0=return_x0, out=out, x0_out=x0_out, **known)

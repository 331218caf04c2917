"""What a step needs to know of a whole sample before it starts: dynamic thresholds, the rescale of guidance."""

import torch

from .. import reference
from .._call import DTYPE_CODE, Kernel, Op
from ..reference.diffusion import real_dtype

_kernel = Kernel("step_statistics")
_FLOATS = tuple(DTYPE_CODE)
_QUANTILE, _RESCALE = 0, 1


def _out(x):
    return x.new_empty(x.shape[:1], dtype=real_dtype(x))


def _quantile_outputs(x, model_output, coefficients, uncond, guidance_scale, q, out=None):
    return _out(x)


def _quantile_launch(out, x, model_output, coefficients, uncond, guidance_scale, q):
    if not x.numel():
        out.fill_(torch.nan)
        return
    ins = x, model_output, uncond = [None if t is None else t.contiguous() for t in (x, model_output, uncond)]
    coefficients = coefficients.contiguous()
    _kernel((out,), (*ins, coefficients), x.numel(), x.shape[0],
            coefficients.shape[0] if coefficients.dim() == 2 else 1, guidance_scale, q, _QUANTILE,
            DTYPE_CODE[x.dtype], coefficients.dtype is torch.float64)


def _rescale_outputs(model_output, uncond, guidance_scale, rescale, out=None):
    return _out(model_output)


def _rescale_launch(out, model_output, uncond, guidance_scale, rescale):
    if not model_output.numel():
        out.fill_(torch.nan)
        return
    model_output, uncond = model_output.contiguous(), uncond.contiguous()
    _kernel((out,), (None, model_output, uncond, None), model_output.numel(), model_output.shape[0], 1, guidance_scale,
            rescale, _RESCALE, DTYPE_CODE[model_output.dtype], False)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-2])
    ctx.scalars = inputs[-2:]


def _backward_of(formula):
    """The formula's own derivative, which can be differentiated again."""

    def backward(ctx, grad):
        args = [*ctx.saved_tensors, *ctx.scalars]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]

        def of(*tensors):
            for i, t in zip(wanted, tensors, strict=True):
                args[i] = t
            return formula(*args)

        _, pull = torch.func.vjp(of, *(args[i] for i in wanted))
        grads = [None] * len(args)
        for i, g in zip(wanted, pull(grad), strict=True):
            grads[i] = g
        return tuple(grads)

    return backward


quantile = Op(
    "step_quantile(Tensor x, Tensor model_output, Tensor coefficients, Tensor? uncond, float guidance_scale, float q)"
    " -> Tensor",
    outputs=_quantile_outputs, launch=_quantile_launch, reference=reference.diffusion.step_quantile, kernel=_kernel,
    dtypes=_FLOATS, setup=_setup, backward=_backward_of(reference.diffusion.step_quantile),
)
rescale_factor = Op(
    "guidance_rescale(Tensor model_output, Tensor uncond, float guidance_scale, float rescale) -> Tensor",
    outputs=_rescale_outputs, launch=_rescale_launch, reference=reference.diffusion.guidance_rescale, kernel=_kernel,
    dtypes=_FLOATS, setup=_setup, backward=_backward_of(reference.diffusion.guidance_rescale),
)


def with_statistics(coefficients, x, model_output, uncond, guidance_scale, rescale, threshold):
    """Coefficients per sample, with the rescale of the guidance and 1 / threshold as factors. Checked arguments."""
    rows = coefficients if coefficients.dim() == 2 else coefficients.expand(x.shape[0], -1)
    if rescale:
        factor = rescale_factor(model_output, uncond, guidance_scale, rescale).to(rows.dtype)
        rows = torch.cat((rows[:, :1], rows[:, 1:2] * factor[:, None], rows[:, 2:]), 1)  # B
    if threshold is not None:
        q, most = threshold
        least = quantile(x, model_output, rows, uncond, guidance_scale, q).clamp(1.0, most).to(rows.dtype)
        rows = torch.cat((rows[:, :2] * (1 / least)[:, None], rows[:, 2:]), 1)  # A and B
    return rows

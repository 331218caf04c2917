"""Losses whose kernel makes the gradient together with the value, so that nothing else is kept for backward."""

import torch
from torch.compiler import is_compiling

from . import _call
from ._call import DTYPE_CODE, Kernel, Op

REDUCTIONS = ("none", "image", "sum", "mean")
# The op's last argument. Own: no caller sees it, so backward may reuse it.
NO_GRADIENT, GRADIENT, OWN_GRADIENT = 0, 1, 2
_scale = Kernel("scale_in_place", scratch=1)  # elements that keep their value are not written


def check_reduction(reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def reduced(nll, reduction):
    """[b, ...] -> the loss. Sums in float64."""
    if reduction == "none":
        return nll
    if reduction == "image":
        nll = nll.flatten(1) if nll.dim() > 1 else nll[:, None]
        return nll.sum(1, dtype=torch.float64).to(nll.dtype)
    total = nll.sum(dtype=torch.float64)
    return (total if reduction == "sum" else total / nll.numel()).to(nll.dtype)


def reduced_shape(shape, reduction):
    return tuple(shape) if reduction == "none" else tuple(shape[:1]) if reduction == "image" else ()


def weight(count, reduction):
    """What the gradient of each element of `count` counts for."""
    return 1.0 / count if reduction == "mean" and count else 1.0


def with_gradient(f, t, need):
    """(f(t), its gradient by t or an empty tensor), f summed up: the reference of a loss op."""
    if not need:
        return f(t), t.new_empty((0,))
    loss, pull = torch.func.vjp(f, t)
    return loss, pull(torch.ones_like(loss))[0]


def wanted(t):
    """The op's last argument, for the call of a public function."""
    return OWN_GRADIENT if t.requires_grad and torch.is_grad_enabled() else NO_GRADIENT


def keeps_graph():
    """Will this graph be run again? Private, hence True where torch does not say: a copy too many is no mistake."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


# Is it many factors under one name, torch.autograd.grad(..., is_grads_batched=True)? Private: where torch has
# no such question, none is taken for one.
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)


def _scaled(gradient, g, own):
    """gradient * g, in place where nobody will see it. g: [b, ...] or [b], or a scalar."""
    factor = g.reshape(*g.shape[:1], 1, *g.shape[1:], *(1,) * (gradient.dim() - 1 - g.dim())) if g.dim() else g
    if is_compiling() or torch.is_grad_enabled() or _call._observed() or not own or keeps_graph() or _is_batched(g):
        return gradient * factor
    plain = type(g) is type(gradient) is torch.Tensor and not g.is_neg() and not g._is_zerotensor()
    if plain and g.dim() == 0 and g.dtype is gradient.dtype and g.device == gradient.device:
        if g.is_cuda or Kernel.backend is not None or g.is_cpu:
            g = g.contiguous()
            _scale((gradient,), (gradient, g), gradient.numel(), DTYPE_CODE[g.dtype])
            return gradient
    return gradient.mul_(factor)


def loss_op(schema, **arguments):
    """An Op (t, ..., int need) -> (loss, gradient by the first tensor), differentiable any number of times: the
    gradient is an output, and its own derivative is that of the reference."""

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        tensors = sum(isinstance(a, torch.Tensor) for a in inputs)
        ctx.save_for_backward(*inputs[:tensors], output[1])
        ctx.options = inputs[tensors:]

    def backward(ctx, g, g_gradient):
        *tensors, gradient = ctx.saved_tensors
        t, *options, need = *tensors, *ctx.options
        if need == NO_GRADIENT:  # under a transform that hides requires_grad
            gradient = op(t, *options, GRADIENT)[1]
        result = None if g is None else _scaled(gradient, g, need == OWN_GRADIENT)
        if g_gradient is not None and need != NO_GRADIENT:
            _, pull = torch.func.vjp(lambda t: op.reference(t, *options, GRADIENT)[1], t)
            second = pull(g_gradient)[0]
            result = second if result is None else result + second
        return (result, *(None,) * len(options), None)

    op = Op(schema, setup=setup, backward=backward, autocast=torch.float32, **arguments)  # `backward` calls it too
    return op

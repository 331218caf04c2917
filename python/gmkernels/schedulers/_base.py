"""What all drop-in schedulers share: construction, the plan of a run, and how its steps find their index.

A scheduler here is its diffusers parent with another `step`. All state stays in the parent's own attributes, so the
parent's `step` can take any single step that has no fused form, before and after fused ones.
"""

import functools
import inspect
from collections import OrderedDict

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import is_grad_enabled

from .. import _C, ops
from .._call import plain_eager
from ._noise import CHOICES, Noise

_plain, _two_plain, _same_floats = _C.diffusion_step_plain, _C.diffusion_two_steps_plain, _C.same_floats
with torch.inference_mode(False):
    _STILL = torch.empty(0, device="cpu")


class Plan:
    """What the steps of a run need on the host. Made by `Fused._ready` from the schedule as it is at that time."""

    def __init__(self, scheduler):
        config = scheduler.config
        self.timesteps = scheduler.timesteps
        self.name = scheduler._source_name
        self.source = getattr(scheduler, self.name)
        self.config = scheduler._internal_dict
        self.corrected = scheduler.corrected
        self.key = tuple(getattr(scheduler, name, None) for name in ("num_inference_steps", "custom_timesteps"))
        self.steps = scheduler.num_inference_steps if hasattr(scheduler, "num_inference_steps") else None
        self.end = scheduler.__dict__.get("final_alpha_cumprod")
        watched = self.source, self.timesteps
        self.watched = tuple(_STILL if t is None or t.is_inference() else t for t in watched)
        self.version = tuple(t._version for t in self.watched)
        # made in inference mode, not by `set_timesteps`: without a version
        self.copies = [(t, t.clone()) for t in watched if t is not None and t.is_inference()]
        self.times = [] if self.timesteps is None else self.timesteps.tolist()
        self.single = self.timesteps is not None and self.timesteps.dtype is torch.float32
        self.first = self.timesteps.data_ptr() if self.times and self.timesteps.is_contiguous() else 0
        ratio, most = config.get("dynamic_thresholding_ratio"), config.get("sample_max_value")
        self.threshold = (float(ratio), float(most)) if config.get("thresholding") else None
        self.clip = float(config["clip_sample_range"]) if config.get("clip_sample") and not self.threshold else None
        self.noise = scheduler._run_noise
        self.tables = {}
        self._indices = None

    def fits(self, scheduler):
        own = scheduler.__dict__
        return (scheduler.timesteps is self.timesteps and own[self.name] is self.source
                and own["_internal_dict"] is self.config and scheduler.corrected == self.corrected
                and own.get("num_inference_steps") == self.steps and own.get("final_alpha_cumprod") is self.end
                and self.untouched())  # fmt: skip

    def reuse(self, before):
        """The tables of the plan before, if it was made from the same numbers: a pipeline asks for them every time."""
        if (before is not None and before.config is self.config and before.corrected == self.corrected
                and before.key == self.key and before.times == self.times and before.source is not None
                and before.end is self.end and before.untouched()
                and torch.equal(before.source, self.source)):  # fmt: skip
            self.tables = before.tables

    def untouched(self):
        a, b = self.watched
        if self.copies and not all(torch.equal(*pair) for pair in self.copies):
            return False
        return self.version == (a._version, b._version)

    def time(self, timestep):
        """The number that `timestep` is. A view of the schedule is known by its address, so nothing is read back."""
        if not isinstance(timestep, torch.Tensor):
            return timestep
        if timestep.dtype is self.timesteps.dtype and timestep.device == self.timesteps.device:
            place, rest = divmod(timestep.data_ptr() - self.first, timestep.element_size())
            if rest == 0 and 0 <= place < len(self.times) and timestep.numel() == 1:
                return self.times[place]
        return timestep.item()

    def indices(self):
        """time -> index; of times that occur more than once, the second, so that a loop can begin in the middle."""
        if self._indices is None:
            self._indices, seen = {}, set()
            for i, t in enumerate(self.times):
                if t not in self._indices:
                    self._indices[t] = i
                elif t not in seen:
                    self._indices[t] = i
                    seen.add(t)
        return self._indices


class Fused:
    """Mixed in before the diffusers class of the same name."""

    corrected = False
    noise = "auto"
    _plan = None
    _run_noise = None  # outlives a plan: a config or a schedule that changes in the middle of a run begins no new seed
    _source_name = "alphas_cumprod"  # the tensor, besides the timesteps, that the coefficients are made from

    def _ready(self):
        plan = self._plan
        if plan is None or not plan.fits(self):
            if self._run_noise is None:
                self._run_noise = Noise()
            plan = self._plan = Plan(self)
        return plan

    def __getstate__(self):
        return self.__dict__ | {"_plan": None}  # it knows this object's tensors by their addresses

    def _tables(self, plan):
        """The tables that an ordinary run needs."""
        raise NotImplementedError

    def _real(self):
        """diffusers makes its coefficients in float32; to be equal to it means to round where it rounds."""
        return torch.float64 if self.corrected else torch.float32


def drop_in(cls):
    """Give `cls` the constructor of its diffusers parent with two more keywords, and a `set_timesteps` that plans."""
    parent = cls.__bases__[-1]

    @functools.wraps(parent.__init__)
    def __init__(self, *args, corrected=False, noise="auto", **kwargs):
        if not isinstance(corrected, bool):
            raise TypeError(f"corrected must be a bool, got {type(corrected).__name__}")
        if noise not in CHOICES:
            raise ValueError(f"noise must be one of {', '.join(CHOICES)}, got {noise!r}")
        self.corrected, self.noise = corrected, noise
        with torch.inference_mode(False):  # a schedule has versions, by which a plan sees that it has changed
            parent.__init__(self, *args, **kwargs)
        # Kept in the config only where it is not the default, so that a default config is diffusers' own.
        ours = {"corrected": corrected, "noise": noise}
        ours = {name: value for name, value in ours.items() if value != getattr(cls, name)}
        if ours:
            self.register_to_config(**ours)

    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(parent.__init__)
    __init__.__signature__ = signature.replace(parameters=[  # from_config reads the names that it may pass
        *signature.parameters.values(),
        inspect.Parameter("corrected", keyword, default=False, annotation=bool),
        inspect.Parameter("noise", keyword, default="auto", annotation=str),
    ])  # fmt: skip

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self, num_inference_steps=None, *args, **kwargs):
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        before, self._plan, self._run_noise = self._plan, None, Noise()
        with torch.inference_mode(False):
            parent.set_timesteps(self, num_inference_steps, *args, **kwargs)
        plan = self._ready()
        plan.reuse(before)
        for table in self._tables(plan):
            table.prepare(self.timesteps.device)

    cls.__init__, cls.set_timesteps = __init__, set_timesteps
    return cls


_new, _put = OrderedDict.__new__, OrderedDict.__setitem__


def output(cls, prev_sample, **others):
    """``cls(prev_sample=prev_sample, **others)`` of a diffusers output, a dict whose items are attributes too, in a
    sixth of its time."""
    result = _new(cls)
    attributes = result.__dict__
    _put(result, "prev_sample", prev_sample)
    attributes["prev_sample"] = prev_sample
    for name in others:
        _put(result, name, others[name])
        attributes[name] = others[name]
    return result


if output(SchedulerOutput, prev_sample=0).__dict__ != SchedulerOutput(prev_sample=0).__dict__:
    def output(cls, prev_sample, **others):  # noqa: F811  a diffusers whose outputs are made in another way
        return cls(prev_sample=prev_sample, **others)


def check(model_output, sample):
    try:
        if model_output.shape == sample.shape and sample.is_floating_point() and model_output.is_floating_point():
            return
    except AttributeError:
        pass
    for name, t in (("model_output", model_output), ("sample", sample)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {t.dtype}")
    if model_output.shape != sample.shape:
        raise ValueError(f"model_output must have the shape of sample, {tuple(sample.shape)},"
                         f" got {tuple(model_output.shape)}")


def broadcast(count, x, noise):
    """x and noise in one shape and dtype, of `count` samples where one stands for all: as diffusers' products."""
    if isinstance(x, torch.Tensor) and isinstance(noise, torch.Tensor) and x.dim():
        try:
            shape = torch.broadcast_shapes(x.shape, noise.shape, (count, *(1,) * (x.dim() - 1)))
        except RuntimeError:
            raise ValueError(f"original_samples, noise and timesteps must broadcast, got {tuple(x.shape)},"
                             f" {tuple(noise.shape)} and {count} timesteps") from None
        x, noise = (t if t.shape == shape else t.expand(shape) for t in (x, noise))
    check(noise, x)
    return alike(x, noise)


def alike(x, *others):
    """All tensors in one dtype, the one that holds them all."""
    dtype = x.dtype
    if all(t is None or t.dtype is dtype for t in others):
        return [x, *others]
    for t in others:
        if t is not None and t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in (x, *others)]


def matched(sample, model_output, *others):
    """All of them in one dtype, the first two checked."""
    if _same_floats(sample, model_output, *others):
        return sample, model_output, *others
    check(model_output, sample)
    return alike(sample, model_output, *others)


def attempt(table, i, x, m, history=(), variance=None, clip=None, noise=False, seed=None, x0=True):
    """(next sample, x0) of row i, or the next sample alone, where all are plain tensors of one kind on the CPU; else
    None, with nothing done: whatever it is, also an error, `matched` and `fused` find out."""
    if not plain_eager():
        return None
    rows = table.wide if getattr(x, "dtype", None) is torch.float64 else table.narrow
    return _plain(x, m, rows[i], None, 1.0, history, variance, clip, noise, seed, i, x0, None, None, is_grad_enabled())


def attempt_twice(first, second, i, x, m, history, then):
    """The step of `first`, and from its sample and x0 that of `second` with history `then`:
    (next sample, sample, x0) or None."""
    if not plain_eager():
        return None
    wide = getattr(x, "dtype", None) is torch.float64
    row, after = (first.wide[i], second.wide[i]) if wide else (first.narrow[i], second.narrow[i])
    return _two_plain(x, m, row, history, after, then, None, None, is_grad_enabled())


def fused(table, i, x, m, history=(), variance=None, clip=None, noise=False, seed=None, x0=True):
    result = attempt(table, i, x, m, history, variance, clip, noise, seed, x0)
    if result is not None:
        return result
    return ops.diffusion_step(x, m, table.row(i, x), history=history, variance=variance, clip=clip, noise=noise,
                              seed=seed, step=i, return_x0=x0)


def fused_twice(first, second, i, x, m, history, then):
    result = attempt_twice(first, second, i, x, m, history, then)
    if result is not None:
        return result
    x, x0 = ops.diffusion_step(x, m, first.row(i, x), history=history, return_x0=True)
    return ops.diffusion_step(x, x0, second.row(i, x), history=then), x, x0


def x0_step(plan, table, i, x, m, history=(), variance=None, noise=False, seed=None):
    """(next sample, x0) of row i, with the clip or the dynamic threshold of the config."""
    if plan.threshold is None:
        return fused(table, i, x, m, history, variance, plan.clip, noise, seed)
    return ops.diffusion_step(x, m, table.row(i, x), history=history, variance=variance, noise=noise, seed=seed, step=i,
                              return_x0=True, dynamic_threshold=plan.threshold)

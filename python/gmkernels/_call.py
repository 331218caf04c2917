"""How an op is called: one class, used by every op.

A kernel takes addresses. `Kernel` turns tensors into addresses and picks the CPU or CUDA entry point; `Op` decides how
a call gets there:

    plain eager tensors, no gradient wanted -> the launcher itself
    plain eager tensors, a gradient wanted  -> a torch.autograd.Function around the launcher
    forward-mode AD (jvp, jacfwd, hessian)  -> the reference formula in plain torch
    torch.func (grad, vjp, jacrev, vmap)    -> a second autograd.Function, one that transforms can take apart
    anything else                           -> the op registered with torch.library

"Anything else" is torch.compile, torch.export, torch.jit.trace, dispatch modes, and subclass, fake, meta, sparse or
lazily negated tensors. The dispatcher unwraps or materialises each of them, or names the backend for which there is no
kernel, so a launcher only ever sees tensors that have memory. A device or floating dtype that has no kernel runs the
reference, with one warning (GMKERNELS_STRICT=1: an error).
"""

import os
import warnings

import torch
from torch import is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from . import _C

NAMESPACE = "gmkernels"
DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/core/dtype.h
HALVES = (torch.bfloat16, torch.float16)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_STRIDED = torch.strided
_BACKENDS = ("CPU", "CUDA", "MPS", "XPU", "HPU")

try:  # Private, and the only probes there are: about 0.04 us each.
    from torch._C import (
        _are_functorch_transforms_active,
        _is_any_autocast_enabled,
        _is_tracing,
        _len_torch_dispatch_stack,
    )

    forward_ad._current_level  # noqa: B018  (an attribute that must exist)

    def _observed() -> bool:
        """Does something other than plain eager mode need to see this thread's calls?"""
        return (
            _len_torch_dispatch_stack()
            or _are_functorch_transforms_active()
            or _is_tracing()
            or forward_ad._current_level >= 0
        )

except (ImportError, AttributeError):  # A torch without them: the dispatcher decides every call. Slower, as safe.

    def _observed() -> bool:
        return True

    _is_any_autocast_enabled = _observed


# threads, streams, kernels -------------------------------------------------------------------------------------------

_forked = False


def _after_fork():
    global _forked
    _forked = True
    _C.adopt_threads(threads)


os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads for one call. One in a forked child: libgomp hangs there if the parent ever ran a parallel region."""
    return 1 if _forked else torch.get_num_threads()


try:  # Private. In later versions of torch it takes many tensors, and passes over those made in inference mode.
    from torch._C import _increment_version

    with torch.inference_mode():
        _increment_version((torch.empty(0, device="cpu"),))
except (ImportError, TypeError, RuntimeError):

    def _increment_version(tensors):
        for t in tensors:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)


_C.adopt_torch(torch.Tensor, torch.nn.Parameter, torch.empty_like, torch.get_num_threads, _increment_version)


def plain_eager() -> bool:
    """May an op try its fast route (csrc/core/plain_tensor.h), which checks the tensors but cannot see the modes?"""
    return not (is_dynamo_compiling() or Kernel.backend is not None or _observed())


def written(*outs):
    """Autograd must notice that tensors it may have saved have changed."""
    _increment_version(outs)


class Kernel:
    """The C++ entry points `_C.<name>_cpu` and `_C.<name>_cuda`.

    kernel(outs, ins, *scalars): `outs` are written, `ins` are only read; both are tuples of tensors of one device or
    None, already checked, in the order of the binding. The tensors live until the call returns. The last `scratch` of
    the outs are workspace: the emulator does not ask that each of their elements is written.
    """

    backend = None  # tests/simt puts the emulator here: backend(name, outs, ins, scalars) instead of _C
    scratch = {}  # name -> count, for the emulator

    def __init__(self, name, scratch=0):
        self.name = name
        Kernel.scratch[name] = scratch
        self.cpu = getattr(_C, name + "_cpu")
        self.cuda = getattr(_C, name + "_cuda", None)

    def __call__(self, outs, ins, *scalars):
        if Kernel.backend is not None:
            return Kernel.backend(self.name, outs, ins, scalars)
        addresses = [0 if t is None else t.data_ptr() for t in outs + ins]
        if outs[0].is_cuda:
            device = outs[0].get_device()
            self.cuda(*addresses, *scalars, device, torch.cuda.current_stream(device).cuda_stream)
        else:
            self.cpu(*addresses, *scalars, 1 if _forked else torch.get_num_threads())


def has_kernel(kernel, kind):
    """Is it in this build for devices of this type?"""
    return kind == "cpu" or (kind == "cuda" and kernel.cuda is not None)


_warned = set()  # names of ops


def warn_of_fallback(name, why):
    """No kernel takes a call: one warning for each op that the reference runs, or with GMKERNELS_STRICT=1 an error."""
    if os.environ.get("GMKERNELS_STRICT", "0") not in ("", "0"):
        raise NotImplementedError(f"{name}: {why} (GMKERNELS_STRICT is set)")
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"gmkernels.{name}: {why}; running the reference in plain torch", stacklevel=5)


# ops -----------------------------------------------------------------------------------------------------------------


class Op:
    """A kernel as a torch op. In `schema` the tensor arguments come first; None is allowed where it says `Tensor?`.

    schema            "name(Tensor x, Tensor? y, float a) -> Tensor", or "-> (Tensor, Tensor)": several outputs
    outputs           (*args, out=None) -> output, or a tuple of them: checks shapes and dtypes, then `allocate`s. It is
                      the fake too, so it must also run on fake tensors and symbolic sizes.
    launch            (output, *args) -> None: plain strided tensors of one device, no gradient. Calls a Kernel.
    reference         the same function in plain torch: the oracle of the tests, forward-mode AD, vmap, and the fallback
    dtypes            those of the first tensor that `launch` takes; other floating dtypes run the reference
    setup, backward   as in torch.library.register_autograd; a backward made of ops can be differentiated again
    autocast          dtype to compute in under torch.autocast, for a kernel that has no half precision
    kernel            the Kernel that `launch` calls: a CUDA tensor without a CUDA half runs the reference
    device_arg        index of the `Device` argument of an op that may be called with no tensor at all
    """

    def __init__(self, schema, *, outputs, launch, reference, kernel, dtypes=(torch.float32, torch.float64),
                 setup=None, backward=None, autocast=None, device_arg=None):
        self.name = name = schema.partition("(")[0]
        self.outputs, self.launch, self.reference, self.kernel = outputs, launch, reference, kernel
        self.dtypes, self.autocast, self.device_arg = frozenset(dtypes), autocast, device_arg
        _library.define(schema)
        for backend in _BACKENDS:
            _library.impl(name, self._run, backend)
        if device_arg is not None:
            _library.impl(name, self._select_backend(device_arg), "BackendSelect", with_keyset=True)
        torch.library.register_fake(f"{NAMESPACE}::{name}", outputs, lib=_library)
        self.op = getattr(getattr(torch.ops, NAMESPACE), name).default
        types = [str(a.type) for a in self.op._schema.arguments]
        self.tensors = sum("Tensor" in t for t in types)
        self.optional = tuple("Optional" in t for t in types[: self.tensors])

        def forward(ctx, *args):
            result = self._run(*args)
            setup(ctx, args, result)
            return result

        def batched(info, in_dims, *args):
            result = torch.func.vmap(self.reference, in_dims, randomness="different")(*args)
            return result, 0 if isinstance(result, torch.Tensor) else (0,) * len(result)

        def no_setup(ctx, inputs, output):
            pass

        def no_backward(ctx, *grads):
            raise NotImplementedError(f"{name} has no backward")

        setup, backward = setup or no_setup, backward or no_backward
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_library)
        # Only the variant with a separate setup_context works under torch.func, at 2.5 times the cost: so, both.
        self.function = _function(name, forward=forward, backward=backward)
        self.transformable = _function(
            name, forward=lambda *args: self.op(*args), setup_context=setup, backward=backward, vmap=batched
        )

    def _select_backend(self, device_arg):
        def select(keys, *args):
            key = torch._C._dispatch_key_for_device(args[device_arg].type)
            return self.op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *args)

        return select

    def __call__(self, *args, out=None):
        if is_compiling() or _observed():
            return self._dispatch(args, out)
        grad = False
        for t in args[: self.tensors]:
            if t is None:
                continue
            if type(t) not in _PLAIN or t.layout is not _STRIDED or t.is_neg():
                return self._dispatch(args, out)
            grad = grad or t.requires_grad
        if self.autocast is not None and _is_any_autocast_enabled():
            args = self._cast(args)
        if out is not None:
            return self._run_into(out, args)
        if grad and is_grad_enabled():
            return self.function.apply(*args)
        return self._run(*args)

    def _run(self, *args, out=None):
        """The kernel, on real tensors of one device; or the reference, where there is no kernel for them."""
        first = args[0]
        for i in range(self.tensors):
            t = args[i]
            if t is None:
                if not self.optional[i]:
                    raise TypeError(f"{self.name}: tensor argument {i} is required, got None")
            elif first is None:
                first = t
            elif t.device != first.device:
                raise ValueError(f"{self.name}: tensors on {first.device} and {t.device}; all must be on one device")
        if first is None:
            kind = args[self.device_arg].type
        else:
            kind = "cpu" if first.is_cpu else first.device.type
            if first.dtype not in self.dtypes and first.dtype.is_floating_point:
                return self._fall_back(args, out, f"no {first.dtype} kernel")
        if kind != "cpu" and not has_kernel(self.kernel, kind):
            if kind == "meta":
                return self.outputs(*args, out=out)
            return self._fall_back(args, out, f"no kernel for {kind} in this build")
        result = self.outputs(*args, out=out)
        self.launch(result, *args)
        return result

    def _fall_back(self, args, out, why):
        warn_of_fallback(self.name, why)
        result = self.reference(*args)
        return result if out is None else _copy_into(out, result)

    def _run_into(self, out, args):
        self._no_grad_into(out, args)
        device = next((t.device for t in args[: self.tensors] if t is not None), None)
        for o in out if isinstance(out, tuple) else (out,):
            if type(o) not in _PLAIN or o.layout is not _STRIDED or not o.is_contiguous() or o.is_neg():
                raise ValueError(f"{self.name}: out must be a contiguous torch.Tensor, got {_describe(o)}")
            if device is not None and o.device != device:
                raise ValueError(f"{self.name}: out is on {o.device}, the inputs on {device}")
        self._run(*args, out=out)
        written(*(out if isinstance(out, tuple) else (out,)))
        return out

    def _dispatch(self, args, out):
        for i in range(self.tensors):  # the dispatcher would let None pass for a Tensor
            if args[i] is None and not self.optional[i]:
                raise TypeError(f"{self.name}: tensor argument {i} is required, got None")
        if self.autocast is not None:
            args = self._cast(args)
        if getattr(forward_ad, "_current_level", -1) >= 0:  # the dispatcher would drop tangents silently
            result = self.reference(*args)
        elif torch._C._are_functorch_transforms_active():  # register_autograd cannot be transformed
            result = self.transformable.apply(*args)
        else:
            result = self.op(*args)
        if out is None:
            return result
        self._no_grad_into(out, args)
        return _copy_into(out, result)

    def _no_grad_into(self, out, args):
        outs = out if isinstance(out, tuple) else (out,)
        if is_grad_enabled() and any(t is not None and t.requires_grad for t in (*outs, *args[: self.tensors])):
            raise RuntimeError(
                f"{self.name}: out= does not support automatic differentiation, but one of the tensors requires grad"
            )

    def _cast(self, args):
        kind = next((t.device.type for t in args[: self.tensors] if isinstance(t, torch.Tensor)), None)
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return args
        lossy = (torch.float16, torch.bfloat16, torch.float32)
        return tuple(t.to(self.autocast) if isinstance(t, torch.Tensor) and t.dtype in lossy else t for t in args)


def _function(name, **methods):
    return type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})


def _copy_into(out, result):
    if isinstance(out, tuple):
        return tuple(o.copy_(r) for o, r in zip(out, result, strict=True))
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {tuple(result.shape)}, got {tuple(out.shape)}")
    return out.copy_(result)


def _describe(t):
    if not isinstance(t, torch.Tensor):
        return type(t).__name__
    if type(t) in _PLAIN and t.layout is _STRIDED:
        return f"strides {tuple(t.stride())} for shape {tuple(t.shape)}"
    return f"{type(t).__name__} of layout {t.layout}"


def allocate(out, like, shape, dtype=None):
    """A fresh contiguous output of `shape` with the dtype and device of `like`, or `out` if it fits."""
    if out is None:
        if shape == like.shape and dtype is None:  # 1 us cheaper than new_empty
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        return like.new_empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype is not (dtype or like.dtype):
        raise ValueError(
            f"out must be {dtype or like.dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}"
        )
    return out


# checks --------------------------------------------------------------------------------------------------------------


def check_tensor(name, t):
    """`t` must be a tensor: for public functions, before they ask for its shape."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")


def check_floating(name, t):
    if not t.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")


def check_same_dtype(name, t, **others):
    for other, o in others.items():
        if o is not None and o.dtype is not t.dtype:
            raise TypeError(f"{other} must be {t.dtype} as {name}, got {o.dtype}")


def check_int(name, value, low, high):
    """An integer in [low, high); bool is refused."""
    if isinstance(value, int):  # also a symbolic one: __index__ would make torch.compile specialise
        index = value
    else:
        try:
            index = value.__index__()
        except (AttributeError, TypeError):
            index = None
    if index is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not low <= index < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {index}")
    return index


# seeds ---------------------------------------------------------------------------------------------------------------

_SEED_LIMITS = (-(2**63), 2**64)


def split_seed(seed, device, samples=None):
    """A `seed` argument as (seed tensor or None, seed int), the form of every random op's schema.

    None: one 64-bit seed from torch's default CPU generator; under torch.compile, tracers and modes a tensor drawn
    where they see it (inside the graph).
    An int counts over the whole output. An int64 tensor of no dimension counts over the whole output too; one of shape
    [samples] gives each sample its own numbers, whatever batch it is in.
    """
    if seed is None:
        if is_compiling() or _observed():
            return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device), 0
        return None, int(torch.randint(-(2**63), 2**63 - 1, ()))
    if isinstance(seed, torch.Tensor):
        if seed.dtype is not torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}")
        if seed.dim() > 1 or (seed.dim() == 1 and (samples is None or seed.shape[0] != samples)):
            expected = "[]" if samples is None else f"[] or [{samples}]"
            raise ValueError(f"seed must have shape {expected}, got {tuple(seed.shape)}")
        return seed, 0
    seed = check_int("seed", seed, *_SEED_LIMITS)
    return None, seed if seed < 2**63 else seed - 2**64

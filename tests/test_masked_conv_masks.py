"""masked_conv2d: orders, boolean masks, data channels, conditioning, residual, the gate without tanh."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import cases
from gmkernels import ops, reference
from test_masked_conv import GATE, layouts, near, problem

REF = reference.masked_conv
LINEAR = "identity_sigmoid"
ORDERS = ("raster", "vertical", "horizontal")


def masked_weight(weight, mask_type, mask_order="raster", data_channels=1, gated=False):
    """float64, zeros wherever the definition hides a weight: written out tap by tap, independently of the library."""
    c_out, c_in, kh, kw = weight.shape
    mask = torch.zeros(c_out, c_in, kh, kw, dtype=torch.bool)
    half = c_out // 2 if gated else c_out
    for o, i, y, x in itertools.product(range(c_out), range(c_in), range(kh), range(kw)):
        above, own, left = y < kh // 2, y == kh // 2, x < kw // 2
        centre = own and x == kw // 2
        before, after = i * data_channels // c_in, o % half * data_channels // half
        seen = {"raster": above or own and left, "vertical": above or own and mask_type == "B",
                "horizontal": own and left}[mask_order]
        if centre and mask_order != "vertical":
            seen = before <= after if mask_type == "B" else before < after
        mask[o, i, y, x] = seen
    return torch.where(mask.to(weight.device), weight, 0).double(), mask


def check(tensors, grad_seed=4, **options):
    """Output and all gradients against float64; what the mask hides has no gradient at all."""
    x, weight, bias, cond, residual = tensors
    gate, order, data_channels = (options.get(k, d) for k, d in (("gate", None), ("mask_order", "raster"),
                                                                 ("data_channels", 1)))
    out = ops.masked_conv2d(x, weight, bias, cond=cond, residual=residual, **options)
    wide, mask = masked_weight(weight, options["mask_type"], order, data_channels, gate is not None)
    padding = [k // 2 for k in weight.shape[2:]]
    z = F.conv2d(x.double(), wide, None if bias is None else bias.double(), padding=padding)
    if cond is not None:
        z = z + (cond if cond.dim() == 4 else cond[:, :, None, None]).double()
    if gate:
        a, b = z.chunk(2, 1)
        z = (torch.tanh(a) if gate == GATE else a) * torch.sigmoid(b)
    want = z if residual is None else z + residual.double()
    near(out, want)
    inputs = [t for t in tensors if t is not None and t.requires_grad]
    grad = cases.data(*out.shape, seed=grad_seed).to(device=out.device, dtype=out.dtype)
    got = torch.autograd.grad(out, inputs, grad)
    for g, r in zip(got, torch.autograd.grad(want, inputs, grad.double()), strict=True):
        near(g, r)
    assert not got[1][~mask.to(x.device)].any()


def conditioned(b, c_in, c_out, h, w, kernel, gate, cond, residual, **options):
    tensors = problem(b, c_in, c_out, h, w, kernel, grad=True, **options)
    dtype, device = tensors[0].dtype, tensors[0].device
    shapes = {"vector": (b, c_out), "map": (b, c_out, h, w)}
    extra = [cases.data(*shapes[cond], dtype=dtype, device=device, seed=5) if cond else None,
             cases.data(b, c_out // (2 if gate else 1), h, w, dtype=dtype, device=device, seed=6) if residual else None]
    if options.get("nhwc"):
        extra = [t.to(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in extra]
    return *tensors, *(t if t is None else t.detach().requires_grad_() for t in extra)


@pytest.mark.parametrize("data_channels", [1, 3])
@pytest.mark.parametrize("mask_type", "AB")
@pytest.mark.parametrize("order", ORDERS)
def test_orders(device, order, mask_type, data_channels):
    for gate, kernel in ((None, (3, 5)), (GATE, 3)):
        tensors = conditioned(1, 3, 10, 3, 4, kernel, gate, None, False, device=device.torch)
        check(tensors, mask_type=mask_type, mask_order=order, data_channels=data_channels, gate=gate)


@layouts
@pytest.mark.parametrize("gate", [None, GATE, LINEAR])
@pytest.mark.parametrize("cond", ["vector", "map"])
def test_conditioning_and_residual(device, cond, gate, nhwc):
    for residual, c_out in ((False, 6), (True, 34)):
        tensors = conditioned(2, 3, c_out, 3, 4, 3, gate, cond, residual, nhwc=nhwc, device=device.torch)
        check(tensors, mask_type="B", gate=gate)


@pytest.mark.parametrize("c_out", [2, 30, 32, 34, 64, 66, 128, 130])
@pytest.mark.parametrize("gate", [None, GATE, LINEAR])
def test_every_panel_width(isa, c_out, gate):
    for nhwc, dtype, cond in itertools.product((False, True), (*cases.FLOATS, torch.bfloat16), ("vector", "map")):
        tensors = conditioned(2, 3, c_out, 5, 7, 3, gate, cond, True, nhwc=nhwc, dtype=dtype)
        check(tensors, mask_type="A", gate=gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_on_cuda(device, dtype):
    for nhwc, cond in ((False, "map"), (True, "map"), (True, "vector")):
        tensors = conditioned(1, 8, 16, 3, 4, 3, GATE, cond, True, nhwc=nhwc, dtype=dtype, device=device.torch)
        check(tensors, mask_type="B", gate=GATE)


def test_wide_images_and_mixed_formats():
    """Bands narrower than the image; cond and residual in another memory format than x."""
    for nhwc in (False, True):
        x, weight, bias, cond, residual = conditioned(2, 3, 20, 3, 517, 3, GATE, "map", True, nhwc=nhwc)
        other = torch.contiguous_format if nhwc else torch.channels_last
        cond, residual = (t.detach().contiguous(memory_format=other).requires_grad_() for t in (cond, residual))
        check((x, weight, bias, cond, residual), mask_type="B", gate=GATE)
        strided = torch.cat([cond.detach(), cond.detach()], 3)[..., ::2]
        near(ops.masked_conv2d(x, weight, bias, gate=GATE, cond=strided),
             ops.masked_conv2d(x, weight, bias, gate=GATE, cond=strided.contiguous()).double())


@pytest.mark.parametrize("mask", [
    [[1, 0, 1], [0, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 1]], [[1] * 3] * 3, [[0] * 3] * 3,
], ids=["gaps", "last", "all", "none"])
def test_boolean_masks(device, mask):
    x, weight, bias = problem(1, 3, 4, 3, 5, 3, device=device.torch, grad=True)
    used = torch.tensor(mask, dtype=torch.bool)
    for form in (used.to(x.device), used.tolist(), used.numpy()):
        out = ops.masked_conv2d(x, weight, bias, form)
        want = F.conv2d(x.double(), torch.where(used.to(x.device), weight, 0).double(), bias.double(), padding=1)
        near(out, want)
    for g, r in zip(torch.autograd.grad(out.sum(), (x, weight)), torch.autograd.grad(want.sum(), (x, weight)),
                    strict=True):
        near(g, r)


def test_kernels_with_more_taps_than_16_bits_count(isa):
    x, weight, bias = problem(1, 1, 2, 4, 8, 257, grad=True)
    used = torch.zeros(257, 257, dtype=torch.bool)
    used[128, 120:129] = True
    for options in ({"mask_order": "horizontal"}, {"mask_type": used}):
        out = ops.masked_conv2d(x, weight, bias, **options)
        wide = torch.where(used, weight, 0).double()[:, :, 128:129, 120:129]
        want = F.conv2d(F.pad(x.double(), (8, 0)), wide, bias.double())
        near(out, want)
        inputs = (x, weight, bias)
        for g, r in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
            near(g, r)


def test_one_by_one():
    """Torch's own only where nothing but the centre is left and nothing is added."""
    for order, dc, cond in itertools.product(("raster", "horizontal"), (1, 2), (None, "vector")):
        tensors = conditioned(2, 4, 6, 3, 4, 1, None, cond, cond is not None)
        check(tensors, mask_type="B", mask_order=order, data_channels=dc)


@pytest.mark.parametrize("mask_type", "AB")
def test_causality_of_colours(device, mask_type):
    """Of 3 data channels of 2 features each, an output sees earlier channels of its own pixel, and no later one."""
    x, weight, bias = problem(1, 6, 12, 2, 3, 3, device=device.torch, grad=True)
    out = ops.masked_conv2d(x, weight, bias, mask_type, data_channels=3, gate=GATE)
    for channel in range(6):
        (grad,) = torch.autograd.grad(out[0, channel, 1, 1], x, retain_graph=True)
        own = channel // 2 + (mask_type == "B")
        assert not grad[0, 2 * own :, 1, 1].any()
        assert not own or grad[0, : 2 * own, 1, 1].all()
        assert not grad[0, :, 1, 2].any()


@pytest.mark.parametrize("gate", [None, GATE, LINEAR])
@pytest.mark.parametrize("cond", ["vector", "map"])
def test_gradcheck(gate, cond):
    tensors = conditioned(1, 3, 6, 2, 3, 3, gate, cond, True, dtype=torch.float64)

    def call(x, weight, bias, cond, residual):
        return ops.masked_conv2d(x, weight, bias, "B", data_channels=3, gate=gate, cond=cond, residual=residual)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("needed", range(5))
def test_one_gradient_at_a_time(needed):
    tensors = conditioned(1, 3, 6, 2, 3, 3, GATE, "vector", True)
    x, weight, bias, cond, residual = (t.detach().requires_grad_(i == needed) for i, t in enumerate(tensors))
    out = ops.masked_conv2d(x, weight, bias, gate=GATE, cond=cond, residual=residual)
    full = ops.masked_conv2d(*tensors[:3], gate=GATE, cond=tensors[3], residual=tensors[4])
    (got,) = torch.autograd.grad(out.square().sum(), (x, weight, bias, cond, residual)[needed])
    assert torch.equal(got, torch.autograd.grad(full.square().sum(), tensors[needed])[0])


def test_residual_alone_does_not_convolve(kernel_calls):
    tensors = conditioned(1, 3, 6, 2, 3, 3, GATE, None, True)
    x, weight, bias, _, residual = (t if t is None else t.detach() for t in tensors)
    out = ops.masked_conv2d(x, weight, bias, gate=GATE, residual=residual.requires_grad_())
    (grad,) = torch.autograd.grad(out.sum(), residual)
    assert torch.equal(grad, torch.ones_like(grad)) and kernel_calls == ["masked_conv2d"]


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile(backend):
    tensors = conditioned(2, 3, 6, 4, 5, 3, GATE, "map", True)

    def call(*t):
        return ops.masked_conv2d(*t[:3], "A", mask_order="horizontal", data_channels=3, gate=GATE, cond=t[3],
                                 residual=t[4])

    want = call(*tensors)
    got = torch.compile(call, fullgraph=True, backend=backend)(*tensors)
    torch.testing.assert_close(got, want)
    grad = torch.ones_like(got)
    for g, r in zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad), strict=True):
        torch.testing.assert_close(g, r)


def test_func():
    tensors = [t.detach() for t in conditioned(2, 3, 6, 2, 3, 3, LINEAR, "vector", True, dtype=torch.float64)]

    def call(*t):
        return ops.masked_conv2d(*t[:3], gate=LINEAR, cond=t[3], residual=t[4])

    def plain(*t):
        return REF.masked_conv2d(*t, REF.taps(3, 3, "B"), (1, 1), LINEAR)

    for transform in (lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(5))),
                      lambda f: lambda *t: torch.func.jvp(f, t, tuple(torch.ones_like(s) for s in t))):
        for g, r in zip(transform(call)(*tensors), transform(plain)(*tensors), strict=True):
            cases.close(g, r)
    many = [torch.stack((t, 2 * t)) for t in tensors]
    cases.close(torch.func.vmap(call)(*many), torch.stack([plain(*(t[i] for t in many)) for i in range(2)]))


def test_same_bits_on_any_number_of_threads(isa):
    results = []
    tensors = conditioned(3, 17, 70, 23, 29, 3, GATE, "map", True)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = ops.masked_conv2d(*tensors[:3], gate=GATE, cond=tensors[3], residual=tensors[4])
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


BAD = {
    "mask_order must be .* got 'spiral'": {"mask_order": "spiral"},
    "data_channels must be in .* got 0": {"data_channels": 0},
    "data_channels must be an integer": {"data_channels": 1.5},
    r"mask_type must be \[kh, kw\] = \(3, 3\) as weight, got 2 rows of": {"mask_type": torch.zeros(2, 3) == 0},
    "mask_type must be .* got torch.float32": {"mask_type": torch.ones(3, 3)},
    'mask_type must be "A", "B" or a boolean .* got dict': {"mask_type": {}},
    "need mask_type .* got a boolean mask": {"mask_type": torch.ones(3, 3, dtype=torch.bool), "data_channels": 3},
    "cond must be a torch.Tensor, got int": {"cond": 1},
    r"cond must be \[b, c_out\] = \(2, 6\) or .* got \(2, 5\)": {"cond": torch.zeros(2, 5)},
    r"cond must be .* got \(6,\)": {"cond": torch.zeros(6)},
    r"cond must be .* got \(2, 6, 5, 4\)": {"cond": torch.zeros(2, 6, 5, 4)},
    "cond must be torch.float32 as x, got torch.float64": {"cond": torch.zeros(2, 6, dtype=torch.float64)},
    r"residual must have the shape of the output, \(2, 6, 4, 5\), got \(2, 3, 4, 5\)": {
        "residual": torch.zeros(2, 3, 4, 5)},
    r"residual must have .*\(2, 3, 4, 5\), got \(2, 6, 4, 5\)": {"residual": torch.zeros(2, 6, 4, 5), "gate": GATE},
    "residual must be torch.float32 as x, got torch.bfloat16": {"residual": torch.zeros(2, 6, 4, 5).bfloat16()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    x, weight, bias = problem(2, 3, 6, 4, 5, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.masked_conv2d(x, weight, bias, **BAD[message])


def test_channels_that_data_channels_do_not_divide(device):
    tensors = conditioned(1, 4, 7, 2, 3, 3, None, None, False, device=device.torch)
    check(tensors, mask_type="B", data_channels=3)
    # fewer channels than data channels
    tensors = conditioned(1, 2, 10, 2, 3, 3, GATE, None, False, device=device.torch)
    check(tensors, mask_type="A", data_channels=3, gate=GATE)

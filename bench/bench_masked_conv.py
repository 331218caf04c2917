"""masked_conv2d beside the forms that a torch user writes: weight * mask, the kernel cropped to live rows, two crops.

Real pixels where the channels allow it (the 3-channel first layer reads patches of scikit-learn's china.jpg), numbers
of the same shape elsewhere. Contiguous and channels_last inputs; what converts them is inside the timing on both sides.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from .. import ops, reference
from .case import Case

OPS = ("masked_conv2d",)
_SIDE = 32
_GATE = "tanh_sigmoid"
_NO_SLOWER = {"fastest": 1.0}
_LAYERS = (  # name, c_in, c_out, kernel, mask_type, gate, goals forward, forward + backward
    ("3x3 B 128->128", 128, 128, 3, "B", None, {"w*mask": 1.9, "fastest": 1.15}, {"w*mask": 1.4, "fastest": 1.0}),
    ("3x3 B 128->256 gated", 128, 256, 3, "B", _GATE, {"w*mask": 2.0, "fastest": 1.6}, {"w*mask": 1.4, "fastest": 1.0}),
    ("7x7 A 3->128", 3, 128, 7, "A", None, _NO_SLOWER, _NO_SLOWER),
    ("1x1 B 128->128", 128, 128, 1, "B", None, _NO_SLOWER, _NO_SLOWER),
)


def cases(quick, device):
    for layer in _LAYERS:
        for nhwc in (False, True):
            yield _case(*layer, 16, nhwc, device, backward=False, quick=quick)
    for layer in _LAYERS[1:2] if quick else _LAYERS:
        for nhwc in (True,) if quick else (False, True):
            yield _case(*layer, 16, nhwc, device, backward=True, quick=quick)
    for layer in () if quick else _LAYERS:
        yield _case(*layer, 1, True, device, backward=False, quick=quick)


def _images(batch, c, device):
    if c != 3:
        return torch.randn(batch, c, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    patches = F.unfold(pixels, _SIDE, stride=_SIDE).view(1, c, _SIDE, _SIDE, -1)[0].permute(3, 0, 1, 2)
    return patches[:batch].contiguous().to(device)


def _gated(z, gate):
    return z if gate is None else torch.tanh(z.chunk(2, 1)[0]) * torch.sigmoid(z.chunk(2, 1)[1])


def _forms(kernel, mask_type, gate, device):
    """The ways to write it in torch: name -> function of x, weight, bias."""
    centre = kernel // 2
    mask = reference.masked_conv.mask(kernel, kernel, mask_type, device=device)
    left = centre + (mask_type == "B")

    def masked(x, w, b):
        return _gated(F.conv2d(x, w * mask, b, padding=centre), gate)

    def rows(x, w, b):  # padded on top only: a channels_last output must not be sliced
        return _gated(F.conv2d(F.pad(x, (centre, centre, centre, 0)), (w * mask)[:, :, : centre + 1], b), gate)

    def crops(x, w, b):
        h, width = x.shape[2:]
        above = F.conv2d(F.pad(x, (centre, centre, centre, 0))[:, :, : h + centre - 1], w[:, :, :centre], b)
        row = F.pad(x, (centre, 0))[..., : width + left - 1]
        return _gated(above + F.conv2d(row, w[:, :, centre : centre + 1, :left]), gate)

    def plain(x, w, b):  # 1x1: nothing is masked
        return _gated(F.conv2d(x, w, b), gate)

    return {"w*mask": masked, "conv2d": plain} if kernel == 1 else {"w*mask": masked, "rows": rows, "crops": crops}


def _products(taps, kernel, direct):
    """For a pixel, an input and an output channel. On the CPU a segment of n <= 3 taps has n + 1 for two pixels."""
    if direct:
        return len(taps)
    rows = [sum(tap // kernel == y for tap in taps) for y in range(kernel)]
    return sum(row + -(-row // 3) for row in rows) / 2


def _case(name, c_in, c_out, kernel, mask_type, gate, forward, both, batch, nhwc, device, backward, quick):
    goals = both if backward else _NO_SLOWER if batch == 1 else forward
    x, generator = _images(batch, c_in, device), torch.Generator().manual_seed(1)
    weight = torch.randn(c_out, c_in, kernel, kernel, generator=generator).to(device) / (c_in * kernel) ** 0.5
    bias = torch.randn(c_out, generator=generator).to(device)
    if nhwc:
        x = x.to(memory_format=torch.channels_last)
    forms = _forms(kernel, mask_type, gate, device)
    masked = forms["w*mask"]
    if not quick or (nhwc and goals.get("w*mask") and not backward):
        forms["torch.compile"] = torch.compile(masked)

    def ours(x, w, b):
        return ops.masked_conv2d(x, w, b, mask_type, gate=gate)

    tensors = [t.requires_grad_(backward) for t in (x, weight, bias)]
    with torch.no_grad():
        out = ours(*tensors)
    grad = torch.ones_like(out)

    def run(form):
        if not backward:
            return lambda: form(*tensors)
        return lambda: torch.autograd.grad(form(*tensors), tensors, grad)

    def error_of(form):
        def error():
            exact = [t.detach().double().requires_grad_(backward) for t in tensors]
            got, want = form(*tensors), masked(*exact)
            if backward:
                got, want = (torch.autograd.grad(y, t, torch.ones_like(y))[1]
                             for y, t in ((got, tensors), (want, exact)))
            return ((got.detach().double() - want.detach()).abs().max() / want.abs().max()).item()

        return error

    rivals = {form_name: run(form) for form_name, form in forms.items()}
    if "torch.compile" not in rivals:
        rivals["torch.compile"] = "not in --quick"
    direct = device != "cpu" or kernel == 1 or c_in < 8
    products = _products(reference.masked_conv.taps(kernel, kernel, mask_type), kernel, direct)
    pixels = batch * _SIDE * _SIDE
    moved = sum(t.numel() for t in tensors) * (2 if backward else 1) + out.numel()
    return Case(
        "masked_conv2d",
        f"{name}, {batch}x{_SIDE}x{_SIDE}, {'channels_last' if nhwc else 'contiguous'}, "
        + ("forward + backward" if backward else "forward"),
        ours=run(ours),
        rivals=rivals,
        bytes=4.0 * moved,
        flops=2.0 * pixels * c_in * c_out * products * (3 if backward else 1),
        exps=2.0 * out.numel() * (2 if backward else 1) if gate else 0.0,
        error=error_of(ours),
        rival_error=error_of(masked),
        goals=goals,
        note="counted on live taps" if direct else f"counted on {products:g} products a pixel (docs/masked_conv.md)",
    )

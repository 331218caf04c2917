"""Training steps of the models, beside the same network in plain torch."""

import torch
import torch.nn.functional as F

from .. import models
from ..cli.pixelcnn import images
from . import pixelcnn_torch
from .case import Case

OPS = ("PixelCNN",)
_BATCH, _FEATURES, _LAYERS, _LEVELS = 128, 64, 6, 17


def cases(quick, device):
    yield _pixelcnn(quick, device)


def _pixelcnn(quick, device):
    torch.manual_seed(0)
    model = models.PixelCNN((1, 8, 8), levels=_LEVELS, features=_FEATURES, layers=_LAYERS).to(device)
    x = images("digits")[0][:_BATCH].to(device)
    values = model.values(x)
    parameters = list(model.parameters())
    compiled = torch.compile(lambda v: pixelcnn_torch.network(model, v))

    def last(v):
        return pixelcnn_torch.network(model, v, torch.channels_last)

    def gradients(network):
        logits = network(values).unflatten(1, (1, _LEVELS)).transpose(1, 2)
        return torch.autograd.grad(F.cross_entropy(logits, x), parameters)

    def error_of(network):
        def error():
            got = gradients(network)
            wide = models.PixelCNN(**model.config).to(device).double()
            wide.load_state_dict(model.state_dict())
            out = pixelcnn_torch.network(wide, values.double()).unflatten(1, (1, _LEVELS)).transpose(1, 2)
            want = torch.autograd.grad(F.cross_entropy(out, x), list(wide.parameters()))
            return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))

        return error

    def plain(v):
        return pixelcnn_torch.network(model, v)

    # Live taps of a pixel: vertical, horizontal, link, out; of the first layer; of the head.
    c = _FEATURES
    layer = 6 * c * 2 * c + 2 * c * 2 * c + c * 2 * c + c * c
    first = (21 + 3) * 2 * c + c * 2 * c + c * c
    head = c * 2 * c + 2 * c * _LEVELS
    return Case(
        "PixelCNN",
        f"digits, {_LAYERS} layers of {_FEATURES}, batch {_BATCH}: loss and gradients of a training step",
        ours=lambda: gradients(model.network),
        rivals={"eager": lambda: gradients(plain), "channels_last": lambda: gradients(last),
                "torch.compile": "not in --quick" if quick else lambda: gradients(compiled)},
        bytes=4.0 * sum(p.numel() for p in parameters) * 2,
        flops=3 * 2.0 * _BATCH * 64 * ((_LAYERS - 1) * layer + first + head),
        error=error_of(model.network),
        rival_error=error_of(plain),
        goals={"eager": 1.3, "channels_last": 1.3},
        note="rivals: the same network with kernels cropped to their live taps",
    )

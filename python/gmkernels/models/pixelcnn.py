"""Gated PixelCNN: images with an exact likelihood, sampled by a kernel that computes each feature once."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .._call import HALVES, check_int
from ..nn import GatedMaskedConv2d, MaskedConv2d
from ..ops.pixelcnn import PixelCNNWeights, pixelcnn_sample
from ..reference.pixelcnn import image_values
from ._model import Model

_HEADS = ("categorical", "logistic_mixture")


class PixelCNN(Model):
    r"""Images of c channels of integer levels, ``p(x) = prod_p p(x_p | pixels before p in raster order)``.

    Two stacks of gated convolutions: the vertical one sees the rows above, the horizontal one the pixels to the left
    and, through 1x1 links, the vertical one; together they see every earlier pixel and no other, without a blind spot.
    Both are residual. With x the levels scaled to [-1, 1] and ``gate(z) = tanh(z[:C]) sigmoid(z[C:])``::

        v_0 = gate(conv7x7_above(x))                  v_l = v_{l-1} + gate(conv3x3_above_and_own_row(v_{l-1}))
        h_0 = out_0 gate(conv1x7_left(x) + link_0 v_0)
        h_l = h_{l-1} + out_l gate(conv1x3_left_and_own(h_{l-1}) + link_l v_l)
        head2 relu(head1 relu(h_L))                   a class adds a vector to each gate's z

    Args:
        shape: (c, h, w) of the images. Convolutions take any size; ``sample`` makes this one.
        levels: values of a channel, 0 .. levels - 1.
        features: C. layers: L + 1, with the first. kernel_size, first_kernel_size: odd.
        head: ``"categorical"``: a softmax over the levels; with c > 1 the channels of a pixel are ordered too (colour
            masks). ``"logistic_mixture"``: :func:`gmkernels.ops.discretized_logistic_mixture_nll`, c = 1 or 3.
        num_mixtures: of that head. head_features: width of the head, by default 2C.
        num_classes: None, or how many; then ``cond`` are labels ``[n]`` in ``[0, num_classes)``.

    ``log_prob`` is exact (``log_prob_kind``). Errors: ``ValueError`` and ``TypeError`` that name the argument.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016 (here the links read the
    gated vertical features, and the vertical stack is residual); Salimans et al., "PixelCNN++", 2017 (the mixture).

    >>> model = PixelCNN((1, 8, 8), levels=17, features=16, layers=2)
    >>> model.sample(2, seed=0).shape
    torch.Size([2, 1, 8, 8])
    """

    log_prob_kind = "exact"

    def __init__(self, shape, *, levels=256, features=64, layers=6, kernel_size=3, first_kernel_size=7,
                 head="categorical", num_mixtures=10, head_features=None, num_classes=None):
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape must be (c, h, w), got {tuple(shape)}")
        self.shape = (check_int("shape[0]", shape[0], 1, 17), *(check_int("shape", s, 1, 2**31) for s in shape[1:]))
        self.levels = levels = check_int("levels", levels, 2, 65537)
        features, layers = check_int("features", features, 1, 2**24), check_int("layers", layers, 1, 2**16)
        k, k0 = check_int("kernel_size", kernel_size, 1, 32), check_int("first_kernel_size", first_kernel_size, 1, 32)
        if head not in _HEADS:
            raise ValueError(f'head must be "categorical" or "logistic_mixture", got {head!r}')
        channels = self.shape[0]
        if head == "logistic_mixture" and channels not in (1, 3):
            raise ValueError(f"shape must have 1 or 3 channels for a logistic mixture, got {channels}")
        self.head, self.num_mixtures = head, check_int("num_mixtures", num_mixtures, 1, 513)
        hidden = check_int("head_features", 2 * features if head_features is None else head_features, 1, 2**24)
        self.num_classes = None if num_classes is None else check_int("num_classes", num_classes, 1, 2**31)
        self.config = dict(shape=list(self.shape), levels=levels, features=features, layers=layers, kernel_size=k,
                           first_kernel_size=k0, head=head, num_mixtures=self.num_mixtures, head_features=hidden,
                           num_classes=self.num_classes)
        groups = channels if head == "categorical" else 1
        outputs = channels * levels if head == "categorical" else self.num_mixtures * (3 if channels == 1 else 10)
        self.vertical, self.horizontal, self.link, self.out = (nn.ModuleList() for _ in range(4))
        for layer in range(layers):
            size, kind, source = (k, "B", features) if layer else (k0, "A", channels)
            self.vertical.append(GatedMaskedConv2d(source, features, size, kind, mask_order="vertical"))
            self.horizontal.append(GatedMaskedConv2d(source, features, (1, size), kind, mask_order="horizontal",
                                                     data_channels=groups))
            self.link.append(MaskedConv2d(features, 2 * features, 1, bias=False))
            self.out.append(MaskedConv2d(features, features, 1, data_channels=groups))
        self.head1 = MaskedConv2d(features, hidden, 1, data_channels=groups)
        self.head2 = MaskedConv2d(hidden, outputs, 1, data_channels=groups)
        if num_classes is not None:  # [class] -> a vector for each gate: layers x (vertical, horizontal) x 2C
            self.classes = nn.Embedding(self.num_classes, layers * 2 * 2 * features)
            nn.init.normal_(self.classes.weight, std=0.1)

    def values(self, x):
        """Levels -> float32 in [-1, 1], those that the sampler shows the network, whatever the model's dtype."""
        return image_values(self.levels, torch.float32, x.device)[x.long()]

    # the network ------------------------------------------------------------------------------------------------------

    def _gate_vectors(self, cond, n):
        """[layers, 2, n, 2C] for labels, or None."""
        if self.num_classes is None:
            if cond is not None:
                raise ValueError("cond must be None: the model has no classes")
            return None
        if cond is None:
            raise ValueError(f"cond must be labels [n] in [0, {self.num_classes}), got None")
        device = self.classes.weight.device
        labels = torch.as_tensor(cond, device=device)
        if labels.dtype.is_floating_point or labels.dtype is torch.bool:
            raise TypeError(f"cond must be integer labels, got {labels.dtype}")
        labels = labels.expand(n) if labels.dim() == 0 else labels
        if labels.shape != (n,):
            raise ValueError(f"cond must be labels [n] with n={n}, got {tuple(labels.shape)}")
        if n and not torch.compiler.is_compiling():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"cond must be in [0, {self.num_classes}), got {low if low < 0 else high}")
        layers = len(self.out)
        vectors = self.classes(labels.long()).view(n, layers, 2, self.classes.embedding_dim // (2 * layers))
        return vectors.permute(1, 2, 0, 3)

    def network(self, values, cond=None):
        """``[n, c, h, w]`` scaled to [-1, 1] -> the head's parameters ``[n, outputs, h, w]``."""
        values = values.to(self.head2.weight.dtype)
        vectors = self._gate_vectors(cond, values.shape[0])
        v = h = None
        for layer, (vertical, horizontal, link, out) in enumerate(
                zip(self.vertical, self.horizontal, self.link, self.out, strict=True)):
            for_v, for_h = (None, None) if vectors is None else vectors[layer]
            # The first layer is causal only without a residual: its input is the image itself. From there on everything
            # is channels_last, which the kernels read and write in place.
            above = vertical(values if layer == 0 else v, for_v, v)
            above = above.contiguous(memory_format=torch.channels_last)
            linked = link(above)
            if for_h is not None:
                linked = linked + for_h[:, :, None, None]
            gated = horizontal(values if layer == 0 else h, linked).contiguous(memory_format=torch.channels_last)
            v, h = above, out(gated, residual=h)
        return self.head2(F.relu(self.head1(F.relu(h))))

    def _checked(self, x):
        c = self.shape[0]
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype is torch.bool:
            raise TypeError(f"x must hold integer levels, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != c:
            raise ValueError(f"x must be [n, c, h, w] with c={c}, got {tuple(x.shape)}")
        if x.numel() and not torch.compiler.is_compiling():
            low, high = int(x.min()), int(x.max())
            if low < 0 or high >= self.levels:
                raise ValueError(f"x must be in [0, {self.levels}), got {low if low < 0 else high}")
        return x.long()

    def forward(self, x, cond=None):
        """Levels ``[n, c, h, w]`` -> logits ``[n, levels, c, h, w]``, or the mixture's parameters ``[n, -1, h, w]``."""
        parameters = self.network(self.values(self._checked(x)), cond)
        if self.head == "categorical":
            return parameters.unflatten(1, (self.shape[0], self.levels)).transpose(1, 2)
        return parameters

    def log_prob(self, x, cond=None):
        """Of levels ``[n, c, h, w]``: the exact log-probability of each image in nats, ``[n]``; differentiable."""
        parameters, x = self(x, cond), x.long()
        if self.head == "categorical":
            return -ops.categorical_nll(parameters, x, reduction="image")
        if parameters.dtype in HALVES:  # half types do not tell the levels apart
            parameters = parameters.float()
        return -ops.discretized_logistic_mixture_nll(parameters, self.values(x).to(parameters.dtype), self.num_mixtures,
                                                     levels=self.levels, reduction="image")

    def bits_per_dim(self, x, cond=None):
        """Of each image, ``[n]``: ``-log2 p(x) / (c h w)``."""
        return self.log_prob(x, cond) / (-math.log(2) * max(1, x[0].numel() if len(x) else 1))

    def loss(self, x, cond=None):
        """Mean bits per dimension: what ``fit`` minimises."""
        return self.bits_per_dim(x, cond).mean()

    # samples ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def weights(self, cond=None, n=1):
        """The parameters as :func:`gmkernels.ops.pixelcnn_sample` takes them, for n images with labels cond."""
        vectors = self._gate_vectors(cond, n)
        biases = [torch.stack([m.bias for m in stack])[:, None] for stack in (self.vertical, self.horizontal)]
        if vectors is not None:
            biases = [b + v for b, v in zip(biases, vectors.unbind(1), strict=True)]
        return PixelCNNWeights(
            *(tuple(m.weight for m in stack) for stack in (self.vertical, self.horizontal)),
            *(tuple(m.weight[:, :, 0, 0] for m in stack) for stack in (self.link, self.out)),
            *biases, torch.stack([m.bias for m in self.out]),
            self.head1.weight[:, :, 0, 0], self.head1.bias, self.head2.weight[:, :, 0, 0], self.head2.bias,
        )

    def sample(self, n, *, seed=None, given=None, given_mask=None, temperature=1.0, cond=None, callback=None):
        """n images of levels, int64 ``[n, c, h, w]``, by :func:`gmkernels.ops.pixelcnn_sample`: no Python per pixel.

        Args:
            seed: None, an int, or an int64 tensor ``[n]``: then an image does not depend on its batch.
            given, given_mask: integer and bool ``[n, c, h, w]``: where the mask is True the level is known, and kept.
                A draw from the model's conditional distribution only where the known pixels come first in raster
                order; otherwise a heuristic: a pixel does not see known pixels that come after it.
            temperature: below 1 sharpens; 0 takes the likeliest level of each pixel in turn.
            cond: labels, one or ``[n]``, of a model with classes.
            callback: called with (rows done, rows) while it works.
        """
        n = check_int("n", n, 0, 2**31)
        return pixelcnn_sample(self.weights(cond, n), n, self.shape, levels=self.levels, head=self.head,
                               num_mixtures=self.num_mixtures, temperature=temperature, seed=seed, given=given,
                               given_mask=given_mask, callback=callback)

    def impute(self, x, mask, *, seed=None, temperature=1.0, cond=None):
        """``x`` ``[n, c, h, w]`` where ``mask`` is True (known), drawn elsewhere; ``sample`` says when it is exact."""
        if not isinstance(x, torch.Tensor) or x.shape[1:] != self.shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"x must be [n, c, h, w] with (c, h, w)={self.shape}, got {got}")
        return self.sample(len(x), seed=seed, given=x, given_mask=mask, temperature=temperature, cond=cond)

    @torch.no_grad()
    def check_causality(self):
        """True if no output depends on its own or later pixels (or data channels); RuntimeError naming one that does.

        For every pixel of an image of at most 12 x 12: with NaN in all later pixels nothing that predicts it is NaN,
        and the same bits come out whatever its own later channels hold. Convolutions look the same everywhere, so that
        is enough for every size.
        """
        c, h, w = self.shape[0], min(12, self.shape[1]), min(12, self.shape[2])
        units = c if self.head == "categorical" else 1  # data channels that are predicted one after the other
        pixel, channel = torch.arange(h * w).view(h, w), torch.arange(units).view(-1, 1, 1)
        device = self.head2.weight.device
        cond = None if self.num_classes is None else 0
        if not self.network(torch.zeros(1, c, h, w, device=device), cond).isfinite().all():
            raise RuntimeError("the network's outputs must be finite, got NaN or infinity: are all weights finite?")
        for first in range(0, h * w * units, 64):
            at = torch.arange(first, min(first + 64, h * w * units)).view(-1, 1, 1, 1)
            own, unit = at // units, at % units
            both = []
            for other in (0.25, -0.75):  # in what is not known yet of the own pixel
                hidden = (pixel == own) & (channel >= unit)
                x = torch.where(pixel > own, math.nan, torch.where(hidden, other, 0.5)).expand(-1, c, -1, -1)
                out = self.network(x.to(device), cond).unflatten(1, (units, -1)).cpu()
                both.append(out.movedim(2, -1))
            now = (pixel == own) & (channel == unit)
            wrong = now & ~(both[0].isfinite() & (both[0] == both[1])).all(-1)
            if wrong.any():
                _, g, y, column = wrong.nonzero()[0].tolist()
                raise RuntimeError(f"what predicts data channel {g} of pixel ({y}, {column}) depends on itself or on "
                                   "what comes after it")
        return True

"""Images drawn from a gated PixelCNN, pixel by pixel, each feature computed once."""

import functools
import sys
from dataclasses import dataclass, fields

import torch

from .. import _C
from .._call import Kernel, check_int, has_kernel, split_seed, warn_of_fallback
from .._packed import packed
from ..reference import pixelcnn as _ref
from ..reference.likelihood import KINDS
from .likelihood import check_parametrization, check_temperature
from .random import STREAM_PIXELCNN, philox_uniform

HEADS = ("categorical", "logistic_mixture")  # csrc/pixelcnn/pixelcnn.h: PixelCnnHead
_MOST_KERNEL, _MOST_GROUPS, _SLACK = 63, 16, 64  # kMaxKernel, kMaxGroups, kSlack there
_CHUNK = {"cpu": 4e9, "cuda": 4e12}  # operations of one call: well under a second, so that Ctrl-C is heard

_sample = Kernel("pixelcnn_sample", scratch=4)  # rows of other calls are not written


@dataclass(frozen=True)
class PixelCNNWeights:
    """The parameters of a gated PixelCNN of c data channels, C features, layers 0 .. L and a head C -> E -> outputs.

    Weights have torch's own layouts; taps that the network must not see are there too, and never read. Each tuple has
    L + 1 tensors. All are on one device and of any floating dtype: everything is computed in float32.

    vertical         layer 0 [2C, c, k0, k0], the others [2C, C, k, k]: rows above (layers 1 .. L: and the own row)
    horizontal       layer 0 [2C, c, 1, k0], the others [2C, C, 1, k]: the pixels to the left (and the own one)
    link             [2C, C], a 1x1 convolution from the vertical stack to the horizontal one
    out              [C, C], a 1x1 convolution behind the horizontal gate
    bias_vertical    [L + 1, 1 or n, 2C]: a row for all images, or one for each (a class, folded in)
    bias_horizontal  the same
    bias_out         [L + 1, C]
    head1, bias_head1, head2, bias_head2    [E, C], [E], [outputs, E], [outputs]
    """

    vertical: tuple
    horizontal: tuple
    link: tuple
    out: tuple
    bias_vertical: torch.Tensor
    bias_horizontal: torch.Tensor
    bias_out: torch.Tensor
    head1: torch.Tensor
    bias_head1: torch.Tensor
    head2: torch.Tensor
    bias_head2: torch.Tensor

    def map(self, function):
        """The same with function(tensor) for each tensor."""
        values = (getattr(self, f.name) for f in fields(self))
        return PixelCNNWeights(*(tuple(map(function, v)) if isinstance(v, tuple) else function(v) for v in values))

    def to(self, *args):
        """As torch.Tensor.to, detached."""
        return self.map(lambda t: t.detach().to(*args))


# checks --------------------------------------------------------------------------------------------------------------


def _check_weights(weights, n, channels, outputs):
    """(C, number of layers, E, k0, k); ValueError where a shape does not fit."""
    if not isinstance(weights, PixelCNNWeights):
        raise TypeError(f"weights must be a PixelCNNWeights, got {type(weights).__name__}")
    layers = len(weights.out)
    if layers < 1:
        raise ValueError("weights.out must have at least one layer, got none")
    for name in ("vertical", "horizontal", "link"):
        if len(getattr(weights, name)) != layers:
            raise ValueError(f"weights.{name} must have {layers} layers as weights.out, got "
                             f"{len(getattr(weights, name))}")
    first = weights.out[0]

    def check(name, t, *shape):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"weights.{name} must be a torch.Tensor, got {type(t).__name__}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"weights.{name} must be a floating-point tensor, got {t.dtype}")
        if t.device != first.device:
            raise ValueError(f"weights.{name} is on {t.device}, weights.out[0] on {first.device}; all must be on one "
                             "device")
        sizes = [s if isinstance(s, int) else t.shape[i] if t.dim() == len(shape) else -1 for i, s in enumerate(shape)]
        rows = "rows" not in shape or sizes[1] in (1, n)
        if list(t.shape) != sizes or 0 in sizes[:1] + sizes[1 + ("rows" in shape) :] or not rows:
            either = "1" if n == 1 else f"1 or {n}"
            expected = ", ".join(either if s == "rows" else str(s) for s in shape)
            raise ValueError(f"weights.{name} must be [{expected}], got {tuple(t.shape)}")

    check("out[0]", first, "C", "C")
    features = first.shape[0]
    k = []
    for l in range(layers):
        cin = channels if l == 0 else features
        if l < 2:
            check(f"vertical[{l}]", weights.vertical[l], 2 * features, cin, "k", "k")
            k.append(weights.vertical[l].shape[-1])
            if k[-1] % 2 == 0 or k[-1] > _MOST_KERNEL:
                raise ValueError(f"weights.vertical[{l}] must have an odd kernel size up to {_MOST_KERNEL}, "
                                 f"got {k[-1]}")
        check(f"vertical[{l}]", weights.vertical[l], 2 * features, cin, k[l > 0], k[l > 0])
        check(f"horizontal[{l}]", weights.horizontal[l], 2 * features, cin, 1, k[l > 0])
        check(f"link[{l}]", weights.link[l], 2 * features, features)
        check(f"out[{l}]", weights.out[l], features, features)
    check("bias_vertical", weights.bias_vertical, layers, "rows", 2 * features)
    check("bias_horizontal", weights.bias_horizontal, layers, "rows", 2 * features)
    check("bias_out", weights.bias_out, layers, features)
    check("head1", weights.head1, "E", features)
    hidden = weights.head1.shape[0]
    check("bias_head1", weights.bias_head1, hidden)
    check("head2", weights.head2, outputs, hidden)
    check("bias_head2", weights.bias_head2, outputs)
    return features, layers, hidden, k[0], k[1] if layers > 1 else 1


def _check_images(name, t, shape, device):
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.shape != shape:
        raise ValueError(f"{name} must be [n, c, h, w] = {list(shape)}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, weights on {device}; all must be on one device")


def _check_given(given, mask, shape, levels, device):
    if given is None and mask is None:
        return None, None
    if given is None or mask is None:
        names = ("given", "given_mask") if mask is None else ("given_mask", "given")
        raise ValueError(f"given and given_mask come together, got {names[0]} without {names[1]}")
    _check_images("given", given, shape, device)
    _check_images("given_mask", mask, shape, device)
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype is torch.bool:
        raise TypeError(f"given must hold integer levels, got {given.dtype}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"given_mask must be torch.bool, got {mask.dtype}")
    given = given.detach().resolve_neg().long().contiguous()
    wrong = mask & ((given < 0) | (given >= levels))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"given must be in [0, {levels}) where given_mask is True, got {int(given[at])} at {list(at)}")
    return given, mask.contiguous()


def _check_uniforms(uniforms, shape, device):
    _check_images("uniforms", uniforms, shape, device)
    if not uniforms.dtype.is_floating_point:
        raise TypeError(f"uniforms must be a floating-point tensor, got {uniforms.dtype}")
    u = uniforms.detach().resolve_neg().float().contiguous()
    if not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError("uniforms must be in [0, 1) as float32")
    return u


# packing -------------------------------------------------------------------------------------------------------------


def _groups(channels, groups):
    """[first, end) of each group's channels."""
    ends = [-(-g * channels // groups) for g in range(groups + 1)]
    return list(zip(ends, ends[1:], strict=False))


def _rows(w, features, first, end):
    """Of [layers, 2C, ...]: the outputs [first, end) of both halves."""
    return w if end - first == features else torch.cat((w[:, first:end], w[:, features + first : features + end]), 1)


# A linear map of several layers: (halves, outputs, pieces [layers, halves * outputs, inputs, taps], one behind the
# other along k = (tap, input)). Layers of one shape are packed together: a copy each, not one for each layer.


def _layer_maps(vertical, horizontal, link, out, groups, own_row, points):
    """Of layers [layers, ...]; layer 0 sees neither the own row nor, but for the groups before, the own pixel."""
    features, half = out.shape[1], vertical.shape[-1] // 2
    if own_row and points:  # pairs.h
        left, middle, right = vertical[..., : half + 1, :].float().unbind(-1)
        ends = left + right
        for weights in (left, (ends + middle) / 2, (ends - middle) / 2, right):
            yield 2, features, [weights]
    else:
        yield 2, features, [vertical[..., : half + own_row, :].flatten(3)]
    yield 1, 2 * features, [link[..., None]]
    for g, (first, end) in enumerate(_groups(features, groups)):
        w = _rows(horizontal[:, :, :, 0], features, first, end)
        yield 2, end - first, [w[..., :half], w[:, :, : end if own_row else g, half, None]]
    for first, end in _groups(features, groups):
        yield 1, end - first, [out[:, first:end, :end, None]]


def _head_maps(head1, head2, features, groups):
    groups = zip(*(_groups(c, groups) for c in (features, head1.shape[1], head2.shape[1])), strict=True)
    for (_, feature_end), (first, end), (output, output_end) in groups:
        yield 1, end - first, [head1[:, first:end, :feature_end, None]]
        yield 1, output_end - output, [head2[:, output:output_end, :end, None]]


def _pack(buffer, maps, lanes, words):
    """Maps in the kernel's order, [panel][k][word][lane] (pixelcnn.h), one after the other. Returns the rest."""
    sizes = [halves * -(-outputs // lanes) * lanes * sum(p.shape[2] * p.shape[3] for p in pieces)
             for halves, outputs, pieces in maps]
    layers, size, at = maps[0][2][0].shape[0], sum(sizes), 0
    block = buffer[: layers * size].view(layers, size)
    for halves, outputs, pieces in maps:
        pieces = [p.unflatten(1, (halves, outputs)).permute(0, 4, 3, 1, 2) for p in pieces]
        k = sum(p.shape[1] * p.shape[2] for p in pieces)
        width, first = max(1, words // halves) * lanes, 0
        while first < outputs:  # the whole panels at once, then what is left
            panels = (outputs - first) // width or 1
            padded = min(width, -(-(outputs - first) // lanes) * lanes)
            count = min(panels * padded, outputs - first)
            end, row = at + panels * k * halves * padded, 0
            to = block[:, at:end].view(layers, panels, k, halves, padded)[..., : count // panels]
            for p in pieces:
                rows = p.shape[1] * p.shape[2]
                source = p[..., first : first + count].unflatten(-1, (panels, -1)).movedim(-2, 1)
                to[:, :, row : row + rows].unflatten(2, p.shape[1:3]).copy_(source)
                row += rows
            first, at = first + count, end
    return buffer[layers * size :]


def _pack_weights(weights, groups, count, lanes, words, points):
    buffer = rest = torch.zeros(count, dtype=torch.float32, device=weights.out[0].device)
    layers, features = len(weights.out), weights.out[0].shape[0]
    for first, end in ((0, 1), (1, layers)):
        if first < end:
            of = (weights.vertical, weights.horizontal, weights.link, weights.out)
            stacked = (torch.stack([w.detach() for w in each[first:end]]) for each in of)
            rest = _pack(rest, list(_layer_maps(*stacked, groups, first, points)), lanes, words)
    heads = (weights.head1.detach()[None], weights.head2.detach()[None])
    _pack(rest, list(_head_maps(*heads, features, groups)), lanes, words)
    return buffer


def _biases(weights):
    names = ("bias_vertical", "bias_horizontal", "bias_out", "bias_head1", "bias_head2")
    parts = [getattr(weights, name).detach().float().flatten() for name in names]
    return torch.cat([*parts, parts[0].new_zeros(_SLACK)])


# the call ------------------------------------------------------------------------------------------------------------


def _run(weights, sizes, outputs_wanted, random, given, head, callback):
    """The kernel, in calls of some rows."""
    n, c, h, w, levels, features, layers, hidden, outputs, groups, *_ = sizes
    device = weights.out[0].device
    cuda = device.type == "cuda" or Kernel.backend is not None
    panel = _C.pixelcnn_panel(cuda, sizes[-1], w)
    sizes = (*sizes, *panel)
    numbers = _C.pixelcnn_memory(sizes, cuda)
    drawn = torch.empty((n, c, h, w), dtype=torch.int64, device=device)
    logits = torch.empty((n, outputs, h, w), device=device) if outputs_wanted else None
    bad = torch.zeros(n, dtype=torch.int64, device=device)
    workspace = torch.zeros(numbers[1], device=device)
    values = _ref.image_values(levels, torch.float32, device)
    maps = *weights.vertical, *weights.horizontal, *weights.link, *weights.out, weights.head1, weights.head2
    kept = packed(("pixelcnn_sample", sizes[1:], device), maps)
    if kept.buffer is None:
        kept.buffer = _pack_weights(weights, groups, numbers[0], *panel)
    biases = _biases(weights)
    uniforms, seeds, seed, temperature = random
    kind, mixtures = head[1:]
    seed_rows = 1 if seeds is None or not seeds.dim() else n
    seeds = None if seeds is None else seeds.resolve_neg().contiguous()
    rows = (weights.bias_vertical.shape[1], weights.bias_horizontal.shape[1])
    step = max(1, min(h, int(_CHUNK["cuda" if device.type == "cuda" else "cpu"] / (2.0 * n * w * numbers[0]))))
    if callback is not None:
        step = min(step, -(-h // 8))
    for y in range(0, h, step):
        _sample((drawn, logits, bad, workspace),
                (bad, workspace, kept.buffer, biases, values, uniforms, *given, seeds),
                sizes, (*rows, y, min(h, y + step)), numbers, seed_rows, seed & (2**64 - 1), mixtures, temperature,
                HEADS.index(head[0]), kind)
        if callback is not None:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            callback(min(h, y + step), h)
    return drawn, logits, bad


def _not_traced(function):
    """torch.compiler.disable, which would import torch._dynamo (1.5 s) where nobody compiles."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        dynamo = sys.modules.get("torch._dynamo")
        return (function if dynamo is None else dynamo.disable(function))(*args, **kwargs)

    return call


@_not_traced
@torch.no_grad()
def pixelcnn_sample(weights, n, shape, *, levels=256, head="categorical", num_mixtures=10, parametrization="openai",
                    groups=None, temperature=1.0, seed=None, uniforms=None, given=None, given_mask=None, callback=None,
                    return_logits=False):
    r"""Images drawn from a gated PixelCNN: all pixels in one call, each feature of the network computed once.

    The network, with ``gate(z) = tanh(z[:C]) sigmoid(z[C:])`` and zero padding::

        v_0 = gate(conv[k0 x k0, rows above](x) + bias_v[0])
        v_l = v_{l-1} + gate(conv[k x k, rows above and the own row](v_{l-1}) + bias_v[l])
        a_0 = gate(conv[1 x k0, left](x) + link_0 v_0 + bias_h[0])
        a_l = gate(conv[1 x k, left and the own pixel](h_{l-1}) + link_l v_l + bias_h[l])
        h_l = [h_{l-1} +] out_l a_l + bias_o[l]
        y   = head2(relu(head1(relu(h_L))))

    x is the image, level i as ``2 i / (levels - 1) - 1``. A full forward pass for every pixel gives the same images;
    this keeps the rows and pixels that the kernels reach (Ramachandran et al.), so all pixels together cost about as
    much as one forward pass.

    Args:
        weights: :class:`PixelCNNWeights`. float64 and half types are computed in float32. No gradients.
        n: number of images. 0 gives empty tensors.
        shape: ``(c, h, w)``: data channels (1 to 16; the mixture head 1 or 3), height, width.
        levels: values of a data channel.
        head: what the outputs mean. ``"categorical"``: ``[c][levels]`` logits. ``"logistic_mixture"``: the parameters
            of :func:`discretized_logistic_mixture_sample` with ``num_mixtures`` and ``parametrization``.
        groups: 1 or c. With c groups (the default of the categorical head) channel i of C features, and of E, is of
            group ``i c // C``; at the own pixel, in out and in the head, group g sees the groups up to g, in layer 0
            the data channels before g; data channel g is drawn from what group g says. With one group all channels of
            a pixel are drawn at once, from what is known of other pixels.
        temperature: divides the logits (and multiplies the scales of the mixture). 0: the largest logit, the first of
            equals; of the mixture the means of the likeliest component.
        seed: ``None`` draws one from torch's default generator; an int counts over all images; an int64 tensor ``[n]``
            counts within each image, which then does not depend on its batch. Categorical: ``uniforms`` are
            ``philox_uniform((n, c, h, w), seed, stream=11)``. Mixture: the numbers, and so the pixels, of
            ``discretized_logistic_mixture_sample(outputs, seed=seed)``.
        uniforms: ``[n, c, h, w]`` in [0, 1), instead of a seed (categorical): a sub-pixel is the first level whose
            cumulative softmax exceeds its number.
        given, given_mask: integers and bools ``[n, c, h, w]``: where the mask is True the image keeps this level, and
            what is drawn later sees it. Pixels drawn earlier do not.
        callback: ``callback(rows_done, rows)``, called about eight times or more.
        return_logits: return the outputs that the pixels were drawn from, too.

    Returns: int64 levels ``[n, c, h, w]``; with ``return_logits`` also float32 ``[n, outputs, h, w]``.
    The same bits for any number of threads and, with a seed per image, any batch, on one instruction set. Other ones,
    and CUDA, round sums otherwise: their pixels differ where a number is within rounding of the boundary of two levels.

    Errors: ``ValueError`` for shapes, ranges and options, and afterwards where the outputs of an image have a NaN or
    +inf or nothing above -inf (for the mixture, as its sampler): it names the first such image. ``TypeError`` for
    dtypes.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", NeurIPS 2016; Ramachandran et
    al., "Fast Generation for Convolutional Autoregressive Models", 2017, arXiv 1704.06001.
    """
    n = check_int("n", n, 0, 2**31)
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 3:
        raise ValueError(f"shape must be (c, h, w), got {shape!r}")
    c = check_int("shape[0]", shape[0], 1, _MOST_GROUPS + 1)
    h, w = check_int("shape[1]", shape[1], 1, 2**31), check_int("shape[2]", shape[2], 1, 2**31)
    levels = check_int("levels", levels, 2, 2**23)
    if head not in HEADS:
        raise ValueError(f'head must be "categorical" or "logistic_mixture", got {head!r}')
    categorical = head == "categorical"
    check_parametrization(parametrization)
    num_mixtures = check_int("num_mixtures", num_mixtures, 1, 513)
    if not categorical and c not in (1, 3):
        raise ValueError(f"shape must have 1 or 3 data channels for the logistic mixture, got {c}")
    groups = (c if categorical else 1) if groups is None else check_int("groups", groups, 1, _MOST_GROUPS + 1)
    if groups not in ((1, c) if categorical else (1,)):
        raise ValueError(f"groups must be {f'1 or {c}' if categorical and c > 1 else 1} for {c} data channels and the "
                         f"{head} head, got {groups}")
    temperature = check_temperature(temperature)
    outputs = c * levels if categorical else num_mixtures * (10 if c == 3 else 3)
    features, layers, hidden, k0, k = _check_weights(weights, n, c, outputs)
    device, images = weights.out[0].device, (n, c, h, w)
    given, given_mask = _check_given(given, given_mask, images, levels, device)
    seeds, number = None, 0
    if uniforms is not None:
        if seed is not None or not categorical:
            raise ValueError("uniforms are for the categorical head, in place of a seed, got "
                             + ("both" if categorical else f"head={head!r}"))
        uniforms = _check_uniforms(uniforms, images, device)
    elif categorical and temperature > 0:
        uniforms = philox_uniform(images, seed, stream=STREAM_PIXELCNN, device=device)
    elif not categorical:
        seeds, number = split_seed(seed, device, n)
        if seeds is not None and seeds.device != device:
            raise ValueError(f"seed is on {seeds.device}, weights on {device}; both must be on one device")
    if n == 0:
        drawn = torch.empty(images, dtype=torch.int64, device=device)
        logits = torch.empty((0, outputs, h, w), device=device)
        return (drawn, logits) if return_logits else drawn
    if has_kernel(_sample, device.type):
        sizes = (*images, levels, features, layers, hidden, outputs, groups, k0, k)
        drawn, logits, bad = _run(weights, sizes, return_logits, (uniforms, seeds, number, temperature),
                                  (given, given_mask), (head, KINDS.index(parametrization), num_mixtures), callback)
    else:
        warn_of_fallback("pixelcnn_sample", f"no kernel for {device.type} in this build")
        drawn, logits, bad = _ref.pixelcnn_sample(
            weights, n, (c, h, w), levels, head, num_mixtures, parametrization, groups, temperature, seeds, number,
            uniforms, given, given_mask, torch.float32)
    if bad.any():
        raise ValueError(f"the network's outputs for image {int(bad.nonzero()[0, 0])} are not a distribution: NaN, "
                         "+inf or nothing above -inf (are all weights finite?)")
    return (drawn, logits) if return_logits else drawn

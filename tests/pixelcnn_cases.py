"""A small gated PixelCNN with random weights, and its oracle in float64."""

import torch

import cases
from gmkernels import _C, ops, reference

SAMPLE = ops.pixelcnn_sample


def network(c=1, features=16, layers=2, k0=3, k=3, hidden=8, outputs=4, rows=1, device="cpu", dtype=torch.float32,
            scale=1.5, seed=0):
    """Live and dead taps are alike: a kernel that reads a dead one draws other images."""
    count = 0

    def w(*shape):
        nonlocal count
        count += 1
        fan_in = max(1, torch.Size(shape[1:]).numel() // 2)
        return (scale * cases.data(*shape, seed=1000 * seed + count) / fan_in**0.5).to(device, dtype)

    def kernels(cin0, high):
        return tuple(w(2 * features, features if l else cin0, *((s, s) if high else (1, s)))
                     for l, s in enumerate([k0] + [k] * (layers - 1)))

    return ops.PixelCNNWeights(
        vertical=kernels(c, True),
        horizontal=kernels(c, False),
        link=tuple(w(2 * features, features) for _ in range(layers)),
        out=tuple(w(features, features) for _ in range(layers)),
        bias_vertical=w(layers, rows, 2 * features),
        bias_horizontal=w(layers, rows, 2 * features),
        bias_out=w(layers, features),
        head1=w(hidden, features),
        bias_head1=w(hidden),
        head2=w(outputs, hidden),
        bias_head2=w(outputs),
    )


def on(device, weights):
    return weights.to(device.torch)


def uniforms(n, c, h, w, seed=0):
    return ops.philox_uniform((n, c, h, w), seed=seed, stream=300)


def oracle(weights, n, shape, levels, **options):
    """Levels and float64 outputs of the reference; what it is given is moved to the CPU."""
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    weights, threads = weights.to("cpu", torch.float64), torch.get_num_threads()
    torch.set_num_threads(1)  # many small convolutions: on a busy machine the others are waited for
    try:
        drawn, outputs, bad = reference.pixelcnn.pixelcnn_sample(weights, n, shape, levels, **options)
    finally:
        torch.set_num_threads(threads)
    assert not bad.any()
    return drawn, outputs


def margin(outputs, u, levels, temperature=1.0):
    """How far the uniforms are from the boundaries of the levels: float32 sums must not decide."""
    n, c, h, w = u.shape
    p = torch.softmax(outputs.view(n, c, levels, h, w) / temperature, 2)
    return (p.cumsum(2)[:, :, :-1] - u.double()[:, :, None]).abs().min().item()


def expected(weights, n, shape, levels, u, temperature=1.0, **options):
    want, outputs = oracle(weights, n, shape, levels, uniforms=u, temperature=temperature, **options)
    assert temperature == 0 or margin(outputs, u, levels, temperature) > 1e-5
    return want, outputs


def check(device, weights, n, shape, levels, u, want=None, given=None, given_mask=None, groups=1, **options):
    """Pixels equal the oracle's, outputs are near."""
    images = {"given": given, "given_mask": given_mask}
    want, outputs = want or expected(weights, n, shape, levels, u, groups=groups, **images, **options)
    images["uniforms"] = None if options.get("temperature") == 0 else u
    images = {name: None if t is None else t.to(device.torch) for name, t in images.items()}
    got, logits = SAMPLE(on(device, weights), n, shape, levels=levels, groups=groups, return_logits=True, **images,
                         **options)
    assert got.dtype is torch.int64 and logits.dtype is torch.float32
    assert torch.equal(got.cpu(), want)
    cases.close(logits, outputs, rtol=2e-5, atol=2e-5)
    return got.cpu()


def check_isas(weights, n, shape, levels, u, groups=1, **options):
    want = expected(weights, n, shape, levels, u, groups=groups)
    for isa in _C.isas():
        _C.set_isa(isa)
        check(cases.Device("cpu"), weights, n, shape, levels, u, groups=groups, want=want, **options)


def same(weights, n, shape, levels, u, want, **options):
    got = SAMPLE(weights, n, shape, levels=levels, uniforms=u, return_logits=True, **options)
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

"""ops.pixelcnn_sample against one forward pass per pixel: both heads, groups, conditioning, what is given, all bits."""

import math
import re
from dataclasses import replace

import pytest
import torch
from scipy import stats

import cases
from gmkernels import _C, _call, ops, reference
from pixelcnn_cases import SAMPLE, check, check_isas, network, on, oracle, same, uniforms

TINY = {"features": 4, "hidden": 5, "layers": 2}  # the emulator's share


# the reference is the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_the_reference_is_causal(groups):
    """Outputs at a pixel change with pixels before it, not with later ones; of group g with data channels before g."""
    w, levels = network(c=3, features=13, layers=3, k0=5, hidden=14, outputs=12).to("cpu", torch.float64), 4
    x = cases.data(1, 3, 4, 4)
    moved = x + torch.eye(48, dtype=torch.float64).view(48, 3, 4, 4)
    change = (reference.pixelcnn.forward(w, moved, groups) - reference.pixelcnn.forward(w, x, groups)).abs() > 1e-12
    change = change.view(3, 16, 3, levels, 16).any(3).permute(2, 0, 3, 1)  # [group, channel, pixel, of pixel]
    assert not change[:, :, torch.ones(16, 16).triu(1).bool()].any()
    for g in range(3):
        for channel in range(3):
            assert change[g, channel].diagonal(-1).any()
            assert bool(change[g, channel].diagonal().any()) is (groups > 1 and channel < g)


# pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, c, features, layers, k0, k, hidden, levels, h, w, groups", [
    (2, 1, 4, 2, 3, 3, 5, 3, 3, 3, 1),
    (1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1),  # sees nothing at all
    (1, 3, 5, 2, 3, 3, 4, 2, 2, 3, 3),  # groups of unequal size
    (2, 3, 2, 2, 3, 1, 1, 3, 2, 2, 3),  # a group without features
    (1, 2, 3, 1, 5, 1, 3, 2, 2, 2, 1),  # all channels of a pixel at once
])
def test_pixels(device, n, c, features, layers, k0, k, hidden, levels, h, w, groups):
    weights = network(c, features, layers, k0, k, hidden, c * levels)
    check(device, weights, n, (c, h, w), levels, uniforms(n, c, h, w), groups=groups)


@pytest.mark.parametrize("n, c, features, layers, k0, k, hidden, levels, h, w, groups", [
    (3, 1, 16, 3, 7, 3, 33, 16, 7, 5, 1),
    (7, 1, 32, 2, 3, 5, 16, 17, 3, 4, 1),
    (2, 3, 48, 2, 5, 3, 47, 33, 3, 3, 3),
    (13, 1, 17, 4, 1, 3, 64, 256, 2, 2, 1),
    (1, 1, 67, 2, 3, 7, 65, 5, 2, 11, 1),
    (2, 4, 34, 3, 9, 3, 9, 7, 2, 3, 4),
    (50, 1, 5, 2, 3, 3, 3, 4, 2, 2, 1),
])
def test_pixels_of_larger_networks(n, c, features, layers, k0, k, hidden, levels, h, w, groups):
    weights = network(c, features, layers, k0, k, hidden, c * levels)
    check_isas(weights, n, (c, h, w), levels, uniforms(n, c, h, w, seed=1), groups=groups)


def test_a_row_of_biases_for_each_image(device):
    weights = network(**TINY, rows=3, outputs=3)
    check(device, weights, 3, (1, 2, 2), 3, uniforms(3, 1, 2, 2))
    one = replace(weights, bias_horizontal=weights.bias_horizontal[:, :1])
    check(device, one, 3, (1, 2, 2), 3, uniforms(3, 1, 2, 2))


@pytest.mark.parametrize("temperature", [0, 0.3, 2.0])
def test_temperature(device, temperature):
    weights = network(**TINY, outputs=4)
    check(device, weights, 2, (1, 3, 2), 4, uniforms(2, 1, 3, 2, seed=2), temperature=temperature)


def test_temperature_0_is_the_first_of_equals(device):
    weights = network(**TINY, outputs=5)
    flat = replace(weights, head2=torch.zeros_like(weights.head2), bias_head2=torch.tensor([0.0, 1, 2, 2, 1]))
    got = SAMPLE(on(device, flat), 1, (1, 2, 2), levels=5, temperature=0)
    assert (got == 2).all()
    for t in (1e-300, 1e300):
        assert SAMPLE(on(device, flat), 1, (1, 1, 1), levels=5, temperature=t, seed=0).item() in (2, 3) or t > 1


@pytest.mark.parametrize("groups", [1, 3])
def test_given(device, groups):
    """Known sub-pixels stay, and the others see them."""
    c, levels, n, h, w = 3 if groups > 1 else 1, 3, 2, 2, 3
    weights = network(c, 4, 2, hidden=4, outputs=c * levels)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, c, h, w, generator=generator) < 0.5
    given = torch.randint(0, levels, (n, c, h, w), generator=generator)
    got = check(device, weights, n, (c, h, w), levels, uniforms(n, c, h, w), given=torch.where(mask, given, -7),
                given_mask=mask, groups=groups)
    assert torch.equal(got[mask], given[mask])
    u = uniforms(n, c, h, w)
    with cases.cpu_kernels():
        free = SAMPLE(weights, n, (c, h, w), levels=levels, uniforms=u)
        nothing = SAMPLE(weights, n, (c, h, w), levels=levels, uniforms=u, given=given, given_mask=mask & ~mask)
        again = SAMPLE(weights, n, (c, h, w), levels=levels, uniforms=u, given=got.int(), given_mask=mask)
    assert torch.equal(free, nothing) and not torch.equal(free, got) and torch.equal(again, got)


# the mixture ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai", "tfp"])
@pytest.mark.parametrize("c", [1, 3])
def test_mixture(device, kind, c):
    """One forward pass on the finished images, and the sampler of the likelihood, give the same images."""
    m, levels, n, h, w = 2, 8, 2, 2, 3
    outputs = m * (10 if c == 3 else 3)
    weights = network(c, **TINY, outputs=outputs, scale=0.6)
    for seed, temperature in ((3, 1.0), (torch.tensor([5, -6]), 2.0), (torch.tensor(4), 0.0)):
        seed = seed.to(device.torch) if isinstance(seed, torch.Tensor) else seed
        got, params = SAMPLE(on(device, weights), n, (c, h, w), levels=levels, head="logistic_mixture", num_mixtures=m,
                             parametrization=kind, seed=seed, temperature=temperature, return_logits=True)
        x = ops.discretized_logistic_mixture_sample(params, m, seed=seed, temperature=temperature, parametrization=kind,
                                                    low=0, high=levels - 1, levels=levels)
        assert torch.equal(x.long().cpu(), got.cpu())
        values = reference.pixelcnn.image_values(levels)[got.cpu()]
        cases.close(params, reference.pixelcnn.forward(weights, values), rtol=2e-5, atol=2e-5)
        assert temperature == 0 or got.unique().numel() > 1


def test_mixture_with_given_channels(device):
    m, levels, n, shape = 2, 8, 2, (3, 2, 2)
    weights = network(3, **TINY, outputs=10 * m)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(n, *shape, generator=generator) < 0.4
    mask[:, 0, 0, 0] = True  # a first channel that the others of its pixel see
    mask[:, 1:, 0, 0] = False
    given = torch.randint(0, levels, (n, *shape), generator=generator)
    want, _ = oracle(weights, n, shape, levels, head="logistic_mixture", num_mixtures=m, seed=9, given=given,
                     given_mask=mask)
    got = SAMPLE(on(device, weights), n, shape, levels=levels, head="logistic_mixture", num_mixtures=m, seed=9,
                 given=given.to(device.torch), given_mask=mask.to(device.torch))
    assert torch.equal(got.cpu(), want)


# numbers -------------------------------------------------------------------------------------------------------------


def test_seeds(device):
    weights, shape = on(device, network(**TINY, outputs=4)), (1, 2, 2)
    for seed in (5, torch.tensor([7, 8, 9], device=device.torch)):
        u = ops.philox_uniform((3, *shape), seed=seed, stream=11, device=device.torch)
        got = SAMPLE(weights, 3, shape, levels=4, seed=seed)
        assert torch.equal(got, SAMPLE(weights, 3, shape, levels=4, uniforms=u))
    assert torch.equal(got[1:], SAMPLE(weights, 2, shape, levels=4, seed=seed[1:]))
    torch.manual_seed(3)
    first, second = (SAMPLE(weights, 9, shape, levels=4) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, SAMPLE(weights, 9, shape, levels=4)) and not torch.equal(first, second)


def test_every_value_is_drawn_as_often_as_the_network_says():
    """All images of two pixels with three levels, by chi-square."""
    levels, n = 3, 60_000
    weights = network(features=5, layers=2, hidden=6, outputs=levels, scale=0.7)
    got = SAMPLE(weights, n, (1, 1, 2), levels=levels, seed=4).flatten(1)
    every = torch.cartesian_prod(torch.arange(levels), torch.arange(levels))
    x = reference.pixelcnn.image_values(levels)[every].view(-1, 1, 1, 2)
    log_p = torch.log_softmax(reference.pixelcnn.forward(weights, x), 1)[:, :, 0]
    p = torch.exp(log_p.gather(1, every[:, None]).sum((1, 2)))
    assert p.sum().item() == pytest.approx(1, abs=1e-12) and (p * n).min() > 5
    counts = torch.bincount(got[:, 0] * levels + got[:, 1], minlength=levels**2).double()
    assert stats.chisquare(counts.numpy(), (p * n).numpy()).pvalue > 1e-3


def test_forbidden_levels_are_never_drawn(device):
    weights = network(**TINY, outputs=4)
    bias = weights.bias_head2.clone()
    bias[[0, 3]] = -math.inf
    u = torch.zeros(2, 1, 2, 2)
    u[1] = 1 - 2.0**-24
    got = SAMPLE(on(device, replace(weights, bias_head2=bias)), 2, (1, 2, 2), levels=4, uniforms=u.to(device.torch))
    assert (got[0] == 1).all() and (got[1] == 2).all()


# the same bits -------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_no_other_one_and_on_no_thread(isa):
    n, shape, levels = 59, (1, 4, 5), 16
    weights, u = network(features=20, layers=3, hidden=24, outputs=16, rows=n), uniforms(n, *shape)
    torch.set_num_threads(1)
    want = SAMPLE(weights, n, shape, levels=levels, uniforms=u, return_logits=True)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert same(weights, n, shape, levels, u, want)
    for first, end in ((0, 1), (3, 5), (7, 13), (20, 59)):
        some = replace(weights, bias_vertical=weights.bias_vertical[:, first:end],
                       bias_horizontal=weights.bias_horizontal[:, first:end])
        assert same(some, end - first, shape, levels, u[first:end], [t[first:end] for t in want])


def test_an_image_does_not_depend_on_its_batch(device):
    weights, u = on(device, network(**TINY, outputs=3)), uniforms(5, 1, 2, 2).to(device.torch)
    want = SAMPLE(weights, 5, (1, 2, 2), levels=3, uniforms=u, return_logits=True)
    for first, end in ((0, 1), (2, 5)):
        assert same(weights, end - first, (1, 2, 2), 3, u[first:end], [t[first:end] for t in want])


def test_chunks_of_rows(device, monkeypatch):
    from gmkernels.ops import pixelcnn

    weights, u = on(device, network(**TINY, k0=5, outputs=3)), uniforms(2, 1, 5, 2).to(device.torch)
    want = SAMPLE(weights, 2, (1, 5, 2), levels=3, uniforms=u, return_logits=True)
    seen = []
    assert same(weights, 2, (1, 5, 2), 3, u, want, callback=lambda *rows: seen.append(rows))
    assert seen == [(y, 5) for y in range(1, 6)]
    monkeypatch.setattr(pixelcnn, "_CHUNK", {"cpu": 1.0, "cuda": 1.0})
    assert same(weights, 2, (1, 5, 2), 3, u, want)


def test_the_workspace_lives_across_rows_of_a_tall_image():
    check_isas(network(features=3, layers=3, k0=5, k=5, hidden=3, outputs=2), 2, (1, 17, 2), 2, uniforms(2, 1, 17, 2),
               callback=lambda *rows: None)


def test_a_pixel_does_not_depend_on_later_ones(device):
    """Whatever is given there."""
    weights, u = on(device, network(**TINY, outputs=3)), uniforms(1, 1, 3, 3).to(device.torch)
    want = SAMPLE(weights, 1, (1, 3, 3), levels=3, uniforms=u)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool, device=device.torch)
    mask[..., 1, 1] = True
    got = SAMPLE(weights, 1, (1, 3, 3), levels=3, uniforms=u, given=(want + 1) % 3, given_mask=mask)
    assert torch.equal(got.flatten()[:4], want.flatten()[:4]) and got[0, 0, 1, 1] == (want[0, 0, 1, 1] + 1) % 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_computed_in_float32(dtype):
    weights, u = network(outputs=4, dtype=dtype), uniforms(2, 1, 3, 3)
    want = SAMPLE(weights.to(torch.float32), 2, (1, 3, 3), levels=4, uniforms=u, return_logits=True)
    assert same(weights, 2, (1, 3, 3), 4, u, want)
    assert not SAMPLE(weights.map(lambda t: t.requires_grad_()), 2, (1, 3, 3), levels=4).requires_grad


def test_dead_taps_are_never_read(device):
    weights = network(c=2, features=4, k0=3, k=3, hidden=4, outputs=4)
    u = uniforms(2, 2, 2, 2)
    want = SAMPLE(weights, 2, (2, 2, 2), levels=2, uniforms=u)
    spoilt = weights.map(torch.clone)
    for l, (v, h) in enumerate(zip(spoilt.vertical, spoilt.horizontal, strict=True)):
        v[:, :, 1 + (l > 0) :] = math.nan
        h[..., 2:] = math.nan
        rows = torch.arange(8) % 4 // 2  # group of an output
        h[:, :, 0, 1][rows[:, None] < torch.arange(h.shape[1]) * 2 // h.shape[1] + (l == 0)] = math.nan
        spoilt.out[l][:2, 2:] = math.nan
    spoilt.head1[:2, 2:] = math.nan
    spoilt.head2[:2, 2:] = math.nan
    assert torch.equal(SAMPLE(on(device, spoilt), 2, (2, 2, 2), levels=2, uniforms=u.to(device.torch)).cpu(), want)


# NaN, empty, errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head, outputs", [("categorical", 3), ("logistic_mixture", 3)])
def test_not_a_distribution(device, head, outputs):
    options = {"head": head, "num_mixtures": 1, "levels": 3}
    weights = network(**TINY, rows=3, outputs=outputs)
    bias = weights.bias_horizontal.clone()
    bias[1, 1] = math.nan
    broken = on(device, replace(weights, bias_horizontal=bias))
    with pytest.raises(ValueError, match="outputs for image 1 are not a distribution: NaN, \\+inf or nothing above"):
        SAMPLE(broken, 3, (1, 2, 2), seed=0, **options)
    with pytest.raises(ValueError, match="outputs for image 1"):
        SAMPLE(broken, 3, (1, 2, 2), seed=0, temperature=0, **options)
    for value in (math.inf, -math.inf):
        infinite = replace(weights, bias_head2=torch.full((3,), value))
        with pytest.raises(ValueError, match="outputs for image 0"):
            SAMPLE(on(device, infinite), 3, (1, 2, 2), seed=0, **options)
    known = torch.zeros(3, 1, 2, 2, dtype=torch.int64, device=device.torch)
    assert (SAMPLE(broken, 3, (1, 2, 2), seed=0, given=known, given_mask=known == 0, **options) == 0).all()


def test_no_images(device):
    weights = on(device, network(outputs=3))
    got, logits = SAMPLE(weights, 0, (1, 4, 5), levels=3, seed=0, return_logits=True)
    assert got.shape == (0, 1, 4, 5) and got.dtype is torch.int64 and logits.shape == (0, 3, 4, 5)


def test_huge_memory_that_nobody_has():
    with pytest.raises((MemoryError, RuntimeError)):
        SAMPLE(network(features=1, layers=1, hidden=1, outputs=2), 1, (1, 2**20, 2**30), levels=2, temperature=0)


def _change(name, t, index=None):
    weights = network(**TINY, outputs=3)
    if index is None:
        return {"weights": replace(weights, **{name: t})}
    return {"weights": replace(weights, **{name: (*getattr(weights, name)[:index], t)})}


ZEROS = torch.zeros


@pytest.mark.parametrize("change, kind, message", [
    ({"weights": None}, TypeError, "weights must be a PixelCNNWeights, got NoneType"),
    ({"n": -1}, ValueError, "n must be in [0, 2147483648), got -1"),
    ({"shape": (2, 2)}, ValueError, "shape must be (c, h, w), got (2, 2)"),
    ({"shape": (1, 0, 2)}, ValueError, "shape[1] must be in [1, "),
    ({"levels": 1}, ValueError, "levels must be in [2, 8388608), got 1"),
    ({"levels": 4}, ValueError, "weights.head2 must be [4, 5], got (3, 5)"),
    ({"head": "softmax"}, ValueError, "head must be \"categorical\" or \"logistic_mixture\", got 'softmax'"),
    ({"parametrization": "classic"}, ValueError, "parametrization must be \"openai\" or \"tfp\", got 'classic'"),
    ({"groups": 2}, ValueError, "groups must be 1 for 1 data channels and the categorical head, got 2"),
    ({"head": "logistic_mixture", "shape": (2, 2, 2)}, ValueError, "shape must have 1 or 3 data channels"),
    ({"temperature": -0.1}, ValueError, "temperature must be in [0, inf), got -0.1"),
    ({"temperature": math.nan}, ValueError, "temperature must be in [0, inf), got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a float, got str"),
    ({"temperature": True}, TypeError, "temperature must be a float, got bool"),
    ({"seed": torch.arange(3)}, ValueError, "seed must have shape [] or [2], got (3,)"),
    ({"seed": 1, "uniforms": ZEROS(2, 1, 2, 2)}, ValueError, "uniforms are for the categorical head, in place of"),
    ({"uniforms": ZEROS(2, 1, 2)}, ValueError, "uniforms must be [n, c, h, w] = [2, 1, 2, 2], got (2, 1, 2)"),
    ({"uniforms": torch.ones(2, 1, 2, 2)}, ValueError, "uniforms must be in [0, 1)"),
    ({"given": ZEROS(2, 1, 2, 2).long()}, ValueError, "given and given_mask come together, got given without"),
    ({"given": ZEROS(2, 1, 2, 2), "given_mask": ZEROS(2, 1, 2, 2).bool()}, TypeError, "given must hold integer levels"),
    ({"given": ZEROS(2, 1, 2, 2).long() + 3, "given_mask": torch.ones(2, 1, 2, 2).bool()}, ValueError,
     "given must be in [0, 3) where given_mask is True, got 3 at [0, 0, 0, 0]"),
    ({"given": ZEROS(2, 1, 2, 2).long(), "given_mask": ZEROS(2, 1, 2, 2)}, TypeError, "given_mask must be torch.bool"),
    (_change("link", ZEROS(8, 5), 1), ValueError, "weights.link[1] must be [8, 4], got (8, 5)"),
    (_change("vertical", ZEROS(8, 4, 4, 4), 1), ValueError, "weights.vertical[1] must have an odd kernel size up to"),
    (_change("vertical", ZEROS(8, 4, 3, 5), 1), ValueError, "weights.vertical[1] must be [8, 4, "),
    (_change("horizontal", ZEROS(8, 4, 1, 5), 1), ValueError, "weights.horizontal[1] must be [8, 4, 1, 3]"),
    (_change("out", ()), ValueError, "weights.out must have at least one layer, got none"),
    (_change("link", ()), ValueError, "weights.link must have 2 layers as weights.out, got 0"),
    (_change("bias_vertical", ZEROS(2, 3, 8)), ValueError, "weights.bias_vertical must be [2, 1 or 2, 8], got (2, 3"),
    (_change("head1", ZEROS(5, 4).int()), TypeError, "weights.head1 must be a floating-point tensor, got torch.int32"),
    (_change("bias_head1", [0.0] * 5), TypeError, "weights.bias_head1 must be a torch.Tensor, got list"),
])
def test_errors(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        SAMPLE(**({"weights": network(**TINY, outputs=3), "n": 2, "shape": (1, 2, 2), "levels": 3} | change))


def test_weights_for_another_instruction_set_are_refused():
    from gmkernels.ops import pixelcnn

    if len(_C.isas()) < 2:
        pytest.skip("there is one")
    isa = _C.isa()

    def other(*_):
        _C.set_isa(next(name for name in _C.isas() if name != isa))

    with pytest.raises(RuntimeError, match="packed for another instruction set"):
        pixelcnn.pixelcnn_sample(network(outputs=2), 1, (1, 2, 2), levels=2, callback=other)


def test_under_torch_compile_it_is_a_call_like_any_other():
    weights, u = network(**TINY, outputs=3), uniforms(2, 1, 2, 2)

    def twice(u):
        return 2 * SAMPLE(weights, 2, (1, 2, 2), levels=3, uniforms=u * 1.0)

    assert torch.equal(torch.compile(twice, backend="eager")(u), twice(u))


def test_reference_where_there_is_no_kernel(monkeypatch):
    weights, u = network(**TINY, outputs=3), uniforms(2, 1, 2, 2)
    want = SAMPLE(weights, 2, (1, 2, 2), levels=3, uniforms=u)
    monkeypatch.setitem(SAMPLE.__globals__, "has_kernel", lambda kernel, kind: False)
    monkeypatch.setattr(_call, "_warned", set())
    with pytest.warns(UserWarning, match="pixelcnn_sample: no kernel for cpu in this build; running the") as caught:
        for _ in range(2):
            assert torch.equal(SAMPLE(weights, 2, (1, 2, 2), levels=3, uniforms=u), want)
    assert len(caught) == 1
    monkeypatch.setenv("GMKERNELS_STRICT", "1")
    with pytest.raises(NotImplementedError, match="pixelcnn_sample: no kernel for cpu"):
        SAMPLE(weights, 2, (1, 2, 2), levels=3, uniforms=u)

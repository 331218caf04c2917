"""keep_packed_weights: the same bits, fewer packings, and every write that torch counts is seen."""

import functools
import gc
import itertools
import threading

import pytest
import torch

import cases
from gmkernels import _C, _packed, keep_packed_weights, models, ops
from gmkernels.ops import masked_conv
from gmkernels.ops import pixelcnn as pixelcnn_op
from pixelcnn_cases import SAMPLE, network, uniforms

keep, conv = keep_packed_weights, ops.masked_conv2d


data = functools.partial(cases.data, dtype=torch.float32)


@pytest.fixture
def filled(monkeypatch):
    """For each call of the forward kernel: did it find the weight packed?"""
    seen = []
    kernel = masked_conv._forward

    def watched(outs, ins, *scalars):
        seen.append(scalars[-1])
        return kernel(outs, ins, *scalars)

    monkeypatch.setattr(masked_conv, "_forward", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate, last", [(None, False), ("tanh_sigmoid", True)])
@pytest.mark.parametrize("c_in, side", [(3, 5), (16, 9)])  # direct sums, pairs of pixels
def test_the_same_bits(isa, filled, dtype, gate, last, c_in, side):
    weight, bias = data(70, c_in, 3, 3, dtype=dtype), data(70, dtype=dtype)
    xs = [data(2, c_in, side, side, dtype=dtype, seed=s) for s in range(3)]
    if last:
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    want = [conv(x, weight, bias, mask_type="B", gate=gate) for x in xs]
    with keep():
        got = [conv(x, weight, bias, mask_type="B", gate=gate) for x in xs]
    assert filled == [False] * 4 + [True] * 2
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def writes():
    def step(w):
        w.grad = torch.ones_like(w)
        torch.optim.Adam([w], lr=0.5).step()

    def data_of_another(w):
        w.data = w.data + 1

    def loaded(w):
        module = torch.nn.Module()
        module.w = w
        module.load_state_dict({"w": w.detach() + 1})

    def in_inference_mode(w):
        with torch.inference_mode():
            w.add_(1)

    return {
        "copy_": lambda w: w.copy_(w + 1),
        "detach": lambda w: w.detach().mul_(2),
        "view": lambda w: w[3:].zero_(),
        "foreach": lambda w: torch._foreach_add_([w], 1.0),
        "ema": lambda w: ops.ema_update_([w], [torch.zeros_like(w)], 0.5),
        "set_": lambda w: w.set_(w.detach() + 1),
        "optimizer": step,
        "data of another": data_of_another,
        "load_state_dict": loaded,
        "inference mode": in_inference_mode,
    }


@pytest.mark.parametrize("name", list(writes()))
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_write_is_seen(filled, name, which):
    tensors = {"weight": torch.nn.Parameter(data(8, 8, 3, 3)), "bias": torch.nn.Parameter(data(8))}
    x = data(1, 8, 9, 9)
    with keep(), torch.no_grad():
        conv(x, **tensors, mask_type="B")
        before = conv(x, **tensors, mask_type="B")
        writes()[name](tensors[which])
        got = conv(x, **tensors, mask_type="B")
    assert filled == [False, True, False]
    with torch.no_grad():
        assert torch.equal(got, conv(x, **tensors, mask_type="B")) and not torch.equal(got, before)


def test_what_torch_does_not_count_is_not_seen_inside():
    weight, x = data(8, 8, 3, 3), data(1, 8, 9, 9)
    with keep():
        before = conv(x, weight, mask_type="B")
        weight.data.add_(1)
        assert torch.equal(conv(x, weight, mask_type="B"), before)
    assert not torch.equal(conv(x, weight, mask_type="B"), before)


def test_other_calls_have_other_packings():
    weight = data(16, 16, 3, 3)
    options = itertools.product(("A", "B"), (1, 2), (None, "identity_sigmoid"))
    names = ("mask_type", "dilation", "gate")
    calls = [((b, 16, h, w), dict(zip(names, of, strict=True)))
             for of in options for b, h, w in ((1, 9, 9), (5, 9, 9), (2, 3, 40))]
    want = [conv(data(*shape), weight, **options) for shape, options in calls]
    with keep():
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            for (shape, options), w in zip(calls, want, strict=True):
                assert torch.equal(conv(data(*shape), weight, **options), w)


def test_gradients_inside():
    def gradients():
        x, weight = data(2, 8, 9, 9).requires_grad_(), data(16, 8, 3, 3, seed=1).requires_grad_()
        return [torch.autograd.grad(conv(x, weight, mask_type="B", gate="tanh_sigmoid").square().sum(), (x, weight))
                for _ in range(2)]

    want = gradients()
    with keep():
        got = gradients()
    assert all(torch.equal(g, w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True))


def test_what_is_kept_goes_with_its_weight():
    x = data(1, 8, 9, 9)
    with keep():
        weight = data(8, 8, 3, 3)
        conv(x, weight, mask_type="B")
        conv(x, weight, mask_type="A")
        assert len(_packed._kept.get()) == 2
        conv(x, data(8, 8, 3, 3), mask_type="B")  # a temporary
        gc.collect()
        assert len(_packed._kept.get()) == 2
        del weight
        gc.collect()
        assert not _packed._kept.get()
    assert _packed._kept.get() is None


def test_blocks_within_blocks_and_other_threads(filled):
    weight, x, seen = data(8, 8, 3, 3), data(1, 8, 9, 9), []
    with keep():
        conv(x, weight, mask_type="B")
        with keep():
            conv(x, weight, mask_type="B")
        conv(x, weight, mask_type="B")
        other = threading.Thread(target=lambda: seen.append(_packed._kept.get()))
        other.start()
        other.join()
    with keep():
        conv(x, weight, mask_type="B")
    assert filled == [False, True, True, False] and seen == [None]
    with pytest.raises(KeyError), keep():
        raise KeyError
    assert _packed._kept.get() is None


def test_inference_tensors_have_no_version_counter(filled):
    with torch.inference_mode(), keep():
        weight, x = data(8, 8, 3, 3), data(1, 8, 9, 9)
        before = conv(x, weight, mask_type="B")
        weight.add_(1)
        assert not torch.equal(conv(x, weight, mask_type="B"), before)
    assert filled == [False, False]


def test_a_workspace_that_is_too_small_is_refused():
    x, weight = data(1, 8, 9, 9), data(8, 8, 3, 3)
    sizes, kernel = [1, 8, 8, 9, 9], [3, 3, 1, 1]
    size = _C.masked_conv2d_packed_size(sizes, list(range(9)), kernel, False, 0, 0, 1)
    assert size >= weight.numel() * 4
    out, workspace = torch.empty_like(x), torch.empty(size, dtype=torch.uint8)
    address = [t.data_ptr() for t in (out, workspace, x, weight)]
    arguments = (address[0], 0, address[1], *address[2:], 0, 0, 0, 0, sizes, list(range(9)), kernel, False, [False] * 5,
                 0, False, False, 0)
    with pytest.raises(RuntimeError, match="too small"):
        _C.masked_conv2d_cpu(*arguments, size - 1, False, 1)
    _C.masked_conv2d_cpu(*arguments, size, False, 1)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)


def test_sampler(monkeypatch):
    packings = []
    pack = pixelcnn_op._pack_weights
    monkeypatch.setattr(pixelcnn_op, "_pack_weights", lambda *a: packings.append(1) or pack(*a))
    weights, u = network(features=20, layers=3, outputs=4), uniforms(2, 1, 4, 9)

    def sample(n=2):
        return SAMPLE(weights, n, (1, 4, 9), levels=4, uniforms=u[:n], return_logits=True)

    want = sample()
    with keep():
        for n in (2, 1, 2):
            assert all(torch.equal(g, w[:n]) for g, w in zip(sample(n), want, strict=True))
        assert len(packings) == 2
        weights.bias_out.add_(1)  # biases are not packed
        weights.link[1].mul_(2)
        changed = sample()
        assert len(packings) == 3
    assert all(torch.equal(g, w) for g, w in zip(changed, sample(), strict=True)) and len(packings) == 4
    assert not torch.equal(changed[1], want[1])


def test_a_model_is_packed_once(monkeypatch):
    packings = []
    pack = pixelcnn_op._pack_weights
    monkeypatch.setattr(pixelcnn_op, "_pack_weights", lambda *a: packings.append(1) or pack(*a))
    model = models.PixelCNN((1, 4, 9), levels=3, features=8, layers=2, num_classes=2)
    with keep():
        for _ in range(3):
            model.sample(2, seed=0, cond=1)
        assert len(packings) == 1
        with torch.no_grad():
            model.head2.weight.add_(1)
        model.sample(2, seed=0, cond=1)
    assert len(packings) == 2

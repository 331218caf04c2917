"""models.PixelCNN: exact likelihoods that add up to one, causality, samples that are the network's, files, training."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from gmkernels import models, ops
from gmkernels.cli import main
from gmkernels.cli import pixelcnn as cli

SMALL = dict(features=6, layers=3, first_kernel_size=5, head_features=5)


def model(shape=(1, 3, 3), seed=0, sharp=3.0, **options):
    """Random, with weights large enough that pixels depend on each other."""
    torch.manual_seed(seed)
    m = models.PixelCNN(shape, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(sharp)
    return m


def every_image(c, h, w, levels):
    return torch.tensor(list(itertools.product(range(levels), repeat=c * h * w))).view(-1, c, h, w)


@pytest.mark.parametrize("shape, levels, head", [
    ((1, 2, 3), 3, "categorical"), ((2, 2, 2), 2, "categorical"), ((3, 1, 2), 2, "categorical"),
    ((1, 2, 2), 4, "logistic_mixture"), ((3, 1, 2), 3, "logistic_mixture"),
], ids=str)
def test_probabilities_add_up_to_one(shape, levels, head):
    m = model(shape, levels=levels, head=head, num_mixtures=2)
    total = m.log_prob(every_image(*shape, levels)).double().logsumexp(0).exp()
    assert abs(total.item() - 1) < 1e-4


@pytest.mark.parametrize("shape, head", [((1, 5, 4), "categorical"), ((3, 3, 4), "categorical"),
                                         ((3, 3, 4), "logistic_mixture")], ids=str)
@pytest.mark.parametrize("classes", [None, 3])
def test_causal(shape, head, classes):
    """check_causality, and that gradients agree: each output depends on all earlier data within reach and no later."""
    m = model(shape, head=head, levels=5, num_mixtures=1, num_classes=classes, sharp=1.5, features=12,
              head_features=60).double()
    assert m.check_causality() is True
    x = torch.randn(1, *shape, requires_grad=True, dtype=torch.float64)
    out = m.network(x, None if classes is None else 1)
    c, h, w = shape
    unit = c if head == "categorical" else 1
    order = torch.arange(h * w * unit).view(h, w, unit).permute(2, 0, 1)
    seen = order if unit == c else order.expand(c, h, w)
    grouped = out.unflatten(1, (unit, -1)).square().sum(2)[0]
    for g, y, column in itertools.product(range(unit), range(h), range(w)):
        (grad,) = torch.autograd.grad(grouped[g, y, column], x, retain_graph=True)
        assert not grad[0][seen >= order[g, y, column]].any()
        assert grad[0][seen < order[g, y, column]].all()


def test_a_model_that_is_not_causal_is_named():
    m = model((1, 4, 4), levels=3)
    m.horizontal[1].mask_order = "vertical"  # the own row, to the right too
    m.horizontal[1].weight.data.fill_(0.3)
    with pytest.raises(RuntimeError, match=r"data channel 0 of pixel \(\d, \d\) depends on itself"):
        m.check_causality()
    m = model((3, 4, 4), levels=3, features=12)
    m.out[1].data_channels = 1  # later colours of the own pixel
    m.out[1].weight.data.fill_(0.3)
    with pytest.raises(RuntimeError, match="data channel . of pixel .* depends on itself"):
        m.check_causality()


@pytest.mark.parametrize("shape, head, classes", [
    ((1, 4, 5), "categorical", None), ((3, 3, 4), "categorical", 2), ((1, 3, 4), "logistic_mixture", None),
    ((3, 3, 4), "logistic_mixture", 2),
], ids=str)
def test_samples_are_those_of_the_network(shape, head, classes, isa):
    """Teacher forcing: what the finished images' own outputs draw with the same numbers is the images."""
    m = model(shape, head=head, levels=7, num_mixtures=3, num_classes=classes, sharp=2.0)
    n, seeds = 3, torch.tensor([5, 6, 7])
    cond = None if classes is None else torch.tensor([0, 1, 1])
    x = m.sample(n, seed=seeds, cond=cond)
    assert x.dtype is torch.int64 and x.shape == (n, *shape) and 0 <= x.min() and x.max() < 7
    with torch.no_grad():
        out = m(x, cond)
    if head == "categorical":
        u = ops.philox_uniform((n, *shape), seeds, stream=11)
        cdf = out.double().softmax(1).cumsum(1)
        again = (cdf <= u[:, None]).sum(1).clamp_max(6)
    else:
        drawn = ops.discretized_logistic_mixture_sample(out, 3, seed=seeds, levels=7)
        again = ((drawn + 1) * 3).round().long()
    assert torch.equal(x, again)
    assert torch.equal(m.sample(1, seed=seeds[1:2], cond=None if cond is None else cond[1:2])[0], x[1])
    assert not torch.equal(m.sample(n, seed=1, cond=cond), m.sample(n, seed=2, cond=cond))


def test_frequencies():
    """A chi-square test of 20000 images of two pixels against the exact probabilities."""
    m = model((1, 1, 2), levels=3, sharp=2.0)
    x = m.sample(20000, seed=0)
    with torch.no_grad():
        want = m.log_prob(every_image(1, 1, 2, 3)).exp().double() * 20000
    got = torch.bincount(x[:, 0, 0, 0] * 3 + x[:, 0, 0, 1], minlength=9)
    assert stats.chisquare(got, want * (20000 / want.sum())).pvalue > 1e-3


def test_impute():
    m = model((1, 3, 4), levels=3)
    x = m.sample(4000, seed=3)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, :, :2] = True  # rows that come first: exact
    filled = m.impute(x, mask, seed=9)
    assert torch.equal(filled[mask], x[mask]) and not torch.equal(filled, x)
    # The first unknown pixel, of images that begin alike, has the model's conditional distribution.
    alike = m.sample(1, seed=1).expand(4000, -1, -1, -1)
    drawn = m.impute(alike, mask, seed=2)[:, 0, 2, 0]
    with torch.no_grad():
        want = m(alike[:1])[0, :, 0, 2, 0].softmax(0).double() * 4000
    assert stats.chisquare(torch.bincount(drawn, minlength=3), want * (4000 / want.sum())).pvalue > 1e-3
    assert torch.equal(m.impute(x, torch.ones_like(mask), seed=0), x)


def test_temperature_zero_is_the_likeliest_level_in_turn():
    m = model((1, 3, 3), levels=4)
    x = m.sample(1, temperature=0)
    with torch.no_grad():
        assert torch.equal(m(x).argmax(1), x)


def test_log_prob_against_cross_entropy():
    m = model((3, 4, 5), levels=9)
    x = torch.randint(0, 9, (2, 3, 4, 5), dtype=torch.uint8)
    want = -F.cross_entropy(m(x), x.long(), reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(m.log_prob(x), want)
    torch.testing.assert_close(m.bits_per_dim(x), -want / 60 / math.log(2))
    assert torch.equal(m.anomaly_score(x), -m.log_prob(x).detach()) and m.log_prob_kind == "exact"
    m.double()
    torch.testing.assert_close(m.log_prob(x).float(), want, rtol=1e-5, atol=1e-4)


def test_classes_change_the_distribution():
    m = model((1, 3, 3), levels=4, num_classes=3)
    x = m.sample(5, seed=0, cond=1)
    assert torch.equal(x, m.sample(5, seed=0, cond=torch.ones(5, dtype=torch.int64)))
    assert not torch.equal(x, m.sample(5, seed=0, cond=2))
    assert not torch.allclose(m.log_prob(x, 1), m.log_prob(x, 2))


def test_save_and_load(tmp_path):
    m = model((3, 3, 4), levels=5, head="logistic_mixture", num_mixtures=2, num_classes=3)
    m.save(tmp_path / "m.safetensors")
    again = models.PixelCNN.load(tmp_path / "m.safetensors")
    x = torch.randint(0, 5, (2, 3, 3, 4))
    assert again.config == m.config and torch.equal(again.log_prob(x, 1), m.log_prob(x, 1))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be a PixelCNN that save wrote"):
        models.PixelCNN.load(tmp_path / "other.safetensors")


def test_fit_learns_and_repeats():
    data = (torch.arange(4) % 2).view(1, 1, 2, 2).expand(64, -1, -1, -1) * 2
    results, said = [], []
    for _ in range(2):
        m = model((1, 2, 2), levels=3, sharp=1.0)
        m.fit(data, steps=60, batch_size=16, learning_rate=0.03, progress=lambda *now: said.append(now))
        assert not m.training
        results.append(m.bits_per_dim(data[:1]).item())
    assert results[0] == results[1] < 0.1 and len(said) == 120 and said[59][1] == 1.0
    m = model((1, 2, 2), levels=3, num_classes=2)
    m.fit(data, seconds=0.05, cond=torch.arange(64) % 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    """Probabilities add up whatever the model's dtype; casting back and forth, and files, keep the model."""
    m = model((1, 1, 1), levels=4096, head="logistic_mixture", num_mixtures=2).to(dtype)
    total = m.log_prob(every_image(1, 1, 1, 4096)).double().logsumexp(0).exp()
    assert abs(total.item() - 1) < 1e-3
    m.save(tmp_path / "m.safetensors")
    again = models.PixelCNN.load(tmp_path / "m.safetensors")
    x = torch.arange(8).view(8, 1, 1, 1) * 500
    assert again.head1.weight.dtype is dtype and torch.equal(again.log_prob(x), m.log_prob(x))
    back = m.float()
    wide = back.double().log_prob(x)
    torch.testing.assert_close(back.float().log_prob(x).double(), wide, rtol=1e-4, atol=1e-4)


def test_made_without_memory():
    m = model((1, 3, 3), levels=4)
    with torch.device("meta"):
        empty = models.PixelCNN((1, 3, 3), levels=4, **SMALL)
    empty.to_empty(device="cpu").load_state_dict(m.state_dict())
    x = m.sample(2, seed=0)
    assert torch.equal(empty.log_prob(x), m.log_prob(x)) and torch.equal(empty.sample(2, seed=0), x)


def test_autocast():
    m = model((1, 3, 3), levels=4, num_classes=2)
    x = torch.zeros(2, 1, 3, 3, dtype=torch.int64)
    want = m.log_prob(x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m.log_prob(x, 1).float(), want, rtol=1e-2, atol=1e-2)
        assert m.check_causality()


def test_arguments_of_numpy(tmp_path):
    m = models.PixelCNN((1, 3, 3), levels=np.int64(4), num_classes=np.int64(3), **SMALL)
    m.save(tmp_path / "m.safetensors")
    assert models.PixelCNN.load(tmp_path / "m.safetensors").config == m.config


def test_weights_that_are_not_finite():
    m = model((1, 3, 3), levels=4)
    with torch.no_grad():
        m.head2.bias[0] = math.nan
    before = m.head1.weight.detach().clone()
    with pytest.raises(RuntimeError, match="the gradient of step 1 is not finite"):
        m.fit(ints(4, 1, 3, 3), steps=2)
    assert torch.equal(m.head1.weight, before)
    with pytest.raises(RuntimeError, match="outputs must be finite"):
        m.check_causality()
    with pytest.raises(ValueError, match="not a distribution"):
        m.sample(1)


def test_empty_and_other_sizes():
    classes = model((1, 3, 3), levels=4, num_classes=3)
    assert classes.sample(0, cond=1).shape == (0, 1, 3, 3) and classes.log_prob(ints(0, 1, 3, 3), ints(0)).shape == (0,)
    m = model((1, 3, 3), levels=4)
    assert m.sample(0).shape == (0, 1, 3, 3) and m.log_prob(torch.zeros(0, 1, 3, 3, dtype=torch.int64)).shape == (0,)
    assert m.log_prob(torch.zeros(2, 1, 6, 5, dtype=torch.int64)).shape == (2,)


@pytest.mark.parametrize("classes", [None, 3])
def test_compile(classes):
    m = model((1, 3, 4), levels=4, num_classes=classes)
    x, cond = torch.randint(0, 4, (2, 1, 3, 4)), None if classes is None else torch.tensor([0, 2])
    got = torch.compile(m.log_prob, fullgraph=True, backend="aot_eager")(x, cond)
    torch.testing.assert_close(got, m.log_prob(x, cond))


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


BAD = {
    r"shape must be \(c, h, w\), got \(3, 3\)": lambda m: models.PixelCNN((3, 3)),
    "levels must be in .* got 1": lambda m: models.PixelCNN((1, 3, 3), levels=1),
    'head must be "categorical" or "logistic_mixture"': lambda m: models.PixelCNN((1, 3, 3), head="mse"),
    "1 or 3 channels for a logistic mixture, got 2": lambda m: models.PixelCNN((2, 3, 3), head="logistic_mixture"),
    "kernel_size must be odd": lambda m: models.PixelCNN((1, 3, 3), kernel_size=4),
    r"first_kernel_size must be in \[1, 32\), got 33": lambda m: models.PixelCNN((1, 3, 3), first_kernel_size=33),
    r"num_mixtures must be in \[1, 513\), got 1000": lambda m: models.PixelCNN((1, 3, 3), num_mixtures=1000),
    r"shape\[0\] must be in \[1, 17\), got 17": lambda m: models.PixelCNN((17, 3, 3)),
    "x must hold integer levels, got torch.float32": lambda m: m.log_prob(torch.zeros(1, 1, 3, 3)),
    "x must be a torch.Tensor, got list": lambda m: m.log_prob([1]),
    r"x must be \[n, c, h, w\] with c=1, got \(1, 3, 3, 3\)": lambda m: m.log_prob(ints(1, 3, 3, 3)),
    r"x must be in \[0, 4\), got 4": lambda m: m.log_prob(ints(1, 1, 3, 3) + 4),
    r"x must be in \[0, 4\), got -1": lambda m: m.log_prob(ints(1, 1, 3, 3) - 1),
    "cond must be None: the model has no classes": lambda m: m.log_prob(ints(1, 1, 3, 3), 0),
    r"temperature must be in \[0, inf\), got -1": lambda m: m.sample(1, temperature=-1),
    "n must be in .* got -1": lambda m: m.sample(-1),
    "given and given_mask come together": lambda m: m.sample(1, given=ints(1, 1, 3, 3)),
    "given must be .* got": lambda m: m.sample(1, given=ints(1, 1, 3, 4), given_mask=ints(1, 1, 3, 4) == 0),
    r"x must be \[n, c, h, w\] with .* got \(1, 1, 2, 3\)": lambda m: m.impute(ints(1, 1, 2, 3), ints(1, 1, 2, 3) == 0),
    "one of steps and seconds": lambda m: m.fit(ints(2, 1, 3, 3)),
    "data must have at least one": lambda m: m.fit(ints(0, 1, 3, 3), steps=1),
    "cond must have one entry for each": lambda m: m.fit(ints(2, 1, 3, 3), steps=1, cond=ints(3)),
    "seconds must be positive": lambda m: m.fit(ints(2, 1, 3, 3), seconds=0),
}
BAD_CLASSES = {
    r"cond must be labels \[n\] in \[0, 3\), got None": None,
    r"cond must be in \[0, 3\), got 3": 3,
    r"cond must be labels \[n\] with n=1, got \(2,\)": [0, 1],
    "cond must be integer labels, got torch.float32": 0.5,
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message](model(levels=4))


@pytest.mark.parametrize("message", BAD_CLASSES)
def test_bad_classes(message):
    with pytest.raises((ValueError, TypeError), match=message):
        model(levels=4, num_classes=3).log_prob(ints(1, 1, 3, 3), BAD_CLASSES[message])


@pytest.mark.parametrize("data", ["digits", "china"])
def test_command(data, tmp_path, capsys):
    files = [str(tmp_path / "m.safetensors"), str(tmp_path / "s.png")]
    arguments = ["--data", data, "--steps", "2", "--features", "4", "--layers", "2"]
    assert main(["pixelcnn", *arguments, "--save", files[0], "--samples", files[1]]) == 0
    said = capsys.readouterr().out
    assert "causal: True" in said and "bits/dim: train" in said and "trained 2 steps" in said
    test = cli.images(data)[1]
    bits = cli.bits_per_dim(models.PixelCNN.load(files[0]), test)
    assert f"test {bits:.3f}" in said
    assert (tmp_path / "s.png").stat().st_size > 100
    for wrong in (["--steps", "2", "--seconds", "1"], ["--save", "/nowhere/m"], ["--samples", "/nowhere/s.png"]):
        assert main(["pixelcnn", *wrong]) == 2
    for wrong in (["--seconds", "0"], ["--layers", "0"], ["--steps", "0"], ["--seed", str(2**65)]):
        assert main(["pixelcnn", *wrong]) == 1
    assert "pixelcnn: seconds must be positive" in capsys.readouterr().err


@pytest.mark.slow
def test_digits():
    """The goal is 1.90 bits/dim on images that were not trained on, in 483 steps of batch 128: fewer do."""
    train, test = cli.images("digits")
    torch.manual_seed(0)
    m = models.PixelCNN((1, 8, 8), levels=17, features=64, layers=6)
    m.fit(train, steps=300)
    assert cli.bits_per_dim(m, test) <= 1.90

"""ops.pixelcnn_sample where the vertical stack is summed by pairs of pixels (csrc/pixelcnn/pairs.h)."""

import itertools
from dataclasses import replace

import pytest
import torch

from gmkernels import _C
from pixelcnn_cases import SAMPLE, check_isas, network, same, uniforms


def test_where_there_are_pairs():
    questions = itertools.product((False, True), (1, 3, 5), (1, 7, 8, 9))  # CUDA, kernel, width
    points = {of: _C.pixelcnn_panel(*of)[2] for of in questions}
    assert {of: n for of, n in points.items() if n} == {(False, 3, 8): 4, (False, 3, 9): 4}


@pytest.mark.parametrize("n, c, features, layers, k0, hidden, levels, h, w, groups", [
    (3, 1, 16, 3, 7, 33, 16, 5, 9, 1),
    (1, 1, 67, 2, 3, 9, 5, 3, 8, 1),
    (5, 3, 20, 3, 5, 9, 3, 3, 13, 3),
    (50, 1, 5, 4, 3, 3, 4, 2, 8, 1),  # more than a slice
    (2, 1, 33, 2, 1, 4, 3, 2, 105, 1),  # more pairs than pass together
    (1, 1, 1, 2, 3, 1, 2, 1, 8, 1),
])
def test_pixels(n, c, features, layers, k0, hidden, levels, h, w, groups):
    weights = network(c, features, layers, k0, 3, hidden, c * levels, rows=n)
    check_isas(weights, n, (c, h, w), levels, uniforms(n, c, h, w, seed=3), groups=groups)


def test_threads_share_the_rows_of_an_image(isa):
    shape, levels = (1, 6, 40), 16
    weights, u = network(features=20, layers=3, hidden=24, outputs=16), uniforms(3, *shape)
    torch.set_num_threads(1)
    want = SAMPLE(weights, 3, shape, levels=levels, uniforms=u, return_logits=True)
    for threads in (2, 3, 5, 8, 16):
        torch.set_num_threads(threads)
        for n in (1, 2, 3):
            assert same(weights, n, shape, levels, u[:n], [t[:n] for t in want])
            assert same(weights, n, shape, levels, u[:n], [t[:n] for t in want], callback=lambda *_: None)


def test_an_image_does_not_depend_on_its_batch(isa):
    n, shape, levels = 27, (1, 3, 11), 8
    weights, u = network(features=20, layers=3, hidden=24, outputs=8, rows=n), uniforms(n, *shape)
    want = SAMPLE(weights, n, shape, levels=levels, uniforms=u, return_logits=True)
    for first, end in ((0, 1), (3, 5), (7, 13), (5, 27)):
        some = replace(weights, bias_vertical=weights.bias_vertical[:, first:end],
                       bias_horizontal=weights.bias_horizontal[:, first:end])
        assert same(some, end - first, shape, levels, u[first:end], [t[first:end] for t in want])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_computed_in_float32(dtype):
    weights, u = network(outputs=4, dtype=dtype), uniforms(2, 1, 3, 9)
    want = SAMPLE(weights.to(torch.float32), 2, (1, 3, 9), levels=4, uniforms=u, return_logits=True)
    assert same(weights, 2, (1, 3, 9), 4, u, want)


def test_rows_drawn_in_calls(isa):
    weights, u = network(features=9, layers=3, hidden=8, outputs=4), uniforms(2, 1, 11, 9)
    want = SAMPLE(weights, 2, (1, 11, 9), levels=4, uniforms=u, return_logits=True)
    assert same(weights, 2, (1, 11, 9), 4, u, want, callback=lambda *rows: None)

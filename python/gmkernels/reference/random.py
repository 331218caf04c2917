"""The random contract (docs/random-numbers.md) in plain torch: Philox in int64, Box-Muller in float64."""

import math

import torch

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _multiply(a, m):
    """High and low words of the 64-bit product of 32-bit words held in int64 (int64 alone would overflow)."""
    low = a * (m & 0xFFFF)
    mid = a * (m >> 16) + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(blocks, step, stream, seed):
    """Philox4x32-10 of counters (block low, block high, step, stream): int64 tensor `blocks` [...] -> words [..., 4].

    `seed` is an int64 tensor that broadcasts with `blocks`.
    """
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = blocks & _MASK, (blocks >> 32) & _MASK
    c2, c3 = torch.full_like(c0, step), torch.full_like(c0, stream)
    for _ in range(10):
        h0, l0 = _multiply(c0, _M0)
        h1, l1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ key0, l1, h0 ^ c3 ^ key1, l0
        key0, key1 = (key0 + _W0) & _MASK, (key1 + _W1) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def _numbers(words, normal):
    if not normal:
        return (words >> 8).double() * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log((words[..., 0::2].double() + 0.5) * 2.0**-32))
    angle = words[..., 1::2].double() * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(-2)


def philox_fill(seeds, seed, size, step, stream, normal, dtype, device):
    """[samples, size] numbers: row i from seeds[i], or one row from the int `seed`."""
    if seeds is None:
        seeds = torch.tensor([seed], dtype=torch.int64, device=device)
    blocks = torch.arange((size + 3) // 4, dtype=torch.int64, device=device)
    words = philox_words(blocks, step, stream, seeds.reshape(-1, 1))
    return _numbers(words, normal).flatten(-2)[:, :size].to(dtype)


def philox_normal(shape, seed=0, step=0, stream=0, device="cpu", dtype=torch.float64):
    """Standard normals in float64 arithmetic: :func:`gmkernels.ops.philox_normal` rounded less often."""
    return _shaped(shape, seed, step, stream, device, dtype, True)


def philox_uniform(shape, seed=0, step=0, stream=1, device="cpu", dtype=torch.float64):
    """Uniforms on [0, 1): the same values as :func:`gmkernels.ops.philox_uniform`."""
    return _shaped(shape, seed, step, stream, device, dtype, False)


def _shaped(shape, seed, step, stream, device, dtype, normal):
    shape, seeds = torch.Size(shape), None
    size = shape.numel()
    if isinstance(seed, torch.Tensor):
        seeds, seed = seed, 0
        size = size if seeds.dim() == 0 else shape[1:].numel()
    elif seed >= 2**63:
        seed -= 2**64
    return philox_fill(seeds, seed, size, step, stream, normal, dtype, device).reshape(shape)

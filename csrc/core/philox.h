// The random contract, version 1 (docs/random-numbers.md): Philox4x32-10 and Box-Muller, one number at a time.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Written in + * fma sqrt and integers only, each
// rounded once, so that every CPU and every GPU gives the same bits; core/philox_simd.h is the same arithmetic in SIMD.
#pragma once
#include "core/half.h"

namespace gmk {

struct PhiloxKey {
  uint32_t lo, hi;  // seed
};
GMK_HD PhiloxKey philox_key(uint64_t seed) { return PhiloxKey{uint32_t(seed), uint32_t(seed >> 32)}; }

struct PhiloxWords {
  uint32_t w[4];
};

// The four words of one block. Counter = (block low, block high, step, stream).
GMK_HD PhiloxWords philox(uint64_t block, uint32_t step, uint32_t stream, PhiloxKey key) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = step, c3 = stream;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key.lo;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key.hi;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    key.lo += 0x9E3779B9u;
    key.hi += 0xBB67AE85u;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

GMK_HD float uniform_from(uint32_t word) { return float(word >> 8) * 5.9604644775390625e-8f; }  // [0, 1), 24 bits

#ifdef __CUDA_ARCH__  // nvcc would contract a * b + c
GMK_HD float rn_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GMK_HD float rn_mul(float a, float b) { return __fmul_rn(a, b); }
GMK_HD float rn_add(float a, float b) { return __fadd_rn(a, b); }
GMK_HD float rn_sqrt(float a) { return __fsqrt_rn(a); }
#else  // built with -ffp-contract=off
GMK_HD float rn_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GMK_HD float rn_mul(float a, float b) { return a * b; }
GMK_HD float rn_add(float a, float b) { return a + b; }
GMK_HD float rn_sqrt(float a) { return __builtin_sqrtf(a); }
#endif

// -2 ln((r + 0.5) / 2^32) with a small relative error everywhere: near 1 it is the logarithm of 1 + (u - 1).
GMK_HD float minus_2_log(uint32_t r) {
  const bool near_one = r >= 0xC0000000u;  // u > 3/4: as a signed number r is (u - 1) 2^32, with all its bits
  const float u = rn_fma(near_one ? float(int32_t(r)) : float(r), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  const uint32_t t = float_bits(u) - 0x3F400000u;  // bits of 3/4: the mantissa is in [3/4, 3/2)
  const float e = near_one ? 0.0f : float(int32_t(t) >> 23);
  const float f = near_one ? u : rn_add(bits_float((t & 0x007FFFFFu) + 0x3F400000u), -1.0f);
  float p = -1.1119284481e-1f;  // -2 ln(1 + f) / f on [-1/4, 1/2], relative error 4e-8
  p = rn_fma(p, f, 2.4228139222e-1f);
  p = rn_fma(p, f, -2.9808878899e-1f);
  p = rn_fma(p, f, 3.3577650785e-1f);
  p = rn_fma(p, f, -3.9964640141e-1f);
  p = rn_fma(p, f, 4.9992722273e-1f);
  p = rn_fma(p, f, -6.6666942835e-1f);
  p = rn_fma(p, f, 1.0f);
  p = rn_fma(p, f, -2.0f);
  return rn_fma(e, -1.38629436112f, rn_mul(p, f));
}

// sin and cos of 2 pi r / 2^32: the quadrant from the top bits, a polynomial on [-pi/4, pi/4].
GMK_HD void sincos_2pi(uint32_t r, float* sine, float* cosine) {
  const uint32_t turned = r + 0x20000000u;  // bits 31 and 30 are the quadrant
  const float x = rn_mul(float(int32_t(r - (turned & 0xC0000000u))), 1.4629180792671596e-9f);  // * pi 2^-31
  const float z = rn_mul(x, x);
  float s = rn_fma(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = rn_fma(s, z, -1.6666654611e-1f);
  s = rn_fma(rn_mul(s, z), x, x);
  float c = rn_fma(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = rn_fma(c, z, 4.166664568298827e-2f);
  c = rn_fma(c, z, -0.5f);
  c = rn_fma(c, z, 1.0f);
  const bool swap = turned & 0x40000000u;
  *sine = bits_float(float_bits(swap ? c : s) ^ (turned & 0x80000000u));
  *cosine = bits_float(float_bits(swap ? s : c) ^ ((turned + 0x40000000u) & 0x80000000u));
}

// Box-Muller: words 0 and 1 give normals 0 and 1 (cosine, sine), words 2 and 3 give normals 2 and 3. |z| <= 6.77.
GMK_HD void normals_from(PhiloxWords words, float z[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    float s, c;
    const float radius = rn_sqrt(minus_2_log(words.w[pair]));
    sincos_2pi(words.w[pair + 1], &s, &c);
    z[pair] = rn_mul(radius, c);
    z[pair + 1] = rn_mul(radius, s);
  }
}

// Stream ids: counter word 3. One per op, so that two ops with one seed never share numbers; 256 and up are the user's.
enum PhiloxStream : uint32_t {
  kStreamNormal = 0,
  kStreamUniform = 1,
  kStreamDiffusionStep = 2,
  kStreamGmmComponent = 3,
  kStreamGmmNormal = 4,
  kStreamGmmFit = 6,
  kStreamLogisticMixture = 7,
  kStreamAddNoise = 8,
  kStreamFlowPair = 9,
  kStreamKnown = 10,
  kStreamPixelCnn = 11,
};

}  // namespace gmk

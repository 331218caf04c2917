// CPU kernels only: core/philox.h a chunk at a time. Same bits, by test (tests/test_random.py).
#pragma once
#include "core/philox.h"
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kChunkBlocks = 64;
constexpr int kChunk = 4 * kChunkBlocks;  // numbers: 1 KiB of float32 stays in L1

struct PhiloxAt {
  PhiloxKey key;
  uint32_t step, stream;
};

#if defined(__AVX2__)
// Each 32-bit word lives in a 64-bit lane, so that the widening multiply leaves high:low in place; what remains in the
// upper half is ignored by the next multiply. Lanes hold blocks 0,4,1,5,2,6,3,7 (AVX2: 0,2,1,3), the order in which
// unpacklo/unpackhi put Box-Muller pairs into row-major order without a permutation.
#if defined(__AVX512F__)
typedef __m512i vwide;
constexpr int kWide = 8;
GMK_INLINE vwide wide_mul(vwide a, vwide b) { return _mm512_mul_epu32(a, b); }
GMK_INLINE vwide wide_high(vwide a) { return _mm512_srli_epi64(a, 32); }
GMK_INLINE vwide wide_xor(vwide a, vwide b, vwide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
GMK_INLINE vwide wide_set(uint64_t x) { return _mm512_set1_epi64((long long)x); }
GMK_INLINE vwide wide_pack(vwide even, vwide odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}
GMK_INLINE vwide wide_blocks(uint32_t low) {
  return _mm512_add_epi64(wide_set(low), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
GMK_INLINE void unpack(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi32(x, y));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi32(x, y));
}
#else
typedef __m256i vwide;
constexpr int kWide = 4;
GMK_INLINE vwide wide_mul(vwide a, vwide b) { return _mm256_mul_epu32(a, b); }
GMK_INLINE vwide wide_high(vwide a) { return _mm256_srli_epi64(a, 32); }
GMK_INLINE vwide wide_xor(vwide a, vwide b, vwide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
GMK_INLINE vwide wide_set(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
GMK_INLINE vwide wide_pack(vwide even, vwide odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
GMK_INLINE vwide wide_blocks(uint32_t low) { return _mm256_add_epi64(wide_set(low), _mm256_set_epi64x(3, 1, 2, 0)); }
GMK_INLINE void unpack(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
  _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi32(x, y));
  _mm256_storeu_si256((__m256i*)(out + 8), _mm256_unpackhi_epi32(x, y));
}
#endif

// Words 0|2 of every block into `even`, words 1|3 into `odd`. block % kChunkBlocks == 0, so its low word cannot wrap.
// Three of the four counter words are the same in all lanes: half of rounds 1 and 2 is done once, outside the lanes.
static __attribute__((noinline)) void chunk_words(uint32_t* even, uint32_t* odd, uint64_t block, PhiloxAt at) {
  const uint64_t q1 = uint64_t(at.step) * 0xCD9E8D57u;
  const uint64_t q0 = uint64_t(uint32_t(q1 >> 32) ^ uint32_t(block >> 32) ^ at.key.lo) * 0xD2511F53u;
  const uint32_t k0 = at.key.lo + 0x9E3779B9u, k1 = at.key.hi + 0xBB67AE85u;  // keys of round 2
  uint64_t keys[2][10];
  for (uint32_t round = 2; round < 10; ++round) {
    keys[0][round] = at.key.lo + round * 0x9E3779B9u;
    keys[1][round] = at.key.hi + round * 0xBB67AE85u;
  }
  asm("" : "+m"(keys));  // keep them in memory: a broadcast from memory is free, one from a register costs a shuffle
  const vwide m0 = wide_set(0xD2511F53u), m1 = wide_set(0xCD9E8D57u);
  const vwide r1 = wide_set(at.stream ^ at.key.hi), r2a = wide_set(uint32_t(q1) ^ k0);
  const vwide r2b = wide_set(uint32_t(q0 >> 32) ^ k1), c3_all = wide_set(uint32_t(q0));
  for (int v = 0; v < kChunkBlocks / kWide; v += 4) {  // four independent chains hide the multiply's latency
    vwide c0[4], c1[4], c2[4], c3[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vwide p0 = wide_mul(wide_blocks(uint32_t(block) + uint32_t((v + j) * kWide)), m0);
      c1[j] = wide_mul(wide_high(p0) ^ r1, m1);
      c0[j] = wide_high(c1[j]) ^ r2a;
      c2[j] = p0 ^ r2b;
      c3[j] = c3_all;
    }
#pragma GCC unroll 8
    for (uint32_t round = 2; round < 10; ++round) {
      const vwide a = wide_set(keys[0][round]), b = wide_set(keys[1][round]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vwide p0 = wide_mul(c0[j], m0), p1 = wide_mul(c2[j], m1);
        c0[j] = wide_xor(wide_high(p1), c1[j], a);
        c2[j] = wide_xor(wide_high(p0), c3[j], b);
        c1[j] = p1;
        c3[j] = p0;
      }
    }
    for (int j = 0; j < 4; ++j) {
      const vwide e = wide_pack(c0[j], c2[j]), o = wide_pack(c1[j], c3[j]);
      memcpy(even + (v + j) * 2 * kWide, &e, sizeof e);
      memcpy(odd + (v + j) * 2 * kWide, &o, sizeof o);
    }
  }
}

#if defined(__AVX512F__)
// normals_from() of 16 pairs. By hand, since gcc makes 15 % more of it, and a mask register does each choice.
GMK_INLINE void box_muller(__m512i radius_word, __m512i angle_word, __m512* cosine, __m512* sine) {
  const auto f1 = [](float x) { return _mm512_set1_ps(x); };
  const auto i1 = [](uint32_t x) { return _mm512_set1_epi32(int(x)); };
  const __mmask16 far = _mm512_cmplt_epu32_mask(radius_word, i1(0xC0000000u));
  const __m512 w = _mm512_mask_cvtepu32_ps(_mm512_cvtepi32_ps(radius_word), far, radius_word);
  const __m512 u = _mm512_fmadd_ps(w, f1(2.3283064365386963e-10f), f1(1.1641532182693481e-10f));
  // The exponent that goes with a mantissa in [3/4, 3/2) is that of 4/3 u; the rounding of the product never crosses.
  const __m512 e = _mm512_maskz_getexp_ps(far, _mm512_mul_ps(u, f1(1.3333333731f)));
  const __m512 mantissa = _mm512_getmant_ps(u, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 f = _mm512_mask_add_ps(u, far, mantissa, f1(-1.0f));
  constexpr float poly[8] = {2.4228139222e-1f,
                             -2.9808878899e-1f,
                             3.3577650785e-1f,
                             -3.9964640141e-1f,
                             4.9992722273e-1f,
                             -6.6666942835e-1f,
                             1.0f,
                             -2.0f};
  __m512 p = f1(-1.1119284481e-1f);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) p = _mm512_fmadd_ps(p, f, f1(poly[i]));
  const __m512 radius = _mm512_sqrt_ps(_mm512_fmadd_ps(e, f1(-1.38629436112f), _mm512_mul_ps(p, f)));

  const __m512i turned = _mm512_add_epi32(angle_word, i1(0x20000000u));
  // The angle less its quadrant, times 4: what the shift leaves, as a signed number.
  const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_slli_epi32(angle_word, 2)), f1(3.6572951981678989e-10f));
  const __m512 z = _mm512_mul_ps(x, x);
  __m512 s = _mm512_fmadd_ps(f1(-1.9515295891e-4f), z, f1(8.3321608736e-3f));
  s = _mm512_fmadd_ps(s, z, f1(-1.6666654611e-1f));
  s = _mm512_fmadd_ps(_mm512_mul_ps(s, z), x, x);
  __m512 c = _mm512_fmadd_ps(f1(2.443315711809948e-5f), z, f1(-1.388731625493765e-3f));
  c = _mm512_fmadd_ps(c, z, f1(4.166664568298827e-2f));
  c = _mm512_fmadd_ps(_mm512_fmadd_ps(c, z, f1(-0.5f)), z, f1(1.0f));
  const __mmask16 swap = _mm512_test_epi32_mask(turned, i1(0x40000000u));
  // Bit 31 of `turned` changes both signs, so it changes that of the radius; in odd quadrants the cosine is -s.
  const __m512i sign = i1(0x80000000u);
  const __m512 r = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(radius), turned, sign, 0x78));
  const __m512i minus_s = _mm512_mask_xor_epi32(_mm512_castps_si512(c), swap, _mm512_castps_si512(s), sign);
  *sine = _mm512_mul_ps(r, _mm512_mask_blend_ps(swap, s, c));
  *cosine = _mm512_mul_ps(r, _mm512_castsi512_ps(minus_s));
}
#endif

// f(i, z0, z1) for i = 0, 2 kLanes, 4 kLanes, ... kChunk - 2 kLanes: two words of the kChunk normals of blocks block,
// block + 1, ..., which are row-major: in this order, or (kEvenOdd) the even elements and the odd ones.
template <bool kEvenOdd, class F>
GMK_INLINE void each_normals(uint64_t block, PhiloxAt at, const F& f) {
  alignas(64) uint32_t even[kChunk / 2], odd[kChunk / 2];
  chunk_words(even, odd, block, at);
#if defined(__AVX512F__)
  for (int i = 0; i < kChunk / 2; i += 16) {
    __m512 c, s;
    box_muller(_mm512_load_si512(even + i), _mm512_load_si512(odd + i), &c, &s);
    if (kEvenOdd) {  // what unpacking makes of the lanes, without mixing them
      const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
      const auto sorted = [&](__m512 x) { return (vfloat)_mm512_permutexvar_epi64(order, _mm512_castps_si512(x)); };
      f(2 * i, sorted(c), sorted(s));
    } else {
      f(2 * i, (vfloat)_mm512_unpacklo_ps(c, s), (vfloat)_mm512_unpackhi_ps(c, s));
    }
  }
#else
  alignas(64) float c[kChunk / 2], s[kChunk / 2];
#pragma omp simd
  for (int i = 0; i < kChunk / 2; ++i) {
    float sine, cosine;
    const float radius = rn_sqrt(minus_2_log(even[i]));
    sincos_2pi(odd[i], &sine, &cosine);
    c[i] = rn_mul(radius, cosine);
    s[i] = rn_mul(radius, sine);
  }
  for (int i = 0; i < kChunk / 2; i += 8) {
    const __m256 a = _mm256_load_ps(c + i), b = _mm256_load_ps(s + i);
    if (kEvenOdd) {
      const auto sorted = [](__m256 x) {
        return (vfloat)_mm256_permute4x64_pd(_mm256_castps_pd(x), _MM_SHUFFLE(3, 1, 2, 0));
      };
      f(2 * i, sorted(a), sorted(b));
    } else {
      f(2 * i, (vfloat)_mm256_unpacklo_ps(a, b), (vfloat)_mm256_unpackhi_ps(a, b));
    }
  }
#endif
}
static __attribute__((noinline, unused)) void chunk_uniforms(float* out, uint64_t block, PhiloxAt at) {
  alignas(64) uint32_t even[kChunk / 2], odd[kChunk / 2], words[kChunk];
  chunk_words(even, odd, block, at);
  for (int i = 0; i < kChunk / 2; i += 2 * kWide) unpack(even + i, odd + i, words + 2 * i);
#pragma omp simd
  for (int i = 0; i < kChunk; ++i) out[i] = uniform_from(words[i]);
}
#else
template <bool kEvenOdd, class F>
GMK_INLINE void each_normals(uint64_t block, PhiloxAt at, const F& f) {
  static_assert(kLanes == 4, "one block is one word");
  for (int b = 0; b < kChunkBlocks; b += 2) {
    float z[8];
    for (int k = 0; k < 2; ++k) normals_from(philox(block + uint64_t(b + k), at.step, at.stream, at.key), z + 4 * k);
    if (kEvenOdd) {
      f(4 * b, vfloat{z[0], z[2], z[4], z[6]}, vfloat{z[1], z[3], z[5], z[7]});
    } else {
      f(4 * b, load(z), load(z + 4));
    }
  }
}
GMK_INLINE void chunk_uniforms(float* out, uint64_t block, PhiloxAt at) {
  for (int b = 0; b < kChunkBlocks; ++b) {
    const PhiloxWords words = philox(block + uint64_t(b), at.step, at.stream, at.key);
    for (int i = 0; i < 4; ++i) out[4 * b + i] = uniform_from(words.w[i]);
  }
}
#endif

// Not inlined: inside an OpenMP region gcc 12 made it 1.6 times slower.
static __attribute__((noinline, unused)) void chunk_normals(float* out, uint64_t block, PhiloxAt at) {
  each_normals<false>(block, at, [&](int i, vfloat z0, vfloat z1) {
    store(out + i, z0);
    store(out + i + kLanes, z1);
  });
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

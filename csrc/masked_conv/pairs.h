// CPU kernels only: products of bfloat16 pairs summed in float32 (vdpbf16ps), where an AVX-512 CPU has them. The sum over k
// takes two neighbours at a time. In the sum over channels and taps a pair lies within a run of the band, since taps that are
// adjacent continue each other; in the sum over pixels it lies within a row of the image. Where the last one of a run or a row
// has no partner, both factors of the partner are zero, so what lies beyond, NaN or infinite, is never multiplied.
// The instruction takes subnormal numbers, factors and sums, for zero.
#pragma once
#include "masked_conv/panel.h"

#if defined(__AVX512BW__) && (defined(__GNUC__) || defined(__clang__))
#define GMK_PAIRS __attribute__((target("avx512bf16")))

namespace gmk {
namespace GMK_ISA_NS {
namespace {

GMK_INLINE bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }

// [pair of rows][lanes][2] from [row][lanes]; `lanes` whole words.
GMK_INLINE void pair_up(const bf16* low, const bf16* high, int64_t lanes, bf16* to) {
  for (int64_t l = 0; l < lanes; l += kLanes) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + l)));
    const __m512i b = high ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + l))) : __m512i{};
    _mm512_storeu_si512(to + 2 * l, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}
// Rows of a panel of weights once they are pairs.
GMK_INLINE int64_t paired_rows(const Bands& s) {
  int64_t rows = 0;
  for (int r = 0; r < s.runs; ++r) rows += (s.run[r].length + 1) / 2 * 2;
  return rows;
}
GMK_INLINE void pair_weights(const Bands& s, const bf16* rows, int64_t lanes, bf16* to) {
  for (int r = 0; r < s.runs; ++r)
    for (int64_t left = s.run[r].length; left > 0; left -= 2, rows += least(left + 2, 2) * lanes, to += 2 * lanes)
      pair_up(rows, left > 1 ? rows + lanes : nullptr, lanes, to);
}

static inline __attribute__((always_inline, target("avx512bf16"))) vfloat add_pairs(vfloat sum, __m512i a, __m512i b) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
GMK_INLINE __m512i splat_pair(const bf16* p) {
  int32_t two;
  memcpy(&two, p, sizeof two);
  return _mm512_set1_epi32(two);
}
GMK_INLINE __m512i splat_last(const bf16* p) { return _mm512_set1_epi32(p->bits); }

// As the panel_pixels of float32.
template <int vectors>
GMK_PAIRS __attribute__((noinline)) void panel_pixels(const Bands& s, const Band& band, const bf16* scratch,
                                                      const bf16* weights, const float* bias, const Target<bf16>& to) {
  const int64_t pixels = band.pixels();
  int64_t y = 0, x = 0;
  for (int64_t first = 0; first < pixels; first += kTile) {
    Tile<bf16> tile;
    next_tile(s, band, scratch, pixels - first, y, x, tile);
    vfloat acc[kTile][vectors];
    for (int j = 0; j < vectors; ++j) {
      const vfloat b = load(bias + j * kLanes);
      for (int p = 0; p < kTile; ++p) acc[p][j] = b;
    }
    const bf16* w = weights;
    for (int r = 0; r < s.runs; ++r) {
      const bf16* q[kTile];
      for (int p = 0; p < kTile; ++p) q[p] = tile.slot[p] + s.run[r].offset;
      const int64_t length = s.run[r].length;
      int64_t c = 0;
      for (; c + 1 < length; c += 2, w += vectors * 2 * kLanes) {
        __m512i word[vectors];
        for (int j = 0; j < vectors; ++j) word[j] = _mm512_loadu_si512(w + j * 2 * kLanes);
        for (int p = 0; p < kTile; ++p) {
          const __m512i value = splat_pair(q[p] + c);
          for (int j = 0; j < vectors; ++j) acc[p][j] = add_pairs(acc[p][j], value, word[j]);
        }
      }
      if (c == length) continue;
      for (int p = 0; p < kTile; ++p) {
        const __m512i value = splat_last(q[p] + c);
        for (int j = 0; j < vectors; ++j)
          acc[p][j] = add_pairs(acc[p][j], value, _mm512_loadu_si512(w + j * 2 * kLanes));
      }
      w += vectors * 2 * kLanes;
    }
    finish<float>(tile, to, acc);
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
#endif

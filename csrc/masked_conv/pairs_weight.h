// CPU kernels only: the gradient for weight by products of bfloat16 pairs (pairs.h): two neighbouring pixels of a row. A band
// of x lies in scratch as one plane for each channel, and grad as [pair of pixels][lanes][2].
#pragma once
#include "masked_conv/pairs.h"

#ifdef GMK_PAIRS
namespace gmk {
namespace GMK_ISA_NS {
namespace {

GMK_INLINE int64_t plane_size(const Bands& s) { return (s.rows + s.halo_y) * s.pitch; }
GMK_INLINE int64_t pairs_of(int64_t pixels) { return (pixels + 1) / 2; }

// planes: [c][row][column], zeros outside the image.
inline void pack_planes(const Bands& s, const Band& band, const bf16* x, bool nhwc, bf16* planes) {
  const int64_t c = s.channels, first = band.x + s.left, end = first + band.cols + s.halo_x, plane = plane_size(s);
  const int64_t from = least(most(first, 0), s.w), to = most(from, least(end, s.w));
  if (nhwc) memset(planes, 0, size_t(c * plane) * sizeof(bf16));
  for (int64_t r = 0; r < band.rows + s.halo_y; ++r) {
    const int64_t y = band.y + s.top + r;
    const bool inside = y >= 0 && y < s.h && from < to;
    bf16* const row = planes + r * s.pitch;
    if (nhwc) {
      if (inside) transpose(x + ((band.image * s.h + y) * s.w + from) * c, c, to - from, c, row + from - first, plane);
      continue;
    }
    const bf16* const line = x + (band.image * c * s.h + y) * s.w;  // of channel 0
    for (int64_t j = first; j < end; j += 32) {
      const __mmask32 room = first_lanes(end - j);
      const __mmask32 some = inside && to > j ? first_lanes(to - j) & ~first_lanes(most(0, from - j)) : 0;
      for (int64_t i = 0; i < c; ++i)
        _mm512_mask_storeu_epi16(row + i * plane + j - first, room,
                                 some ? _mm512_maskz_loadu_epi16(some, line + i * s.h * s.w + j) : __m512i{});
    }
  }
}

// panel: [row][pair of columns][lanes][2], zeros where there is no pixel or no channel.
inline void pair_grad(const Bands& s, const Band& band, const bf16* grad, bool nhwc, int64_t channels, int64_t channel,
                      int64_t count, bf16* panel, int64_t lanes) {
  for (int64_t y = band.y; y < band.y + band.rows; ++y) {
    if (nhwc) {
      const bf16* g = grad + ((band.image * s.h + y) * s.w + band.x) * channels + channel;
      for (int64_t x = 0; x < band.cols; x += 2, g += 2 * channels, panel += 2 * lanes)
        for (int64_t l = 0; l < lanes; l += kLanes) {
          const __mmask16 some = __mmask16(first_lanes(most(0, count - l)));
          const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, g + l));
          const __m512i b =
              x + 1 < band.cols ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, g + channels + l)) : __m512i{};
          _mm512_storeu_si512(panel + 2 * l, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
      continue;
    }
    const bf16* const g = grad + ((band.image * channels + channel) * s.h + y) * s.w + band.x;
    for (int64_t x = 0; x < band.cols; x += 32) {
      const __mmask32 some = first_lanes(band.cols - x);
      const int64_t pairs = least(16, pairs_of(band.cols - x));
      for (int64_t l = 0; l < lanes; l += 16) {
        __m512 r[16];
        for (int i = 0; i < 16; ++i)
          r[i] = l + i < count ? (__m512)_mm512_maskz_loadu_epi16(some, g + (l + i) * s.h * s.w + x) : __m512{};
        turn(r);
        for (int i = 0; i < 16; ++i)
          if (i < pairs) _mm512_storeu_ps(panel + (i * lanes + l) * 2, r[i]);
      }
      panel += pairs * 2 * lanes;
    }
  }
}

// partial[row] += sum over the band's pixels of planes[start[row] + pixel] * g[pixel]; the last row, the bias, of g alone.
template <int vectors>
GMK_PAIRS __attribute__((noinline)) void pair_products(const Bands& s, const Band& band, const bf16* planes,
                                                       const int64_t* start, int64_t rows, const bf16* g,
                                                       float* partial, int64_t pitch) {
  for (int64_t row = 0; row < rows; row += kTile) {
    const int live = int(least(kTile, rows - row));
    const bf16* q[kTile];
    for (int i = 0; i < kTile; ++i) q[i] = planes + start[row + (i < live ? i : 0)];
    vfloat acc[kTile][vectors];
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < vectors; ++j) acc[i][j] = vfloat{};
    const bf16* w = g;
    for (int64_t y = 0; y < band.rows; ++y) {
      int64_t x = 0;
      __m512i word[vectors];
      for (; x + 1 < band.cols; x += 2, w += vectors * 2 * kLanes) {
        for (int j = 0; j < vectors; ++j) word[j] = _mm512_loadu_si512(w + j * 2 * kLanes);
        for (int i = 0; i < kTile; ++i) {
          const __m512i value = splat_pair(q[i] + x);
          for (int j = 0; j < vectors; ++j) acc[i][j] = add_pairs(acc[i][j], value, word[j]);
        }
      }
      if (x < band.cols) {
        for (int j = 0; j < vectors; ++j) word[j] = _mm512_loadu_si512(w + j * 2 * kLanes);
        for (int i = 0; i < kTile; ++i) {
          const __m512i value = splat_last(q[i] + x);
          for (int j = 0; j < vectors; ++j) acc[i][j] = add_pairs(acc[i][j], value, word[j]);
        }
        w += vectors * 2 * kLanes;
      }
      for (int i = 0; i < kTile; ++i) q[i] += s.pitch;
    }
    for (int i = 0; i < kTile; ++i)  // a fixed count: sums stay in registers
      for (int j = 0; j < vectors; ++j) {
        float* const p = partial + (row + i) * pitch + j * kLanes;
        if (i < live) store(p, load(p) + acc[i][j]);
      }
  }
  vfloat sum[vectors] = {};
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  for (int64_t p = 0; p < band.rows * pairs_of(band.cols); ++p)
    for (int j = 0; j < vectors; ++j)
      sum[j] = add_pairs(sum[j], ones, _mm512_loadu_si512(g + (p * vectors + j) * 2 * kLanes));
  for (int j = 0; j < vectors; ++j) {
    float* const p = partial + rows * pitch + j * kLanes;
    store(p, load(p) + sum[j]);
  }
}

inline void pair_panel(const Bands& s, const Band& band, const MaskedConvWeight& a, const int64_t* start,
                       int64_t channel, int64_t count, int vectors, const bf16* planes, bf16* panel, float* partial,
                       int64_t pitch) {
  const int64_t rows = a.taps.count * a.c_in;
  pair_grad(s, band, static_cast<const bf16*>(a.grad), a.grad_nhwc, a.c_out, channel, count, panel, vectors * kLanes);
  switch (vectors) {
    case 1:
      return pair_products<1>(s, band, planes, start, rows, panel, partial, pitch);
    case 2:
      return pair_products<2>(s, band, planes, start, rows, panel, partial, pitch);
    case 3:
      return pair_products<3>(s, band, planes, start, rows, panel, partial, pitch);
    default:
      return pair_products<4>(s, band, planes, start, rows, panel, partial, pitch);
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk
#endif

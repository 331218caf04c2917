// CPU kernels only, float32: a third fewer multiplications where live taps are neighbours in a row. Pixels are taken in pairs
// (2 i, 2 i + 1 of an image row), and what a segment of up to three neighbouring taps g adds to a pair, seeing the columns d, is
//   three taps   m0 += (d0 - d2) g0,  m1 += (d1 + d2) (g0 + g1 + g2) / 2,  m2 += (d2 - d1) (g0 - g1 + g2) / 2,  m3 += (d3 - d1) g2
//   two taps     m0 += (d0 - d1) g0,  m1 += d1 (g0 + g1),                                                      m3 += (d2 - d1) g1
//   one tap      m0 += d0 g0,                                                                                  m3 += d1 g0
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 + m3
// 4, 3 and 2 products where a direct sum has 6, 4 and 2; segments of all rows and channels add up before the last line.
// No pixel of y depends on a column that its own taps do not see, not even by rounding or NaN; weights within a segment do mix.
// Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016, there in two dimensions and for whole kernels.
#pragma once
#include "masked_conv/band.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kPoints = 4;                // m0 to m3
constexpr int kMaxSegments = 64;          // more: the direct sum
constexpr int kMostProducts = 13;         // in 16 of the direct sum's: with more there is nothing to gain
constexpr int64_t kMostValues = 1 << 22;  // planes for one row of pixels, of a thread: 16 MB

struct Winograd {
  int64_t channels, pitch;  // of x; from a row of planes to the next
  int segments, planes;
  struct {
    int tap, taps;  // the first one in the list, 1 to 3 of them
  } segment[kMaxSegments];
  struct {
    int first, second, sign;  // columns from that of the pair's first pixel - `left` on: first + sign * second
  } plane[kPoints * kMaxSegments];
  int products;  // for a pair and an input channel
  int runs[kPoints];
  Run run[kPoints][kMaxSegments];  // in the scratch of planes, [row][pair][plane][channel]
};

GMK_INLINE bool adds(int point, int taps) { return point == 0 || point == 3 || taps > point; }

// In the order of packed weights: call(point, segment).
template <class Call>
GMK_INLINE void each_product(const Winograd& f, const Call& call) {
  for (int point = 0; point < kPoints; ++point)
    for (int i = 0; i < f.segments; ++i)
      if (adds(point, f.segment[i].taps)) call(point, i);
}

GMK_INLINE int plane_of(Winograd& f, int first, int second, int sign) {
  for (int k = 0; k < f.planes; ++k)
    if (f.plane[k].first == first && f.plane[k].second == second && f.plane[k].sign == sign) return k;
  f.plane[f.planes] = {first, second, sign};
  return f.planes++;
}

// False where it gains nothing. By sizes of one image alone: a sample must not depend on its batch.
GMK_INLINE bool plan(Winograd& f, const Bands& s, const Taps& taps) {
  f.channels = s.channels;
  f.segments = f.planes = f.products = 0;
  if (s.channels < 8 || s.h * s.w < 64) return false;
  for (int i = 0; i < taps.count; ++i) {
    const bool adjacent = i > 0 && tap_dy(taps, i) == tap_dy(taps, i - 1) && tap_dx(taps, i) == tap_dx(taps, i - 1) + 1;
    if (adjacent && f.segment[f.segments - 1].taps < 3) {
      ++f.segment[f.segments - 1].taps;
    } else {
      if (f.segments == kMaxSegments) return false;
      f.segment[f.segments++] = {i, 1};
    }
  }
  for (int i = 0; i < f.segments; ++i) f.products += f.segment[i].taps + 1;
  if (8 * f.products > kMostProducts * taps.count) return false;
  int row[kPoints * kMaxSegments], plane[kPoints * kMaxSegments], k = 0;
  each_product(f, [&](int point, int i) {
    const int tap = f.segment[i].tap, d = int(tap_dx(taps, tap) - s.left), count = f.segment[i].taps;
    row[k] = int(tap_dy(taps, tap) - s.top);
    plane[k++] = point == 0   ? plane_of(f, d, count > 1 ? d + count - 1 : 0, count > 1 ? -1 : 0)
                 : point == 1 ? plane_of(f, d + 1, count > 2 ? d + 2 : 0, count > 2 ? 1 : 0)
                 : point == 2 ? plane_of(f, d + 2, d + 1, -1)
                              : plane_of(f, d + count, count > 1 ? d + 1 : 0, count > 1 ? -1 : 0);
  });
  f.pitch = (s.cols + 1) / 2 * f.planes * s.channels;
  if ((s.halo_y + 1) * f.pitch > kMostValues) return false;
  k = 0;
  for (int point = 0; point < kPoints; ++point) f.runs[point] = 0;
  each_product(f, [&](int point, int) {
    int& runs = f.runs[point];
    const bool adjacent = runs && row[k] == row[k - 1] && plane[k] == plane[k - 1] + 1;
    if (adjacent) {
      f.run[point][runs - 1].length += s.channels;
    } else {
      f.run[point][runs++] = Run{row[k] * f.pitch + plane[k] * s.channels, s.channels};
    }
    ++k;
  });
  return true;
}

constexpr int64_t kSlack = 2 * kLanes;  // whole words are read and written past the last channel
// A row of x, with the column that an odd row's last pair lacks.
GMK_INLINE int64_t row_size(const Bands& s) { return (s.pitch + 1) * s.channels + kSlack; }
GMK_INLINE int64_t plane_size(const Winograd& f, const Bands& s) { return (s.rows + s.halo_y) * f.pitch + kSlack; }

// to: [row][pair][plane][channel]; row: room for one row of x.
template <class S>
void pack_planes(const Winograd& f, const Bands& s, const Band& band, const S* x, bool nhwc, float* row, float* to) {
  const int64_t c = s.channels, pairs = (band.cols + 1) / 2;
  for (int64_t r = 0; r < band.rows + s.halo_y; ++r) {
    float* out = to + r * f.pitch;
    if (!pack_row(s, band, r, 2 * pairs, x, nhwc, row)) {
      memset(out, 0, size_t(pairs * f.planes * c) * sizeof(float));
      continue;
    }
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int k = 0; k < f.planes; ++k, out += c) {
        const float* const a = row + (2 * pair + f.plane[k].first) * c;
        const float* const b = row + (2 * pair + f.plane[k].second) * c;
        if (f.plane[k].sign == 0) {
          for (int64_t i = 0; i < c; i += kLanes) store(out + i, load(a + i));
        } else if (f.plane[k].sign > 0) {
          for (int64_t i = 0; i < c; i += kLanes) store(out + i, load(a + i) + load(b + i));
        } else {
          for (int64_t i = 0; i < c; i += kLanes) store(out + i, load(a + i) - load(b + i));
        }
      }
  }
}

// [product][c_in][lanes] from [tap][c_in][lanes].
GMK_INLINE void combine_weights(const Winograd& f, const float* taps, int64_t lanes, float* to) {
  const int64_t n = f.channels * lanes;
  each_product(f, [&](int point, int i) {
    const int count = f.segment[i].taps;
    const float* const g = taps + (f.segment[i].tap + (point == 3 ? count - 1 : 0)) * n;
    for (int64_t l = 0; l < n; l += kLanes) {
      vfloat sum = load(g + l);
      if (point == 1 && count == 2) sum += load(g + n + l);
      if (point == 1 && count == 3) sum = splat(0.5f) * (sum + load(g + n + l) + load(g + 2 * n + l));
      if (point == 2) sum = splat(0.5f) * (sum - load(g + n + l) + load(g + 2 * n + l));
      store(to + l, sum);
    }
    to += n;
  });
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

// CPU kernels only: the vertical stack by pairs of pixels, Winograd's F(2, 3) along a row. Of four neighbouring columns d and three taps g
//   y0 = m0 + m1 + m2, y1 = m1 - m2 - m3,   m_j = D_j . G_j, summed over rows and channels
//   D = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),  G = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
// four products a pair instead of six. Rows are complete when they get here, so that both pixels may know all four columns.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#pragma once
#include "pixelcnn/map.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kPairs = 48;  // that pass a panel of weights together, or those of one image

GMK_INLINE int64_t images_of_pairs(int64_t count) { return count < kPairs ? kPairs / count : 1; }
// Floats for any part of a row of so many pairs.
GMK_INLINE int64_t pairs_scratch(int64_t count, int64_t k) {
  return (count < kPairs ? kPairs : count) * kPairPoints * k;
}

// D of a pair, [point][row][channel]. Of the last pixel of an odd row, the last column lies behind the margin: nobody needs it.
void transform(const float* in, const Run* run, int runs, int64_t channels, bool both, float* d) {
  const int64_t k = runs * channels;
  for (int row = 0; row < runs; ++row, d += channels) {
    const float* const d0 = in + run[row].offset;
    const float *const d1 = d0 + channels, *const d2 = d1 + channels, *const d3 = both ? d2 + channels : d1;
    for (int64_t c = 0; c < channels; ++c) {
      d[c] = d0[c] - d2[c];
      d[k + c] = d1[c] + d2[c];
      d[2 * k + c] = d2[c] - d1[c];
      d[3 * k + c] = d1[c] - d3[c];
    }
  }
}

// As `apply`, the columns of pairs [from, to) of a row of `width`; `k` and the weights are those of a point.
void apply_pairs(const Map& m, int64_t images, int64_t from, int64_t to, int64_t width, float* scratch) {
  const int64_t each = to - from, point = m.k * (m.gate ? 2 : 1) * ceil_div(m.outputs, kLanes) * kLanes;
  const Run whole{0, m.k};
  alignas(64) float z[kPairPoints][kTile * kWords * kLanes], y[2 * kTile * kWords * kLanes];
  for (int64_t image = 0, end; each > 0 && image < images; image = end) {
    end = least(images, image + images_of_pairs(each));
    float* d = scratch;
    for (int64_t b = image; b < end; ++b)
      for (int64_t pair = from; pair < to; ++pair, d += kPairPoints * m.k)
        transform(m.in.at(b, 2 * pair), m.run, m.runs, m.in.column, 2 * pair + 1 < width, d);
    const int64_t pairs = (end - image) * each, tiles = ceil_div(pairs, kTile);
    for_panels(m, [&](const Panel& panel) {
      int64_t done = 0, b = image, x = 2 * from;
      for (int64_t t = 1; t <= tiles; ++t) {
        const int count = int(pairs * t / tiles - done);
        const float *in[kPairPoints][kTile], *add[kTile], *residual[2 * kTile];
        float* out[2 * kTile];
        int pixels = 0, place[kTile + 1];  // of a pair's first pixel among those of the tile
        for (int p = 0; p < count; ++p) {
          for (int j = 0; j < kPairPoints; ++j) in[j][p] = scratch + ((done + p) * kPairPoints + j) * m.k;
          add[p] = m.add.at(b, x);
          place[p] = pixels;
          for (int64_t i = x; i < x + 2 && i < width; ++i, ++pixels) {
            residual[pixels] = m.residual.base ? m.residual.at(b, i) : nullptr;
            out[pixels] = m.out.at(b, i);
          }
          if ((x += 2) == 2 * to) x = 2 * from, ++b;
        }
        place[count] = pixels;
        for (int j = 0; j < kPairPoints; ++j)
          kTiles[count - 1][panel.vectors - 1](in[j], &whole, 1, panel.weights + j * point, j == 1 ? add : nullptr,
                                               panel.word, z[j]);
        const int sums = panel.vectors * kLanes;
        for (int p = 0; p < count; ++p)
          for (int i = p * sums, to0 = place[p] * sums; i < (p + 1) * sums; i += kLanes, to0 += kLanes) {
            const vfloat z1 = load(z[1] + i), z2 = load(z[2] + i);
            store(y + to0, z1 + load(z[0] + i) + z2);
            if (place[p] + 1 < place[p + 1]) store(y + to0 + sums, z1 - load(z[3] + i) - z2);
          }
        finish(m, panel, y, pixels, residual, out);
        done += count;
      }
    });
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

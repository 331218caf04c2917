// CPU kernels only: a linear map of many pixels. Up to kTile pixels x one panel of outputs stay in registers while the runs of their
// inputs go by, in order: a pixel's bits do not depend on the tile that it falls to.
#pragma once
#include "core/simd_math.h"
#include "pixelcnn/pixelcnn.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kTile = 6;                                // pixels of a register tile
constexpr int kWords = GMK_VECTOR_BYTES == 64 ? 4 : 2;  // its SIMD words: 24 of 32 registers, or 12 of 16

GMK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GMK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GMK_INLINE int64_t ring(int64_t row, int64_t rows) { return (row + rows) % rows; }  // row >= -rows

struct Run {
  int64_t offset;  // from a pixel's place in the input
  int64_t length;
};

// Where a pixel's numbers are: base + image * (...) + column * (...).
template <class T>
struct Field {
  T* base;
  int64_t image, column;
  T* at(int64_t b, int64_t x) const { return base + b * image + x * column; }
};

struct Map {
  Field<const float> in;
  const Run* run;
  int runs;
  int64_t k;             // sum of the runs' lengths
  const float* weights;  // panels
  int64_t outputs;       // with a gate, of a half
  Field<const float> add;
  int64_t half;                 // with a gate, from the tanh half of `add` to its sigmoid half
  Field<const float> residual;  // base nullptr: none
  Field<float> out;
  bool gate, relu;
};

// z [pixel][word] = add, or 0 where that is nullptr, + the map of the pixels.
using Tile = void (*)(const float* const* in, const Run* run, int runs, const float* w, const float* const* add,
                      const int64_t* word, float* z);

template <int pixels, int words>
void tile(const float* const* in, const Run* run, int runs, const float* w, const float* const* add,
          const int64_t* word, float* z) {
  vfloat acc[pixels][words];
  for (int p = 0; p < pixels; ++p)
    for (int j = 0; j < words; ++j) acc[p][j] = add ? load(add[p] + word[j]) : vfloat{};
  for (int r = 0; r < runs; ++r) {
    const float* q[pixels];
    for (int p = 0; p < pixels; ++p) q[p] = in[p] + run[r].offset;
    for (int64_t k = 0; k < run[r].length; ++k, w += words * kLanes) {
      vfloat weight[words];
      for (int j = 0; j < words; ++j) weight[j] = load(w + j * kLanes);
      for (int p = 0; p < pixels; ++p) {
        const vfloat value = splat(q[p][k]);
        for (int j = 0; j < words; ++j) acc[p][j] = madd(value, weight[j], acc[p][j]);
      }
    }
  }
  for (int p = 0; p < pixels; ++p)
    for (int j = 0; j < words; ++j) store(z + (p * words + j) * kLanes, acc[p][j]);
}

#if GMK_VECTOR_BYTES == 64
#define GMK_TILES(pixels) {tile<pixels, 1>, tile<pixels, 2>, tile<pixels, 3>, tile<pixels, 4>}
#else
#define GMK_TILES(pixels) {tile<pixels, 1>, tile<pixels, 2>}
#endif
const Tile kTiles[kTile][kWords] = {GMK_TILES(1), GMK_TILES(2), GMK_TILES(3), GMK_TILES(4), GMK_TILES(5), GMK_TILES(6)};

GMK_INLINE void put(float* p, vfloat x, int64_t count) {
  if (count >= kLanes) {
    store(p, x);
  } else {
    store_some(p, x, count);
  }
}

// tanh(x) sigmoid(s) by one division.
GMK_INLINE vfloat gated(vfloat x, vfloat s) {
  vfloat numerator, denominator;
  tanh_fraction(x, &numerator, &denominator);
  return numerator / (denominator * (splat(1.0f) + vexp(-s)));
}

struct Panel {
  int64_t first;         // word of outputs
  int words, vectors;    // of outputs; of sums, twice as many with a gate
  int64_t word[kWords];  // where each sum's word lies in `add`
  const float* weights;
};
template <class F>
GMK_INLINE void for_panels(const Map& m, F f) {
  const int halves = m.gate ? 2 : 1;
  const int64_t all = ceil_div(m.outputs, kLanes);
  Panel panel;
  for (panel.first = 0; panel.first < all; panel.first += kWords / halves) {
    panel.words = int(least(kWords / halves, all - panel.first));
    panel.vectors = panel.words * halves;
    panel.weights = m.weights + panel.first * halves * m.k * kLanes;
    for (int j = 0; j < panel.vectors; ++j)
      panel.word[j] = j < panel.words ? (panel.first + j) * kLanes : m.half + (panel.first + j - panel.words) * kLanes;
    f(panel);
  }
}

// What follows the sums z [pixel][word] of a panel.
void finish(const Map& m, const Panel& panel, const float* z, int pixels, const float* const* residual,
            float* const* out) {
  for (int p = 0; p < pixels; ++p)
    for (int j = 0; j < panel.words; ++j) {
      const float* const sum = z + (p * panel.vectors + j) * kLanes;
      const int64_t at = (panel.first + j) * kLanes;
      vfloat y = load(sum);
      if (m.gate) y = gated(y, load(sum + panel.words * kLanes));
      if (m.residual.base) y = y + load(residual[p] + at);
      if (m.relu) y = vmax(vfloat{}, y);  // NaN stays
      put(out[p] + at, y, m.outputs - at);
    }
}

// The map of the pixels of all images in columns [from, to).
void apply(const Map& m, int64_t images, int64_t from, int64_t to) {
  const int64_t pixels = images * (to - from), tiles = ceil_div(pixels, kTile);
  alignas(64) float z[kTile * kWords * kLanes];
  for_panels(m, [&](const Panel& panel) {
    int64_t done = 0, b = 0, x = from;
    for (int64_t t = 1; t <= tiles; ++t) {  // of nearly the same size
      const int count = int(pixels * t / tiles - done);
      const float *in[kTile], *add[kTile], *residual[kTile];
      float* out[kTile];
      for (int p = 0; p < count; ++p) {
        in[p] = m.in.at(b, x);
        add[p] = m.add.at(b, x);
        residual[p] = m.residual.base ? m.residual.at(b, x) : nullptr;
        out[p] = m.out.at(b, x);
        if (++x == to) x = from, ++b;
      }
      kTiles[count - 1][panel.vectors - 1](in, m.run, m.runs, panel.weights, add, panel.word, z);
      finish(m, panel, z, count, residual, out);
      done += count;
    }
  });
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

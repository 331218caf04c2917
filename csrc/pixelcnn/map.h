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

using Tile = void (*)(const float* const* in, const Run* run, int runs, const float* w, const float* const* add,
                      const int64_t* word, float* z);

template <int pixels, int words>
void tile(const float* const* in, const Run* run, int runs, const float* w, const float* const* add,
          const int64_t* word, float* z) {
  vfloat acc[pixels][words];
  for (int p = 0; p < pixels; ++p)
    for (int j = 0; j < words; ++j) acc[p][j] = load(add[p] + word[j]);
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

void finish(const Map& m, const float* z, int pixels, int words, const float* const* residual, float* const* out,
            int64_t first) {
  const int vectors = m.gate ? 2 * words : words;
  for (int p = 0; p < pixels; ++p)
    for (int j = 0; j < words; ++j) {
      const float* const sum = z + (p * vectors + j) * kLanes;
      const int64_t at = first + j * kLanes;
      vfloat y = load(sum);
      if (m.gate) y = gated(y, load(sum + words * kLanes));
      if (m.residual.base) y = y + load(residual[p] + at);
      if (m.relu) y = vmax(vfloat{}, y);  // NaN stays
      put(out[p] + at, y, m.outputs - at);
    }
}

// The map of the pixels of all images in columns [from, to).
void apply(const Map& m, int64_t images, int64_t from, int64_t to) {
  const int halves = m.gate ? 2 : 1;
  const int64_t pixels = images * (to - from), tiles = ceil_div(pixels, kTile), all = ceil_div(m.outputs, kLanes);
  alignas(64) float z[kTile * kWords * kLanes];
  for (int64_t first = 0; first < all; first += kWords / halves) {
    const int words = int(least(kWords / halves, all - first)), vectors = words * halves;
    const float* const weights = m.weights + first * halves * m.k * kLanes;
    int64_t word[kWords];
    for (int j = 0; j < vectors; ++j)
      word[j] = j < words ? (first + j) * kLanes : m.half + (first + j - words) * kLanes;
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
      kTiles[count - 1][vectors - 1](in, m.run, m.runs, weights, add, word, z);
      finish(m, z, count, words, residual, out, first * kLanes);
      done += count;
    }
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

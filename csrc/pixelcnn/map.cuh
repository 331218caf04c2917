// A linear map of many pixels by one block. A warp makes one panel of outputs of up to four pixels, lane by lane; weights come from
// L2 in whole lines, what they are multiplied with is read by all lanes at once.
#pragma once
#include "cuda/prims.cuh"
#include "pixelcnn/pixelcnn.h"

namespace gmk {
namespace {

constexpr int kLanes = kPixelCnnCudaLanes, kWarps = kPixelCnnWarps, kThreads = kWarps * kLanes;
constexpr int kTile = 4;  // pixels of a warp

// A linear map of pixels (row, column): of an image and its columns, or of one row, which are the images. Run i of its inputs starts at slot first + i of a ring of `rows` slots.
struct Map {
  const float* in;
  int64_t in_row, in_column;
  int runs, first, rows;
  int64_t pitch;         // from slot to slot
  int64_t length, last;  // of a run, of the last one
  int64_t k;             // of all
  const float* weights;
  int64_t outputs;  // with a gate, of a half
  const float* add;
  int64_t add_row, add_column, half;
  const float* residual;  // nullptr: none
  float* out;
  int64_t out_row, out_column;  // of `residual` too
  bool gate, relu;
  bool wide;  // inputs may be read four at a time
};

GMK_DEV int64_t panels_of(const Map& m) { return (m.outputs + kLanes - 1) / kLanes; }
GMK_DEV bool is_wide(const Map& m) {
  return aligned(m.in, 16) && m.in_row % 4 == 0 && m.in_column % 4 == 0 && m.pitch % 4 == 0 &&
         (m.runs == 1 || m.length % 4 == 0);
}

// acc += the terms [from, to) of the sums of one panel.
template <int T, int halves>
GMK_DEV void add_terms(const Map& m, const float* const (&in)[T], int64_t panel, int64_t from, int64_t to,
                       float (&acc)[T][halves]) {
  const int lane = int(threadIdx.x) % kLanes;
  const float* w = m.weights + (panel * m.k + from) * halves * kLanes + lane;
  int64_t start = 0;
  for (int r = 0; r < m.runs; ++r) {
    const int64_t length = r + 1 == m.runs ? m.last : m.length;
    const int64_t begin = from > start ? from - start : 0, end = to - start < length ? to - start : length;
    const int slot = m.first + r < m.rows ? m.first + r : m.first + r - m.rows;
    const int64_t offset = slot * m.pitch;
    int64_t k = begin;
    if (m.wide) {
#pragma unroll 1
      for (; k + 4 <= end; k += 4, w += 4 * halves * kLanes) {
        float weight[4][halves];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < halves; ++j) weight[i][j] = w[(i * halves + j) * kLanes];
#pragma unroll
        for (int p = 0; p < T; ++p) {
          const Pack<float, 4> x = load_pack<float, 4>(in[p] + offset + k);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < halves; ++j) acc[p][j] = fmaf(x.v[i], weight[i][j], acc[p][j]);
        }
      }
    }
    for (; k < end; ++k, w += halves * kLanes) {
#pragma unroll
      for (int p = 0; p < T; ++p) {
        const float x = in[p][offset + k];
#pragma unroll
        for (int j = 0; j < halves; ++j) acc[p][j] = fmaf(x, w[j * kLanes], acc[p][j]);
      }
    }
    start += length;
  }
}

GMK_DEV float gated(float t, float s) { return tanhf(t) / (1.0f + expf(-s)); }

// From the sum (or the gate of two) to the output.
GMK_DEV void finish(const Map& m, float z, int64_t at) {
  if (m.residual) z += m.residual[at];
  if (m.relu) z = z < 0 ? 0.0f : z;  // NaN stays
  m.out[at] = z;
}

// The pixels first .. first + T - 1 of a row, part `part` of `parts` of their sums: to the output, or to `partial` if there are
// parts, [part][pixel][half][lane of all panels].
template <int T, int halves>
GMK_DEV void make_tile(const Map& m, int64_t row, int64_t first, int64_t columns, int64_t panel, int part, int parts,
                       float* partial) {
  const int64_t output = panel * kLanes + int(threadIdx.x) % kLanes, last = columns - 1;
  const bool live = output < m.outputs;
  const float* in[T];
  float acc[T][halves];
#pragma unroll
  for (int p = 0; p < T; ++p) {
    const int64_t x = first + p < last ? first + p : last;  // past the last: that one again
    in[p] = m.in + row * m.in_row + x * m.in_column;
#pragma unroll
    for (int j = 0; j < halves; ++j)
      acc[p][j] = live && parts == 1 ? m.add[row * m.add_row + x * m.add_column + j * m.half + output] : 0.0f;
  }
  // Parts start at multiples of 4, so that their inputs stay aligned.
  const int64_t from = part ? m.k * part / parts / 4 * 4 : 0;
  const int64_t to = part + 1 < parts ? m.k * (part + 1) / parts / 4 * 4 : m.k;
  add_terms<T, halves>(m, in, panel, from, to, acc);
#pragma unroll
  for (int p = 0; p < T; ++p) {
    if (first + p > last) break;
    if (parts > 1) {
#pragma unroll
      for (int j = 0; j < halves; ++j)
        partial[((part * columns + first + p) * halves + j) * panels_of(m) * kLanes + output] = acc[p][j];
    } else if (live) {
      finish(m, halves == 2 ? gated(acc[p][0], acc[p][halves - 1]) : acc[p][0],
             row * m.out_row + (first + p) * m.out_column + output);
    }
  }
}

// Warps take tiles in turn, panel by panel, column by column, row by row, part by part.
template <int T>
GMK_DEV void make_tiles(const Map& m, int64_t rows, int64_t columns, int parts, float* partial) {
  const int64_t panels = panels_of(m);
  int64_t panel = int(threadIdx.x) / kLanes, column = 0, row = 0;
  for (int part = 0;; panel += kWarps) {
    for (; panel >= panels; panel -= panels) {
      column += T;
      if (column < columns) continue;
      column = 0;
      if (++row < rows) continue;
      row = 0;
      ++part;
    }
    if (part >= parts) return;
    if (m.gate) {
      make_tile<T, 2>(m, row, column, columns, panel, part, parts, partial);
    } else {
      make_tile<T, 1>(m, row, column, columns, panel, part, parts, partial);
    }
  }
}

// The map of one pixel of each image. All threads; afterwards they may read what it has made.
GMK_DEV void apply_pixel(const Map& m, int64_t images, float* partial) {
  const int parts = pixelcnn_parts(m.outputs, m.k);
  if (images == 1) {
    make_tiles<1>(m, 1, 1, parts, partial);
  } else {
    make_tiles<kTile>(m, 1, images, parts, partial);
  }
  __syncthreads();
  if (parts == 1) return;
  const int halves = m.gate ? 2 : 1, lanes = int(panels_of(m)) * kLanes, outputs = int(m.outputs);
  for (int i = int(threadIdx.x); i < int(images) * outputs; i += kThreads) {
    const int b = i / outputs, output = i % outputs;
    float z[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j >= halves) break;
      z[j] = m.add[b * m.add_column + j * m.half + output];
      for (int part = 0; part < parts; ++part)
        z[j] += partial[((part * int(images) + b) * halves + j) * lanes + output];
    }
    finish(m, m.gate ? gated(z[0], z[1]) : z[0], b * m.out_column + output);
  }
  __syncthreads();
}

}  // namespace
}  // namespace gmk

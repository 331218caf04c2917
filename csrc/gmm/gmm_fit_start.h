// CPU only: the rows of one small mixture, as every iteration reads them, and where EM starts: k-means.
#pragma once
#include "core/philox.h"
#include "core/simd.h"
#include "gmm/gmm_sample.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// Rows about their weighted mean, in blocks [d][rows] with the rows on the lanes. Past the end, and where the weight is
// 0, a row is 0 and counts nowhere.
struct FitRows {
  int64_t n, d, rows, padded;  // rows of data, features, rows of a block, rows with the last block filled up
  double *x, *weight, *shift;  // [padded / rows][d][rows], [padded], [d]
  double total;                // weight of all

  const double* block(int64_t first) const { return x + first * d; }
  double at(int64_t row, int64_t f) const { return x[(row / rows * d + f) * rows + row % rows]; }

  // f(row, x of its first feature): the next one is `rows` further.
  template <class F>
  void each(const F& f) const {
    for (int64_t first = 0; first < padded; first += rows)
      for (int64_t row = 0; row < rows; ++row) f(first + row, x + first * d + row);
  }

  template <class T>
  void load(const T* from, const T* weights) {
    total = 0;
    for (int64_t f = 0; f < d; ++f) shift[f] = 0;
    for (int64_t i = 0; i < padded; ++i) {
      const double w = weight[i] = i >= n ? 0 : weights ? double(weights[i]) : 1;
      total += w;
      if (w != 0)
        for (int64_t f = 0; f < d; ++f) shift[f] += w * double(from[i * d + f]);
    }
    for (int64_t f = 0; f < d; ++f) shift[f] /= total;
    each([&](int64_t i, double* to) {
      for (int64_t f = 0; f < d; ++f) to[f * rows] = weight[i] != 0 ? double(from[i * d + f]) - shift[f] : 0;
    });
  }
};

// Everything here is written so that each instruction set rounds alike: with + and * of one row, or sums in row order.
struct KMeans {
  static constexpr int n = simd<double>::n;
  static constexpr int kParts = 8;  // sums of potentials, whatever the width of a word

  const FitRows* data;
  int64_t k;
  double* centres;                  // [k, d]
  double *nearest, *trial, *least;  // [padded]: squared distances
  double* sums;                     // [k, d + 1]
  int64_t* labels;                  // [padded]

  // to[i] = min(before[i], |x_i - centre|^2)
  void distances(double* to, const double* centre, const double* before) const {
    const FitRows& r = *data;
    for (int64_t first = 0; first < r.padded; first += r.rows)
      for (int64_t row = 0; row < r.rows; row += n) {
        const double* const x = r.block(first) + row;
        vdouble sum{};
        for (int64_t f = 0; f < r.d; ++f) {
          const vdouble t = load(x + f * r.rows) - splat(centre[f]);
          sum += t * t;
        }
        store(to + first + row, before ? vmin(sum, load(before + first + row)) : sum);
      }
  }
  double potential(const double* distance) const {
    double part[kParts] = {};
    for (int64_t i = 0; i < data->padded; i += kParts)
      for (int l = 0; l < kParts; ++l) part[l] += data->weight[i + l] * distance[i + l];
    for (int half = kParts / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) part[l] += part[l + half];
    return part[0];
  }
  // The first row at which the weights (times distances) so far exceed u of them all; with nothing to go by, the first.
  int64_t choose(const double* distance, double u) const {
    double total = 0, sum = 0;
    const double* const w = data->weight;
    for (int64_t i = 0; i < data->n; ++i) total += distance ? w[i] * distance[i] : w[i];
    for (int64_t i = 0; i < data->n; ++i) {
      sum += distance ? w[i] * distance[i] : w[i];
      if (sum > u * total) return i;
    }
    for (int64_t i = 0; i < data->n; ++i)
      if (w[i] > 0) return i;
    return 0;
  }
  void take_centre(int64_t c, int64_t row) {
    for (int64_t f = 0; f < data->d; ++f) centres[c * data->d + f] = data->at(row, f);
  }

  // k-means++: of a few candidates, drawn by squared distance, the one that leaves the least potential. uniform(i) is in
  // (0, 1): 0 the first pick, then `candidates` for every other.
  template <class F>
  void pick(int64_t candidates, const F& uniform) {
    take_centre(0, choose(nullptr, uniform(0)));
    distances(nearest, centres, nullptr);
    for (int64_t c = 1; c < k; ++c) {
      int64_t best_row = 0;
      double best = 0;
      for (int64_t t = 0; t < candidates; ++t) {
        const int64_t row = choose(nearest, uniform(1 + (c - 1) * candidates + t));
        take_centre(c, row);
        distances(trial, centres + c * data->d, nearest);
        const double p = potential(trial);
        if (t && !(p < best)) continue;
        best = p;
        best_row = row;
        double* const swap = least;
        least = trial;
        trial = swap;
      }
      take_centre(c, best_row);
      double* const swap = least;
      least = nearest;
      nearest = swap;
    }
  }

  // The nearest centre of every row, of equally near ones the first; did any label change?
  bool assign() {
    const FitRows& r = *data;
    vlong changed{};
    for (int64_t first = 0; first < r.padded; first += r.rows)
      for (int64_t row = 0; row < r.rows; row += n) {
        const double* const x = r.block(first) + row;
        vdouble best{};
        vlong label{};
        for (int64_t c = 0; c < k; ++c) {
          vdouble sum{};
          for (int64_t f = 0; f < r.d; ++f) {
            const vdouble t = load(x + f * r.rows) - splat(centres[c * r.d + f]);
            sum += t * t;
          }
          const vlong closer = (vlong)(sum < best) | (c ? vlong{} : ~vlong{});
          best = select(closer, sum, best);
          label = select(closer, vlong{} + c, label);
        }
        vlong before;
        memcpy(&before, labels + first + row, sizeof before);
        changed |= (vlong)(label != before);
        memcpy(labels + first + row, &label, sizeof label);
      }
    for (int l = 0; l < n; ++l)
      if (changed[l]) return true;
    return false;
  }
  void move_centres() {  // an empty one stays
    const int64_t d = data->d;
    for (int64_t i = 0; i < k * (d + 1); ++i) sums[i] = 0;
    data->each([&](int64_t i, const double* x) {
      double* const own = sums + labels[i] * (d + 1);
      const double w = data->weight[i];
      for (int64_t f = 0; f < d; ++f) own[f] += w * x[f * data->rows];
      own[d] += w;
    });
    for (int64_t c = 0; c < k; ++c)
      for (int64_t f = 0; f < d && sums[c * (d + 1) + d] > 0; ++f)
        centres[c * d + f] = sums[c * (d + 1) + f] / sums[c * (d + 1) + d];
  }
  void lloyd(int64_t rounds) {
    for (int64_t i = 0; i < data->padded; ++i) labels[i] = -1;
    assign();
    for (int64_t round = 0; round < rounds; ++round) {
      move_centres();
      if (!assign()) break;
    }
  }
};

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

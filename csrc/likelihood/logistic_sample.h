// One pixel drawn from its discretized logistic mixture, in float64 on every device: they differ only where the logarithms of
// two libraries do, in the last bit.
#pragma once
#include <math.h>

#include "likelihood/logistic_mixture.h"

namespace gmk {

GMK_HD double logistic_uniform(uint32_t word) { return (double(word) + 0.5) * 2.3283064365386963e-10; }

// The levels of one pixel's channels, by the four words of its Philox block; `at(row)` is a parameter of it. A channel whose
// fixed[c] is not negative has that level, and the next channels' means see it. True: the pixel has no distribution.
template <class At>
GMK_HD bool logistic_draw(const LogisticShape& s, const LogisticRows& rows, double temperature,
                          const PhiloxWords& words, const At& at, const double (&fixed)[3], double (&levels)[3]) {
  // The component: of the largest logit (the first of equals) at temperature 0, else by the cumulative weights.
  double top = at(rows.logit);
  int64_t best = 0;
  bool bad = top != top;
  for (int64_t m = 1; m < s.mixtures; ++m) {
    const double logit = at(rows.logit + m * rows.step);
    bad = bad || logit != logit;
    if (logit > top) top = logit, best = m;
  }
  bad = bad || !(top - top == 0);  // no logit above -inf, or an infinite one
  if (temperature > 0 && !bad) {
    double total = 0, sum = 0;
    for (int64_t m = 0; m < s.mixtures; ++m) total += exp((at(rows.logit + m * rows.step) - top) / temperature);
    const double u = logistic_uniform(words.w[0]) * total;
    for (int64_t m = 0; m < s.mixtures; ++m) {
      const double weight = exp((at(rows.logit + m * rows.step) - top) / temperature);
      sum += weight;
      if (weight > 0) best = m;  // the last with a weight where rounding leaves u above the sum
      if (sum > u) break;
    }
  }
  double x[3] = {};
  GMK_UNROLL
  for (int c = 0; c < 3; ++c) {  // unrolled: x stays in registers
    if (c >= s.data_channels) break;
    const int64_t offset = c * rows.mean_step + best * rows.step;
    double value = at(rows.mean + offset);
    const double raw = at(rows.scale + offset), last = s.levels - 1;
    GMK_UNROLL
    for (int before = 0; before < c; ++before) {
      const int j = c * (c - 1) / 2 + before;
      const double k = at(rows.coefficient + j * rows.coefficient_step + best * rows.step);
      value += (s.kind == kTfp ? k : tanh(k)) * x[before];
    }
    const double scale = s.kind == kTfp ? fmax(raw, 0.0) + log1p(exp(-fabs(raw))) + exp(-7.0) : exp(fmax(raw, -7.0));
    bad = bad || raw != raw;
    if (temperature > 0) {
      const double u = logistic_uniform(c == 0 ? words.w[1] : c == 1 ? words.w[2] : words.w[3]);
      value += temperature * scale * (log(u) - log1p(-u));
    }
    bad = bad || value != value;
    const double drawn = fmin(fmax(floor((value + 1) * 0.5 * last + 0.5), 0.0), last);
    levels[c] = fixed[c] < 0 ? drawn : fixed[c];
    x[c] = 2 * levels[c] / last - 1;
  }
  return bad;
}

template <class T>
GMK_HD void logistic_sample_pixel(const LogisticMixtureSample& a, int64_t pixel) {
  const LogisticShape& s = a.shape;
  const LogisticRows rows = logistic_rows(s);
  const int64_t image = pixel / s.pixels, inside = pixel % s.pixels, channels = s.data_channels;
  const int64_t step = s.last ? 1 : s.pixels;  // from a channel to the next
  const T* const params =
      static_cast<const T*>(a.params) + (s.last ? pixel * rows.count : image * rows.count * s.pixels + inside);
  T* const out = static_cast<T*>(a.x) + (s.last ? pixel * channels : image * channels * s.pixels + inside);
  const bool own = a.seed_rows > 1;
  const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[own ? image : 0]) : a.seed);
  const PhiloxWords words = philox(uint64_t(own ? inside : pixel), 0, kStreamLogisticMixture, key);
  const double none[3] = {-1, -1, -1}, last = s.levels - 1;
  double levels[3] = {};
  const bool bad = logistic_draw(
      s, rows, a.temperature, words, [&](int64_t row) { return double(params[row * step]); }, none, levels);
  GMK_UNROLL
  for (int c = 0; c < 3; ++c) {
    if (c >= channels) break;
    const double level = levels[c];
    out[c * step] = bad             ? T(NAN)  // in one channel: the pixel is none
                    : level == last ? T(s.high)
                                    : T(s.low + level * ((s.high - s.low) / last));
  }
}

}  // namespace gmk

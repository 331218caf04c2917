// The discretized logistic mixture of a pixel, written once: `Ops` says what a number is, a SIMD word of pixels on the CPU, one
// pixel on CUDA; `Tile` is where its parameters are, a row a channel, and where the gradient takes their place.
#pragma once
#include "likelihood/likelihood.h"

#ifdef __CUDACC__
#define GMK_UNROLL _Pragma("unroll")
#else
#define GMK_UNROLL _Pragma("GCC unroll 3")
#endif

namespace gmk {

// Rows of the parameters of component 0; those of component m are m * step further.
struct LogisticRows {
  int64_t step, logit, mean, mean_step, scale, coefficient, coefficient_step, count;
};
GMK_HD LogisticRows logistic_rows(const LogisticShape& s) {
  const int64_t m = s.mixtures, c = s.data_channels;
  if (s.kind == kTfp) return {1 + 2 * c + c * (c - 1) / 2, 0, 1, 1, 1 + c, 1 + 2 * c, 1, m * (c == 3 ? 10 : 3)};
  return {1, 0, m, 3 * m, 2 * m, 3 * m, 3 * m, m * (c == 3 ? 10 : 3)};
}
// x * scale + offset is in [-1, 1].
GMK_HD double logistic_scale(const LogisticShape& s) { return 2 / (s.high - s.low); }
GMK_HD double logistic_offset(const LogisticShape& s) { return -(s.high + s.low) / (s.high - s.low); }
// Between the bins of the edge and their neighbours, and past the edge: a quarter of half a bin, as |x| > 0.999 of 256 levels.
GMK_HD double logistic_edge(double levels) { return 0.255 / (levels - 1); }

template <class Ops>
struct LogisticChannel {
  typename Ops::V log_p, by_mean, by_scale;  // by_scale: by what `params` holds
};

// Reflecting x and mean makes every inner bin one below its mean, and the highest bin the lowest: then with z = i (x - mean)
// and A = e^-|z|, H = e^-ih, all probabilities are rational in A and H, and small differences are not taken:
//   log P = log sigma(z + ih) [+ log sigma(ih - z) + log(1 - H^2)]
// `few` levels: ih may be so large that A / H has no digits left.
template <class Ops, int kind, bool kGradient>
GMK_HD LogisticChannel<Ops> logistic_channel(typename Ops::V distance, typename Ops::V raw, typename Ops::I low,
                                             typename Ops::I high, typename Ops::V half, bool few) {
  using V = typename Ops::V;
  using I = typename Ops::I;
  const V zero = Ops::set(0), one = Ops::set(1), two = Ops::set(2);
  V i, excess = zero, chain = one, log_scale = zero;
  if (kind == kTfp) {
    const V s = Ops::min(Ops::set(1e20), raw), e = Ops::exp_nonpositive(-Ops::abs(s));  // past 1e20 nothing changes
    i = one / (Ops::max(zero, s) + Ops::log1p(e) + Ops::set(9.118819655545162e-4));     // e^-7
    chain = i * Ops::select(s > zero, one, e) / (one + e);
  } else {
    log_scale = Ops::max(Ops::set(-7), raw);
    const V s = Ops::min(Ops::set(60), log_scale);  // wider: P is proportional to 1 / scale, which would underflow
    excess = log_scale - s;
    chain = Ops::select(raw >= Ops::set(-7), one, zero);
    i = Ops::exp(-s);
  }
  const I inner = Ops::neither(low, high), flip = Ops::either(high, Ops::both(inner, distance > zero));
  const V t = Ops::select(flip, -distance, distance), z = t * i, width = i * half;
  V h, u;
  Ops::exp_and_expm1(width, &h, &u);  // e^-width, 1 - e^-width
  const V a = Ops::exp_nonpositive(-Ops::abs(z)), edge = z + width, om = u * (two - u);
  V above, below, larger;  // sigma(-edge) = above / (above + below)
  if (few) {
    const V e = Ops::exp_nonpositive(-Ops::abs(edge));
    above = Ops::select(edge > zero, e, one);
    below = Ops::select(edge > zero, one, e);
    larger = one;
  } else {
    above = Ops::select(z < zero, h, a * h);
    below = Ops::select(z < zero, a, one);
    larger = Ops::max(above, below);
  }
  const V beyond = Ops::select(inner, a * h, zero), number = Ops::select(inner, om, one);
  const V s = above + below, w = one + beyond, r = one / (s * w * number), q = r * number;
  LogisticChannel<Ops> c;
  c.log_p = Ops::min(zero, edge) + Ops::log(number * larger * q) - Ops::select(inner, excess, zero);
  V g1 = above * w * q, g2 = beyond * s * q, g = g1 - g2, d = zero;
  if (kGradient) d = width * (g1 + g2 + Ops::select(inner, two * h * h * s * w * r, zero));
  if (kind == kClassic) {  // an inner bin of P <= 1e-5: the density in its middle, times its width
    const V wide = one + a, b = -z;
    const V log_pdf = -b - two * Ops::log(wide) - log_scale + Ops::log(two * half);
    const I small = Ops::both(inner, Ops::no(c.log_p > Ops::set(-11.512925464970229)));
    c.log_p = Ops::select(small, log_pdf, c.log_p);
    if (kGradient) {
      g = Ops::select(small, (one - a) / wide, g);
      d = Ops::select(small, one, d);
    }
  }
  if (kGradient) {
    c.by_mean = Ops::select(flip, i * g, -i * g);
    c.by_scale = -(z * g + d) * chain;
  }
  return c;
}

// The nll of the pixels in a tile; x [C] in [-1, 1]. With kGradient the tile holds the gradient afterwards. The rows behind the
// parameters are scratch: M, and with kGradient 2 M.
template <class Ops, int C, int kind, bool kGradient, class Tile>
GMK_HD typename Ops::V logistic_pixel(const LogisticShape& shape, double weight, const LogisticRows& rows, Tile tile,
                                      const typename Ops::V (&x)[C]) {
  using V = typename Ops::V;
  using I = typename Ops::I;
  const V zero = Ops::set(0), one = Ops::set(1), half = Ops::set(1 / (shape.levels - 1));
  const V border = Ops::set(1 - logistic_edge(shape.levels)), limit = Ops::set(1 + logistic_edge(shape.levels));
  const bool few = shape.levels < 20;
  I low[C], high[C], valid = x[0] == x[0];
  GMK_UNROLL
  for (int c = 0; c < C; ++c) {
    low[c] = x[c] < -border;
    high[c] = x[c] > border;
    valid = Ops::both(valid, Ops::abs(x[c]) <= limit);
  }
  V top = tile.get(rows.logit), total = zero;
  for (int64_t m = 1; m < shape.mixtures; ++m) top = Ops::max(top, tile.get(rows.logit + m * rows.step));
  for (int64_t m = 0; m < shape.mixtures; ++m) {
    const V e = Ops::exp_nonpositive(tile.get(rows.logit + m * rows.step) - top);
    total = total + e;
    if (kGradient) tile.put(rows.count + shape.mixtures + m, e);
  }
  const V normaliser = top + Ops::log(total), prior = one / total;

  V best = zero;
  for (int64_t m = 0; m < shape.mixtures; ++m) {
    const int64_t at = m * rows.step;
    V whole[3] = {}, part[3] = {},
      slope[3] = {};  // a coefficient is whole + part, of slope as a function of what is read
    if (C == 3) {
      GMK_UNROLL
      for (int j = 0; j < 3; ++j) {
        const V raw = tile.get(rows.coefficient + j * rows.coefficient_step + at);
        part[j] = raw;
        slope[j] = one;
        if (kind != kTfp) {
          Ops::tanh(raw, &whole[j], &part[j]);
          const V k = whole[j] + part[j];
          slope[j] = Ops::madd(-k, k, one);
        }
      }
    }
    V log_p = tile.get(rows.logit + at) - normaliser;
    GMK_UNROLL
    for (int c = 0; c < C; ++c) {
      const int64_t mean = rows.mean + c * rows.mean_step + at, scale = rows.scale + c * rows.mean_step + at;
      const V mu = tile.get(mean);
      V distance = x[c] - mu;
      if (c) {  // a narrow component makes 1000 times as much of what is rounded off here
        const V back = distance - x[c], lost = (x[c] - (distance - back)) - (mu + back);
        for (int j = c * (c - 1) / 2, before = 0; before < c; ++j, ++before)
          distance = Ops::madd(-part[j], x[before], distance - whole[j] * x[before]);
        distance = distance + lost;
      }
      const auto p = logistic_channel<Ops, kind, kGradient>(distance, tile.get(scale), low[c], high[c], half, few);
      log_p = log_p + p.log_p;
      if (kGradient) {
        tile.put(mean, p.by_mean);
        tile.put(scale, p.by_scale);
        for (int j = c * (c - 1) / 2, before = 0; before < c; ++j, ++before)
          tile.put(rows.coefficient + j * rows.coefficient_step + at, p.by_mean * x[before] * slope[j]);
      }
    }
    tile.put(rows.count + m, log_p);
    best = m ? Ops::max(best, log_p) : log_p;
  }

  best = Ops::select(best == Ops::set(-INFINITY), zero, best);
  V sum = zero;
  for (int64_t m = 0; m < shape.mixtures; ++m) {
    const V e = Ops::exp_nonpositive(tile.get(rows.count + m) - best);
    sum = sum + e;
    if (kGradient) tile.put(rows.count + m, e);
  }
  const V nan = Ops::set(NAN);
  if (kGradient) {
    const V factor = Ops::select(valid, Ops::set(weight), nan), posterior = -factor / sum, share = factor * prior;
    for (int64_t m = 0; m < shape.mixtures; ++m) {
      const int64_t at = m * rows.step;
      const V r = tile.get(rows.count + m) * posterior;
      tile.put(rows.logit + at, Ops::madd(tile.get(rows.count + shape.mixtures + m), share, r));
      GMK_UNROLL
      for (int c = 0; c < C; ++c) {
        const int64_t mean = rows.mean + c * rows.mean_step + at, scale = rows.scale + c * rows.mean_step + at;
        tile.put(mean, tile.get(mean) * r);
        tile.put(scale, tile.get(scale) * r);
        if (C == 3) {
          const int64_t j = rows.coefficient + c * rows.coefficient_step + at;
          tile.put(j, tile.get(j) * r);
        }
      }
    }
  }
  return Ops::select(valid, -(best + Ops::log(sum)), nan);
}

}  // namespace gmk

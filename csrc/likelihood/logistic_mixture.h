// The discretized logistic mixture of a pixel, written once: `Ops` says what a number is, a SIMD word of pixels on the CPU, one
// pixel on CUDA. `Tile` has a row a channel of its parameters (`param`) and of their gradient (`result`), and in between keeps
// what was `put`; all three may be the same memory.
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

// log P = log(inside) + outside.
template <class Ops>
struct LogisticChannel {
  typename Ops::V inside, outside, by_mean, by_scale;  // by_scale: by what `params` holds
};

// Reflecting x and mean makes every inner bin one below its mean, and the highest bin the lowest: then with z = i (x - mean)
// and A = e^-|z|, H = e^-ih, all probabilities are rational in A and H, and small differences are not taken:
//   log P = log sigma(z + ih) [+ log sigma(ih - z) + log(1 - H^2)]
// `few` levels: ih may be so large that A / H has no digits left. `inside` is in [1e-34, 1] (ih is at least 1e-33), or NaN
// where `outside` is.
template <class Ops, int kind, bool kGradient>
GMK_HD LogisticChannel<Ops> logistic_channel(typename Ops::V distance, typename Ops::V raw, typename Ops::M low,
                                             typename Ops::M high, typename Ops::V half, bool few) {
  using V = typename Ops::V;
  using M = typename Ops::M;
  const V zero = Ops::set(0), one = Ops::set(1), two = Ops::set(2);
  const M inner = Ops::no(low | high), flip = high | (inner & Ops::less(zero, distance));
  V i, excess = zero, chain = one, log_scale = zero;
  M bounded = inner;  // the log-scale is at its bound
  if (kind == kTfp) {
    const V s = Ops::min(Ops::set(1e20), raw), e = Ops::exp_nonpositive(-Ops::abs(s));  // past 1e20 nothing changes
    i = one / (Ops::max(zero, s) + Ops::log1p(e) + Ops::set(9.118819655545162e-4));     // e^-7
    chain = i * Ops::where(Ops::less(zero, s), one, e) / (one + e);
  } else {
    log_scale = Ops::max(Ops::set(-7), raw);
    const V s = Ops::min(Ops::set(60), log_scale);  // wider: P is proportional to 1 / scale, which would underflow
    excess = Ops::where(inner, log_scale - s, zero);
    bounded = Ops::less(raw, Ops::set(-7));
    i = Ops::exp_normal(-s);
  }
  const V z = Ops::where(flip, -distance, distance) * i, width = i * half;
  V h, u;
  Ops::exp_and_expm1(width, &h, &u);  // e^-width, 1 - e^-width
  const V a = Ops::exp_nonpositive(-Ops::abs(z)), edge = z + width, om = u * (two - u), ah = a * h;
  V above, below, larger;  // sigma(-edge) = above / (above + below)
  if (few) {
    const V e = Ops::exp_nonpositive(-Ops::abs(edge));
    const M positive = Ops::less(zero, edge);
    above = Ops::where(positive, e, one);
    below = Ops::where(positive, one, e);
    larger = one;
  } else {
    const M negative = Ops::less(z, zero);
    above = Ops::where(negative, h, ah);
    below = Ops::where(negative, a, one);
    larger = Ops::max(above, below);
  }
  const V beyond = Ops::where(inner, ah, zero), number = Ops::where(inner, om, one);
  const V s = above + below, w = one + beyond, sw = s * w, r = one / (sw * number), q = r * number;
  LogisticChannel<Ops> c;
  c.inside = number * larger * q;
  c.outside = Ops::min(zero, edge) - excess;
  const V near = above * w;
  V g = Ops::madd(-beyond, s, near) * q, d = zero;
  if (kGradient) d = width * Ops::madd(Ops::madd(beyond, s, near), q, Ops::where(inner, (h + h) * h * (sw * r), zero));
  if (kind == kClassic) {  // an inner bin of P <= 1e-5: the density in its middle, times its width
    const V wide = one + a, b = -z;
    const V log_pdf = -b - two * Ops::log(wide) - log_scale + Ops::log(two * half);
    const M large = Ops::less(Ops::set(-11.512925464970229), Ops::log(c.inside) + c.outside);
    const M small = inner & Ops::no(large);
    c.inside = Ops::where(small, one, c.inside);
    c.outside = Ops::where(small, log_pdf, c.outside);
    if (kGradient) {
      g = Ops::where(small, (one - a) / wide, g);
      d = Ops::where(small, one, d);
    }
  }
  if (kGradient) {
    c.by_mean = Ops::where(flip, i * g, -i * g);
    c.by_scale = kind == kTfp ? -Ops::madd(z, g, d) * chain : Ops::where(bounded, zero, -Ops::madd(z, g, d));
  }
  return c;
}

// The nll of the pixels in a tile; x [C] in [-1, 1]. With kGradient the tile holds the gradient afterwards. The rows behind the
// parameters are scratch: M, and with kGradient 2 M.
template <class Ops, int C, int kind, bool kGradient, class Tile>
GMK_HD typename Ops::V logistic_pixel(const LogisticShape& shape, double weight, const LogisticRows& rows, Tile tile,
                                      const typename Ops::V (&x)[C]) {
  using V = typename Ops::V;
  using M = typename Ops::M;
  const V zero = Ops::set(0), one = Ops::set(1), half = Ops::set(1 / (shape.levels - 1));
  const V border = Ops::set(1 - logistic_edge(shape.levels)), limit = Ops::set(1 + logistic_edge(shape.levels));
  const bool few = shape.levels < 20;
  M low[C], high[C], valid = Ops::less(Ops::abs(x[0]), limit);
  GMK_UNROLL
  for (int c = 0; c < C; ++c) {
    low[c] = Ops::less(x[c], -border);
    high[c] = Ops::less(border, x[c]);
    valid = valid & Ops::less(Ops::abs(x[c]), limit);
  }
  V top = tile.param(rows.logit), total = zero;
  for (int64_t m = 1; m < shape.mixtures; ++m) top = Ops::max(top, tile.param(rows.logit + m * rows.step));
  for (int64_t m = 0; m < shape.mixtures; ++m) {
    const V e = Ops::exp_nonpositive(tile.param(rows.logit + m * rows.step) - top);
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
        const V raw = tile.param(rows.coefficient + j * rows.coefficient_step + at);
        part[j] = raw;
        slope[j] = one;
        if (kind != kTfp) {
          Ops::tanh(raw, &whole[j], &part[j]);
          const V k = whole[j] + part[j];
          slope[j] = Ops::madd(-k, k, one);
        }
      }
    }
    V log_p = tile.param(rows.logit + at) - normaliser;
    typename Ops::LogProduct inside;  // of normal numbers of at most 1
    GMK_UNROLL
    for (int c = 0; c < C; ++c) {
      const int64_t mean = rows.mean + c * rows.mean_step + at, scale = rows.scale + c * rows.mean_step + at;
      const V mu = tile.param(mean);
      V distance = x[c] - mu;
      if (c) {  // a narrow component makes 1000 times as much of what is rounded off here
        const V back = distance - x[c];
        V lost = (x[c] - (distance - back)) - (mu + back);
        for (int j = c * (c - 1) / 2, before = 0; before < c; ++j, ++before) {
          if (kind != kTfp) distance = distance - whole[j] * x[before];
          distance = Ops::madd(-part[j], x[before], distance);
        }
        distance = distance + lost;
      }
      const auto p = logistic_channel<Ops, kind, kGradient>(distance, tile.param(scale), low[c], high[c], half, few);
      inside.times(p.inside);
      log_p = log_p + p.outside;
      if (kGradient) {
        tile.put(mean, p.by_mean);
        tile.put(scale, p.by_scale);
        for (int j = c * (c - 1) / 2, before = 0; before < c; ++j, ++before)
          tile.put(rows.coefficient + j * rows.coefficient_step + at, p.by_mean * x[before] * slope[j]);
      }
    }
    log_p = log_p + inside.log();
    tile.put(rows.count + m, log_p);
    best = m ? Ops::max(best, log_p) : log_p;
  }

  best = Ops::where(Ops::less(Ops::set(-INFINITY), best), best, zero);
  V sum = zero;
  for (int64_t m = 0; m < shape.mixtures; ++m) {
    const V e = Ops::exp_nonpositive(tile.get(rows.count + m) - best);
    sum = sum + e;
    if (kGradient) tile.put(rows.count + m, e);
  }
  const V nan = Ops::set(NAN);
  if (kGradient) {
    const V factor = Ops::where(valid, Ops::set(weight), nan), posterior = -factor / sum, share = factor * prior;
    for (int64_t m = 0; m < shape.mixtures; ++m) {
      const int64_t at = m * rows.step;
      const V r = tile.get(rows.count + m) * posterior;
      tile.result(rows.logit + at, Ops::madd(tile.get(rows.count + shape.mixtures + m), share, r));
      GMK_UNROLL
      for (int c = 0; c < C; ++c) {
        const int64_t mean = rows.mean + c * rows.mean_step + at, scale = rows.scale + c * rows.mean_step + at;
        tile.result(mean, tile.get(mean) * r);
        tile.result(scale, tile.get(scale) * r);
        if (C == 3) {
          const int64_t j = rows.coefficient + c * rows.coefficient_step + at;
          tile.result(j, tile.get(j) * r);
        }
      }
    }
  }
  return Ops::where(valid, -(best + Ops::log(sum)), nan);
}

}  // namespace gmk

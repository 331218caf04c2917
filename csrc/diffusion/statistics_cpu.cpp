// A quantile in one pass over memory: a thousand elements drawn from the sample say between which two numbers the quantile
// surely lies; the pass counts what is below and keeps the few that are between; among them it is found digit by digit.
// Where the bounds were wrong, or too many are between (a sample of equal numbers), the digits are found by passes over the
// whole sample: never wrong, six times slower. Bound: memory.
#include "diffusion/statistics.h"

#include <stdlib.h>

#include "core/arithmetic.h"
#include "core/batch.h"
#include "core/scratch.h"
#include "diffusion/diffusion.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kPart = 16384;     // elements of a part, the unit of work
constexpr int64_t kKept = 2048;      // of a part's elements, at most, lie between the bounds
constexpr int64_t kDrawn = 1024;     // elements that the bounds are taken from
constexpr int64_t kOutright = 4096;  // a sample that is not larger is looked at as a whole

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class real>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
  using lane = int32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  using lane = int64_t;
};

// Number k (from 0) of the keys that each(f) gives to f, and how many are not above it.
template <class Key>
struct Selected {
  Key key;
  int64_t not_above;
};
template <class Key, class Each>
Selected<Key> radix_select(int64_t k, const Each& each) {
  Key prefix = 0;
  int shift = RadixDigits<Key>::kBits;
  int64_t below = 0, inside = 0;
  for (int digit = 0; digit < RadixDigits<Key>::kCount; ++digit) {
    const int width = radix_width<Key>(digit), above = shift;
    shift -= width;
    int64_t counts[kRadixBins] = {};
    const Key mask = (Key(1) << width) - 1;
    each([&](Key key) {
      if (digit == 0 || key >> above == prefix) ++counts[(key >> shift) & mask];
    });
    int bin = 0;
    while (bin < int(mask) && below + counts[bin] <= k) below += counts[bin++];
    inside = counts[bin];
    prefix = Key(prefix << width) | Key(bin);
  }
  return {prefix, below + inside};
}
// The least of the keys that are above `key`; `key` itself if none is.
template <class Key, class Each>
Key next_above(Key key, const Each& each) {
  Key best = ~Key(0);
  each([&](Key other) {
    if (other > key && other < best) best = other;
  });
  return best == ~Key(0) ? key : best;
}

// |A x + B m| of one sample.
template <class T>
class Magnitude {
 public:
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using I = typename simd<real>::i;
  using Key = typename KeyOf<real>::type;
  static constexpr int64_t kLanes = simd<real>::n;

  Magnitude(const StepStatistics& s, int64_t sample) : n_(s.numel / s.samples) {
    const int64_t at = sample * n_, row = s.coefficient_rows > 1 ? sample * kCoefficients : 0;
    const auto coefficient = [&](int64_t i) {
      return splat(s.wide ? real(static_cast<const double*>(s.coefficients)[row + i])
                          : real(static_cast<const float*>(s.coefficients)[row + i]));
    };
    a_ = coefficient(kA);
    b_ = coefficient(kB);
    guidance_ = splat(real(s.guidance));
    x_ = static_cast<const T*>(s.x) + at;
    m_ = static_cast<const T*>(s.model_output) + at;
    u_ = s.uncond ? static_cast<const T*>(s.uncond) + at : nullptr;
  }
  int64_t size() const { return n_; }

  template <class... Count>
  GMK_HD_MEMBER V word(int64_t i, Count... count) const {
    V m = get(m_ + i, count...);
    if (u_) {
      const V u = get(u_ + i, count...);
      m = madd(guidance_, m - u, u);
    }
    const V y = madd(b_, hidden(m, b_), a_ * hidden(get(x_ + i, count...), a_));
    return (V)((I)y & (I)~sign());
  }
  Key key(int64_t i) const { return key_of(word(i, 1), 0); }
  static Key key_of(V y, int lane) { return Key(((I)y)[lane]); }
  static real number(Key key) {
    real y;
    memcpy(&y, &key, sizeof y);
    return y;
  }

  // f(word, lanes of it that count) over [begin, end).
  template <class F>
  GMK_HD_MEMBER void words(int64_t begin, int64_t end, const F& f) const {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) f(word(i), int(kLanes));
    if (i < end) f(word(i, end - i), int(end - i));
  }
  template <class F>
  void each(const F& f) const {
    words(0, n_, [&](V y, int count) {
      for (int l = 0; l < count; ++l) f(key_of(y, l));
    });
  }

 private:
  static I sign() { return (I)splat(real(-0.0)); }
  static V hidden(V x, V c) { return (V)((I)x & (I)(c != V{})); }

  V a_, b_, guidance_;
  const T *x_, *m_, *u_;
  int64_t n_;
};

template <class T>
class Quantile {
 public:
  using M = Magnitude<T>;
  using V = typename M::V;
  using I = typename M::I;
  using Key = typename M::Key;
  using real = typename M::real;

  Quantile(const StepStatistics& s, int64_t sample)
      : magnitude_(s, sample), n_(magnitude_.size()), place_(quantile_place(n_, s.amount)) {}

  Status run(real* out, int threads) {
    if (n_ <= kOutright) return outright(out);
    Key low, high;
    bounds(&low, &high);
    const int64_t parts = (n_ + kPart - 1) / kPart;
    Scratch<Key> kept(parts * kKept);
    Scratch<Part> found(parts);
    if (!kept.ok() || !found.ok()) return kOutOfMemory;
    threads = team(n_, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t p = 0; p < parts; ++p) found.get()[p] = part(p * kPart, low, high, kept.get() + p * kKept);

    int64_t below = 0, between = 0;
    bool whole = true;
    for (int64_t p = 0; p < parts; ++p) {
      const Part& f = found.get()[p];
      if (f.nan) return put_nan(out);
      below += f.below;
      between += f.kept;
      whole = whole && f.kept <= kKept;
    }
    const bool next = place_.weight > 0;  // then the order statistic behind it is needed too
    if (!whole || place_.below < below || place_.below + next >= below + between) {
      finish(out, place_.below, [&](const auto& f) { magnitude_.each(f); });
    } else {
      finish(out, place_.below - below, [&](const auto& f) {
        for (int64_t p = 0; p < parts; ++p)
          for (int64_t i = 0; i < found.get()[p].kept; ++i) f(kept.get()[p * kKept + i]);
      });
    }
    return kOk;
  }

 private:
  struct Part {
    int64_t below, kept;  // kept: counted on where there is no room
    bool nan;
  };

  static Status put_nan(real* out) {
    *out = real(NAN);
    return kOk;
  }

  // Number k of the keys, and the one behind it.
  template <class Each>
  void finish(real* out, int64_t k, const Each& each) const {
    const Selected<Key> at = radix_select<Key>(k, each);
    const Key after = place_.weight == 0 || k + 1 < at.not_above ? at.key : next_above(at.key, each);
    const real first = M::number(at.key), second = M::number(after);
    *out = first == second ? first : first + real(place_.weight) * (second - first);
  }

  Status outright(real* out) const {
    Scratch<Key> keys(n_);
    if (!keys.ok()) return kOutOfMemory;
    bool nan = false;
    int64_t count = 0;
    magnitude_.each([&](Key key) {
      const real y = M::number(key);
      nan = nan || y != y;
      keys.get()[count++] = key;
    });
    if (nan) return put_nan(out);
    finish(out, place_.below, [&](const auto& f) {
      for (int64_t i = 0; i < n_; ++i) f(keys.get()[i]);
    });
    return kOk;
  }

  // One element of each of kDrawn equal stretches, at a place that a small generator says: images repeat themselves. Four
  // standard deviations of the rank either way, so that in one sample of ten thousand the bounds are wrong.
  void bounds(Key* low, Key* high) const {
    Key drawn[kDrawn];
    uint32_t state = 12345;
    for (int64_t i = 0; i < kDrawn; ++i) {
      state = state * 1664525u + 1013904223u;
      const int64_t begin = i * n_ / kDrawn, size = (i + 1) * n_ / kDrawn - begin;
      drawn[i] = magnitude_.key(begin + int64_t(uint64_t(state) * uint64_t(size) >> 32));
    }
    const double q = double(place_.below) / double(n_ - 1), spread = 4 * sqrt(kDrawn * q * (1 - q)) + 2;
    const auto number = [&](double rank) {
      return radix_select<Key>(int64_t(rank),
                               [&](const auto& f) {
                                 for (int64_t i = 0; i < kDrawn; ++i) f(drawn[i]);
                               })
          .key;
    };
    const double from = q * kDrawn - spread, to = q * kDrawn + spread;
    *low = from < 0 ? 0 : number(from);
    *high = to > kDrawn - 1 ? ~Key(0) >> 1 : number(to);
  }

  // Bits are compared as signed integers: no key has its top bit.
  Part part(int64_t begin, Key low, Key high, Key* kept) const {
    Part r{};
    using Lane = typename KeyOf<real>::lane;
    const I from = I{} + Lane(low), to = I{} + Lane(high);
    I below{}, nan{};
    magnitude_.words(begin, least(begin + kPart, n_), [&](V y, int count) __attribute__((always_inline)) {
      const I key = (I)y;
      I under = (I)(key < from), between = (I)((key >= from) & (key <= to)), bad = (I)(y != y);
      uint32_t lanes = lanes_of(between);
      if (count < M::kLanes) {
        const uint32_t live = (1u << count) - 1;
        lanes &= live;
        for (int l = count; l < M::kLanes; ++l) under[l] = bad[l] = 0;
      }
      below -= under;
      nan |= bad;
      for (; lanes; lanes &= lanes - 1) {
        if (r.kept < kKept) kept[r.kept] = M::key_of(y, __builtin_ctz(lanes));
        ++r.kept;
      }
    });
    for (int l = 0; l < M::kLanes; ++l) r.below += below[l];
    r.nan = any(nan);
    return r;
  }

  const Magnitude<T> magnitude_;
  const int64_t n_;
  const QuantilePlace place_;
};

// Sums of d and d^2, d the distance from the first element, of model_output and of m.
struct Spread {
  double sum[2], squares[2];
};
template <class T>
Spread spread_of(const T* m, const T* u, double guidance, int64_t begin, int64_t end) {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  constexpr int64_t lanes = simd<real>::n;
  const V scale = splat(real(guidance));
  const V m0 = splat(get(m, 1)[0]), u0 = splat(get(u, 1)[0]), g0 = madd(scale, m0 - u0, u0);
  Spread r{};
  constexpr int64_t kBlock = 64 * lanes;  // what float32 sums take in
  for (int64_t at = begin; at < end; at += kBlock) {
    V sum[2] = {}, squares[2] = {};
    const auto word = [&](int64_t i, auto... count) __attribute__((always_inline)) {
      V a = get(m + i, count...);
      const V b = get(u + i, count...);
      V g = madd(scale, a - b, b) - g0;
      a -= m0;
      if constexpr (sizeof...(count) > 0)
        for (int64_t l = (count, ...); l < lanes; ++l) a[l] = g[l] = 0;
      sum[0] += a;
      sum[1] += g;
      squares[0] = madd(a, a, squares[0]);
      squares[1] = madd(g, g, squares[1]);
    };
    const int64_t stop = least(at + kBlock, end);
    int64_t i = at;
    for (; i + lanes <= stop; i += lanes) word(i);
    if (i < stop) word(i, stop - i);
    for (int k = 0; k < 2; ++k)
      for (int l = 0; l < lanes; ++l) {
        r.sum[k] += double(sum[k][l]);
        r.squares[k] += double(squares[k][l]);
      }
  }
  return r;
}

template <class T>
Status rescale_of(const StepStatistics& s, int64_t sample, int threads) {
  using real = typename Arithmetic<T>::real;
  const int64_t n = s.numel / s.samples, parts = (n + kPart - 1) / kPart;
  const T *const m = static_cast<const T*>(s.model_output) + sample * n, *const u = static_cast<const T*>(s.uncond) +
                                                                                    sample * n;
  Scratch<Spread> spreads(parts);
  if (!spreads.ok()) return kOutOfMemory;
  threads = team(n, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t p = 0; p < parts; ++p)
    spreads.get()[p] = spread_of(m, u, s.guidance, p * kPart, least((p + 1) * kPart, n));
  double variance[2];
  for (int k = 0; k < 2; ++k) {
    double sum = 0, squares = 0;
    for (int64_t p = 0; p < parts; ++p) {
      sum += spreads.get()[p].sum[k];
      squares += spreads.get()[p].squares[k];
    }
    const double rest = squares - sum * (sum / double(n));
    variance[k] = (rest < 0 ? 0 : rest) / double(n - 1);
  }
  static_cast<real*>(s.out)[sample] = real(s.amount * sqrt(variance[0] / variance[1]) + (1 - s.amount));
  return kOk;
}

template <class T>
Status run(const StepStatistics& s, int threads) {
  using real = typename Arithmetic<T>::real;
  return each_of_batch(s.samples, s.numel, threads, [&](int64_t sample, int inner) -> Status {
    if (s.statistic == kGuidanceRescale) return rescale_of<T>(s, sample, inner);
    return Quantile<T>(s, sample).run(static_cast<real*>(s.out) + sample, inner);
  });
}

Status step_statistics(const StepStatistics& s, int threads) {
  if (s.numel <= 0) return kOk;
  return by_dtype(s.dtype, [&](auto type) { return run<typename decltype(type)::of>(s, threads); });
}

}  // namespace

extern const StepStatisticsKernels step_statistics_kernels;
const StepStatisticsKernels step_statistics_kernels = {step_statistics};

}  // namespace GMK_ISA_NS
}  // namespace gmk

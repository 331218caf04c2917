// One segment: consecutive elements that share a row of coefficients.
#pragma once
#include "diffusion/diffusion.h"

#include "core/arithmetic.h"
#include "core/philox_simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// One segment's streams and coefficients, in the order in which the inner loop wants them.
template <class T>
struct Segment {
  using real = typename Arithmetic<T>::real;
  const T *x, *m, *u;  // u: nullptr without guidance
  const T* h[3];       // the live history only
  const real* z;       // scaled noise: sqrt(variance) z; nullptr: none, or made word by word
  T *out, *x0;         // x0: nullptr if it is not wanted
  real a, b, c0, c1, ch[3], s, guidance, low, high;
  int history;
};

// Does a segment have a stream: known where it is compiled, or asked at run time, which costs some percent where the data
// are in the cache.
enum Has : int { kHasNot, kHas, kAsk };

// kMasked: some coefficient is 0, so its stream must be hidden. A third of the arithmetic, hence not always.
// kMore: may there be a history or x0.
template <class T, bool kMasked, Has kGuided = kAsk, Has kNoise = kAsk, bool kMore = true>
struct Body {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using I = typename simd<real>::i;
  static constexpr int64_t lanes = simd<real>::n;
  const Segment<T>& g;
  V a, b, c0, c1, s, guidance, low, high;
  I use_a, use_b, use_c0, use_c1;

  GMK_HD_MEMBER explicit Body(const Segment<T>& g)
      : g(g),
        a(splat(g.a)),
        b(splat(g.b)),
        c0(splat(g.c0)),
        c1(splat(g.c1)),
        s(splat(g.s)),
        guidance(splat(g.guidance)),
        low(g.low - V{}),
        high(g.high - V{}),
        use_a((I)(a != V{})),
        use_b((I)(b != V{})),
        use_c0((I)(c0 != V{})),
        use_c1((I)(c1 != V{})) {}

  GMK_HD_MEMBER static V hide(V x, I use) { return kMasked ? (V)((I)x & use) : x; }

  template <int kWords>
  struct Result {
    Words<V, kWords> out, x0;
  };
  // All but the noise.
  template <int kWords, class... Count>
  GMK_HD_MEMBER Result<kWords> compute(int64_t i, Count... count) const {
    const Words<V, kWords> x = get_words<kWords>(g.x + i, count...);
    Words<V, kWords> m = get_words<kWords>(g.m + i, count...);
    if (kGuided == kHas || (kGuided == kAsk && g.u)) {
      const Words<V, kWords> u = get_words<kWords>(g.u + i, count...);
      for (int j = 0; j < kWords; ++j) m.w[j] = madd(guidance, m.w[j] - u.w[j], u.w[j]);
    }
    Result<kWords> r;
    for (int j = 0; j < kWords; ++j) {
      const V x0 = madd(b, hide(m.w[j], use_b), a * hide(x.w[j], use_a));
      r.x0.w[j] = vmin(high, vmax(low, x0));  // NaN stays: second operand
      r.out.w[j] = madd(c0, hide(r.x0.w[j], use_c0), c1 * hide(x.w[j], use_c1));
    }
    for (int h = 0; kMore && h < g.history; ++h) {
      const Words<V, kWords> old = get_words<kWords>(g.h[h] + i, count...);
      for (int j = 0; j < kWords; ++j) r.out.w[j] = madd(splat(g.ch[h]), old.w[j], r.out.w[j]);
    }
    return r;
  }
  template <int kWords>
  GMK_HD_MEMBER void add_noise(Result<kWords>& r, const Words<V, kWords>& z) const {
    for (int j = 0; j < kWords; ++j) r.out.w[j] = madd(s, z.w[j], r.out.w[j]);
  }
  template <int kWords, class... Count>
  GMK_HD_MEMBER void write(const Result<kWords>& r, int64_t i, Count... count) const {
    put_words(g.out + i, r.out, count...);
    if (kMore && g.x0) put_words(g.x0 + i, r.x0, count...);
  }
  // kTimes times kWords words, all read before the first is written.
  template <int kTimes, int kWords, class... Count>
  GMK_HD_MEMBER void run(int64_t i, Count... count) const {
    Result<kWords> r[kTimes];
    for (int t = 0; t < kTimes; ++t) {
      const int64_t at = i + t * kWords * lanes;
      r[t] = compute<kWords>(at, count...);
      if (kNoise == kHas || (kNoise == kAsk && g.z))
        add_noise(r[t], in_order_of<T>(get_words<kWords>(g.z + at, count...)));
    }
    for (int t = 0; t < kTimes; ++t) write(r[t], i + t * kWords * lanes, count...);
  }
};

// An element is read before it is written, so out and x0 may be any of the inputs. Four words are read before the first
// is written: malloc likes to put the output 64 bytes (modulo 4096) behind an input, where every load would wait for the
// store before it.
template <class T, bool kMasked, Has kGuided = kAsk, Has kNoise = kAsk, bool kMore = true>
void run_segment(const Segment<T>& g, int64_t n) {
  const Body<T, kMasked, kGuided, kNoise, kMore> body(g);
  constexpr int64_t lanes = body.lanes;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) body.template run<2, 2>(i);
  for (; i + lanes <= n; i += lanes) body.template run<1, 1>(i);
  if (i < n) body.template run<1, 1>(i, n - i);
}
template <class T>
void run_unknown(const Segment<T>& g, int64_t n, bool masked) {
  if constexpr (kLanes == 4) {  // not tuned
    run_segment<T, true>(g, n);
  } else {
    using Runner = void (*)(const Segment<T>&, int64_t);
#define GMK_RUN4(...)                                                                      \
  run_segment<T, __VA_ARGS__, kHasNot, false>, run_segment<T, __VA_ARGS__, kHasNot, true>, \
      run_segment<T, __VA_ARGS__, kHas, false>, run_segment<T, __VA_ARGS__, kHas, true>
    static const Runner all[16] = {GMK_RUN4(false, kHasNot), GMK_RUN4(false, kHas), GMK_RUN4(true, kHasNot),
                                   GMK_RUN4(true, kHas)};
#undef GMK_RUN4
    const bool guided = g.u, noise = g.z, more = g.x0 || g.history > 0;
    all[masked * 8 + guided * 4 + noise * 2 + more](g, n);
  }
}

// Whole chunks of float arithmetic with drawn noise and no variance: each word of normals is used where it is made, so
// that the loads hide behind the arithmetic of the normals. `block` is that of the first element.
template <class T, bool kMasked, bool kAny>
void run_drawn(const Segment<T>& g, int64_t n, uint64_t block, PhiloxAt at) {
  const Body<T, kMasked, kAny ? kAsk : kHasNot, kHasNot, kAny> body(g);
  for (int64_t e = 0; e < n; e += kChunk)
    each_normals<kEvenOdd<T, 2>>(block + uint64_t(e / 4), at,
                                 [&](int64_t i, vfloat z0, vfloat z1) __attribute__((always_inline)) {
                                   auto r = body.template compute<2>(e + i);
                                   body.add_noise(r, {{z0, z1}});
                                   body.write(r, e + i);
                                 });
}
template <class T>
void run_drawn(const Segment<T>& g, int64_t n, bool masked, uint64_t block, PhiloxAt at) {
  const bool any = g.u || g.x0 || g.history > 0 || kLanes == 4;
  if (kLanes == 4 || masked) {
    (any ? run_drawn<T, true, true> : run_drawn<T, true, kLanes == 4>)(g, n, block, at);
  } else {
    (any ? run_drawn<T, kLanes == 4, true> : run_drawn<T, kLanes == 4, kLanes == 4>)(g, n, block, at);
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

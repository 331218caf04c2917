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

  struct Result {
    V out, x0;
  };
  // All but the noise.
  template <class... Count>
  GMK_HD_MEMBER Result compute(int64_t i, Count... count) const {
    const V x = get(g.x + i, count...);
    V m = get(g.m + i, count...);
    if (kGuided == kHas || (kGuided == kAsk && g.u)) {
      const V u = get(g.u + i, count...);
      m = madd(guidance, m - u, u);
    }
    const V x0 = vmin(high, vmax(low, madd(b, hide(m, use_b), a * hide(x, use_a))));  // NaN stays: second operand
    V out = madd(c0, hide(x0, use_c0), c1 * hide(x, use_c1));
    for (int h = 0; kMore && h < g.history; ++h) out = madd(splat(g.ch[h]), get(g.h[h] + i, count...), out);
    return {out, x0};
  }
  template <class... Count>
  GMK_HD_MEMBER void write(const Result& r, int64_t i, Count... count) const {
    put(g.out + i, r.out, count...);
    if (kMore && g.x0) put(g.x0 + i, r.x0, count...);
  }
  template <int kWords, class... Count>
  GMK_HD_MEMBER void run(int64_t i, Count... count) const {
    Result r[kWords];
#pragma GCC unroll 4
    for (int j = 0; j < kWords; ++j) {
      r[j] = compute(i + j * lanes, count...);
      if (kNoise == kHas || (kNoise == kAsk && g.z)) r[j].out = madd(s, get(g.z + i + j * lanes, count...), r[j].out);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kWords; ++j) write(r[j], i + j * lanes, count...);
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
  for (; i + 4 * lanes <= n; i += 4 * lanes) body.template run<4>(i);
  for (; i + lanes <= n; i += lanes) body.template run<1>(i);
  if (i < n) body.template run<1>(i, n - i);
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
    each_normals(block + uint64_t(e / 4), at, [&](int64_t i, vfloat z) __attribute__((always_inline)) {
      auto r = body.compute(e + i);
      r.out = madd(body.s, z, r.out);
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

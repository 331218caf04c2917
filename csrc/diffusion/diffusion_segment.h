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
  const T *x, *m, *u;
  const T* h[3];  // the live history only
  const real* z;  // scaled noise: sqrt(variance) z
  T *out, *x0;
  real a, b, c0, c1, ch[3], s, guidance, low, high;
  int history;
};

// kMasked: some coefficient is 0, so its stream must be hidden. A third of the arithmetic, hence not always.
template <class T, bool kMasked, bool kGuided, bool kHistory, bool kNoise, bool kX0>
struct Body {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using I = typename simd<real>::i;
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
  template <class... Count>
  GMK_HD_MEMBER Result compute(int64_t i, Count... count) const {
    const V x = get(g.x + i, count...);
    V m = get(g.m + i, count...);
    if (kGuided) {
      const V u = get(g.u + i, count...);
      m = madd(guidance, m - u, u);
    }
    const V x0 = vmin(high, vmax(low, madd(b, hide(m, use_b), a * hide(x, use_a))));  // NaN stays: second operand
    V out = madd(c0, hide(x0, use_c0), c1 * hide(x, use_c1));
    if (kHistory)
      for (int h = 0; h < g.history; ++h) out = madd(splat(g.ch[h]), get(g.h[h] + i, count...), out);
    if (kNoise) out = madd(s, get(g.z + i, count...), out);
    return {out, x0};
  }
  template <class... Count>
  GMK_HD_MEMBER void write(const Result& r, int64_t i, Count... count) const {
    put(g.out + i, r.out, count...);
    if (kX0) put(g.x0 + i, r.x0, count...);
  }
};

// An element is read before it is written, so out and x0 may be any of the inputs. Four words are read before the first
// is written: malloc likes to put the output 64 bytes (modulo 4096) behind an input, where every load would wait for the
// store before it.
template <class T, bool kMasked, bool kGuided, bool kHistory, bool kNoise, bool kX0>
void run_segment(const Segment<T>& g, int64_t n) {
  constexpr int64_t lanes = simd<typename Arithmetic<T>::real>::n;
  using B = Body<T, kMasked, kGuided, kHistory, kNoise, kX0>;
  const B body(g);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    typename B::Result r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) r[j] = body.compute(i + j * lanes);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) body.write(r[j], i + j * lanes);
  }
  for (; i + lanes <= n; i += lanes) body.write(body.compute(i), i);
  if (i < n) body.write(body.compute(i, n - i), i, n - i);
}
template <class T>
using Runner = void (*)(const Segment<T>&, int64_t);
template <class T>
Runner<T> runner(bool masked, bool guided, bool history, bool noise, bool x0) {
#define GMK_RUN2(...) run_segment<T, __VA_ARGS__, false>, run_segment<T, __VA_ARGS__, true>
#define GMK_RUN8(...)                                                                                          \
  GMK_RUN2(__VA_ARGS__, false, false), GMK_RUN2(__VA_ARGS__, false, true), GMK_RUN2(__VA_ARGS__, true, false), \
      GMK_RUN2(__VA_ARGS__, true, true)
  static const Runner<T> all[32] = {GMK_RUN8(false, false), GMK_RUN8(false, true), GMK_RUN8(true, false),
                                    GMK_RUN8(true, true)};
#undef GMK_RUN8
#undef GMK_RUN2
  return all[masked * 16 + guided * 8 + history * 4 + noise * 2 + x0];
}

// Whole chunks of float arithmetic with drawn noise and no variance: each word of normals is used where it is made, so
// that the loads hide behind the arithmetic of the normals. `block` is that of the first element.
template <class T, bool kMasked, bool kGuided, bool kHistory, bool kX0>
void run_drawn(const Segment<T>& g, int64_t n, uint64_t block, PhiloxAt at) {
  using B = Body<T, kMasked, kGuided, kHistory, false, kX0>;
  const B body(g);
  for (int64_t e = 0; e < n; e += kChunk)
    each_normals(block + uint64_t(e / 4), at, [&](int64_t i, vfloat z) __attribute__((always_inline)) {
      typename B::Result r = body.compute(e + i);
      r.out = madd(body.s, z, r.out);
      body.write(r, e + i);
    });
}
template <class T>
using DrawnRunner = void (*)(const Segment<T>&, int64_t, uint64_t, PhiloxAt);
template <class T>
DrawnRunner<T> drawn_runner(bool masked, bool guided, bool history, bool x0) {
#define GMK_RUN4(...)                                                              \
  run_drawn<T, __VA_ARGS__, false, false>, run_drawn<T, __VA_ARGS__, false, true>, \
      run_drawn<T, __VA_ARGS__, true, false>, run_drawn<T, __VA_ARGS__, true, true>
  static const DrawnRunner<T> all[16] = {GMK_RUN4(false, false), GMK_RUN4(false, true), GMK_RUN4(true, false),
                                         GMK_RUN4(true, true)};
#undef GMK_RUN4
  return all[masked * 8 + guided * 4 + history * 2 + x0];
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

// A segment of a step whose x0 or result is partly known (inpainting). What a step may have is asked at run time: the noise
// of what is known is made anew in every call and takes longer than all of it.
#pragma once
#include "diffusion/diffusion_segment.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class T>
struct Known {
  using real = typename Arithmetic<T>::real;
  const T *mask, *known;
  const real* z;  // of what is known; nullptr: none
  real signal, noise;
  bool of_x0;
};

// y where the mask is 0, `known` where it is 1, whatever the other holds; between them what lies between.
template <class V>
GMK_INLINE V blend(V mask, V known, V y) {
  using I = decltype(mask == mask);
  const V one = V{} + 1, mixed = madd(mask, known - y, y);
  return select((I)(mask == V{}), y, select((I)(mask == one), known, mixed));
}

template <class T>
void run_known(const Segment<T>& g, const Known<T>& k, int64_t n) {
  using B = Body<T, true>;
  using V = typename B::V;
  constexpr int64_t lanes = simd<typename Arithmetic<T>::real>::n;
  const B body(g);
  const V signal = splat(k.signal), noise = splat(k.noise);
  const auto word = [&](int64_t i, auto... count) __attribute__((always_inline)) {
    const V x = get(g.x + i, count...);
    V m = get(g.m + i, count...);
    if (g.u) {
      const V u = get(g.u + i, count...);
      m = madd(body.guidance, m - u, u);
    }
    V known = signal * get(k.known + i, count...);
    if (k.z) known = madd(noise, get(k.z + i, count...), known);
    const V mask = get(k.mask + i, count...);
    V x0 = madd(body.b, B::hide(m, body.use_b), body.a * B::hide(x, body.use_a));
    x0 = vmin(body.high, vmax(body.low, x0));  // NaN stays: second operand
    if (k.of_x0) x0 = blend(mask, known, x0);
    V out = madd(body.c0, B::hide(x0, body.use_c0), body.c1 * B::hide(x, body.use_c1));
    for (int h = 0; h < g.history; ++h) out = madd(splat(g.ch[h]), get(g.h[h] + i, count...), out);
    if (g.z) out = madd(body.s, get(g.z + i, count...), out);
    if (!k.of_x0) out = blend(mask, known, out);
    put(g.out + i, out, count...);
    if (g.x0) put(g.x0 + i, x0, count...);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) word(i);
  if (i < n) word(i, n - i);
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

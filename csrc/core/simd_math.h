// CPU kernels only: elementary functions of a SIMD word. Errors are bounds checked by tests/test_simd.py against float64.
#pragma once
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// y = k log 2 + f: returns e^f - 1, and 2^k where that is a normal number. NaN returns NaN.
GMK_INLINE vfloat exp_fraction(vfloat y, vfloat* power) {
  const vfloat magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: adding it leaves k + 127 in the lowest bits
  const vfloat z = madd(y, splat(1.44269504f), magic), n = z - magic;
  vfloat f = madd(n, splat(-0.693145752f), y);
  f = madd(n, splat(-1.42860677e-6f), f);
  vfloat p = splat(0.0013814610429f);  // (e^f - 1 - f) / f^2, so that e^f is within 2^-27.9
  p = madd(p, f, splat(0.0083687109873f));
  p = madd(p, f, splat(0.041668388993f));
  p = madd(p, f, splat(0.16666521132f));
  p = madd(p, f, splat(0.4999999404f));
  *power = (vfloat)((vuint)z << 23);
  return madd(p * f, f, f);
}
GMK_INLINE vdouble exp_fraction(vdouble y, vdouble* power) {
  const vdouble magic = splat(6755399441056767.0);  // 1.5 * 2^52 + 1023
  const vdouble z = madd(y, splat(1.4426950408889634), magic), n = z - magic;
  vdouble f = madd(n, splat(-0.693147180369123816490), y);
  f = madd(n, splat(-1.90821492927058770002e-10), f);
  vdouble p = splat(2.51003758422237e-08);  // as above, within 2^-56
  p = madd(p, f, splat(2.7620075892548164e-07));
  p = madd(p, f, splat(2.7557268480289716e-06));
  p = madd(p, f, splat(2.480152132234228e-05));
  p = madd(p, f, splat(0.00019841269863040559));
  p = madd(p, f, splat(0.0013888888917196736));
  p = madd(p, f, splat(0.008333333333330065));
  p = madd(p, f, splat(0.041666666666624164));
  p = madd(p, f, splat(0.16666666666666669));
  p = madd(p, f, splat(0.5000000000000001));
  *power = (vdouble)((vulong)z << 52);
  return madd(p * f, f, f);
}
GMK_INLINE vfloat least_exponent(vfloat) { return splat(-87.0f); }  // e^x of this and more is a normal number
GMK_INLINE vdouble least_exponent(vdouble) { return splat(-708.0); }

// exp: at most 2 ulp; 0 below the smallest normal number, infinity above the largest, NaN for NaN.
GMK_INLINE vfloat vexp(vfloat x) {
  const vfloat low = splat(-87.336540f), y = vmin(splat(89.0f), vmax(low, x));
  vfloat power;
  const vfloat p = exp_fraction(y, &power) + splat(1.0f);
  const vint k = ((vint)power >> 23) - 127, half = k >> 1;  // two factors, since 2^128 is not a float
  const vfloat r = p * (vfloat)((half + 127) << 23) * (vfloat)((k - half + 127) << 23);
  return select((vint)(x < low), vfloat{}, r);
}
GMK_INLINE vdouble vexp(vdouble x) {
  const vdouble low = splat(-708.39), y = vmin(splat(710.0), vmax(low, x));
  vdouble power;
  const vdouble p = exp_fraction(y, &power) + splat(1.0);
  const vlong k = ((vlong)power >> 52) - 1023, half = k >> 1;
  const vdouble r = p * (vdouble)((half + 1023) << 52) * (vdouble)((k - half + 1023) << 52);
  return select((vlong)(x < low), vdouble{}, r);
}
// exp where the result is a normal number.
template <class V>
GMK_INLINE V vexp_normal(V x) {
  V power;
  const V p = exp_fraction(x, &power);
  return madd(power, p, power);
}
// exp of x <= 0, for softmax: 0 below the smallest normal number, so that no subnormal ever reaches a product.
template <class V>
GMK_INLINE V vexp_nonpositive(V x) {
  const auto under = x < least_exponent(x);
  return select(under, V{}, vexp_normal(x));
}
// e^-w and 1 - e^-w of w >= 0, each with a small relative error.
template <class V>
GMK_INLINE void exp_and_expm1(V w, V* e, V* u) {
  V power;
  const V p = exp_fraction(vmax(least_exponent(w), -w), &power);
  *e = madd(power, p, power);
  *u = madd(-power, p, (V{} + 1) - power);
}

// A positive normal number as m 2^e, m in [sqrt(1/2), sqrt(2)).
GMK_INLINE vfloat split(vfloat x, vint* e) {
  const vint t = (vint)((vuint)x - 0x3F3504F3u);  // unsigned: wraps for -0
  *e = t >> 23;
  return (vfloat)((t & 0x7FFFFF) + 0x3F3504F3);
}
GMK_INLINE vdouble split(vdouble x, vlong* e) {
  const vlong t = (vlong)((vulong)x - 0x3FE6A09E667F3BCDu);
  *e = t >> 52;
  return (vdouble)((t & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD);
}
// log(m 2^e) of such an m.
GMK_INLINE vfloat log_of(vfloat m, vint e) {
  const vfloat f = m - splat(1.0f), z = f * f, k = __builtin_convertvector(e, vfloat);
  vfloat p = splat(7.0376836292e-2f);
  p = madd(p, f, splat(-1.1514610310e-1f));
  p = madd(p, f, splat(1.1676998740e-1f));
  p = madd(p, f, splat(-1.2420140846e-1f));
  p = madd(p, f, splat(1.4249322787e-1f));
  p = madd(p, f, splat(-1.6668057665e-1f));
  p = madd(p, f, splat(2.0000714765e-1f));
  p = madd(p, f, splat(-2.4999993993e-1f));
  p = madd(p, f, splat(3.3333331174e-1f));
  vfloat r = p * f * z;
  r = madd(k, splat(-2.12194440e-4f), r);
  r = madd(splat(-0.5f), z, r);
  return madd(k, splat(0.693359375f), f + r);
}
GMK_INLINE vdouble log_of(vdouble m, vlong e) {
  const vdouble f = m - splat(1.0), k = __builtin_convertvector(e, vdouble);
  const vdouble s = f / (splat(2.0) + f), z = s * s, half = splat(0.5) * f * f;
  vdouble p = splat(1.479819860511658591e-01);
  p = madd(p, z, splat(1.531383769920937332e-01));
  p = madd(p, z, splat(1.818357216161805012e-01));
  p = madd(p, z, splat(2.222219843214978396e-01));
  p = madd(p, z, splat(2.857142874366239149e-01));
  p = madd(p, z, splat(3.999999999940941908e-01));
  p = madd(p, z, splat(6.666666666666735130e-01));
  return k * splat(6.93147180369123816490e-01) -
         ((half - madd(s, half + p * z, k * splat(1.90821492927058770002e-10))) - f);
}
// log: at most 2 ulp; -inf at 0, NaN below 0, inf at inf, subnormals included.
GMK_INLINE vfloat vlog(vfloat x) {
  const vint tiny = x < splat(1.17549435e-38f);
  vint e;
  const vfloat m = split(select(tiny, x * splat(8388608.0f), x), &e);
  vfloat r = log_of(m, e - (tiny & 23));
  r = select(x == vfloat{}, splat(-INFINITY), r);
  r = select((vint)(x == splat(INFINITY)), x, r);
  return select((vint)((x < vfloat{}) | (x != x)), splat(NAN), r);
}
GMK_INLINE vdouble vlog(vdouble x) {
  const vlong tiny = x < splat(2.2250738585072014e-308);
  vlong e;
  const vdouble m = split(select(tiny, x * splat(4503599627370496.0), x), &e);
  vdouble r = log_of(m, e - (tiny & 52));
  r = select(x == vdouble{}, splat(-(double)INFINITY), r);
  r = select((vlong)(x == splat((double)INFINITY)), x, r);
  return select((vlong)((x < vdouble{}) | (x != x)), splat((double)NAN), r);
}

template <class V>
GMK_INLINE V vsigmoid(V x) {  // at most 3 ulp
  const V one = V{} + 1;
  return one / (one + vexp(-x));
}
// tanh(x) = numerator / denominator; at most 3 ulp, odd, also where it is nearly x.
template <class V>
GMK_INLINE void tanh_fraction(V x, V* numerator, V* denominator) {
  const V a = magnitude(x);
  V e, u;
  exp_and_expm1(a + a, &e, &u);
  *numerator = with_sign_of(u, x);
  *denominator = e + 1;
}
template <class V>
GMK_INLINE V vtanh(V x) {
  V numerator, denominator;
  tanh_fraction(x, &numerator, &denominator);
  return numerator / denominator;
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

// Scalar conversions between float32 and the half types, in plain integer arithmetic: the same bits on every device.
// Rounding is to nearest even; NaN stays NaN (quiet), overflow becomes infinity.
#pragma once
#include <string.h>

#include "core/dtype.h"

namespace gmk {

GMK_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
GMK_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

GMK_HD float to_float(float x) { return x; }
GMK_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
GMK_HD float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest << 13));  // infinity, NaN
  // A float16 exponent is rebased by an exact multiplication, which also normalises float16 subnormals.
  return bits_float(float_bits(bits_float(rest << 13) * 5.192296858534828e+33f) | sign);  // * 2^112
}

template <class T>
struct FromFloat;
template <>
struct FromFloat<float> {
  static GMK_HD_MEMBER float of(float x) { return x; }
};
template <>
struct FromFloat<bf16> {
  static GMK_HD_MEMBER bf16 of(float x) {
    const uint32_t u = float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
    return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};
template <>
struct FromFloat<f16> {
  static GMK_HD_MEMBER f16 of(float x) {
    const uint32_t u = float_bits(x), a = u & 0x7fffffffu;
    const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
    if (a > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u | (a >> 13 & 0x3ffu))};
    if (a >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to 65520 or more
    if (a < 0x38800000u) {                                       // float16 subnormal: let the float adder round
      const uint32_t r = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
      return f16{uint16_t(sign | r)};
    }
    return f16{uint16_t(sign | ((a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13))};
  }
};
// from_float<T>(x): the nearest T.
template <class T>
GMK_HD T from_float(float x) {
  return FromFloat<T>::of(x);
}

}  // namespace gmk

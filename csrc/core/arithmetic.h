// CPU kernels only: an element-wise kernel written once for float32, float64 and the half types.
#pragma once
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// The type of arithmetic of a storage type, and moving a word of it.
template <class T>
struct Arithmetic {
  using real = float;
};
template <>
struct Arithmetic<double> {
  using real = double;
};
template <class T>
GMK_INLINE vfloat get(const T* p) {
  return load_float(p);
}
GMK_INLINE vdouble get(const double* p) { return load(p); }
template <class T>
GMK_INLINE vfloat get(const T* p, int64_t count) {
  return load_float_some(p, count);
}
GMK_INLINE vdouble get(const double* p, int64_t count) { return load_some(p, count); }
template <class T>
GMK_INLINE void put(T* p, vfloat x) {
  store_float(p, x);
}
GMK_INLINE void put(double* p, vdouble x) { store(p, x); }
template <class T>
GMK_INLINE void put(T* p, vfloat x, int64_t count) {
  store_float_some(p, x, count);
}
GMK_INLINE void put(double* p, vdouble x, int64_t count) { store_some(p, x, count); }

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

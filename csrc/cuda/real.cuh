// The type of arithmetic of a storage type, and one number to and from it: float32 for the half types too.
#pragma once
#include "cuda/prims.cuh"

namespace gmk {
namespace {

template <class T>
struct Real {
  using type = float;
  static GMK_DEV float from(T x) { return to_float(x); }
  static GMK_DEV T to(float x) { return from_float<T>(x); }
};
template <>
struct Real<double> {
  using type = double;
  static GMK_DEV double from(double x) { return x; }
  static GMK_DEV double to(double x) { return x; }
};

}  // namespace
}  // namespace gmk

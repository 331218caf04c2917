// The element types that cross the Python boundary, as the codes of gmkernels._call.DTYPE_CODE.
#pragma once
#include <stdint.h>

#include "core/error.h"

#ifndef GMK_HD
#ifdef __CUDACC__
#define GMK_HD_MEMBER __host__ __device__ __forceinline__
#define GMK_HD GMK_HD_MEMBER
#else
#define GMK_HD_MEMBER inline __attribute__((always_inline))
#define GMK_HD static inline __attribute__((always_inline, unused))
#endif
#endif

namespace gmk {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Storage of the half types. Arithmetic is always in float32; core/half.h and core/simd.h convert.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type of arithmetic of a storage type.
template <class T>
struct Arithmetic {
  using real = float;
};
template <>
struct Arithmetic<double> {
  using real = double;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class T>
struct Type {
  using of = T;
};
// f(Type<T>{}) for the T of a code: by_dtype(a.dtype, [&](auto type) { return launch<typename decltype(type)::of>(a); })
template <class F>
static inline Status by_dtype(int dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(Type<float>{});
    case kFloat64:
      return f(Type<double>{});
    case kBFloat16:
      return f(Type<bf16>{});
    case kFloat16:
      return f(Type<f16>{});
  }
  return "unknown dtype";
}

}  // namespace gmk

// The element types that cross the Python boundary, as the codes of gmkernels._call.DTYPE_CODE.
#pragma once
#include <stdint.h>

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

}  // namespace gmk

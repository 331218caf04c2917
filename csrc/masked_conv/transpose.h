// CPU kernels only: from channels in planes to channels side by side and back, and between storage and compute types.
#pragma once
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

GMK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GMK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
GMK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// dst[j * dst_stride + i] = src[i * src_stride + j], a square of one SIMD word.
template <class T>
struct Square {
  static constexpr int n = 1;
  GMK_INLINE void move(const T* src, int64_t, T* dst, int64_t) { *dst = *src; }
};
#if defined(__AVX512F__)
// Rows become columns: 16 x 16 words of 32 bits.
GMK_INLINE void turn(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    r[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
template <>
struct Square<float> {
  static constexpr int n = 16;
  GMK_INLINE void move(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    __m512 r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * src_stride);
    turn(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(dst + i * dst_stride, r[i]);
  }
};
#elif defined(__AVX2__)
template <>
struct Square<float> {
  static constexpr int n = 8;
  GMK_INLINE void move(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = (__m256)_mm256_unpacklo_pd((__m256d)t[i], (__m256d)t[i + 2]);
      r[i + 1] = (__m256)_mm256_unpackhi_pd((__m256d)t[i], (__m256d)t[i + 2]);
      r[i + 2] = (__m256)_mm256_unpacklo_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
      r[i + 3] = (__m256)_mm256_unpackhi_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      _mm256_storeu_ps(dst + j * dst_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
      _mm256_storeu_ps(dst + (4 + j) * dst_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
    }
  }
};
#endif

// dst[j * dst_stride + i] = src[i * src_stride + j] for i < rows, j < cols.
template <class T>
void transpose(const T* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst, int64_t dst_stride) {
  constexpr int n = Square<T>::n;
  const int64_t full_rows = n > 1 ? rows / n * n : 0, full_cols = n > 1 ? cols / n * n : 0;
  // The side with the larger stride is walked along its lines: few pages at a time.
  if (src_stride > dst_stride) {
    for (int64_t i = 0; i < full_rows; i += n)
      for (int64_t j = 0; j < full_cols; j += n)
        Square<T>::move(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
  } else {
    for (int64_t j = 0; j < full_cols; j += n)
      for (int64_t i = 0; i < full_rows; i += n)
        Square<T>::move(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
  }
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = j < full_cols ? full_rows : 0; i < rows; ++i) dst[j * dst_stride + i] = src[i * src_stride + j];
}

#if defined(__AVX512BW__)
// The same for 16 bits, 32 x 32 at a time. Neighbouring rows are interleaved first, so that words of 32 bits remain.
GMK_INLINE __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
GMK_INLINE void square16(const bf16* src, int64_t src_stride, int64_t rows, int64_t cols, bf16* dst,
                         int64_t dst_stride) {
  const __mmask32 from = first_lanes(cols), to = first_lanes(rows);
  for (int half = 0; half < (cols > 4 ? 2 : 1); ++half) {  // of every eight columns, the first or the last four
    __m512 r[16];
    for (int i = 0; i < 16; ++i) {
      const bf16* const p = src + 2 * i * src_stride;
      const __m512i a = 2 * i < rows ? _mm512_maskz_loadu_epi16(from, p) : __m512i{};
      const __m512i b = 2 * i + 1 < rows ? _mm512_maskz_loadu_epi16(from, p + src_stride) : __m512i{};
      r[i] = (__m512)(half ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
    }
    turn(r);
    for (int i = 0; i < 16; ++i) {
      const int64_t column = i / 4 * 8 + i % 4 + 4 * half;
      if (column < cols) _mm512_mask_storeu_epi16(dst + column * dst_stride, to, (__m512i)r[i]);
    }
  }
}
inline __attribute__((unused)) void transpose(const bf16* src, int64_t src_stride, int64_t rows, int64_t cols,
                                              bf16* dst, int64_t dst_stride) {
  if (rows < 4 || cols < 4) {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; ++i) dst[j * dst_stride + i] = src[i * src_stride + j];
    return;
  }
  for (int64_t j = 0; j < cols; j += 32)
    for (int64_t i = 0; i < rows; i += 32)
      square16(src + i * src_stride + j, src_stride, least(32, rows - i), least(32, cols - j), dst + j * dst_stride + i,
               dst_stride);
}
#endif

// What is stored as S is computed with as T: S itself, or float where S is a half type.
template <class T, class S>
constexpr bool kSame = false;
template <class T>
constexpr bool kSame<T, T> = true;
template <class T, class S>
GMK_INLINE void widen(const S* src, int64_t count, T* dst) {
  if constexpr (kSame<T, S>) {
    memcpy(dst, src, size_t(count) * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(dst + i, load_float(src + i));
    for (; i < count; ++i) dst[i] = to_float(src[i]);
  }
}
template <class T, class S>
GMK_INLINE void narrow(const T* src, int64_t count, S* dst) {
  if constexpr (kSame<T, S>) {
    memcpy(dst, src, size_t(count) * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_float(dst + i, load(src + i));
    for (; i < count; ++i) dst[i] = from_float<S>(src[i]);
  }
}

// transpose(), from S to T and from T to S, a block at a time by way of the stack.
constexpr int kBlockRows = 16, kBlockCols = 64;
template <class T, class S>
void transpose_in(const S* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst, int64_t dst_stride) {
  if constexpr (kSame<T, S>) {
    transpose(src, src_stride, rows, cols, dst, dst_stride);
  } else {
    T block[kBlockRows * kBlockCols];
    for (int64_t j = 0; j < cols; j += kBlockCols)
      for (int64_t i = 0; i < rows; i += kBlockRows) {
        const int64_t down = least(kBlockRows, rows - i), across = least(kBlockCols, cols - j);
        for (int64_t k = 0; k < down; ++k) widen(src + (i + k) * src_stride + j, across, block + k * kBlockCols);
        transpose(block, kBlockCols, down, across, dst + j * dst_stride + i, dst_stride);
      }
  }
}
template <class T, class S>
void transpose_out(const T* src, int64_t src_stride, int64_t rows, int64_t cols, S* dst, int64_t dst_stride) {
  if constexpr (kSame<T, S>) {
    transpose(src, src_stride, rows, cols, dst, dst_stride);
  } else {
    T block[kBlockRows * kBlockCols];
    for (int64_t i = 0; i < rows; i += kBlockCols)
      for (int64_t j = 0; j < cols; j += kBlockRows) {
        const int64_t down = least(kBlockCols, rows - i), across = least(kBlockRows, cols - j);
        transpose(src + i * src_stride + j, src_stride, down, across, block, kBlockCols);
        for (int64_t k = 0; k < across; ++k) narrow(block + k * kBlockCols, down, dst + (j + k) * dst_stride + i);
      }
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

// CPU kernels only: an image is worked on band by band. A band of x is copied, once, to scratch as [row][column][channel]
// with the rows and columns that its taps reach, zeros outside the image; so a tap is a constant offset for every pixel,
// neighbouring taps are one contiguous run, and NCHW is converted on the way.
#pragma once
#include "core/scratch.h"
#include "core/simd.h"
#include "masked_conv/masked_conv.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kTile = 6;                                  // pixels (or weights) of a register tile
constexpr int kVectors = GMK_VECTOR_BYTES == 64 ? 4 : 2;  // its SIMD words: 24 of 32 registers, or 12 of 16
constexpr int kThree = kVectors > 3 ? 3 : kVectors;       // three words, where panels have more
template <class T>
constexpr int kWidth = kVectors * simd<T>::n;  // channels of a full panel

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
template <>
struct Square<float> {
  static constexpr int n = 16;
  GMK_INLINE void move(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * src_stride);
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
      _mm512_storeu_ps(dst + j * dst_stride, _mm512_shuffle_f32x4(a, b, 0x88));
      _mm512_storeu_ps(dst + (4 + j) * dst_stride, _mm512_shuffle_f32x4(c, d, 0x88));
      _mm512_storeu_ps(dst + (8 + j) * dst_stride, _mm512_shuffle_f32x4(a, b, 0xdd));
      _mm512_storeu_ps(dst + (12 + j) * dst_stride, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
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

struct Run {
  int64_t offset;  // in band scratch, from the slot of a pixel to the first value that the run multiplies
  int64_t length;  // values: adjacent taps * channels
};

// How the image is cut, and where its taps are in the scratch of one band.
struct Bands {
  int64_t h, w, channels;
  int64_t rows, cols;      // of one band; the last ones may be smaller
  int64_t down, across;    // bands of an image
  int64_t top, left;       // offset of the first row and column that any tap reaches
  int64_t halo_y, halo_x;  // rows and columns beyond the band's own
  int64_t pitch;           // columns of scratch
  int runs;
  Run run[kMaxTaps];

  int64_t per_image() const { return down * across; }
  int64_t pixels() const { return rows * cols; }
  // A register tile may read past the last value: what it makes of it is thrown away.
  int64_t scratch() const { return (rows + halo_y) * pitch * channels + kTile; }
};

// `pixels`: about as many as a band should have; `budget`: values of scratch that it should stay below.
GMK_INLINE void cut(Bands& s, const Taps& taps, int64_t h, int64_t w, int64_t channels, int64_t pixels,
                    int64_t budget) {
  s.h = h;
  s.w = w;
  s.channels = channels;
  int64_t bottom = 0, right = 0;
  s.top = s.left = 0;
  for (int i = 0; i < taps.count; ++i) {
    s.top = least(s.top, tap_dy(taps, i));
    bottom = most(bottom, tap_dy(taps, i));
    s.left = least(s.left, tap_dx(taps, i));
    right = most(right, tap_dx(taps, i));
  }
  s.halo_y = bottom - s.top;
  s.halo_x = right - s.left;
  s.across = ceil_div(w, 256);
  s.cols = ceil_div(w, s.across);
  s.pitch = s.cols + s.halo_x;
  int64_t rows = least(ceil_div(pixels, s.cols), budget / most(1, s.pitch * channels) - s.halo_y);
  rows = most(1, least(rows, h));
  s.rows = ceil_div(h, ceil_div(h, rows));
  s.down = ceil_div(h, s.rows);
  s.runs = 0;
  for (int i = 0; i < taps.count; ++i) {
    const int64_t dy = tap_dy(taps, i), dx = tap_dx(taps, i);
    const bool adjacent = i > 0 && dy == tap_dy(taps, i - 1) && dx == tap_dx(taps, i - 1) + 1;
    if (adjacent) {
      s.run[s.runs - 1].length += channels;
    } else {
      s.run[s.runs++] = Run{((dy - s.top) * s.pitch + dx - s.left) * channels, channels};
    }
  }
}

// One band: the image it belongs to, its first pixel, its size.
struct Band {
  int64_t image, y, x, rows, cols;
  int64_t pixels() const { return rows * cols; }
};
GMK_INLINE Band band_of(const Bands& s, int64_t job) {
  const int64_t within = job % s.per_image(), y = within / s.across * s.rows, x = within % s.across * s.cols;
  return Band{job / s.per_image(), y, x, least(s.rows, s.h - y), least(s.cols, s.w - x)};
}

template <class T, class S>
void pack_band(const Bands& s, const Band& band, const S* x, bool nhwc, T* scratch) {
  const int64_t c = s.channels, first = band.x + s.left, end = first + band.cols + s.halo_x;
  const int64_t from = least(most(first, 0), s.w), to = most(from, least(end, s.w));
  for (int64_t r = 0; r < band.rows + s.halo_y; ++r) {
    T* const row = scratch + r * s.pitch * c;
    const int64_t y = band.y + s.top + r;
    if (y < 0 || y >= s.h || from == to) {
      memset(row, 0, size_t((end - first) * c) * sizeof(T));
      continue;
    }
    memset(row, 0, size_t((from - first) * c) * sizeof(T));
    T* const inside = row + (from - first) * c;
    if (nhwc) {
      widen(x + ((band.image * s.h + y) * s.w + from) * c, (to - from) * c, inside);
    } else {
      transpose_in(x + (band.image * c * s.h + y) * s.w + from, s.h * s.w, c, to - from, inside, c);
    }
    memset(row + (to - first) * c, 0, size_t((end - to) * c) * sizeof(T));
  }
}

// The panel buffer holds [pixel][width]: `count` channels of a band, from `channel` on, of a tensor with `channels`.
template <class T, class S>
void load_panel(const Bands& s, const Band& band, const S* x, bool nhwc, int64_t channels, int64_t channel,
                int64_t count, T* panel, int64_t width) {
  const bool whole = band.cols == s.w;
  const int64_t segments = whole ? 1 : band.rows, length = whole ? band.pixels() : band.cols;
  for (int64_t r = 0; r < segments; ++r, panel += length * width) {
    const int64_t y = band.y + r;
    if (nhwc) {
      const S* src = x + ((band.image * s.h + y) * s.w + band.x) * channels + channel;
      for (int64_t p = 0; p < length; ++p) widen(src + p * channels, count, panel + p * width);
    } else {
      transpose_in(x + ((band.image * channels + channel) * s.h + y) * s.w + band.x, s.h * s.w, count, length, panel,
                   width);
    }
  }
}
// The way back.
template <class T, class S>
void store_panel(const Bands& s, const Band& band, const T* panel, int64_t width, S* out, bool nhwc, int64_t channels,
                 int64_t channel, int64_t count) {
  const bool whole = band.cols == s.w;
  const int64_t segments = whole ? 1 : band.rows, length = whole ? band.pixels() : band.cols;
  for (int64_t r = 0; r < segments; ++r, panel += length * width) {
    const int64_t y = band.y + r;
    if (!nhwc) {
      transpose_out(panel, width, length, count, out + ((band.image * channels + channel) * s.h + y) * s.w + band.x,
                    s.h * s.w);
    } else {
      S* const to = out + ((band.image * s.h + y) * s.w + band.x) * channels + channel;
      for (int64_t p = 0; p < length; ++p) narrow(panel + p * width, count, to + p * channels);
    }
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

// What the kernels of masked_conv.cu and masked_conv_weight.cu share: reading the image as a matrix, and the product of two
// tiles in shared memory.
//
// The matrix ("implicit": it is never stored) has a row per pixel and a column per pair of a live tap and an input channel,
// k = tap * c_in + channel, flattened, so that 24 taps of 3 channels are 72 columns and not 24 times a padded 16. It is
// read in pieces of 16 bytes, V = 16 / sizeof(T) neighbouring k of one pixel: one cp.async where they are neighbours in
// memory too (channels_last, c_in a multiple of V), else V loads whose neighbours in the warp read neighbouring addresses,
// and one store. So both memory formats and every channel count have one shared-memory layout and one product.
//
// Products, by type:
//   bfloat16, float16   mma.sync m16n8k16 with float32 sums
//   float32             "3xTF32": x = hi + lo, hi the nearest value with tf32's 11 bits, lo the exact rest; then
//                       w x = hi hi + hi lo + lo hi. Dropped are lo lo (at most 2^-22 |w x|) and the bits of lo that tf32
//                       has not (2^-23 of each factor): at most 2^-21 |w x| together. Tensor cores add with truncation,
//                       which would drift over hundreds of steps, so each chunk of k starts from zero and is added to
//                       the sum by an ordinary, rounded addition.
//   float64, and every type on sm_75 (no such instructions): plain multiply-adds on the same tiles
//
// Infinities: hi = inf would leave lo = inf - inf = NaN, and inf * lo(w) has any sign. So for the image lo, and hi in its
// product with lo(w), are 0 where a value is not finite: what remains is inf * hi(w), as in a plain convolution.
// Magnitudes above 3.4011e38, which hi might round to infinity, count as infinite.
#pragma once
#include "cuda/prims.cuh"
#include "masked_conv/masked_conv.h"

namespace gmk {

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class T>
constexpr int kVector = int(16 / sizeof(T));  // elements of a piece: V
template <class T>
constexpr int kChunk = 4 * kVector<T>;  // k (forward) or pixels (gradient for weight) at a time: two steps of an mma
template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;
template <class T>
constexpr bool kHasMma = true;
template <>
constexpr bool kHasMma<double> = false;
constexpr int kWarpColumns = 64;

GMK_DEV double to_sum(double x) { return x; }
GMK_DEV float to_sum(float x) { return x; }
GMK_DEV float to_sum(bf16 x) { return to_float(x); }
GMK_DEV float to_sum(f16 x) { return to_float(x); }
template <class T>
struct FromSum {
  static GMK_HD_MEMBER T of(float x) { return from_float<T>(x); }
};
template <>
struct FromSum<double> {
  static GMK_HD_MEMBER double of(double x) { return x; }
};

// What a thread holds of its warp's 8 V x 64 results: [V / 2][8][4], the accumulators of V / 2 x 8 mma tiles. Rows and columns
// of an mma may be given to pixels and channels in any order; the orders here make what a thread holds contiguous, so that it
// is read and written 16 bytes at a time without a transposition. With lane = 4 g + t:
//   rows     V g + j, 0 <= j < V:  acc[j / 2][..][2 (j % 2) + ..]
//   columns  2 (4 n + t) + i, 0 <= n < 8, 0 <= i < 2:  acc[..][n][2 .. + i], which the kernels give to channels
template <class T>
using Accumulators = Sum<T>[kVector<T> / 2][8][4];

// Sides and channels are int32, with room for a tile; everything that counts elements is int64.
constexpr const char* kTooLarge = "a side or a number of channels near 2^31";
inline bool fits(int64_t h, int64_t w, int64_t c_in, int64_t c_out) {
  const int64_t most = 0x7fff0000;
  return h < most && w < most && c_in < most && c_out < most;
}

// the image as a matrix ------------------------------------------------------------------------------------------------

struct Tap {
  int dy, dx;
  int64_t offset;  // elements
};
template <class T>
struct Image {
  const T* data;
  int64_t stride_c, stride_y, stride_x, stride_b;  // elements
  int h, w, channels;
  bool nhwc, whole;  // whole: pieces are 16 aligned bytes of one pixel
};
template <class T>
GMK_HD Image<T> image_of(const void* data, bool nhwc, int64_t c, int64_t h, int64_t w) {
  Image<T> m;
  m.data = static_cast<const T*>(data);
  m.stride_b = c * h * w;
  m.stride_c = nhwc ? 1 : h * w;
  m.stride_y = nhwc ? w * c : w;
  m.stride_x = nhwc ? c : 1;
  m.h = int(h);
  m.w = int(w);
  m.channels = int(c);
  m.nhwc = nhwc;
  m.whole = nhwc && c % kVector<T> == 0 && aligned(data, 16);
  return m;
}
struct Place {
  int64_t base;  // element of the pixel's channel 0, or -1: no pixel
  int y, x;
};
template <class T>
GMK_DEV Place place_of(const Image<T>& m, int64_t pixel, int64_t pixels) {
  if (pixel >= pixels) return Place{-1, 0, 0};
  const int64_t area = int64_t(m.h) * m.w, image = pixel / area;
  const int64_t in = pixel - image * area, y = in / m.w, x = in - y * m.w;
  return Place{image * m.stride_b + y * m.stride_y + x * m.stride_x, int(y), int(x)};
}
// The table of taps, by all threads; a barrier must follow. A tap beyond int32 reaches no pixel of an image that is not.
template <class T>
GMK_DEV void make_taps(Tap* table, const Taps& taps, const Image<T>& m, int threads) {
  for (int i = int(threadIdx.x); i < taps.count; i += threads) {
    const int64_t dy = tap_dy(taps, i), dx = tap_dx(taps, i);
    const bool near = dy < m.h && -dy < m.h && dx < m.w && -dx < m.w;
    table[i] = Tap{near ? int(dy) : m.h, near ? int(dx) : m.w, near ? dy * m.stride_y + dx * m.stride_x : 0};
  }
}
template <class T>
GMK_DEV bool inside(const Image<T>& m, const Place& p, const Tap& tap) {
  const unsigned y = unsigned(p.y) + unsigned(tap.dy), x = unsigned(p.x) + unsigned(tap.dx);
  return p.base >= 0 && y < unsigned(m.h) && x < unsigned(m.w);
}

struct Column {  // k = tap * c_in + channel
  int tap, channel;
};
GMK_DEV Column column_of(int64_t k, int channels, int count) {
  return channels ? Column{int(k / channels), int(k % channels)} : Column{count, int(k)};
}
GMK_DEV void advance(Column& k, int by, int channels) {
  k.channel += by;
  while (k.channel >= channels) {
    k.channel -= channels;
    ++k.tap;
  }
}

// The piece at k where it is not `whole`; 0 outside the image and past the last tap. With `ones` the matrix has one more
// column, of ones.
template <class T>
GMK_DEV Pack<T, kVector<T>> gather(const Image<T>& m, const Place& p, const Tap* taps, int count, Column k, bool ones) {
  Pack<T, kVector<T>> piece;
  bool seen = false;
  const T* from = m.data;
  const auto enter = [&] {
    if (k.tap >= count) return seen = false;
    const Tap tap = taps[k.tap];
    from = m.data + (p.base + tap.offset + k.channel * m.stride_c);
    return seen = inside(m, p, tap);
  };
  enter();
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) {
    piece.v[v] = seen ? *from : T{};
    if (ones && k.tap == count && k.channel == 0 && p.base >= 0) piece.v[v] = FromSum<T>::of(1);
    from += m.stride_c;
    if (++k.channel == m.channels) {
      k.channel = 0;
      ++k.tap;
      enter();
    }
  }
  return piece;
}
template <class T>
GMK_DEV void copy_piece(void* shared, const Image<T>& m, const Place& p, const Tap* taps, int count, const Column& k) {
  const Tap tap = k.tap < count ? taps[k.tap] : Tap{m.h, 0, 0};
  const bool seen = inside(m, p, tap);
  cp_async16(shared, seen ? m.data + (p.base + tap.offset + k.channel) : m.data, seen ? 16 : 0);
}

// products -------------------------------------------------------------------------------------------------------------

struct Split {
  uint32_t hi, lo, finite;  // finite: hi, or 0 where the value is not finite
};
GMK_HD Split split(uint32_t bits) {
  const float x = bits_float(bits), size = x < 0 ? -x : x;
  const bool finite = size <= 3.4011e38f;
  const uint32_t nearest = (bits + 0x1000u) & 0xffffe000u;
  Split s;
  s.hi = finite ? nearest : float_bits(x + x);  // a NaN whose upper bits say infinity becomes quiet
  s.lo = finite ? float_bits(x - bits_float(nearest)) : 0u;
  s.finite = finite ? nearest : 0u;
  return s;
}

template <class T>
struct Mma;
template <>
struct Mma<bf16> {
  static GMK_DEV void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b, d); }
};
template <>
struct Mma<f16> {
  static GMK_DEV void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(d, a, b, d); }
};

GMK_DEV int lane_g() { return int(threadIdx.x) % 32 / 4; }
GMK_DEV int lane_t() { return int(threadIdx.x) % 4; }

}  // namespace gmk

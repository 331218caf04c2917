// One thread is one pixel; its parameters are a column of a tile in shared memory, where the gradient takes their place.
// Contiguous params are read and written by the thread itself, a row of neighbouring pixels at a time; with channels last the
// block copies them in memory order, to rows one word longer, so that neither way meets a bank twice. Bound: memory, each
// parameter read once and its gradient written once; about 400 special-function results for an RGB pixel of 10 components.
#include "cuda/prims.cuh"
#include "likelihood/logistic_sample.h"

namespace gmk {
namespace {

constexpr int kThreads = 64, kSampleThreads = 128;
// Blocks of a multiprocessor, at least: without it ptxas spills to stay at 64 registers.
constexpr int kBlocks = 8, kSampleBlocks = 4;
constexpr int64_t kTileBytes = 40 << 10;  // more blocks of a multiprocessor, and no more than any GPU has

template <class T>
struct Scalar {
  using V = T;
  using M = bool;
  static GMK_DEV T set(double x) { return T(x); }
  static GMK_DEV T exp_normal(T x) { return ::exp(x); }
  static GMK_DEV T exp_nonpositive(T x) { return ::exp(x); }
  static GMK_DEV T log(T x) { return ::log(x); }
  struct LogProduct {
    T sum = 0;
    GMK_DEV void times(T x) { sum += ::log(x); }
    GMK_DEV T log() const { return sum; }
  };
  static GMK_DEV T log1p(T x) { return ::log1p(x); }
  static GMK_DEV void tanh(T x, T* whole, T* part) {
    *whole = 0;
    *part = ::tanh(x);
  }
  static GMK_DEV void exp_and_expm1(T w, T* e, T* u) {
    *e = ::exp(-w);
    *u = -::expm1(-w);
  }
  static GMK_DEV T madd(T a, T b, T c) { return ::fma(a, b, c); }
  static GMK_DEV T min(T a, T b) { return a < b ? a : b; }  // b where either is NaN, as in core/simd.h
  static GMK_DEV T max(T a, T b) { return a > b ? a : b; }
  static GMK_DEV T abs(T x) { return ::fabs(x); }
  static GMK_DEV bool less(T a, T b) { return a < b; }
  static GMK_DEV bool no(bool a) { return !a; }
  static GMK_DEV T where(bool c, T x, T y) { return c ? x : y; }
};

template <class T>
struct Column {
  T* rows;
  int stride;
  GMK_DEV T param(int64_t row) const { return get(row); }
  GMK_DEV void result(int64_t row, T v) const { put(row, v); }
  GMK_DEV T get(int64_t row) const { return rows[row * stride]; }
  GMK_DEV void put(int64_t row, T v) const { rows[row * stride] = v; }
};

template <class T, int C, int kind, bool kGradient>
__global__ void __launch_bounds__(kThreads, kBlocks) logistic_mixture_nll_kernel(LogisticMixtureNll a) {
  GMK_DYN_SHARED(shared);
  T* const tile = reinterpret_cast<T*>(shared);
  const LogisticShape& shape = a.shape;
  const LogisticRows rows = logistic_rows(shape);
  const int width = int(blockDim.x), stride = width + 1, thread = int(threadIdx.x), f = int(rows.count);
  const int64_t total = shape.b * shape.pixels;
  for (int64_t first = int64_t(blockIdx.x) * width; first < total; first += int64_t(gridDim.x) * width) {
    const int64_t pixel = first + thread, image = pixel / shape.pixels, inside = pixel % shape.pixels;
    const int count = int(total - first < width ? total - first : width);
    const int64_t column = image * f * shape.pixels + inside;
    const T* const params = static_cast<const T*>(a.params);
    const T* const data = static_cast<const T*>(a.x);
    T* const gradient = static_cast<T*>(a.gradient);
    if (shape.last) {
      for (int i = thread; i < count * f; i += width) tile[i % f * stride + i / f] = params[first * f + i];
      __syncthreads();
    } else if (thread < count) {
#pragma unroll 8
      for (int row = 0; row < f; ++row) tile[row * stride + thread] = params[column + row * shape.pixels];
    }
    if (thread < count) {
      T x[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const T raw = shape.last ? data[pixel * C + c] : data[(image * C + c) * shape.pixels + inside];
        x[c] = ::fma(raw, T(logistic_scale(shape)), T(logistic_offset(shape)));
      }
      static_cast<T*>(a.nll)[pixel] =
          logistic_pixel<Scalar<T>, C, kind, kGradient>(shape, a.weight, rows, Column<T>{tile + thread, stride}, x);
    }
    if (kGradient && shape.last) {
      __syncthreads();
      for (int i = thread; i < count * f; i += width) gradient[first * f + i] = tile[i % f * stride + i / f];
    } else if (kGradient && thread < count) {
#pragma unroll 8
      for (int row = 0; row < f; ++row) gradient[column + row * shape.pixels] = tile[row * stride + thread];
    }
    if (shape.last) __syncthreads();
  }
}

template <class T, int C, int kind, bool kGradient>
Status launch(const LogisticMixtureNll& a, void* stream) {
  const int64_t height = logistic_rows(a.shape).count + a.shape.mixtures * (kGradient ? 2 : 1);
  int width = kThreads;
  while (width > 1 && height * (width + 1) * int64_t(sizeof(T)) > kTileBytes) width /= 2;
  return GMK_LAUNCH((logistic_mixture_nll_kernel<T, C, kind, kGradient>), grid_for(a.shape.b * a.shape.pixels, width),
                    width, size_t(height * (width + 1)) * sizeof(T), stream, a);
}
template <class T, int C, int kind>
Status with_gradient(const LogisticMixtureNll& a, void* stream) {
  return a.gradient ? launch<T, C, kind, true>(a, stream) : launch<T, C, kind, false>(a, stream);
}
template <class T, int C>
Status of_kind(const LogisticMixtureNll& a, void* stream) {
  switch (a.shape.kind) {
    case kOpenAi:
      return with_gradient<T, C, kOpenAi>(a, stream);
    case kClassic:
      return with_gradient<T, C, kClassic>(a, stream);
  }
  return with_gradient<T, C, kTfp>(a, stream);
}
template <class T>
Status of_channels(const LogisticMixtureNll& a, void* stream) {
  return a.shape.data_channels == 3 ? of_kind<T, 3>(a, stream) : of_kind<T, 1>(a, stream);
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads, kSampleBlocks)
    logistic_mixture_sample_kernel(LogisticMixtureSample a) {
  const int64_t total = a.shape.b * a.shape.pixels, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t pixel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; pixel < total; pixel += stride)
    logistic_sample_pixel<T>(a, pixel);
}

template <class T>
__global__ void __launch_bounds__(256) scale_in_place_kernel(ScaleInPlace a) {
  const T factor = *static_cast<const T*>(a.factor);
  if (factor == T(1)) return;
  T* const t = static_cast<T*>(a.t);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n; i += stride) t[i] *= factor;
}

}  // namespace

Status logistic_mixture_nll_cuda(const LogisticMixtureNll& a, int device, void* stream) {
  if (a.shape.b <= 0 || a.shape.pixels <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.shape.dtype == kFloat64 ? of_channels<double>(a, stream) : of_channels<float>(a, stream);
}
Status logistic_mixture_sample_cuda(const LogisticMixtureSample& a, int device, void* stream) {
  if (a.shape.b <= 0 || a.shape.pixels <= 0) return kOk;
  const DeviceGuard guard(device);
  const unsigned grid = grid_for(a.shape.b * a.shape.pixels, kSampleThreads);
  if (a.shape.dtype == kFloat64)
    return GMK_LAUNCH((logistic_mixture_sample_kernel<double>), grid, kSampleThreads, 0, stream, a);
  return GMK_LAUNCH((logistic_mixture_sample_kernel<float>), grid, kSampleThreads, 0, stream, a);
}
Status scale_in_place_cuda(const ScaleInPlace& a, int device, void* stream) {
  if (a.n <= 0) return kOk;
  const DeviceGuard guard(device);
  const unsigned grid = grid_for(a.n, 256);
  if (a.dtype == kFloat64) return GMK_LAUNCH((scale_in_place_kernel<double>), grid, 256, 0, stream, a);
  return GMK_LAUNCH((scale_in_place_kernel<float>), grid, 256, 0, stream, a);
}

}  // namespace gmk

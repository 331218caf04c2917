// A word of pixels at a time. Bound: arithmetic, about 14 exponentials and a logarithm a component of an RGB pixel, against 80
// bytes moved.
#include "likelihood/likelihood.h"

#include <omp.h>

#include "core/scratch.h"
#include "core/simd_math.h"
#include "core/tile.h"
#include "likelihood/logistic_mixture.h"
#include "likelihood/logistic_sample.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// tanh as a whole number -1, 0 or 1 and the rest, whose rounding is less than that of the sum.
template <class V>
GMK_INLINE void tanh_parts(V x, V* whole, V* part) {
  const V a = magnitude(x), zero{};
  V e, u;
  exp_and_expm1(a + a, &e, &u);
  const auto small = less(a, zero + 0.55f);
  const V sign = with_sign_of(zero + 1, x);
  *whole = where(small, zero, sign);
  *part = sign * (where(small, u, e * -2) / (e + 1));
}

template <class T>
struct Word {
  using V = typename simd<T>::v;
  using M = typename simd<T>::m;
  GMK_HD_MEMBER static V set(double x) { return T(x) - V{}; }
  GMK_HD_MEMBER static V exp_normal(V x) { return vexp_normal(x); }
  GMK_HD_MEMBER static V exp_nonpositive(V x) { return vexp_nonpositive(x); }
  GMK_HD_MEMBER static V log(V x) { return vlog(x); }
  struct LogProduct {  // one logarithm; mantissas are multiplied and exponents added, so that nothing underflows
    V product = set(1);
    typename simd<T>::i exponent{};
    GMK_HD_MEMBER void times(V x) { product = mantissa() * x; }
    GMK_HD_MEMBER V log() {
      const V m = mantissa();
      return log_of(m, exponent);
    }
    GMK_HD_MEMBER V mantissa() {
      typename simd<T>::i e;
      const V m = split(product, &e);
      exponent += e;
      return m;
    }
  };
  GMK_HD_MEMBER static void tanh(V x, V* whole, V* part) { tanh_parts(x, whole, part); }
  GMK_HD_MEMBER static V log1p(V x) {  // of 0 .. 1; what the sum rounds off, the quotient puts back
    const V u = x + T(1), d = u - T(1);
    return where(less(V{}, d), vlog(u) * x / where(less(V{}, d), d, V{} + T(1)), x);
  }
  GMK_HD_MEMBER static void exp_and_expm1(V w, V* e, V* u) { gmk::GMK_ISA_NS::exp_and_expm1(w, e, u); }
  GMK_HD_MEMBER static V madd(V a, V b, V c) { return gmk::GMK_ISA_NS::madd(a, b, c); }
  GMK_HD_MEMBER static V min(V a, V b) { return vmin(a, b); }
  GMK_HD_MEMBER static V max(V a, V b) { return vmax(a, b); }
  GMK_HD_MEMBER static V abs(V x) { return magnitude(x); }
  GMK_HD_MEMBER static M less(V a, V b) { return gmk::GMK_ISA_NS::less(a, b); }
  GMK_HD_MEMBER static M no(M a) { return ~a; }
  GMK_HD_MEMBER static V where(M c, V x, V y) { return gmk::GMK_ISA_NS::where(c, x, y); }
};

// Rows a channel, of n pixels each. Whole words of contiguous params are read and their gradient is written where they are;
// others are copied to a tile in L1 and back.
template <class T>
struct Rows {
  const T* params;
  int64_t stride;
  T* tile;
  T* gradient;
  int64_t gradient_stride;
  using V = typename simd<T>::v;
  GMK_HD_MEMBER V param(int64_t row) const {
    const T* const p = params + row * stride;
    __builtin_prefetch(p + simd<T>::n);  // of the next word: its rows are pages apart
    return load(p);
  }
  GMK_HD_MEMBER V get(int64_t row) const { return load(tile + row * simd<T>::n); }
  GMK_HD_MEMBER void put(int64_t row, V v) const { store(tile + row * simd<T>::n, v); }
  GMK_HD_MEMBER void result(int64_t row, V v) const { store(gradient + row * gradient_stride, v); }
};

template <class T, int C, int kind, bool kGradient>
Status run(const LogisticMixtureNll& a, int threads) {
  using V = typename simd<T>::v;
  constexpr int64_t n = simd<T>::n;
  const LogisticShape& shape = a.shape;
  const LogisticRows rows = logistic_rows(shape);
  const int64_t f = rows.count, height = f + shape.mixtures * (kGradient ? 2 : 1);
  // A job: n pixels of an image; with channels last, where images join without a seam, of all of them.
  const int64_t images = shape.last ? 1 : shape.b, pixels = shape.last ? shape.b * shape.pixels : shape.pixels;
  const int64_t words = (pixels + n - 1) / n;
  threads = team(shape.b * shape.pixels * f * 3, threads);
  Scratch<T> scratch(threads * height * n);
  if (!scratch.ok()) return kOutOfMemory;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < images * words; ++job) {
    const int64_t image = job / words, first = job % words * n, rest = pixels - first, count = rest < n ? rest : n;
    T* const tile = scratch.get() + omp_get_thread_num() * height * n;
    const int64_t begin = shape.last ? first * f : image * f * pixels + first;
    const T* const params = (const T*)a.params + begin;
    T* const gradient = (T*)a.gradient + begin;
    const T* const data = (const T*)a.x + (shape.last ? first * C : image * C * pixels + first);
    V x[C];
    if (shape.last) {
      load_tile(tile, n, params, count, f);
      for (int c = 0; c < C; ++c) {
        x[c] = V{};
        for (int64_t l = 0; l < count; ++l) x[c][l] = data[l * C + c];
      }
    } else {
      for (int64_t row = 0; count < n && row < f; ++row) store(tile + row * n, load_some(params + row * pixels, count));
      for (int c = 0; c < C; ++c) x[c] = count == n ? load(data + c * pixels) : load_some(data + c * pixels, count);
    }
    for (int c = 0; c < C; ++c) x[c] = madd(x[c], splat(T(logistic_scale(shape))), splat(T(logistic_offset(shape))));
    const bool direct = !shape.last && count == n;
    const Rows<T> here = direct ? Rows<T>{params, pixels, tile, gradient, pixels} : Rows<T>{tile, n, tile, tile, n};
    const V nll = logistic_pixel<Word<T>, C, kind, kGradient>(shape, a.weight, rows, here, x);
    store_some((T*)a.nll + image * pixels + first, nll, count);
    if (!kGradient || direct) continue;
    if (shape.last) {
      store_tile(gradient, tile, n, count, f);
    } else {
      for (int64_t row = 0; row < f; ++row) store_some(gradient + row * pixels, load(tile + row * n), count);
    }
  }
  return kOk;
}

template <class T, int C, int kind>
Status with_gradient(const LogisticMixtureNll& a, int threads) {
  return a.gradient ? run<T, C, kind, true>(a, threads) : run<T, C, kind, false>(a, threads);
}
template <class T, int C>
Status of_kind(const LogisticMixtureNll& a, int threads) {
  switch (a.shape.kind) {
    case kOpenAi:
      return with_gradient<T, C, kOpenAi>(a, threads);
    case kClassic:
      return with_gradient<T, C, kClassic>(a, threads);
  }
  return with_gradient<T, C, kTfp>(a, threads);
}
template <class T>
Status of_channels(const LogisticMixtureNll& a, int threads) {
  return a.shape.data_channels == 3 ? of_kind<T, 3>(a, threads) : of_kind<T, 1>(a, threads);
}

Status logistic_mixture_nll(const LogisticMixtureNll& a, int threads) {
  if (a.shape.b <= 0 || a.shape.pixels <= 0) return kOk;
  return a.shape.dtype == kFloat64 ? of_channels<double>(a, threads) : of_channels<float>(a, threads);
}

template <class T>
Status sample(const LogisticMixtureSample& a, int threads) {
  const int64_t pixels = a.shape.b * a.shape.pixels;
  threads = team(pixels * a.shape.mixtures * 20, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t pixel = 0; pixel < pixels; ++pixel) logistic_sample_pixel<T>(a, pixel);
  return kOk;
}
Status logistic_mixture_sample(const LogisticMixtureSample& a, int threads) {
  if (a.shape.b <= 0 || a.shape.pixels <= 0) return kOk;
  return a.shape.dtype == kFloat64 ? sample<double>(a, threads) : sample<float>(a, threads);
}

template <class T>
Status scale(const ScaleInPlace& a, int threads) {
  T* const t = (T*)a.t;
  const T factor = *(const T*)a.factor;
  if (factor == T(1)) return kOk;
  threads = team(a.n / 8, threads);
#pragma omp parallel for simd num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < a.n; ++i) t[i] *= factor;
  return kOk;
}
Status scale_in_place(const ScaleInPlace& a, int threads) {
  if (a.n <= 0) return kOk;
  return a.dtype == kFloat64 ? scale<double>(a, threads) : scale<float>(a, threads);
}

}  // namespace

extern const LikelihoodKernels likelihood_kernels;
const LikelihoodKernels likelihood_kernels = {logistic_mixture_nll, logistic_mixture_sample, scale_in_place};

}  // namespace GMK_ISA_NS
}  // namespace gmk

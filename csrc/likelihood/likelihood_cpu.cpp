// A word of pixels at a time: their parameters are copied to a tile in L1, a row a channel, whatever the memory format; the
// gradient takes their place there and is copied out. Bound: about 10 exponentials and 3 logarithms a component of an RGB
// pixel, against 80 bytes moved.
#include "likelihood/likelihood.h"

#include <omp.h>

#include "core/scratch.h"
#include "core/tile.h"
#include "likelihood/logistic_mixture.h"
#include "likelihood/logistic_sample.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// e^-w and 1 - e^-w of w >= 0, each with a small relative error: one polynomial for both.
GMK_INLINE void exp_and_expm1(vfloat w, vfloat* e, vfloat* u) {
  const vfloat y = vmax(splat(-87.0f), -w), magic = splat(12582912.0f), z = madd(y, splat(1.44269504f), magic);
  const vfloat n = z - magic;
  vfloat f = madd(n, splat(-0.693145752f), y);
  f = madd(n, splat(-1.42860677e-6f), f);
  vfloat p = splat(1.9875691500e-4f);
  p = madd(p, f, splat(1.3981999507e-3f));
  p = madd(p, f, splat(8.3334519073e-3f));
  p = madd(p, f, splat(4.1665795894e-2f));
  p = madd(p, f, splat(1.6666665459e-1f));
  p = madd(p, f, splat(5.0000001201e-1f));
  p = madd(p * f, f, f);
  const vfloat s = (vfloat)(((vuint)z - 0x4B400000u + 127u) << 23);
  *e = madd(s, p, s);
  *u = madd(-s, p, splat(1.0f) - s);
}
GMK_INLINE void exp_and_expm1(vdouble w, vdouble* e, vdouble* u) {
  const vdouble y = vmax(splat(-708.0), -w), magic = splat(6755399441055744.0);
  const vdouble z = madd(y, splat(1.4426950408889634), magic), n = z - magic;
  vdouble f = madd(n, splat(-0.693147180369123816490), y);
  f = madd(n, splat(-1.90821492927058770002e-10), f);
  vdouble p = splat(1.0 / 87178291200.0);
  double factorial = 87178291200.0;  // 14!
  for (int i = 14; i >= 3; --i) {
    factorial /= i;
    p = madd(p, f, splat(1.0 / factorial));
  }
  p = madd(p * f, f, f);
  const vdouble s = (vdouble)(((vulong)z - 0x4338000000000000u + 1023u) << 52);
  *e = madd(s, p, s);
  *u = madd(-s, p, splat(1.0) - s);
}

// tanh as a whole number -1, 0 or 1 and the rest, whose rounding is less than that of the sum.
GMK_INLINE void tanh_parts(vfloat x, vfloat* whole, vfloat* part) {
  const vint sign = (vint)x & (vint)splat(-0.0f);
  const vfloat a = (vfloat)((vint)x & 0x7FFFFFFF), e = vexp(a * splat(-2.0f)), z = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = madd(p, z, splat(2.06390887954e-2f));
  p = madd(p, z, splat(-5.37397155531e-2f));
  p = madd(p, z, splat(1.33314422036e-1f));
  p = madd(p, z, splat(-3.33332819422e-1f));
  p = madd(p * z, a, a);
  const vint small = a < splat(0.625f);
  *whole = select(small, vfloat{}, (vfloat)((vint)splat(1.0f) | sign));
  *part = (vfloat)((vint)select(small, p, splat(-2.0f) * e / (splat(1.0f) + e)) ^ sign);
}
GMK_INLINE void tanh_parts(vdouble x, vdouble* whole, vdouble* part) {
  *whole = vdouble{};
  *part = vtanh(x);
}

template <class T>
struct Word {
  using V = typename simd<T>::v;
  using I = typename simd<T>::i;
  GMK_HD_MEMBER static V set(double x) { return T(x) - V{}; }
  GMK_HD_MEMBER static V exp(V x) { return vexp(x); }
  GMK_HD_MEMBER static V exp_nonpositive(V x) { return vexp_nonpositive(x); }
  GMK_HD_MEMBER static V log(V x) { return vlog(x); }
  GMK_HD_MEMBER static void tanh(V x, V* whole, V* part) { tanh_parts(x, whole, part); }
  GMK_HD_MEMBER static V log1p(V x) {  // of 0 .. 1; what the sum rounds off, the quotient puts back
    const V u = x + T(1), d = u - T(1);
    const I lost = (I)(d == V{});
    return gmk::GMK_ISA_NS::select(lost, x, vlog(u) * x / gmk::GMK_ISA_NS::select(lost, V{} + T(1), d));
  }
  GMK_HD_MEMBER static void exp_and_expm1(V w, V* e, V* u) { gmk::GMK_ISA_NS::exp_and_expm1(w, e, u); }
  GMK_HD_MEMBER static V madd(V a, V b, V c) { return gmk::GMK_ISA_NS::madd(a, b, c); }
  GMK_HD_MEMBER static V min(V a, V b) { return vmin(a, b); }
  GMK_HD_MEMBER static V max(V a, V b) { return vmax(a, b); }
  GMK_HD_MEMBER static V abs(V x) { return (V)((I)x & ~(I)(T(-0.0) - V{})); }
  GMK_HD_MEMBER static V select(I c, V x, V y) { return gmk::GMK_ISA_NS::select(c, x, y); }
  GMK_HD_MEMBER static I both(I a, I b) { return a & b; }
  GMK_HD_MEMBER static I either(I a, I b) { return a | b; }
  GMK_HD_MEMBER static I neither(I a, I b) { return ~(a | b); }
  GMK_HD_MEMBER static I no(I a) { return ~a; }
};

template <class T>
struct L1Tile {
  T* rows;
  using V = typename simd<T>::v;
  GMK_HD_MEMBER V get(int64_t row) const { return load(rows + row * simd<T>::n); }
  GMK_HD_MEMBER void put(int64_t row, V v) const { store(rows + row * simd<T>::n, v); }
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
    const T* const data = (const T*)a.x + (shape.last ? first * C : image * C * pixels + first);
    V x[C];
    if (shape.last) {
      load_tile(tile, n, params, count, f);
      for (int c = 0; c < C; ++c) {
        x[c] = V{};
        for (int64_t l = 0; l < count; ++l) x[c][l] = data[l * C + c];
      }
    } else {
      for (int64_t row = 0; row < f; ++row) {
        const T* const p = params + row * pixels;
        store(tile + row * n, count == n ? load(p) : load_some(p, count));
      }
      for (int c = 0; c < C; ++c) x[c] = count == n ? load(data + c * pixels) : load_some(data + c * pixels, count);
    }
    for (int c = 0; c < C; ++c) x[c] = madd(x[c], splat(T(logistic_scale(shape))), splat(T(logistic_offset(shape))));
    const V nll = logistic_pixel<Word<T>, C, kind, kGradient>(shape, a.weight, rows, L1Tile<T>{tile}, x);
    store_some((T*)a.nll + image * pixels + first, nll, count);
    if (!kGradient) continue;
    T* const gradient = (T*)a.gradient + begin;
    if (shape.last) {
      store_tile(gradient, tile, n, count, f);
    } else {
      for (int64_t row = 0; row < f; ++row) {
        T* const p = gradient + row * pixels;
        if (count == n) {
          store(p, load(tile + row * n));
        } else {
          store_some(p, load(tile + row * n), count);
        }
      }
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

// Forward. A tile of rows meets the components kChunk at a time: their log-densities stay in L1, and the running
// maximum and sum of each row absorb them. Bound: k (d^2/2 + 3d/2) multiply-adds per row (full), 2 k d (diag), and k
// exponentials.
#include <omp.h>

#include "core/scratch.h"
#include "gmm/gmm_density.h"
#include "gmm/gmm_few.h"

namespace gmk {
namespace GMK_ISA_NS {

extern Status gmm_log_prob_backward(const GmmLogProbBackward& a, int threads);  // gmm_backward_cpu.cpp

namespace {

constexpr int kChunk = 32;       // components
constexpr int64_t kRows = 1024;  // rows of one job

// One tile: `words` words of rows, x transposed with `stride`; the result into out, one word after the other.
template <class T, bool matrix, bool centred>
static void tile_log_prob(T* out, T* lp, const T* x, int64_t stride, int words, const Mixture<T>& m) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  const v least = splat(T(sizeof(T) == 4 ? -3.4028234e38 : -1.7976931348623157e308));  // -inf - -inf would be NaN
  v best[kTileWords], sum[kTileWords];
  for (int u = 0; u < words; ++u) best[u] = least, sum[u] = v{};
  for (int64_t c0 = 0; c0 < m.k; c0 += kChunk) {
    int live = 0;
    for (int64_t c = c0; c < m.k && c < c0 + kChunk; ++c)
      if (m.constants[c] != T(-INFINITY))
        component<T, matrix, centred>(lp + live++ * stride, x, stride, words, m, c, m.d);
    for (int u = 0; u < words; ++u) {
      v top = best[u];
      for (int c = 0; c < live; ++c) top = vmax(load(lp + c * stride + u * n), top);
      v total = sum[u] * vexp_nonpositive(best[u] - top);
      for (int c = 0; c < live; ++c) total += vexp_nonpositive(load(lp + c * stride + u * n) - top);
      best[u] = top;
      sum[u] = total;
    }
  }
  for (int u = 0; u < words; ++u) {
    v nan_or_inf{};
    for (int64_t f = 0; f < m.d; ++f) {
      const v e = load(x + f * stride + u * n) * splat(T(0));  // NaN where x is not finite
      nan_or_inf += e;
    }
    v r = best[u] + vlog(sum[u]);
    const auto odd = nan_or_inf != nan_or_inf;
    bool any = false;
    for (int l = 0; l < n; ++l) any |= odd[l] != 0;
    if (any)
      for (int l = 0; l < n; ++l) {
        bool inf = false, nan = false;
        for (int64_t f = 0; f < m.d; ++f) {
          const T e = x[f * stride + u * n + l];
          nan |= e != e;
          inf |= e == T(INFINITY) || e == T(-INFINITY);
        }
        if (inf && !nan) r[l] = T(-INFINITY);  // a NaN has reached r, if there is any component
      }
    store(out + u * n, r);
  }
}

template <class T>
Status log_prob(const GmmLogProb& a, int threads) {
  const GmmInputs& in = a.in;
  constexpr int n = simd<T>::n;
  const bool matrix = matrix_covariance(in.covariance);
  const int words = tile_words(in.d);
  const int64_t stride = int64_t(words) * n;
  const int64_t jobs = (in.n + kRows - 1) / kRows;
  threads = team(in.b * in.n * (in.k + 1) * (in.d + 1) / 16, threads);
  const int64_t mixture_size = (Mixture<T>::scratch(in) + 15) / 16 * 16;
  const int64_t size = mixture_size + (in.d + kChunk + 1) * stride;
  Scratch<T> scratch(threads * size);
  if (!scratch.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* const own = scratch.get() + omp_get_thread_num() * size;
    T* const x = own + mixture_size;
    T* const lp = x + in.d * stride;
    T* const result = lp + kChunk * stride;
    Mixture<T> m{};
    int64_t ready = -1;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < in.b * jobs; ++job) {
      const int64_t b = job / jobs, begin = job % jobs * kRows, end = begin + kRows < in.n ? begin + kRows : in.n;
      if (b != ready) m = prepare<T>(in, b, own);
      ready = b;
      for (int64_t row = begin; row < end; row += stride) {
        const int64_t rows = end - row < stride ? end - row : stride;
        const int now = int((rows + n - 1) / n);
        load_tile(x, stride, (const T*)in.x + b * in.x_stride + row * in.d, rows, in.d);
        if (m.centred)
          for (int64_t f = 0; f < in.d; ++f)
            for (int u = 0; u < now; ++u)
              store(x + f * stride + u * n, load(x + f * stride + u * n) - splat(m.centre[f]));
        T* const out = (T*)a.out + b * in.n + row;
        T* const target = rows == now * n ? out : result;
        if (matrix)
          tile_log_prob<T, true, false>(target, lp, x, stride, now, m);
        else if (m.centred)
          tile_log_prob<T, false, true>(target, lp, x, stride, now, m);
        else
          tile_log_prob<T, false, false>(target, lp, x, stride, now, m);
        if (target == result) memcpy(out, result, size_t(rows) * sizeof(T));
      }
    }
  }
  return kOk;
}

Status gmm_log_prob(const GmmLogProb& a, int threads) {
  if (a.in.b <= 0 || a.in.n <= 0) return kOk;
  if (gmm_few(a.in, false)) return gmm_few_log_prob(a, threads);
  return a.in.dtype == kFloat64 ? log_prob<double>(a, threads) : log_prob<float>(a, threads);
}

}  // namespace

extern const GmmKernels gmm_kernels;
const GmmKernels gmm_kernels = {gmm_log_prob, gmm_log_prob_backward};

}  // namespace GMK_ISA_NS
}  // namespace gmk

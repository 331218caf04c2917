// The M-step of many mixtures: their components, of whichever mixture, share the SIMD lanes (gmm_m_step.h).
#include <omp.h>

#include "core/scratch.h"
#include "gmm/gmm_m_step.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class T>
Status m_step(const GmmMStep& a, int threads) {
  const int64_t k = a.k, d = a.d;
  const bool tied = a.covariance == kTied, matrix = tied || a.covariance == kFull;
  const int64_t ridges = tied ? 1 : k, all = a.b * ridges;
  threads = team(a.b * (k + 1) * (matrix ? d * d * (d + 16) / 24 : d), threads);
  constexpr int n = simd<double>::n;
  const int64_t size = matrices_scratch(d, a.covariance);
  Scratch<double> scratch(threads * size), ridge(all), weights(threads * k);
  if (!scratch.ok() || !ridge.ok() || !weights.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.b; ++b) begin<T>(a, view(a, b), b, ridge.get() + b * ridges, OneThread{});
    if (matrix)
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < all; q += n)
        matrices<T>(a, ridge.get(), q, all - q < n ? all - q : n, scratch.get() + omp_get_thread_num() * size);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.b; ++b)
      finish<T>(a, view(a, b), b, weights.get() + omp_get_thread_num() * k, OneThread{});
  }
  return kOk;
}

Status gmm_m_step(const GmmMStep& a, int threads) {
  if (a.b <= 0) return kOk;
  return a.dtype == kFloat64 ? m_step<double>(a, threads) : m_step<float>(a, threads);
}

}  // namespace

extern const GmmMStepKernels gmm_m_step_kernels;
const GmmMStepKernels gmm_m_step_kernels = {gmm_m_step};

}  // namespace GMK_ISA_NS
}  // namespace gmk

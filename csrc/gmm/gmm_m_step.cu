// The M-step (gmm_m_step_parts.h, and the matrices of full and tied in gmm_m_step.cuh), so that an iteration of EM needs
// nothing of the host. A block is a mixture, or a matrix: its Cholesky factor column by column, then the inverse, a thread
// a row. float64. Bound: d^3 / 3 multiply-adds per component, and the d steps that wait for each other: small beside the
// E-step of many rows.
#include "gmm/gmm_m_step.cuh"

namespace gmk {
namespace {

constexpr int kBlocks = 4;  // of a multiprocessor, at least: without it ptxas spills to stay at 80 registers

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) gmm_m_step_begin_kernel(GmmMStep a) {
  const int64_t ridges = a.covariance == kTied ? 1 : a.k;
  for (int64_t b = blockIdx.x; b < a.b; b += gridDim.x)
    begin<T>(a, view(a, b), b, a.per_component + b * ridges, Block{});
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) gmm_m_step_finish_kernel(GmmMStep a) {
  for (int64_t b = blockIdx.x; b < a.b; b += gridDim.x)
    finish<T>(a, view(a, b), b, a.per_component + (a.b + b) * a.k, Block{});
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) gmm_m_step_matrix_kernel(GmmMStep a) {
  GMK_SHARED(odd, int);
  const bool tied = a.covariance == kTied;
  const int64_t all = tied ? a.b : a.b * a.k;
  double* const low = a.factors + blockIdx.x * 2 * a.d * a.d;
  for (int64_t q = blockIdx.x; q < all; q += gridDim.x) {
    const int64_t b = tied ? q : q / a.k, c = tied ? 0 : q % a.k;
    const View v = view(a, b);
    if (tied ? v.nothing : dead(v, c)) continue;
    make_matrix<T>(a, v, b, c, a.per_component[q], low, low + a.d * a.d, odd);
  }
}

template <class T>
Status launch(const GmmMStep& a, void* stream) {
  Status status = GMK_LAUNCH((gmm_m_step_begin_kernel<T>), grid_for(a.b, 1), kThreads, 0, stream, a);
  if (status) return status;
  const int64_t matrices = a.covariance == kFull ? a.b * a.k : a.covariance == kTied ? a.b : 0;
  if (matrices) {
    const unsigned grid = grid_for(matrices < a.at_a_time ? matrices : a.at_a_time, 1);
    status = GMK_LAUNCH((gmm_m_step_matrix_kernel<T>), grid, kThreads, 0, stream, a);
    if (status) return status;
  }
  return GMK_LAUNCH((gmm_m_step_finish_kernel<T>), grid_for(a.b, 1), kThreads, 0, stream, a);
}

}  // namespace

Status gmm_m_step_cuda(const GmmMStep& a, int device, void* stream) {
  if (a.b <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.dtype == kFloat64 ? launch<double>(a, stream) : launch<float>(a, stream);
}

}  // namespace gmk

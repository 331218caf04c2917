// CUDA only: float32's own paths, and which of them serves what.
#pragma once
#include "gmm/gmm.h"

namespace gmk {

constexpr int64_t kMatrixFeatures = 128;  // d at most

// Floats of the prepared parameters of one component (gmm_matrix.cuh).
inline int64_t prepared_floats(int64_t d, bool pull) {
  const int64_t tiles = (d + 7) / 8;
  return 12 * tiles + 64 * tiles * (tiles + 1) * (pull ? 2 : 1);
}
// Whether the tensor-core kernels serve these inputs; `prepared_bytes` is the workspace that the caller gives for it.
inline bool matrix_path(const GmmInputs& in, int64_t prepared_bytes, bool pull) {
  return in.dtype == kFloat32 && in.covariance <= kTied && in.d > 0 && in.d <= kMatrixFeatures && in.k > 0 &&
         in.k < (int64_t(1) << 24) && prepared_bytes >= 4 * in.b * in.k * prepared_floats(in.d, pull);
}

// Whether the kernels of gmm_diagonal.cu do: 64 KiB of shared memory are all that sm_75 has.
inline bool diagonal_path(const GmmInputs& in, bool tensor_cores) {
  return in.dtype == kFloat32 && in.covariance >= kDiag && in.n > 0 && in.k > 0 && in.d > 0 &&
         in.d <= (tensor_cores ? 128 : 64);
}

// Sums over rows of a component, with w = grad r: sum w; full, tied: sum w t [d], sum w t_a t_b [a <= b]; diag, spherical:
// sum w y [d], sum w y^2 [d].
GMK_HD int64_t statistics_of(const GmmInputs& in) {
  return in.covariance <= kTied ? 1 + in.d + in.d * (in.d + 1) / 2 : 1 + 2 * in.d;
}
// Where sum w t_a t_b is.
GMK_HD int64_t second_moment_at(int64_t d, int64_t a, int64_t b) {
  const int64_t low = a < b ? a : b, high = a < b ? b : a;
  return 1 + d + low * d - low * (low - 1) / 2 + high - low;
}

bool gmm_has_tensor_cores();  // for tf32: the code that would run on the current device has them
Status gmm_prepare(const GmmInputs&, float* prepared, bool pull, void* stream);
Status gmm_row_log_prob(const GmmLogProb&, void* stream);  // gmm_log_prob_cuda on the current device
Status gmm_matrix_grad_x(const GmmLogProbBackward&, void* stream);
Status gmm_matrix_statistics(const GmmLogProbBackward&, double* sums, int64_t slabs, bool pull, void* stream);
Status gmm_diagonal_log_prob(const GmmLogProb&, void* stream);
Status gmm_diagonal_grad_x(const GmmLogProbBackward&, void* stream);
Status gmm_diagonal_statistics(const GmmLogProbBackward&, double* sums, int64_t slabs, void* stream);

// a.scratch [slabs][b, k, statistics_of(in)]: the sums of all rows, into its first slab. a.prepared is ready, for need_x.
Status gmm_row_sums(const GmmLogProbBackward& a, int64_t slabs, void* stream);

}  // namespace gmk

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

bool gmm_has_tensor_cores();  // for tf32: the code that would run on the current device has them
Status gmm_prepare(const GmmInputs&, float* prepared, bool pull, void* stream);
Status gmm_matrix_grad_x(const GmmLogProbBackward&, void* stream);
Status gmm_matrix_statistics(const GmmLogProbBackward&, double* sums, int64_t slabs, bool pull, void* stream);
Status gmm_diagonal_log_prob(const GmmLogProb&, void* stream);
Status gmm_diagonal_grad_x(const GmmLogProbBackward&, void* stream);
Status gmm_diagonal_statistics(const GmmLogProbBackward&, double* sums, int64_t slabs, void* stream);

}  // namespace gmk

// Log-density of Gaussian mixtures (docs/gmm.md), for b mixtures at once:
//   out[i] = log sum_k exp(log_weights[k] + log|det P_k| - d/2 log 2 pi - 1/2 |(x_i - mu_k) P_k|^2)
// P_k = precisions_cholesky as scikit-learn has it: Sigma_k^-1 = P_k P_k^T. With r_ik the responsibilities,
// w = grad_i r_ik, t = x_i - mu_k, y = t P_k:
//   grad_log_weights[k] = sum_i w            grad_x[i] = -sum_k w P_k y
//   grad_means[k] = P_k P_k^T sum_i w t      grad_P[k] = upper(-(sum_i w t^T t) P_k) + diag(sum_i w / P_k)
#pragma once
#include "core/dtype.h"
#include "core/error.h"

namespace gmk {

enum CovarianceType : int { kFull = 0, kTied = 1, kDiag = 2, kSpherical = 3 };

// Numbers in the covariances, and in precisions_cholesky, of one mixture.
GMK_HD int64_t covariance_numbers(int64_t k, int64_t d, int covariance) {
  return covariance == kFull ? k * d * d : covariance == kTied ? d * d : covariance == kDiag ? k * d : k;
}
// Where P[i][j] of component c lies; "diag" and "spherical" have only i = j.
GMK_HD int64_t precision_at(int covariance, int64_t d, int64_t c, int64_t i, int64_t j) {
  return covariance == kFull   ? (c * d + i) * d + j
         : covariance == kTied ? i * d + j
         : covariance == kDiag ? c * d + j
                               : c;
}

struct GmmInputs {
  const void* x;            // [n, d] of each mixture
  const void* log_weights;  // [k]
  const void* means;        // [k, d]
  const void* precisions;   // full [k, d, d], tied [d, d], diag [k, d], spherical [k]
  int64_t x_stride, weights_stride, means_stride, precisions_stride;  // elements to the next mixture; 0: one for all
  int64_t b, n, k, d;                                                 // mixtures, rows, components, features
  int dtype;                                                          // DType of everything: float32 or float64
  int covariance;                                                     // CovarianceType
  bool tf32;  // CUDA only, full and tied float32: one product of tf32 numbers on the tensor cores in place of three
};

struct GmmLogProb {
  void* out;  // [b, n]
  void*
      scratch;  // CUDA only: parameters prepared for the tensor cores (ops/gmm.py allocates it); without, the plain path
  int64_t scratch_bytes;
  GmmInputs in;
};

struct GmmLogProbBackward {
  bool need_x, need_parameters;  // which gradients to compute: the first; the other three
  void* grad_x;                  // [b, n, d]
  void* grad_log_weights;        // [b, k]
  void* grad_means;              // [b, k, d]
  void* grad_precisions;         // [b, ...]
  const void* grad;              // [b, n]
  const void* log_prob;          // [b, n]: the result of the forward
  void* prepared;                // CUDA only: as in GmmLogProb
  void* scratch;                 // CUDA only: [slabs][statistics] float64 (ops/gmm.py allocates it)
  int64_t prepared_bytes, scratch_bytes;
  GmmInputs in;
};

struct GmmKernels {
  Status (*log_prob)(const GmmLogProb&, int threads);
  Status (*log_prob_backward)(const GmmLogProbBackward&, int threads);
};

Status gmm_log_prob_cuda(const GmmLogProb&, int device, void* stream);
Status gmm_log_prob_backward_cuda(const GmmLogProbBackward&, int device, void* stream);

}  // namespace gmk

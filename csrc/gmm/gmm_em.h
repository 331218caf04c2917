// Expectation maximisation for Gaussian mixtures (docs/gmm.md), b mixtures at once. With r_ik the responsibilities times
// the weight w_i of the row and t = x_i - shift:
//   nk = sum_i r_ik   s1 = sum_i r_ik t   s2: full sum_i r_ik t t^T, tied sum_ik r_ik t t^T, diag sum_i r_ik t^2,
//   spherical sum_i r_ik |t|^2
// The M-step turns them into a mixture, as scikit-learn does, and repairs components that cannot be used (ops/gmm_em.py).
#pragma once
#include "gmm/gmm.h"

namespace gmk {

constexpr int64_t kEmGroupRows = 2048;  // summed in the dtype of the accumulators, then added to float64, in order

// Numbers of one mixture's sums: log-likelihood, total weight, nk [k], s1 [k, d], s2.
GMK_HD int64_t em_numbers(int64_t k, int64_t d, int covariance) {
  return 2 + k + k * d + covariance_numbers(k, d, covariance);
}

struct GmmEmStatistics {
  double* sums;                                // [b, em_numbers]
  double* used_shift;                          // [b, d]: the shift, rounded to the dtype of x
  const void* sample_weight;                   // [n]; null: all 1
  const double* shift;                         // [d]; null: the mean of the mixture
  const double* initial;                       // [b, em_numbers]: what the sums start from; null: 0
  int64_t sample_weight_stride, shift_stride;  // elements to the next mixture; 0: one for all
  // CUDA only, workspace (ops/gmm_em.py allocates it):
  double* slab_sums;  // [slabs][b, k, statistics_of(in)]: of slabs of rows
  double* row_sums;   // [b, groups of kEmGroupRows rows, 2]: log-likelihood, weight
  void* rows;         // [2][b, n], dtype of x: the rows' log-densities and weights
  void* prepared;     // as in GmmLogProb
  int64_t slabs, prepared_bytes;
  GmmInputs in;
};

struct GmmResponsibilities {
  void* out;       // [b, n, k]
  void* log_prob;  // [b, n], dtype of x: workspace, CUDA only
  void* prepared;  // CUDA only: as in GmmLogProb
  int64_t prepared_bytes;
  GmmInputs in;
};

enum GmmStatus : uint8_t { kHealthy = 0, kDead = 1, kSingular = 2, kNotFinite = 3 };

struct GmmMStep {
  void* weights;        // [b, k]
  void* log_weights;    // [b, k]
  void* means;          // [b, k, d]
  void* covariances;    // [b, ...]
  void* precisions;     // [b, ...]
  uint8_t* status;      // [b, k] GmmStatus
  const double* sums;   // [b, em_numbers]
  const double* shift;  // [b, d]
  int64_t b, k, d;
  int covariance;  // CovarianceType
  double reg_covar;
  int dtype;  // DType of the results: float32 or float64
  // CUDA only, workspace (ops/gmm_em.py allocates it):
  double* per_component;  // [2][b, k]: what to add to a singular matrix; weights
  double* factors;        // [matrices at a time][2][d, d]; full and tied
  int64_t at_a_time;
};

struct GmmEmKernels {
  Status (*statistics)(const GmmEmStatistics&, int threads);
  Status (*responsibilities)(const GmmResponsibilities&, int threads);
};
struct GmmMStepKernels {
  Status (*m_step)(const GmmMStep&, int threads);
};

Status gmm_em_statistics_cuda(const GmmEmStatistics&, int device, void* stream);
Status gmm_responsibilities_cuda(const GmmResponsibilities&, int device, void* stream);
Status gmm_m_step_cuda(const GmmMStep&, int device, void* stream);

}  // namespace gmk

// Whole fits of many small mixtures (docs/mixture.md): b data sets of n rows, each from its start to convergence.
//   start: k-means++ picks (or given means) and Lloyd rounds, whose labels are the first responsibilities; or given
//          responsibilities; or a given mixture
//   then   E-step (gmm_em.h), M-step (GmmMStep), until the mean log-likelihood of a row changes by less than tol
// Arithmetic and sums are float64, about the weighted mean of the rows.
#pragma once
#include "core/philox.h"
#include "gmm/gmm_em.h"

namespace gmk {

struct GmmFit {
  void* weights;                         // [b, k]
  void* log_weights;                     // [b, k]
  void* means;                           // [b, k, d]
  void* covariances;                     // [b, ...]
  void* precisions;                      // [b, ...]
  uint8_t* status;                       // [b, k] GmmStatus after the last M-step
  int64_t* recovered;                    // [b, k]: M-steps that repaired it
  double* log_likelihood;                // [b]: of the mean row, at the last E-step
  int64_t* iterations;                   // [b]
  uint8_t* converged;                    // [b]
  const void* x;                         // [n, d]
  const void* sample_weight;             // [n]; null: all 1
  const int64_t* seeds;                  // [seed_rows]; null: `seed`
  const void* responsibilities;          // [n, k]: a start; or null
  const void* start_log_weights;         // [k]: with means and precisions, a start; or null
  const void* start_means;               // [k, d]: alone, the centres to begin with; or null
  const void* start_precisions;          // as in GmmInputs
  int64_t x_stride, weight_stride;       // elements to the next mixture; 0: one for all
  int64_t responsibilities_stride;       //
  int64_t start_log_weights_stride;      //
  int64_t start_means_stride;            //
  int64_t start_precisions_stride;       //
  int64_t b, n, k, d;                    // mixtures, rows, components, features
  int64_t max_iter, rounds, candidates;  // of EM; of Lloyd, at most; candidates of every pick but the first
  int64_t n_init;                        // starts that are tried: the best by log-likelihood is kept
  int64_t seed_rows;                     // b: each mixture counts its own numbers; 1: one count for all
  uint64_t seed;
  double tol, reg_covar;
  int dtype;       // DType of x, weights and parameters: float32 or float64
  int covariance;  // CovarianceType
  // CUDA only, workspace (ops/gmm_fit.py allocates it):
  double* workspace;              // [blocks][block_numbers]; null where a block's numbers fit into shared memory
  int64_t blocks, block_numbers;  // at a time; of one mixture
};

// Numbers that a mixture needs while a block fits it (gmm_fit.cu).
static inline int64_t fit_numbers(const GmmFit& a) {
  const int64_t matrices = covariance_numbers(a.k, a.d, a.covariance);
  return a.n * (a.d + a.k + 2) + em_numbers(a.k, a.d, a.covariance) + a.k * (a.d + 3) + 2 * a.d * (a.d + 1) +
         2 * (a.k * (a.d + 4) + 2 * matrices);
}

struct GmmFitKernels {
  Status (*gmm_fit)(const GmmFit&, int threads);
};

Status gmm_fit_cuda(const GmmFit&, int device, void* stream);

}  // namespace gmk

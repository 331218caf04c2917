// Samples of Gaussian mixtures (docs/gmm.md), b mixtures of n rows each:
//   c   = the first component whose cdf exceeds (word + 0.5) 2^-32          word r of stream kStreamGmmComponent
//   t P = z, solved for t                                                   z: normals r d ... r d + d - 1 of kStreamGmmNormal
//   out = means[c] + t                                                      so that Cov t = (P P^T)^-1
// r counts the rows of all mixtures (int seed), or of each mixture on its own (a seed per mixture).
#pragma once
#include "core/philox.h"
#include "gmm/gmm.h"

namespace gmk {

struct GmmSample {
  void* out;               // [b, n, d]
  int64_t* component;      // [b, n]; -1, and NaN in out, where no cdf exceeds: a mixture without components
  const double* cdf;       // [k] of each mixture, ascending, the last of those with weight is 1
  const int64_t* seeds;    // nullptr: `seed`
  const void* means;       // [k, d]
  const void* precisions;  // as in GmmInputs
  int64_t cdf_stride, means_stride, precisions_stride;  // elements to the next mixture; 0: one for all
  int64_t b, n, k, d;                                   // mixtures, rows of each, components, features
  int64_t seed_rows;                                    // 1, or b when seeds is [b]
  uint64_t seed;
  int dtype;       // DType of out, means, precisions
  int covariance;  // CovarianceType
};

// The first component with cdf > u, or k.
GMK_HD int64_t component_of(const double* cdf, int64_t k, double u) {
  int64_t low = 0, high = k;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cdf[middle] > u) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}
GMK_HD double component_uniform(uint32_t word) { return (double(word) + 0.5) * 2.3283064365386963e-10; }

struct GmmSampleKernels {
  Status (*gmm_sample)(const GmmSample&, int threads);
};

Status gmm_sample_cuda(const GmmSample&, int device, void* stream);

}  // namespace gmk

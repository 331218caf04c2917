// k-means (docs/kmeans.md), b data sets at once: centres c_1 ... c_k that make the inertia small,
//   inertia = sum_i w_i min_j |x_i - c_j|^2
// by greedy k-means++ (a start) and Lloyd's iteration: rows to their nearest centre, centres to the mean of their rows.
#pragma once
#include "core/dtype.h"
#include "core/error.h"

namespace gmk {

constexpr int64_t kKmeansGroupRows = 2048;  // summed in order by one thread; then the groups are added, in order

struct KmeansInputs {
  const void* x;                    // [n, d] of each data set
  const void* sample_weight;        // [n]; null: all 1
  int64_t x_stride, weight_stride;  // elements to the next data set; 0: one for all
  int64_t b, n, k, d;               // data sets, rows, centres, features
  int dtype;                        // DType of x, weights, centres: float32 or float64
};

struct KmeansPlusPlus {
  void* centers;           // [b, k, d]
  int64_t* indices;        // [b, k]: the rows that they are
  const double* uniforms;  // [1 + (k - 1) trials] of each data set, in [0, 1)
  int64_t uniforms_stride;
  int64_t trials;  // candidates for every centre but the first
  KmeansInputs in;
};

struct KmeansLloyd {
  void* centers;     // [b, k, d]
  int32_t* labels;   // [b, n]
  double* inertia;   // [b]
  int64_t* n_iter;   // [b]
  const void* init;  // [k, d] of each data set
  int64_t init_stride;
  int64_t max_iter;
  double tol;  // of the squared shift of all centres, in units of the mean variance of the features
  KmeansInputs in;
};

struct KmeansStartKernels {
  Status (*plus_plus)(const KmeansPlusPlus&, int threads);
};
struct KmeansKernels {
  Status (*lloyd)(const KmeansLloyd&, int threads);
};

}  // namespace gmk

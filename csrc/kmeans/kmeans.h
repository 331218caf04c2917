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
  // Workspace of CUDA.
  void* closest;        // [b, n], dtype of x: squared distance to the nearest centre so far
  double* left;         // [b, 1 + trials, groups of rows]: their sums, as they are and with each candidate
  int64_t* candidates;  // [2, b, trials]: rows; the next centre's and this one's
};

struct KmeansState {    // of one data set, on CUDA
  double enough;        // squared shift that ends it
  int64_t done, fresh;  // no more iterations; do labels and inertia belong to the centres?
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
  // Workspace of CUDA.
  double* slab_sums;   // [slabs, b, kmeans_slab_numbers]
  void* grouped;       // [b, groups of 8 centres, d, 8]: the centres, as the kernels read them
  KmeansState* state;  // [b + 1]; the last counts those that are done
  int64_t slabs;
};

// Sums of a slab of rows: per centre those of the features and of the weights, inertia, rows with a new label. Before the
// first iteration: of the features and their squares, and of the weights.
GMK_HD int64_t kmeans_slab_numbers(int64_t k, int64_t d) {
  const int64_t numbers = k * (d + 1) + 2, spread = 2 * d + 1;
  return numbers > spread ? numbers : spread;
}

struct KmeansStartKernels {
  Status (*plus_plus)(const KmeansPlusPlus&, int threads);
};
struct KmeansKernels {
  Status (*lloyd)(const KmeansLloyd&, int threads);
};

// Every pointer is to device memory.
Status kmeans_cuda(const KmeansLloyd&, int device, void* stream);
Status kmeans_plus_plus_cuda(const KmeansPlusPlus&, int device, void* stream);

}  // namespace gmk

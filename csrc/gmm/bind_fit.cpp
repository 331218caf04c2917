#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "gmm/gmm_fit.h"

namespace gmk {

GMK_ISA_TABLES(GmmFitKernels, gmm_fit_kernels)

static GmmFit gmm_fit(Address weights, Address log_weights, Address means, Address covariances, Address precisions,
                      Address status, Address recovered, Address log_likelihood, Address iterations, Address converged,
                      Address workspace, Address x, Address sample_weight, Address seeds, Address responsibilities,
                      Address start_log_weights, Address start_means, Address start_precisions, py::tuple strides,
                      int64_t b, int64_t n, int64_t k, int64_t d, int64_t max_iter, int64_t rounds, int64_t candidates,
                      int64_t n_init, uint64_t seed, int64_t seed_rows, double tol, double reg_covar, int dtype,
                      int covariance, int64_t blocks, int64_t block_numbers) {
  GmmFit a{};
  const int64_t matrices = b * covariance_numbers(k, d, covariance);
  a.weights = pointer(weights, b * k, "weights");
  a.log_weights = pointer(log_weights, b * k, "log_weights");
  a.means = pointer(means, b * k * d, "means");
  a.covariances = pointer(covariances, matrices, "covariances");
  a.precisions = pointer(precisions, matrices, "precisions_cholesky");
  a.status = pointer<uint8_t>(status, b * k, "status");
  a.recovered = pointer<int64_t>(recovered, b * k, "recovered");
  a.log_likelihood = pointer<double>(log_likelihood, b, "log_likelihood");
  a.iterations = pointer<int64_t>(iterations, b, "n_iter");
  a.converged = pointer<uint8_t>(converged, b, "converged");
  a.workspace = optional_pointer<double>(workspace);
  a.blocks = blocks;
  a.block_numbers = block_numbers;
  a.x = pointer(x, b * n * d, "x");
  a.sample_weight = optional_pointer(sample_weight);
  a.seeds = optional_pointer<int64_t>(seeds);
  a.responsibilities = optional_pointer(responsibilities);
  a.start_log_weights = optional_pointer(start_log_weights);
  a.start_means = optional_pointer(start_means);
  a.start_precisions = optional_pointer(start_precisions);
  a.x_stride = strides[0].cast<int64_t>();
  a.weight_stride = strides[1].cast<int64_t>();
  a.responsibilities_stride = strides[2].cast<int64_t>();
  a.start_log_weights_stride = strides[3].cast<int64_t>();
  a.start_means_stride = strides[4].cast<int64_t>();
  a.start_precisions_stride = strides[5].cast<int64_t>();
  a.b = b;
  a.n = n;
  a.k = k;
  a.d = d;
  a.max_iter = max_iter;
  a.rounds = rounds;
  a.candidates = candidates;
  a.n_init = n_init;
  a.seed = seed;
  a.seed_rows = seed_rows;
  a.tol = tol;
  a.reg_covar = reg_covar;
  a.dtype = dtype;
  a.covariance = covariance;
  return a;
}

void bind_gmm_fit(py::module_& m) {
  bind_op(m, "gmm_fit", gmm_fit, GMK_CPU(gmm_fit_kernels().gmm_fit), GMK_CUDA(gmm_fit_cuda));
}

}  // namespace gmk

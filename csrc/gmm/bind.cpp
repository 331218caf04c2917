#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "gmm/bind_inputs.h"
#include "gmm/gmm_sample.h"

namespace gmk {

GMK_ISA_TABLES(GmmKernels, gmm_kernels)
GMK_ISA_TABLES(GmmSampleKernels, gmm_sample_kernels)

static GmmLogProb gmm_log_prob(Address out, Address scratch, Address x, Address log_weights, Address means,
                               Address precisions, int64_t scratch_bytes, py::tuple strides, int64_t b, int64_t n,
                               int64_t k, int64_t d, int dtype, int covariance) {
  GmmLogProb a{};
  a.out = pointer(out, b * n, "out");
  a.scratch = pointer(scratch, scratch_bytes, "scratch");
  a.scratch_bytes = scratch_bytes;
  a.in = gmm_inputs(x, log_weights, means, precisions, strides, b, n, k, d, dtype, covariance);
  return a;
}

static GmmLogProbBackward gmm_log_prob_backward(Address grad_x, Address grad_log_weights, Address grad_means,
                                                Address grad_precisions, Address scratch, Address grad,
                                                Address log_prob, Address x, Address log_weights, Address means,
                                                Address precisions, int64_t prepared_bytes, int64_t scratch_bytes,
                                                py::tuple strides, int64_t b, int64_t n, int64_t k, int64_t d,
                                                int dtype, int covariance, bool need_x, bool need_parameters) {
  GmmLogProbBackward a{};
  a.need_x = need_x;
  a.need_parameters = need_parameters;
  a.grad_x = pointer(grad_x, need_x ? b * n * d : 0, "grad_x");
  a.grad_log_weights = pointer(grad_log_weights, need_parameters ? b * k : 0, "grad_log_weights");
  a.grad_means = pointer(grad_means, need_parameters ? b * k * d : 0, "grad_means");
  const int64_t matrices = need_parameters ? b * covariance_numbers(k, d, covariance) : 0;
  a.grad_precisions = pointer(grad_precisions, matrices, "grad_precisions");
  a.prepared = pointer(scratch, prepared_bytes + scratch_bytes, "scratch");
  a.prepared_bytes = prepared_bytes;
  a.scratch = static_cast<char*>(a.prepared) + prepared_bytes;
  a.scratch_bytes = scratch_bytes;
  a.grad = pointer(grad, b * n, "grad");
  a.log_prob = pointer(log_prob, b * n, "log_prob");
  a.in = gmm_inputs(x, log_weights, means, precisions, strides, b, n, k, d, dtype, covariance);
  return a;
}

static GmmSample gmm_sample(Address out, Address component, Address cdf, Address seeds, Address means,
                            Address precisions, py::tuple strides, int64_t b, int64_t n, int64_t k, int64_t d,
                            uint64_t seed, int64_t seed_rows, int dtype, int covariance) {
  GmmSample a{};
  a.out = pointer(out, b * n * d, "out");
  a.component = pointer<int64_t>(component, b * n, "component");
  a.cdf = pointer<double>(cdf, b * k, "cdf");
  a.seeds = optional_pointer<int64_t>(seeds);
  a.means = pointer(means, b * k * d, "means");
  a.precisions = pointer(precisions, b * covariance_numbers(k, d, covariance), "precisions_cholesky");
  a.cdf_stride = strides[0].cast<int64_t>();
  a.means_stride = strides[1].cast<int64_t>();
  a.precisions_stride = strides[2].cast<int64_t>();
  a.b = b;
  a.n = n;
  a.k = k;
  a.d = d;
  a.seed = seed;
  a.seed_rows = seed_rows;
  a.dtype = dtype;
  a.covariance = covariance;
  return a;
}

void bind_gmm(py::module_& m) {
  bind_op(m, "gmm_log_prob", gmm_log_prob, GMK_CPU(gmm_kernels().log_prob), GMK_CUDA(gmm_log_prob_cuda));
  bind_op(m, "gmm_log_prob_backward", gmm_log_prob_backward, GMK_CPU(gmm_kernels().log_prob_backward),
          GMK_CUDA(gmm_log_prob_backward_cuda));
  bind_op(m, "gmm_sample", gmm_sample, GMK_CPU(gmm_sample_kernels().gmm_sample), GMK_CUDA(gmm_sample_cuda));
}

}  // namespace gmk

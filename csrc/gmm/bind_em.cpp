#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "gmm/bind_inputs.h"
#include "gmm/gmm_em.h"

namespace gmk {

GMK_ISA_TABLES(GmmEmKernels, gmm_em_kernels)
GMK_ISA_TABLES(GmmMStepKernels, gmm_m_step_kernels)

static GmmEmStatistics gmm_em_statistics(Address sums, Address used_shift, Address slab_sums, Address row_sums,
                                         Address rows, Address prepared, Address x, Address log_weights, Address means,
                                         Address precisions, Address sample_weight, Address shift, Address initial,
                                         int64_t slabs, int64_t prepared_bytes, py::tuple strides, int64_t b, int64_t n,
                                         int64_t k, int64_t d, int dtype, int covariance, int64_t sample_weight_stride,
                                         int64_t shift_stride, bool tf32) {
  GmmEmStatistics a{};
  a.sums = pointer<double>(sums, b * em_numbers(k, d, covariance), "sums");
  a.used_shift = pointer<double>(used_shift, b * d, "used_shift");
  a.slab_sums = optional_pointer<double>(slab_sums);
  a.row_sums = optional_pointer<double>(row_sums);
  a.rows = optional_pointer(rows);
  a.prepared = pointer(prepared, prepared_bytes, "prepared");
  a.slabs = slabs;
  a.prepared_bytes = prepared_bytes;
  a.sample_weight = optional_pointer(sample_weight);
  a.shift = optional_pointer<double>(shift);
  a.initial = optional_pointer<double>(initial);
  a.sample_weight_stride = sample_weight_stride;
  a.shift_stride = shift_stride;
  a.in = gmm_inputs(x, log_weights, means, precisions, strides, b, n, k, d, dtype, covariance);
  a.in.tf32 = tf32;
  return a;
}

static GmmResponsibilities gmm_responsibilities(Address out, Address log_prob, Address prepared, Address x,
                                                Address log_weights, Address means, Address precisions,
                                                int64_t prepared_bytes, py::tuple strides, int64_t b, int64_t n,
                                                int64_t k, int64_t d, int dtype, int covariance) {
  GmmResponsibilities a{};
  a.out = pointer(out, b * n * k, "out");
  a.log_prob = optional_pointer(log_prob);
  a.prepared = pointer(prepared, prepared_bytes, "prepared");
  a.prepared_bytes = prepared_bytes;
  a.in = gmm_inputs(x, log_weights, means, precisions, strides, b, n, k, d, dtype, covariance);
  return a;
}

static GmmMStep gmm_m_step(Address weights, Address log_weights, Address means, Address covariances, Address precisions,
                           Address status, Address per_component, Address factors, Address sums, Address shift,
                           int64_t at_a_time, int64_t b, int64_t k, int64_t d, int covariance, double reg_covar,
                           int dtype) {
  GmmMStep a{};
  const int64_t matrices = b * covariance_numbers(k, d, covariance);
  a.weights = pointer(weights, b * k, "weights");
  a.log_weights = pointer(log_weights, b * k, "log_weights");
  a.means = pointer(means, b * k * d, "means");
  a.covariances = pointer(covariances, matrices, "covariances");
  a.precisions = pointer(precisions, matrices, "precisions_cholesky");
  a.status = pointer<uint8_t>(status, b * k, "status");
  a.per_component = optional_pointer<double>(per_component);
  a.factors = optional_pointer<double>(factors);
  a.at_a_time = at_a_time;
  a.sums = pointer<double>(sums, b * em_numbers(k, d, covariance), "sums");
  a.shift = pointer<double>(shift, b * d, "shift");
  a.b = b;
  a.k = k;
  a.d = d;
  a.covariance = covariance;
  a.reg_covar = reg_covar;
  a.dtype = dtype;
  return a;
}

void bind_gmm_em(py::module_& m) {
  bind_op(m, "gmm_em_statistics", gmm_em_statistics, GMK_CPU(gmm_em_kernels().statistics),
          GMK_CUDA(gmm_em_statistics_cuda));
  bind_op(m, "gmm_responsibilities", gmm_responsibilities, GMK_CPU(gmm_em_kernels().responsibilities),
          GMK_CUDA(gmm_responsibilities_cuda));
  bind_op(m, "gmm_m_step", gmm_m_step, GMK_CPU(gmm_m_step_kernels().m_step), GMK_CUDA(gmm_m_step_cuda));
}

}  // namespace gmk

// Bindings only: the mixture and its rows, from Python integers.
#pragma once
#include "core/tensor_args.h"
#include "gmm/gmm.h"

namespace gmk {

inline GmmInputs gmm_inputs(Address x, Address log_weights, Address means, Address precisions, py::tuple strides,
                            int64_t b, int64_t n, int64_t k, int64_t d, int dtype, int covariance) {
  GmmInputs in{};
  in.x = pointer(x, b * n * d, "x");
  in.log_weights = pointer(log_weights, b * k, "log_weights");
  in.means = pointer(means, b * k * d, "means");
  in.precisions = pointer(precisions, b * covariance_numbers(k, d, covariance), "precisions_cholesky");
  in.x_stride = strides[0].cast<int64_t>();
  in.weights_stride = strides[1].cast<int64_t>();
  in.means_stride = strides[2].cast<int64_t>();
  in.precisions_stride = strides[3].cast<int64_t>();
  in.b = b;
  in.n = n;
  in.k = k;
  in.d = d;
  in.dtype = dtype;
  in.covariance = covariance;
  return in;
}

}  // namespace gmk

#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "likelihood/likelihood.h"

namespace gmk {

#ifndef GMK_SIMT
GMK_ISA_TABLES(LikelihoodKernels, likelihood_kernels)
#endif

static LogisticShape logistic_shape(int64_t b, int64_t pixels, int64_t mixtures, int data_channels, double low,
                                    double high, double levels, int kind, bool last, int dtype) {
  LogisticShape s{};
  s.b = b;
  s.pixels = pixels;
  s.mixtures = mixtures;
  s.data_channels = data_channels;
  s.low = low;
  s.high = high;
  s.levels = levels;
  s.kind = kind;
  s.last = last;
  s.dtype = dtype;
  return s;
}

static LogisticMixtureNll logistic_mixture_nll(Address nll, Address gradient, Address params, Address x, int64_t b,
                                               int64_t pixels, int64_t mixtures, int data_channels, double low,
                                               double high, double levels, int kind, bool last, int dtype,
                                               double weight) {
  LogisticMixtureNll a{};
  a.shape = logistic_shape(b, pixels, mixtures, data_channels, low, high, levels, kind, last, dtype);
  a.nll = pointer(nll, b * pixels, "nll");
  a.gradient = optional_pointer(gradient);
  a.params = pointer<const void>(params, b * pixels, "params");
  a.x = pointer<const void>(x, b * pixels, "x");
  a.weight = weight;
  return a;
}

static LogisticMixtureSample logistic_mixture_sample(Address x, Address params, Address seeds, int64_t b,
                                                     int64_t pixels, int64_t mixtures, int data_channels, double low,
                                                     double high, double levels, int kind, bool last, int dtype,
                                                     int64_t seed_rows, uint64_t seed, double temperature) {
  LogisticMixtureSample a{};
  a.shape = logistic_shape(b, pixels, mixtures, data_channels, low, high, levels, kind, last, dtype);
  a.x = pointer(x, b * pixels, "x");
  a.params = pointer<const void>(params, b * pixels, "params");
  a.seeds = optional_pointer<const int64_t>(seeds);
  a.seed_rows = seed_rows;
  a.seed = seed;
  a.temperature = temperature;
  return a;
}

static ScaleInPlace scale_in_place(Address t, Address, Address factor, int64_t n, int dtype) {
  ScaleInPlace a{};
  a.t = pointer(t, n, "t");
  a.factor = pointer<const void>(factor, n, "factor");
  a.n = n;
  a.dtype = dtype;
  return a;
}

void bind_likelihood(py::module_& m) {
  bind_op(m, "logistic_mixture_nll", logistic_mixture_nll, GMK_CPU(likelihood_kernels().logistic_mixture_nll),
          GMK_CUDA(logistic_mixture_nll_cuda));
  bind_op(m, "logistic_mixture_sample", logistic_mixture_sample, GMK_CPU(likelihood_kernels().logistic_mixture_sample),
          GMK_CUDA(logistic_mixture_sample_cuda));
  bind_op(m, "scale_in_place", scale_in_place, GMK_CPU(likelihood_kernels().scale_in_place),
          GMK_CUDA(scale_in_place_cuda));
}

}  // namespace gmk

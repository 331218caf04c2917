#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "diffusion/diffusion.h"
#include "diffusion/statistics.h"

namespace gmk {

#ifndef GMK_SIMT
GMK_ISA_TABLES(DiffusionKernels, diffusion_kernels)
GMK_ISA_TABLES(StepStatisticsKernels, step_statistics_kernels)

PyMethodDef* diffusion_plain_methods();  // bind_plain.cpp

Status diffusion_steps_cpu(const DiffusionStep* steps, int count, int threads) {
  return diffusion_kernels().diffusion_steps(steps, count, threads);
}
static Status diffusion_step_cpu(const DiffusionStep& a, int threads) { return diffusion_steps_cpu(&a, 1, threads); }
#endif

static DiffusionStep diffusion_step(Address out, Address x0, Address x, Address model_output, Address coefficients,
                                    Address uncond, Address h1, Address h2, Address h3, Address variance, Address noise,
                                    Address seeds, Address mask, Address known, Address index, int64_t numel,
                                    int64_t coefficient_rows, int64_t seed_rows, uint64_t seed, uint32_t step,
                                    double guidance, double low, double high, int noise_kind, double known_signal,
                                    double known_noise, bool known_x0, int64_t index_rows, int dtype, bool wide) {
  DiffusionStep a{};
  a.out = pointer(out, numel, "out");
  a.x0 = optional_pointer(x0);
  a.x = pointer<const void>(x, numel, "x");
  a.model_output = pointer<const void>(model_output, numel, "model_output");
  a.coefficients = pointer<const void>(coefficients, numel, "coefficients");
  a.uncond = optional_pointer<const void>(uncond);
  a.history[0] = optional_pointer<const void>(h1);
  a.history[1] = optional_pointer<const void>(h2);
  a.history[2] = optional_pointer<const void>(h3);
  a.variance = optional_pointer<const void>(variance);
  a.noise = pointer<const void>(noise, noise_kind == kGivenNoise ? numel : 0, "noise");
  a.seeds = optional_pointer<const int64_t>(seeds);
  a.numel = numel;
  a.coefficient_rows = coefficient_rows;
  a.seed_rows = seed_rows;
  a.seed = seed;
  a.step = step;
  a.guidance = guidance;
  a.low = low;
  a.high = high;
  a.mask = optional_pointer<const void>(mask);
  a.known = pointer<const void>(known, mask ? numel : 0, "known");
  a.known_signal = known_signal;
  a.known_noise = known_noise;
  a.known_x0 = known_x0;
  a.index = optional_pointer<const int64_t>(index);
  a.index_rows = index_rows;
  a.noise_kind = noise_kind;
  a.dtype = dtype;
  a.wide = wide;
  return a;
}

static StepStatistics step_statistics(Address out, Address x, Address model_output, Address uncond,
                                      Address coefficients, int64_t numel, int64_t samples, int64_t coefficient_rows,
                                      double guidance, double amount, int statistic, int dtype, bool wide) {
  StepStatistics s{};
  const int64_t of_quantile = statistic == kQuantile ? numel : 0;
  s.out = pointer(out, samples, "out");
  s.x = pointer<const void>(x, of_quantile, "x");
  s.model_output = pointer<const void>(model_output, numel, "model_output");
  s.uncond = pointer<const void>(uncond, numel - of_quantile, "uncond");
  s.coefficients = pointer<const void>(coefficients, of_quantile, "coefficients");
  s.numel = numel;
  s.samples = samples;
  s.coefficient_rows = coefficient_rows;
  s.guidance = guidance;
  s.amount = amount;
  s.statistic = statistic;
  s.dtype = dtype;
  s.wide = wide;
  return s;
}

void bind_diffusion(py::module_& m) {
  bind_op(m, "diffusion_step", diffusion_step, GMK_CPU(diffusion_step_cpu), GMK_CUDA(diffusion_step_cuda));
  bind_op(m, "step_statistics", step_statistics, GMK_CPU(step_statistics_kernels().step_statistics),
          GMK_CUDA(step_statistics_cuda));
#ifndef GMK_SIMT
  for (PyMethodDef* method = diffusion_plain_methods(); method->ml_name; ++method)
    m.attr(method->ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(method, nullptr));
#endif
}

}  // namespace gmk

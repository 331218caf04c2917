#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "training/noising.h"

namespace gmk {

#ifndef GMK_SIMT
GMK_ISA_TABLES(NoisingKernels, noising_kernels)
#endif

static NoiseSource noise_source(Address noise, Address seeds, int64_t seed_rows, uint64_t seed, uint32_t step,
                                uint32_t stream) {
  NoiseSource n{};
  n.given = optional_pointer<const void>(noise);
  n.seeds = optional_pointer<const int64_t>(seeds);
  n.seed_rows = seed_rows;
  n.seed = seed;
  n.step = step;
  n.stream = stream;
  return n;
}
static NoiseSchedule noise_schedule(Address pairs, Address t, int64_t times, int64_t samples, bool wide) {
  NoiseSchedule s{};
  s.pairs = pointer<const void>(pairs, times, "schedule");
  s.t = optional_pointer<const int64_t>(t);
  s.times = times;
  s.samples = samples;
  s.wide = wide;
  return s;
}

static AddNoise add_noise(Address xt, Address target, Address x0, Address t, Address schedule, Address noise,
                          Address seeds, int64_t numel, int64_t times, int64_t samples, bool wide, int64_t seed_rows,
                          uint64_t seed, uint32_t step, int target_kind, int dtype) {
  AddNoise a{};
  a.xt = pointer(xt, numel, "x_t");
  a.target = optional_pointer(target);
  a.x0 = pointer<const void>(x0, numel, "x0");
  a.noise = noise_source(noise, seeds, seed_rows, seed, step, kStreamAddNoise);
  a.schedule = noise_schedule(schedule, t, times, samples, wide);
  a.numel = numel;
  a.target_kind = target_kind;
  a.dtype = dtype;
  return a;
}

static DenoisingLoss denoising_loss(Address loss, Address grad, Address partials, Address pred, Address x0, Address t,
                                    Address schedule, Address weight, Address seeds, int64_t numel, int64_t times,
                                    int64_t samples, bool wide, int64_t seed_rows, uint64_t seed, uint32_t step,
                                    int target_kind, int weight_kind, double gamma, int dtype) {
  DenoisingLoss a{};
  a.loss = pointer(loss, 1, "loss");
  a.grad = optional_pointer(grad);
  a.partials = pointer<double>(partials, numel, "partials");
  a.pred = pointer<const void>(pred, numel, "pred");
  a.x0 = optional_pointer<const void>(x0);
  a.weight = pointer<const void>(weight, weight_kind == kGivenWeight ? numel : 0, "weight");
  a.noise = noise_source(0, seeds, seed_rows, seed, step, kStreamAddNoise);
  a.schedule = noise_schedule(schedule, t, times, samples, wide);
  a.gamma = gamma;
  a.numel = numel;
  a.target_kind = target_kind;
  a.weight_kind = weight_kind;
  a.dtype = dtype;
  return a;
}

static FlowPair flow_pair(Address xt, Address u, Address x0, Address x1, Address t, Address seeds, int64_t numel,
                          int64_t samples, bool wide, double sigma, int64_t seed_rows, uint64_t seed, uint32_t step,
                          int dtype) {
  FlowPair a{};
  a.xt = pointer(xt, numel, "x_t");
  a.u = pointer(u, numel, "u_t");
  a.x0 = pointer<const void>(x0, numel, "x0");
  a.x1 = pointer<const void>(x1, numel, "x1");
  a.t = pointer<const void>(t, numel, "t");
  a.noise = noise_source(0, seeds, seed_rows, seed, step, kStreamFlowPair);
  a.sigma = sigma;
  a.numel = numel;
  a.samples = samples;
  a.wide = wide;
  a.dtype = dtype;
  return a;
}

void bind_training(py::module_& m) {
  bind_op(m, "add_noise", add_noise, GMK_CPU(noising_kernels().add_noise), GMK_CUDA(add_noise_cuda));
  bind_op(m, "denoising_loss", denoising_loss, GMK_CPU(noising_kernels().denoising_loss),
          GMK_CUDA(denoising_loss_cuda));
  bind_op(m, "flow_pair", flow_pair, GMK_CPU(noising_kernels().flow_pair), GMK_CUDA(flow_pair_cuda));
  m.def("denoising_loss_partials", denoising_loss_partials);
}

}  // namespace gmk

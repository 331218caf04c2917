// One thread makes a group. Bound: memory, streams * numel * sizeof(T), with some 85 operations an element for a normal
// number beside it. A seed starts at its own block 0 and a sum has its parts and its order from the sizes alone: nothing
// depends on the grid.
#include "cuda/groups.cuh"
#include "training/noising.h"

namespace gmk {
namespace {

template <class R>
GMK_DEV NoisingRow<R> row_of(const NoiseSchedule& s, int64_t sample, int target) {
  return s.wide ? noising_row<R, double>(s, sample, target) : noising_row<R, float>(s, sample, target);
}

template <class T, bool kPacked, int n>
GMK_DEV void noise_of(const NoiseSource& noise, const Place& at, typename Real<T>::type (&z)[n]) {
  if (noise.given) {
    read<T, kPacked>(noise.given, at.at, at.count, z);
  } else {
    float made[n];
    draw(at, noise.seeds, noise.seed, noise.step, noise.stream, made);
#pragma unroll
    for (int i = 0; i < n; ++i) z[i] = typename Real<T>::type(made[i]);
  }
}

template <class T, bool kPacked>
__global__ void __launch_bounds__(256) add_noise_kernel(AddNoise a, Groups g) {
  using R = typename Real<T>::type;
  constexpr int n = kGroup<T>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group < g.total; group += stride) {
    const Place at = place_of<n>(g, group);
    R x[n], z[n], y[n];
    noise_of<T, kPacked>(a.noise, at, z);
    read<T, kPacked>(a.x0, at.at, at.count, x);
    NoisingRow<R> row = row_of<R>(a.schedule, at.first, a.target_kind);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (at.first != at.last && i < at.count) row = row_of<R>(a.schedule, (at.at + i) / g.sample, a.target_kind);
      const R clean = x[i];
      x[i] = term(row.alpha, clean) + term(row.sigma, z[i]);
      y[i] = term(row.p, clean) + term(row.q, z[i]);
    }
    write<T, kPacked>(a.xt, at.at, at.count, x);
    if (a.target) write<T, kPacked>(a.target, at.at, at.count, y);
  }
}

// A part is 256 groups.
template <class T, bool kPacked>
__global__ void __launch_bounds__(256) denoising_loss_kernel(DenoisingLoss a, Groups g, int64_t parts, double slope) {
  using R = typename Real<T>::type;
  constexpr int n = kGroup<T>;
  GMK_SHARED(shared, double[8]);
  for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
    const int64_t group = part * 256 + threadIdx.x;
    double sum = 0;
    if (group < g.total) {
      const Place at = place_of<n>(g, group);
      R x[n], z[n], d[n];
      noise_of<T, kPacked>(a.noise, at, z);
      read<T, kPacked>(a.pred, at.at, at.count, d);
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = 0;
      if (a.x0) read<T, kPacked>(a.x0, at.at, at.count, x);
      NoisingRow<R> row{};
      R weight = 1, scale = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i == 0 || (at.first != at.last && i < at.count)) {
          const int64_t sample = i == 0 ? at.first : (at.at + i) / g.sample;
          row = row_of<R>(a.schedule, sample, a.target_kind);
          if (a.weight_kind == kMinSnr) weight = min_snr_weight(row.alpha, row.sigma, R(a.gamma), a.target_kind);
          if (a.weight_kind == kGivenWeight)
            weight = a.schedule.wide ? R(static_cast<const double*>(a.weight)[sample])
                                     : R(static_cast<const float*>(a.weight)[sample]);
          scale = R(double(weight) * slope);
        }
        const R difference = d[i] - (term(row.p, x[i]) + term(row.q, z[i]));
        if (i < at.count) squares += weight * difference * difference;
        d[i] = scale * difference;
      }
      sum = double(squares);
      if (a.grad) write<T, kPacked>(a.grad, at.at, at.count, d);
    }
    sum = block_sum<8>(sum, shared);
    if (threadIdx.x == 0) a.partials[part] = sum;
  }
}
template <class R>
__global__ void __launch_bounds__(256) denoising_loss_sum_kernel(DenoisingLoss a, int64_t parts) {
  GMK_SHARED(shared, double[8]);
  double sum = 0;
  for (int64_t part = threadIdx.x; part < parts; part += 256) sum += a.partials[part];
  sum = block_sum<8>(sum, shared);
  if (threadIdx.x == 0) *static_cast<R*>(a.loss) = R(sum / double(a.numel));
}

template <class T, bool kPacked>
__global__ void __launch_bounds__(256) flow_pair_kernel(FlowPair a, Groups g) {
  using R = typename Real<T>::type;
  constexpr int n = kGroup<T>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group < g.total; group += stride) {
    const Place at = place_of<n>(g, group);
    R from[n], to[n], z[n];
    read<T, kPacked>(a.x0, at.at, at.count, from);
    read<T, kPacked>(a.x1, at.at, at.count, to);
    if (a.sigma != 0) {
      noise_of<T, kPacked>(a.noise, at, z);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) z[i] = 0;
    }
    R t = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i == 0 || (at.first != at.last && i < at.count)) {
        const int64_t sample = i == 0 ? at.first : (at.at + i) / g.sample;
        t = a.wide ? R(static_cast<const double*>(a.t)[sample]) : R(static_cast<const float*>(a.t)[sample]);
      }
      const R x = (R(1) - t) * from[i] + t * to[i] + R(a.sigma) * z[i];
      to[i] -= from[i];
      from[i] = x;
    }
    write<T, kPacked>(a.xt, at.at, at.count, from);
    write<T, kPacked>(a.u, at.at, at.count, to);
  }
}

template <class T>
Status launch(const AddNoise& a, void* stream) {
  const Groups g = groups_of<T>(a.numel, a.noise.given ? 1 : a.noise.seed_rows, a.schedule.samples);
  const unsigned grid = grid_for(g.total, 256);
  const void* const streams[] = {a.xt, a.target, a.x0, a.noise.given};
  if (packed<T>(g, streams)) return GMK_LAUNCH((add_noise_kernel<T, true>), grid, 256, 0, stream, a, g);
  return GMK_LAUNCH((add_noise_kernel<T, false>), grid, 256, 0, stream, a, g);
}
template <class T>
Status launch(const DenoisingLoss& a, void* stream) {
  const Groups g = groups_of<T>(a.numel, a.noise.seed_rows, a.schedule.samples);
  const int64_t parts = (g.total + 255) / 256;  // at most denoising_loss_partials()
  const unsigned grid = grid_for(parts, 1);
  const double slope = 2.0 / double(a.numel);  // of the gradient; a division costs a GPU registers
  const void* const streams[] = {a.pred, a.grad, a.x0};
  const Status status = packed<T>(g, streams)
                            ? GMK_LAUNCH((denoising_loss_kernel<T, true>), grid, 256, 0, stream, a, g, parts, slope)
                            : GMK_LAUNCH((denoising_loss_kernel<T, false>), grid, 256, 0, stream, a, g, parts, slope);
  if (status) return status;
  return GMK_LAUNCH((denoising_loss_sum_kernel<typename Real<T>::type>), 1, 256, 0, stream, a, parts);
}
template <class T>
Status launch(const FlowPair& a, void* stream) {
  const Groups g = groups_of<T>(a.numel, a.sigma != 0 ? a.noise.seed_rows : 1, a.samples);
  const unsigned grid = grid_for(g.total, 256);
  const void* const streams[] = {a.xt, a.u, a.x0, a.x1};
  if (packed<T>(g, streams)) return GMK_LAUNCH((flow_pair_kernel<T, true>), grid, 256, 0, stream, a, g);
  return GMK_LAUNCH((flow_pair_kernel<T, false>), grid, 256, 0, stream, a, g);
}

template <class Args>
Status run(const Args& a, int device, void* stream) {
  if (a.numel <= 0) return kOk;
  const DeviceGuard guard(device);
  return by_dtype(a.dtype, [&](auto type) { return launch<typename decltype(type)::of>(a, stream); });
}

}  // namespace

Status add_noise_cuda(const AddNoise& a, int device, void* stream) { return run(a, device, stream); }
Status denoising_loss_cuda(const DenoisingLoss& a, int device, void* stream) { return run(a, device, stream); }
Status flow_pair_cuda(const FlowPair& a, int device, void* stream) { return run(a, device, stream); }

}  // namespace gmk

// The training side: noise is added to data, and what a model says of it is compared with what it should have said.
//   add_noise       x_t = alpha x0 + sigma z,  target = p x0 + q z,  with (alpha, sigma) = pairs[t[sample]]
//   denoising_loss  mean(weight (pred - target)^2) and, where it is wanted, its gradient for pred
//   flow_pair       x_t = (1 - t) x0 + t x1 + sigma z,  u = x1 - x0
// A stream whose coefficient (alpha, sigma, p, q) is exactly 0 contributes exactly 0, whatever it holds. z is drawn by
// docs/random-numbers.md, or given. float64 is computed in float64, the rest in float32.
#pragma once
#include "core/error.h"
#include "core/philox.h"

namespace gmk {

enum NoisingTarget : int { kEpsilon, kX0, kV, kScore, kVelocity, kNoTarget };
enum LossWeight : int { kNoWeight, kGivenWeight, kMinSnr };

struct NoiseSource {
  const void* given;     // [numel] of the op's dtype; nullptr: drawn
  const int64_t* seeds;  // [seed_rows], each with its own count of elements; nullptr: `seed`
  int64_t seed_rows;     // 1, or samples
  uint64_t seed;
  uint32_t step, stream;  // counter words 2 and 3
};

struct NoiseSchedule {
  const void* pairs;  // [times, 2]: (alpha, sigma), float32 or (with float64 tensors) float64
  const int64_t* t;   // [samples], each in [0, times), or else the sample becomes NaN; nullptr: sample i has pair i
  int64_t times;
  int64_t samples;  // that have a pair of their own: 1, or the batch
  int wide;         // pairs (and weights) are float64
};

struct AddNoise {
  void* xt;      // [numel] of dtype, as every tensor below
  void* target;  // nullptr: not wanted
  const void* x0;
  NoiseSource noise;
  NoiseSchedule schedule;
  int64_t numel;
  int target_kind;  // NoisingTarget
  int dtype;
};

struct DenoisingLoss {
  void* loss;          // one float64 (float64 tensors) or float32
  void* grad;          // [numel], or nullptr: not wanted
  double* partials;    // [denoising_loss_partials()], workspace
  const void* pred;    // [numel]
  const void* x0;      // nullptr: the target has none of it
  const void* weight;  // [schedule.samples], kGivenWeight
  NoiseSource noise;
  NoiseSchedule schedule;
  double gamma;  // of kMinSnr
  int64_t numel;
  int target_kind, weight_kind;
  int dtype;
};

struct FlowPair {
  void* xt;
  void* u;
  const void *x0, *x1;
  const void* t;      // [samples], float32 or (with float64 tensors) float64
  NoiseSource noise;  // not used where sigma is 0
  double sigma;
  int64_t numel, samples;
  int dtype, wide;
};

// The four numbers of a sample.
template <class R>
struct NoisingRow {
  R alpha, sigma, p, q;
};
template <class R, class P>
GMK_HD NoisingRow<R> noising_row(const NoiseSchedule& s, int64_t sample, int target) {
  const int64_t at = s.t ? s.t[sample] : sample;
  const bool inside = at >= 0 && at < s.times;
  const P* const pair = static_cast<const P*>(s.pairs) + (inside ? 2 * at : 0);
  NoisingRow<R> r{inside ? R(pair[0]) : R(NAN), inside ? R(pair[1]) : R(NAN), R(0), R(1)};
  if (target == kX0) r.p = R(1);
  if (target == kX0) r.q = R(0);
  if (target == kV) r.p = -r.sigma;
  if (target == kV) r.q = r.alpha;
  if (target == kScore) r.q = R(-1) / r.sigma;
  if (target == kVelocity) r.p = R(-1);
  if (!inside) r.p = r.q = R(NAN);
  return r;  // selections: a switch that returns rows puts them into a GPU's local memory
}
// Hang et al. 2023: min(snr, gamma), the weight that a loss of x0 would get, over what a loss of this target is to that.
template <class R>
GMK_HD R min_snr_weight(R alpha, R sigma, R gamma, int target) {
  const R signal = alpha * alpha, noise = sigma * sigma, snr = signal / noise;  // infinite where there is no noise
  const R least = snr < gamma ? snr : snr == snr ? gamma : snr;
  if (target == kX0) return least;
  if (target == kV) return snr < gamma ? signal / (signal + noise) : gamma / (snr + R(1));
  return snr < gamma ? R(1) : gamma / snr;  // epsilon
}

// Sums have a fixed order: parts of kNoisingPart elements or less, then the parts.
constexpr int64_t kNoisingPart = 1024;
inline int64_t denoising_loss_partials(int64_t numel, int64_t seed_rows) {
  const int64_t size = seed_rows > 0 ? numel / seed_rows : 0;
  return seed_rows * (size / kNoisingPart + 1);
}

struct NoisingKernels {
  Status (*add_noise)(const AddNoise&, int threads);
  Status (*denoising_loss)(const DenoisingLoss&, int threads);
  Status (*flow_pair)(const FlowPair&, int threads);
};

Status add_noise_cuda(const AddNoise&, int device, void* stream);
Status denoising_loss_cuda(const DenoisingLoss&, int device, void* stream);
Status flow_pair_cuda(const FlowPair&, int device, void* stream);

}  // namespace gmk

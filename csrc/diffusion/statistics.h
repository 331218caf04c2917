// Two numbers a sample that a step needs before it starts; both go into its row of coefficients.
//   quantile          of |A x + B m| over the sample, m as in the step: Imagen's dynamic threshold
//   guidance_rescale  rescale std(model_output) / std(m) + 1 - rescale, m = uncond + guidance (model_output - uncond): what
//                     brings a guided output part of the way back to the spread it had (Lin et al. 2024, eq. 15, 16)
// The quantile is exact and interpolated linearly, as torch.quantile, without sorting; it is NaN where the sample has one.
// Standard deviations have n - 1, are taken about the sample's first element in float64, and in a fixed order.
#pragma once
#include "core/error.h"
#include "core/philox.h"

namespace gmk {

enum StepStatistic : int { kQuantile, kGuidanceRescale };

struct StepStatistics {
  void* out;                 // [samples], float64 of float64 tensors, else float32
  const void* x;             // [numel] of dtype; kQuantile
  const void* model_output;  // [numel] of dtype
  const void* uncond;        // [numel] of dtype; nullptr: no guidance
  const void* coefficients;  // [8] or [samples, 8] as in the step, float32 or (wide) float64; kQuantile
  int64_t numel, samples;
  int64_t coefficient_rows;  // 1 or samples
  double guidance;
  double amount;  // the quantile's q in [0, 1], or rescale
  int statistic;  // StepStatistic
  int dtype, wide;
};

// Where quantile q lies between the order statistics: number `below` and the next, `weight` of the way.
struct QuantilePlace {
  int64_t below;
  double weight;
};
GMK_HD QuantilePlace quantile_place(int64_t n, double q) {
  const double rank = q * double(n - 1);
  int64_t below = int64_t(rank);
  if (below > n - 1) below = n - 1;
  return {below, rank - double(below)};
}

// Numbers that are not negative are ordered as their bits are. Their digits from the top, 11 bits or less each.
template <class Key>
struct RadixDigits;
template <>
struct RadixDigits<uint32_t> {
  static constexpr int kBits = 31, kCount = 3;
};
template <>
struct RadixDigits<uint64_t> {
  static constexpr int kBits = 63, kCount = 6;
};
constexpr int kRadixBins = 2048;
template <class Key>
GMK_HD int radix_width(int digit) {  // 11 + 10 + 10, 11 + 11 + 11 + 10 + 10 + 10
  return digit < (sizeof(Key) == 4 ? 1 : 3) ? 11 : 10;
}

struct StepStatisticsKernels {
  Status (*step_statistics)(const StepStatistics&, int threads);
};

Status step_statistics_cuda(const StepStatistics&, int device, void* stream);

}  // namespace gmk

// Likelihood heads (docs/likelihood.md). A pixel holds c = 1 or 3 data channels and M components; with x scaled to [-1, 1],
// h = 1 / (levels - 1) half the width of a bin, and i = e^-s (or 1 / (softplus(s) + e^-7)) the reciprocal scale:
//   mean_c   = mu_c + coefficients * channels before c
//   log P    = [not the lowest bin] log(1 - sigma(q)) + [not the highest] log sigma(p) + [neither] log(1 - e^-d)
//              p, q = i (x - mean +- h), d = 2 i h
//   nll      = -logsumexp_m(log_softmax(logits)_m + sum_c log P_mc)
//   gradient = weight * d nll / d params
// x outside of the range (or NaN) gives NaN to its pixel.
#pragma once
#include "core/error.h"
#include "core/philox.h"

namespace gmk {

// What a channel of `params` means. kOpenAi, kClassic: [M logits][for each data channel: M means, M log-scales, with three
// channels M coefficients]; kTfp: [M][logit, c means, c scales, c (c - 1) / 2 coefficients].
enum LogisticKind : int { kOpenAi = 0, kClassic = 1, kTfp = 2 };  // kClassic: with the fallback at P <= 1e-5

struct LogisticShape {
  int64_t b, pixels, mixtures;  // images, pixels of each, components
  double low, high, levels;     // values of x: the lowest, the highest, and how many there are at equal distances
  int data_channels;            // 1 or 3
  int kind;                     // LogisticKind
  int last;                     // params, gradient and x are [b, pixels, channels], else [b, channels, pixels]
  int dtype;                    // DType of every tensor
};

struct LogisticMixtureNll {
  LogisticShape shape;
  void* nll;       // [b, pixels]
  void* gradient;  // as params; nullptr: not wanted
  const void* params;
  const void* x;
  double weight;
};

// The component by word 0 of a pixel's Philox block, channel c by word 1 + c; x rounded to its bin before the next channel.
struct LogisticMixtureSample {
  LogisticShape shape;
  void* x;
  const void* params;
  const int64_t* seeds;  // nullptr: `seed`
  int64_t seed_rows;     // 1, or b: each image counts its pixels from 0
  uint64_t seed;
  double temperature;
};

// t *= *factor, without touching t where the factor is 1: a loss's gradient, when backward learns what to multiply it with.
struct ScaleInPlace {
  void* t;  // [n]
  const void* factor;
  int64_t n;
  int dtype;
};

struct LikelihoodKernels {
  Status (*logistic_mixture_nll)(const LogisticMixtureNll&, int threads);
  Status (*logistic_mixture_sample)(const LogisticMixtureSample&, int threads);
  Status (*scale_in_place)(const ScaleInPlace&, int threads);
};

Status logistic_mixture_nll_cuda(const LogisticMixtureNll&, int device, void* stream);
Status logistic_mixture_sample_cuda(const LogisticMixtureSample&, int device, void* stream);
Status scale_in_place_cuda(const ScaleInPlace&, int device, void* stream);

}  // namespace gmk

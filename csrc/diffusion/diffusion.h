// One step of any sampler that is affine in its inputs, element by element:
//   m   = model_output, or uncond + guidance (model_output - uncond)
//   x0  = clamp(A x + B m, low, high)
//   out = c0 x0 + c1 x + c2 h1 + c3 h2 + c4 h3 + s sqrt(variance) z
// Where something is known (inpainting), out (or x0) is blended with it: mask 1 takes known_signal known + known_noise z',
// mask 0 what was computed, whatever the other holds. z' is drawn under stream kStreamKnown.
// A stream whose coefficient is exactly 0 contributes exactly 0, whatever it holds (a NaN too). z is drawn by
// docs/random-numbers.md under stream kStreamDiffusionStep, or given. float64 is computed in float64, the rest in float32.
#pragma once
#include "core/error.h"
#include "core/philox.h"

namespace gmk {

enum DiffusionNoise : int { kNoNoise = 0, kDrawnNoise = 1, kGivenNoise = 2 };
enum DiffusionCoefficient : int { kA, kB, kC0, kC1, kC2, kC3, kC4, kS, kCoefficients };

struct DiffusionStep {
  void* out;  // [numel] of dtype, as every tensor below; may be one of them, but not a part of one
  void* x0;   // nullptr: not wanted
  const void* x;
  const void* model_output;
  const void* coefficients;  // [8] or [samples, 8], float32 or (with float64 tensors) float64
  const void* uncond;        // nullptr: no guidance
  const void* history[3];    // nullptr: absent, its coefficient is not used
  const void* variance;      // nullptr: 1
  const void* noise;         // kGivenNoise
  const int64_t* seeds;      // kDrawnNoise: [samples], each with its own count of elements; nullptr: `seed`
  int64_t numel;
  int64_t coefficient_rows;  // 1 or samples
  int64_t seed_rows;         // 1, or samples when seeds is [samples]
  uint64_t seed;
  uint32_t step;  // counter word 2
  double guidance;
  double low, high;   // -infinity, infinity: no clip
  const void* mask;   // [numel]: 1 known, 0 not, or between; nullptr: nothing is known
  const void* known;  // [numel]
  double known_signal, known_noise;
  int known_x0;          // it is x0 that is known; else out
  const int64_t* index;  // one number: coefficients are [index_rows, 8], and it is the row and counter word 2; nullptr
  int64_t index_rows;
  int noise_kind;  // DiffusionNoise
  int dtype;       // DType of every tensor but coefficients and seeds
  int wide;        // coefficients are float64
};

// Several steps of one size and dtype: a run of elements goes through all of them while it is in the cache, as if each step
// had read and written all elements before the next one began. So no step may draw noise or have an index, and tensors of
// different steps are the same elements or lie apart.
struct DiffusionKernels {
  Status (*diffusion_steps)(const DiffusionStep*, int count, int threads);
};

Status diffusion_step_cuda(const DiffusionStep&, int device, void* stream);

}  // namespace gmk

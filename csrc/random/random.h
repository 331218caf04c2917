// Random numbers by the contract of docs/random-numbers.md: element e of a sample is word e mod 4 of block e div 4.
//   normal:  out[e] = Box-Muller of the words of its block
//   uniform: out[e] = (word >> 8) * 2^-24, in [0, 1)
#pragma once
#include "core/error.h"
#include "core/philox.h"

namespace gmk {

enum PhiloxKind : int { kNormal = 0, kUniform = 1 };

struct PhiloxFill {
  void* out;             // [samples, size], contiguous
  const int64_t* seeds;  // [samples], or nullptr: then `seed` and samples = 1
  uint64_t seed;         // used when seeds is nullptr
  int64_t samples;       // each with its own key and its own count of elements
  int64_t size;          // elements of one sample
  uint32_t step;         // counter word 2
  uint32_t stream;       // counter word 3
  int dtype;             // DType of out; rounded (or widened) from float32
  int kind;              // PhiloxKind
};

struct RandomKernels {
  Status (*philox_fill)(const PhiloxFill&, int threads);
};

Status philox_fill_cuda(const PhiloxFill&, int device, void* stream);

}  // namespace gmk

// The arguments of bugs.cu.
#pragma once
#include <stdint.h>

#include "core/error.h"

namespace gmk {

struct Bug {
  float* out;       // [n]
  unsigned* state;  // [1], zero, in place
  float* x;         // [n]
  float* host;      // [n], not device memory
  int64_t n;
  const char* name;
  bool bug;  // with it, or the same kernel without it
};
Status bug_cuda(const Bug&, int device, void* stream);

}  // namespace gmk

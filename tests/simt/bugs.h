// The arguments of bugs.cu.
#pragma once
#include <stdint.h>

#include "core/error.h"

namespace gmk {

struct Bug {
  float* out;
  float* x;
  int64_t n;
  int which;
};
Status bug_cuda(const Bug&, int device, void* stream);

}  // namespace gmk

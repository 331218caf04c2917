// CPU kernels only: one piece of work for every data set of a batch.
#pragma once
#include "core/error.h"
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// run(b, threads) for b = 0 .. count: many of them on one thread each, else one after the other on all threads. `work`: of
// all, as in team().
template <class F>
static Status each_of_batch(int64_t count, int64_t work, int threads, F run) {
  threads = team(work, threads);
  Status status = kOk;
  if (threads == 1 || count < 2 * threads) {
    for (int64_t b = 0; b < count && !status; ++b) status = run(b, threads);
    return status;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < count; ++b)
    if (run(b, 1)) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
  return status;
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

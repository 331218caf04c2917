#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "random/random.h"

namespace gmk {

GMK_ISA_TABLES(RandomKernels, random_kernels)

static PhiloxFill philox_fill(Address out, Address seeds, uint64_t seed, int64_t samples, int64_t size, uint32_t step,
                              uint32_t stream, int dtype, int kind) {
  PhiloxFill a{};
  a.out = pointer(out, samples * size, "out");
  a.seeds = optional_pointer<const int64_t>(seeds);
  a.seed = seed;
  a.samples = samples;
  a.size = size;
  a.step = step;
  a.stream = stream;
  a.dtype = dtype;
  a.kind = kind;
  return a;
}

void bind_random(py::module_& m) {
  bind_op(m, "philox_fill", philox_fill, GMK_CPU(random_kernels().philox_fill), GMK_CUDA(philox_fill_cuda));
}

}  // namespace gmk

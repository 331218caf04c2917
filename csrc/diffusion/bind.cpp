#include "core/tensor_args.h"

namespace gmk {
void bind_diffusion(py::module_&) {}
}  // namespace gmk

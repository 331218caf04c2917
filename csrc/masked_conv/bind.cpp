#include "core/tensor_args.h"

namespace gmk {
void bind_masked_conv(py::module_&) {}
}  // namespace gmk

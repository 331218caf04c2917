#include "bugs.h"
#include "core/tensor_args.h"

namespace gmk {

static Bug bug(Address out, Address state, Address x, Address, Address host, std::int64_t n, const std::string& name, bool bug) {
  return {optional_pointer<float>(out),  optional_pointer<unsigned>(state), optional_pointer<float>(x),
          optional_pointer<float>(host), n, name.c_str(), bug};
}

void bind_bugs(py::module_& m) { bind_op(m, "bug", bug, nullptr, &bug_cuda); }

}  // namespace gmk

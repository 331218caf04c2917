// How a kernel reports failure: a static message, or nullptr for success. The binding turns it into a Python exception.
#pragma once

namespace gmk {

using Status = const char*;
constexpr Status kOk = nullptr;
constexpr Status kOutOfMemory = "out of memory for the kernel's scratch space";

}  // namespace gmk

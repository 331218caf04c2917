// Bindings only: from Python integers to kernel arguments, and one kernel to its `<name>_cpu` and `<name>_cuda` functions.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "core/error.h"

namespace gmk {

namespace py = pybind11;
using Address = std::uintptr_t;  // tensor.data_ptr(); 0 for an absent optional tensor

// The last line of defence: meta, fake, zero and freed tensors all report address 0.
template <class T = void>
T* pointer(Address address, std::int64_t count, const char* name) {
  if (address == 0 && count > 0)
    throw std::runtime_error(std::string(name) + " has " + std::to_string(count) +
                             " elements but no memory (a meta, fake or freed tensor?)");
  return reinterpret_cast<T*>(address);
}
template <class T = void>
T* optional_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void raise_if(Status status, const char* name) {
  if (!status) return;
  if (status == kOutOfMemory) throw std::bad_alloc();
  throw std::runtime_error(std::string(name) + ": " + status);
}

// make(python arguments...) -> Args;  cpu(Args, threads) and cuda(Args, device, stream) -> Status.
// Defines name_cpu(python arguments..., threads) and, in a CUDA build, name_cuda(python arguments..., device, stream);
// cuda = nullptr: there is no CUDA half, and the op runs its reference there.
// The emulator (GMK_SIMT, tests/simt) is a CUDA build without the CPU half.
template <class Args, class... P>
void bind_op(py::module_& m, const std::string& name, Args (*make)(P...),
             std::common_type_t<Status (*)(const Args&, int)> cpu,
             std::common_type_t<Status (*)(const Args&, int, void*)> cuda) {
#ifndef GMK_SIMT
  m.def((name + "_cpu").c_str(), [make, cpu, name](P... args, int threads) {
    const Args a = make(args...);
    Status status;
    {
      py::gil_scoped_release release;
      status = cpu(a, threads);
    }
    raise_if(status, name.c_str());
  });
#else
  (void)cpu;
#endif
#if defined(GMK_WITH_CUDA) || defined(GMK_SIMT)
  if (!cuda) return;
  m.def((name + "_cuda").c_str(), [make, cuda, name](P... args, int device, Address stream) {
    const Args a = make(args...);
    Status status;
    {
      py::gil_scoped_release release;
      status = cuda(a, device, reinterpret_cast<void*>(stream));
    }
    raise_if(status, name.c_str());
  });
#else
  (void)cuda;
#endif
}

// GMK_CPU(gmm_kernels().log_prob) and GMK_CUDA(gmm_log_prob_cuda): the two halves, each absent where it is not built.
#ifdef GMK_SIMT
#define GMK_CPU(kernel) nullptr
#else
#define GMK_CPU(kernel) [](const auto& a, int threads) -> ::gmk::Status { return kernel(a, threads); }
#endif
#if defined(GMK_WITH_CUDA) || defined(GMK_SIMT)
#define GMK_CUDA(entry) &entry
#else
#define GMK_CUDA(entry) nullptr
#endif

}  // namespace gmk

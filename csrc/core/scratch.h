// CPU kernels only: scratch memory that frees itself. No exceptions: ask ok() after the last allocation.
#pragma once
#include <stdint.h>
#include <stdlib.h>

namespace gmk {
namespace {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const uint64_t bytes = (uint64_t(count > 0 ? count : 1) * sizeof(T) + 63) & ~uint64_t(63);
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, bytes)) data_ = nullptr;
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  bool ok() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
};

}  // namespace
}  // namespace gmk

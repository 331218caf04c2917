#include "core/dispatch.h"

#include <atomic>
#include <cstring>

namespace gmk {

namespace {
const char* const kNames[kIsaCount] = {"base", "avx2", "avx512"};

int best() {
  for (int isa = kIsaCount - 1; isa > 0; --isa)
    if (isa_available(isa)) return isa;
  return kBase;
}
std::atomic<int>& current() {
  static std::atomic<int> isa{best()};
  return isa;
}
}  // namespace

const char* isa_name(int isa) { return kNames[isa]; }

bool isa_available(int isa) {
#ifdef GMK_HAVE_avx2
  __builtin_cpu_init();
  // Feature by feature: the names "x86-64-v3", "x86-64-v4" are younger (GCC 12) than the -march of that name (GCC 11).
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  if (isa == kAvx2) return v3;
  if (isa == kAvx512)
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return isa == kBase;
}

int isa_current() { return current().load(std::memory_order_relaxed); }

bool isa_set(const char* name) {
  for (int isa = 0; isa < kIsaCount; ++isa)
    if (!std::strcmp(name, kNames[isa]) && isa_available(isa)) {
      current().store(isa);
      return true;
    }
  return false;
}

}  // namespace gmk

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
  if (isa == kAvx512) return __builtin_cpu_supports("x86-64-v4");
  if (isa == kAvx2) return __builtin_cpu_supports("x86-64-v3");
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

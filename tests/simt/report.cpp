// Reports: one per kind and line of the kernel, with a count. backend.py turns program counters into file:line.
#include "runtime.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>

namespace gmk_simt {

Machine machine;

static uintptr_t module_base() {
  static uintptr_t base = 0;
  if (!base) {
    Dl_info info;
    base = dladdr(reinterpret_cast<void*>(&module_base), &info) ? uintptr_t(info.dli_fbase) : 1;
  }
  return base;
}

// One less: a return address may already be on the next line.
uint32_t pc_offset(const void* pc) { return pc ? uint32_t(uintptr_t(pc) - 1 - module_base()) : 0; }

bool in_module(uintptr_t address) {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(address), &info) && uintptr_t(info.dli_fbase) == module_base();
}

void report(const char* kind, const Fiber* who, std::vector<uint32_t> pcs, const char* format, ...) {
  const std::string key = std::string(kind) + " " + std::to_string(pcs.empty() ? 0 : pcs[0]);
  const auto found = machine.report_index.find(key);
  if (found != machine.report_index.end()) {
    ++machine.reports[found->second].count;
    return;
  }
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.report_index[key] = machine.reports.size();
  machine.reports.push_back({kind, machine.kernel ? machine.kernel : "", text, machine.block_index,
                             who ? who->index : uint3{0, 0, 0}, std::move(pcs), 1});
}

}  // namespace gmk_simt

// The Python module _simt: every <op>_cuda of the product, as csrc/<family>/bind.cpp binds it, and control of the
// machine.
#include "runtime.h"

#include <pybind11/stl.h>
#include <string.h>

#include "core/tensor_args.h"

namespace gmk {
#define GMK_FAMILY(family) void bind_##family(py::module_&);
#include "families.inc"
#undef GMK_FAMILY
void bind_bugs(py::module_&);
}  // namespace gmk

PYBIND11_MODULE(_simt, m) {
  using namespace gmk_simt;
  namespace py = pybind11;
#define GMK_FAMILY(family) gmk::bind_##family(m);
#include "families.inc"
#undef GMK_FAMILY
  gmk::bind_bugs(m);

  // schedule: see Schedule. blocks: run only these, negative ones from the last; [] all.
  m.def("configure", [](int schedule, uint64_t seed, bool check, std::vector<int64_t> blocks) {
    machine.options = {Schedule(schedule), seed, check, std::move(blocks)};
    machine.first_launch = machine.launch + 1;
  });
  m.def("has_mma", [](bool on) { set_has_mma(on); });
  m.def("most_blocks", [](unsigned count) { set_most_blocks(count); });
  m.def("reset", [] {
    free_all();
    machine.reports.clear();
    machine.report_index.clear();
    machine.aborted = false;
  });
  m.def("allocate", [](size_t bytes, size_t phase, const std::string& name, bool read_only) {
    const uintptr_t address = allocate(bytes, phase, name, read_only);
    if (!address) throw std::bad_alloc();
    return address;
  });
  // A buffer's bytes that the kernel may read: those where mask is not 0, or all (mask = 0).
  m.def("define", [](uintptr_t address, uintptr_t mask) {
    Region& region = *find_region(address);
    const size_t bytes = region.high - region.low;
    region.defined = mask == 0;
    for (size_t i = 0; mask && i < bytes; ++i)
      if (reinterpret_cast<const uint8_t*>(mask)[i]) region.state[i] |= kInitialised;
  });
  // Which bytes the kernel has written: 1 or 0 each.
  m.def("written", [](uintptr_t address, uintptr_t mask) {
    const Region& region = *find_region(address);
    for (size_t i = 0; i < region.high - region.low; ++i)
      reinterpret_cast<uint8_t*>(mask)[i] = (region.state[i] & kWritten) != 0;
  });
  // For buffers too large to copy: an input whose bytes are those of a file, repeated; what the kernel has written, as
  // [first, past the last) bytes; and these alone to `host`.
  m.def("map_file", &map_file);
  m.def("written_ranges", [](uintptr_t address) { return written_ranges(*find_region(address)); });
  m.def("copy_written", [](uintptr_t address, uintptr_t host) {
    for (const auto& r : written_ranges(*find_region(address)))
      memcpy(reinterpret_cast<void*>(host + r.first), reinterpret_cast<void*>(address + r.first), r.second - r.first);
  });
  m.def("aborted", [] { return machine.aborted; });
  m.def("reports", [] {
    py::list list;
    for (const Report& r : machine.reports)
      list.append(py::make_tuple(r.kind, r.kernel, py::make_tuple(r.block.x, r.block.y, r.block.z),
                                 py::make_tuple(r.thread.x, r.thread.y, r.thread.z), r.message, r.pcs, r.count));
    return list;
  });
  m.def("counters", [] {
    const Counters c = machine.counters;
    machine.counters = {};
    return py::make_tuple(c.threads, c.accesses, c.switches);
  });
}

// Atomics, fences and cp.async.
#include "runtime.h"

namespace gmk_simt {

void fence() { machine.current->fenced = true; }

// Other threads may come first; then nothing runs between the load and the store.
void atomic_load(void* p, void* old, size_t bytes) {
  watch_read(uintptr_t(p), __builtin_return_address(0));
  if (machine.options.schedule >= Schedule::random && random_bits() % 4 == 0) yield_fiber();
  const Schedule schedule = machine.options.schedule;
  machine.options.schedule = Schedule::random;  // no preemption inside
  access(uintptr_t(p), bytes, Kind::atomic, __builtin_return_address(0));
  machine.options.schedule = schedule;
  race_atomic(p);
  if (inside(uintptr_t(p), bytes))
    __builtin_memcpy(old, p, bytes);
  else
    __builtin_memset(old, 0, bytes);
}
void atomic_store(void* p, const void* value, size_t bytes) {
  if (!inside(uintptr_t(p), bytes)) return;
  machine.progress += __builtin_memcmp(p, value, bytes) != 0;
  __builtin_memcpy(p, value, bytes);
}

// The copy may land at any time between here and the wait. So: races are checked here, the destination is undefined
// until the wait, and only there do the bytes arrive.
void async_copy(void* shared, const void* global, int bytes, int source_bytes) {
  const void* const pc = __builtin_return_address(0);
  Fiber& me = *machine.current;
  if (uintptr_t(shared) % size_t(bytes) || (source_bytes && uintptr_t(global) % size_t(bytes)))
    report("misaligned", &me, {pc_offset(pc)}, "cp.async of %d bytes to or from an address that is no multiple of it",
           bytes);
  if (source_bytes) access(uintptr_t(global), size_t(source_bytes), Kind::read, pc);
  access(uintptr_t(shared), size_t(bytes), Kind::write, pc);
  Region* const region = find_region(uintptr_t(shared));
  if (!region || !region->shared || !inside(uintptr_t(shared), size_t(bytes))) return;
  if (source_bytes && !inside(uintptr_t(global), size_t(source_bytes))) return;
  __builtin_memset(shared, 0xff, size_t(bytes));
  __builtin_memset(region->state + (uintptr_t(shared) - region->low), 0, size_t(bytes));
  me.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes});
}

void async_commit() { machine.current->groups.push_back(machine.current->copies.size()); }

void async_wait(int groups_left) {
  const void* const pc = __builtin_return_address(0);
  Fiber& me = *machine.current;
  if (me.groups.size() <= size_t(groups_left)) return;
  const size_t done = me.groups[me.groups.size() - 1 - size_t(groups_left)];
  for (size_t i = 0; i < done; ++i) {
    const Copy copy = me.copies[i];
    access(uintptr_t(copy.to), size_t(copy.bytes), Kind::write, pc);
    __builtin_memset(copy.to, 0, size_t(copy.bytes));
    __builtin_memcpy(copy.to, copy.from, size_t(copy.source_bytes));
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + long(done));
  me.groups.erase(me.groups.begin(), me.groups.end() - groups_left);
  for (size_t& group : me.groups) group -= done;
}

}  // namespace gmk_simt

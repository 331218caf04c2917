// Device memory, and the check of each access: bounds, alignment, initialisation, read-only inputs, host pointers.
//
// Global memory is one large reserved range. A buffer has exactly the bytes its tensor has; at least 64 KiB around it
// belong to nobody, so that an index that is a little wrong lands where it is seen. The first quarter of the range is
// nobody's too: an index that has become negative lands there. Shared arrays lie in the first 512 KiB, laid out anew
// for each block. Only pages that somebody touches take memory, here and in what is remembered about each byte.
#include "runtime.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>

namespace gmk_simt {
namespace {

constexpr size_t kSlot = 64 * 1024, kSharedArea = 8 * kSlot, kSharedGap = 256;
constexpr size_t kFillLimit = size_t(256) << 20, kLarge = size_t(1) << 20;

uintptr_t arena = 0;
size_t arena_bytes = 0, global_start = 0, arena_top = 0;
std::vector<Region*> regions;        // global memory
std::vector<uint16_t> slots;         // 64 KiB slot -> 1 + index in `regions`, 0: nobody's
std::vector<Region> shared_regions;  // of this block
std::vector<std::pair<const Site*, size_t>> sites;
size_t shared_top = 0;
bool mapped = false;  // a file, into the arena
uint8_t* shared_state = nullptr;
Cell* shared_cells = nullptr;

// Zeros that take no memory until they are written; nullptr if there is no room.
void* reserve(size_t bytes, void* at = nullptr) {
  void* const p = mmap(at, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0), -1, 0);
  if (p == MAP_FAILED) return nullptr;
  madvise(p, bytes, MADV_NOHUGEPAGE);  // a byte here and there must not take 2 MiB each
  return p;
}
template <class T>
T* new_zeros(size_t count) {
  const size_t bytes = count * sizeof(T);
  return static_cast<T*>(bytes < kLarge ? calloc(bytes, 1) : reserve(bytes));
}
template <class T>
void delete_zeros(T* p, size_t count) {
  if (p && count * sizeof(T) < kLarge) free(p);
  if (p && count * sizeof(T) >= kLarge) munmap(p, count * sizeof(T));
}

void reserve_arena() {
  if (arena) return;
  for (size_t bytes = size_t(256) << 30; !arena && bytes >= size_t(256) << 20; bytes /= 2) {
    void* const p = reserve(bytes);
    if (!p) continue;
    arena = (uintptr_t(p) + kSlot - 1) & ~(kSlot - 1);
    arena_bytes = bytes - kSlot;
    arena_top = global_start = bytes / 4;
  }
  if (!arena) abort();
  slots.assign(arena_bytes / kSlot + 1, 0);
  shared_state = static_cast<uint8_t*>(calloc(kSharedArea, 1));
  shared_cells = static_cast<Cell*>(calloc(kSharedArea / 4, sizeof(Cell)));
}

Region* find_shared(uintptr_t address) {
  for (Region& region : shared_regions)
    if (address >= region.low && address < region.high) return &region;
  return nullptr;
}

// Where an address that is out of bounds lies: what the author of an index wants to know.
std::string neighbour(uintptr_t address) {
  const Region* best = nullptr;
  uintptr_t distance = ~uintptr_t(0);
  const auto consider = [&](const Region& region) {
    const uintptr_t d = address >= region.high ? address - region.high : region.low - address;
    if (d < distance) distance = d, best = &region;
  };
  if (address < arena + kSharedArea)
    for (const Region& region : shared_regions) consider(region);
  else
    for (const Region* region : regions) consider(*region);
  if (!best) return "where there is no memory";
  const std::string size = " (" + std::to_string(best->high - best->low) + " bytes)";
  if (address < best->low) return std::to_string(best->low - address) + " bytes before " + best->name + size;
  return "at byte " + std::to_string(address - best->low) + " of " + best->name + size;
}

// Not device memory, not this thread's own stack. A kernel that goes on would crash the test process: so it ends here.
void foreign(uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  const uintptr_t closure = uintptr_t(machine.closure);
  if (kind == Kind::read && address >= closure && address + bytes <= closure + machine.closure_bytes)
    return;                                              // arguments
  if (kind == Kind::read && in_module(address)) return;  // constants
  const Fiber* me = machine.current;
  const char* what = "memory of the host";
  if (address < 4096) what = "a null pointer";
  const uintptr_t first = machine.fibers[0].stack;
  if (address >= first && address < first + kMaxThreads * kStackBytes) what = "a local variable of another thread";
  report("host-pointer", me, {pc_offset(pc)},
         "%s of %zu bytes at %#zx, which is %s, not device memory; the launch ends here",
         kind == Kind::read ? "read" : "write", bytes, size_t(address), what);
  abort_launch();
}

void check_initialised(Region& region, uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  uint8_t* const state = region.state + (address - region.low);
  // Where only some blocks run, the others of an earlier launch may have written it.
  const bool unknown = !machine.options.blocks.empty() && machine.launch != machine.first_launch && !region.shared;
  if (kind != Kind::write && !region.defined && !unknown) {
    for (size_t i = 0; i < bytes; ++i) {
      if (state[i] & kInitialised) continue;
      report("uninitialised", machine.current, {pc_offset(pc)},
             "read of %zu bytes of %s at byte %zu, which nobody has written", bytes, region.name.c_str(),
             size_t(address - region.low) + i);
      break;
    }
  }
  if (kind == Kind::read) return;
  for (size_t i = 0; i < bytes; ++i) state[i] = kInitialised | kWritten;
  if (region.pages)
    for (size_t page = (address - region.low) / kPage; page <= (address - region.low + bytes - 1) / kPage; ++page)
      region.pages[page] = 1;
}

uintptr_t add_shared(const std::string& name, size_t bytes, size_t align, const void* pc) {
  align = std::max<size_t>(align, 16);
  shared_top = (shared_top + align - 1) & ~(align - 1);
  const size_t offset = shared_top + kSharedGap * (shared_regions.size() + 1);
  const size_t start = (offset + 127) & ~size_t(127);
  if (shared_top + bytes > kMaxShared) {
    report("bad-launch", machine.current, {pc_offset(pc)},
           "with %s (%zu bytes) a block has %zu bytes of shared memory, more than 227 KiB; the launch ends here",
           name.c_str(), bytes, shared_top + bytes);
    abort_launch();
  }
  shared_top += bytes;
  const uintptr_t low = arena + start;
  __builtin_memset(reinterpret_cast<void*>(low), 0xff, bytes);
  __builtin_memset(shared_state + start, 0, bytes);
  // The cells need no clearing: what they hold is of another block's context.
  shared_regions.push_back(
      {low, low + bytes, name, true, false, false, shared_state + start, shared_cells + start / 4, nullptr});
  return low;
}

}  // namespace

Region* find_region(uintptr_t address) {
  const size_t offset = address - arena;
  if (offset >= arena_bytes) return nullptr;
  if (offset < kSharedArea) return find_shared(address);
  const uint16_t slot = slots[offset / kSlot];
  return slot ? regions[slot - 1] : nullptr;
}

bool inside(uintptr_t address, size_t bytes) {
  const Region* region = find_region(address);
  return region && address >= region->low && address + bytes <= region->high;
}

void access(uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  Fiber* const me = machine.current;
  if (!me || address - me->stack < kStackBytes) return;
  if (address - arena >= arena_bytes) return foreign(address, bytes, kind, pc);
  ++machine.counters.accesses;
  if (machine.options.check) {
    if ((bytes == 2 || bytes == 4 || bytes == 8) && address % bytes)
      report("misaligned", me, {pc_offset(pc)}, "%zu-byte access to an address that is %zu modulo %zu", bytes,
             size_t(address % bytes), bytes);
    Region* const region = find_region(address);
    if (!region || address < region->low || address + bytes > region->high) {
      const uintptr_t first_bad = region && address >= region->low && address < region->high ? region->high : address;
      report("out-of-bounds", me, {pc_offset(pc)}, "%s of %zu bytes, %s",
             kind == Kind::read    ? "read"
             : kind == Kind::write ? "write"
                                   : "atomic",
             bytes, neighbour(first_bad).c_str());
      if (first_bad == address) return;
      bytes = region->high - address;  // the part that is inside counts as any access
    }
    if (region->read_only) {
      if (kind != Kind::read)
        report("write-to-input", me, {pc_offset(pc)}, "%zu bytes at byte %zu of %s, which the kernel may only read",
               bytes, size_t(address - region->low), region->name.c_str());
    }
    if (!region->defined || kind != Kind::read) check_initialised(*region, address, bytes, kind, pc);
    if (region->cells) check_race(*region, address, bytes, kind, pc);
  }
  if (kind == Kind::read) watch_read(address, pc);
  if (kind == Kind::write) ++machine.progress;
  if (machine.options.schedule == Schedule::preempt) preempt_point();
}

namespace {
void vector_access(uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  if (!machine.current) return;
  const size_t unit = bytes < 16 ? bytes : 16;
  if (machine.options.check && address % unit)
    report("misaligned", machine.current, {pc_offset(pc)},
           "%zu-byte vector access to an address that is %zu modulo %zu: a GPU stops here", bytes,
           size_t(address % unit), unit);
  access(address, bytes, kind, pc);
}
}  // namespace

void vector_load(const void* p, void* to, size_t bytes) {
  vector_access(uintptr_t(p), bytes, Kind::read, __builtin_return_address(0));
  __builtin_memcpy(to, p, bytes);
}
void vector_store(void* p, const void* from, size_t bytes) {
  vector_access(uintptr_t(p), bytes, Kind::write, __builtin_return_address(0));
  __builtin_memcpy(p, from, bytes);
}

uintptr_t allocate(size_t bytes, size_t phase, const std::string& name, bool read_only) {
  reserve_arena();
  const size_t start = arena_top + kSlot + phase;  // a red zone first
  const size_t end = (start + bytes + kSlot) & ~(kSlot - 1);
  if (end + kSlot > arena_bytes || regions.size() >= 65000) return 0;
  arena_top = end;
  const uintptr_t low = arena + start;
  uint8_t* const state = new_zeros<uint8_t>(bytes + 1);
  uint8_t* const pages = new_zeros<uint8_t>(bytes / kPage + 1);
  Cell* const cells = read_only ? nullptr : new_zeros<Cell>(bytes / 4 + 2);
  regions.push_back(new Region{low, low + bytes, name, false, read_only, false, state, cells, pages});
  if (!state || !pages || (!cells && !read_only)) return 0;
  for (size_t slot = start / kSlot; slot <= (start + bytes) / kSlot; ++slot) slots[slot] = uint16_t(regions.size());
  if (bytes <= kFillLimit) __builtin_memset(reinterpret_cast<void*>(low), 0xff, bytes);  // NaN, where it leaks
  return low;
}

void map_file(uintptr_t address, int file, size_t period) {
  const Region& region = *find_region(address);
  if (region.low % kPage) abort();
  for (uintptr_t at = region.low; at < region.high; at += period) {
    const size_t bytes = std::min<size_t>(period, region.high - at);
    if (mmap(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0) ==
        MAP_FAILED)
      abort();
  }
  mapped = true;
}

std::vector<std::pair<size_t, size_t>> written_ranges(const Region& region) {
  std::vector<std::pair<size_t, size_t>> ranges;
  const size_t bytes = region.high - region.low;
  for (size_t page = 0; page * kPage < bytes; ++page) {
    if (!region.pages[page]) continue;
    for (size_t i = page * kPage; i < std::min((page + 1) * kPage, bytes); ++i) {
      if (!(region.state[i] & kWritten)) continue;
      if (ranges.empty() || ranges.back().second != i) ranges.push_back({i, i});
      ranges.back().second = i + 1;
    }
  }
  return ranges;
}

void free_all() {
  for (Region* region : regions) {
    const size_t bytes = region->high - region->low;
    delete_zeros(region->state, bytes + 1);
    delete_zeros(region->pages, bytes / kPage + 1);
    delete_zeros(region->cells, bytes / 4 + 2);
    delete region;
  }
  regions.clear();
  if (!arena || arena_top == global_start) return;
  std::fill(slots.begin() + long(global_start / kSlot), slots.begin() + long(arena_top / kSlot) + 1, 0);
  void* const first = reinterpret_cast<void*>(arena + global_start);
  if (mapped)
    reserve(arena_top - global_start, first);
  else
    madvise(first, arena_top - global_start, MADV_DONTNEED);
  mapped = false;
  arena_top = global_start;
}

void begin_block_memory() {
  reserve_arena();
  shared_regions.clear();
  sites.clear();
  shared_top = 0;
}

size_t shared_bytes_used() { return shared_top; }

void* shared_static(const Site* site) {
  for (const auto& known : sites)
    if (known.first == site) return reinterpret_cast<void*>(known.second);
  const uintptr_t address =
      add_shared(std::string("shared array ") + site->name, site->size, site->align, __builtin_return_address(0));
  sites.push_back({site, address});
  return reinterpret_cast<void*>(address);
}

void* shared_dynamic(size_t align) {
  static const Site dynamic{"dynamic shared memory", 0, 0};
  for (const auto& known : sites)
    if (known.first == &dynamic) return reinterpret_cast<void*>(known.second);
  const uintptr_t address = add_shared(dynamic.name, machine.dynamic_bytes, align, __builtin_return_address(0));
  sites.push_back({&dynamic, address});
  return reinterpret_cast<void*>(address);
}

}  // namespace gmk_simt

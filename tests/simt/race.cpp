// Races: two threads touch the same bytes, one of them writes, and nothing orders the two.
//
// Every four bytes remember their last writer and up to two readers since. What orders an old access before the present:
//   the same thread;  a block barrier since then;  __syncwarp of both lanes since then;
//   another block's access: only that block's fence and atomic, then an atomic of ours on the same address.
// Two atomics never race. Shuffles and votes order nothing, as on a GPU.
#include "runtime.h"

#include <algorithm>

namespace gmk_simt {
namespace {

using Times = std::map<uint32_t, uint64_t>;  // block -> its accesses up to this time are ordered before us
Times known;                                 // to this block, through atomics
std::map<const void*, Times> released;       // through the atomic at this address, by blocks that had fenced

bool ordered(const Access& old, const Fiber& me, const Region& region) {
  if (old.context != (region.shared ? machine.block_serial : machine.launch)) return true;
  if (old.block != machine.block) {
    const auto k = known.find(old.block);
    return k != known.end() && old.time <= k->second;
  }
  if (old.thread == me.linear || old.epoch < machine.epoch) return true;
  return old.thread / 32 == me.linear / 32 && me.seen[old.thread % 32] > old.clock;
}

void report_race(const char* what, const Access& old, const Region& region, uintptr_t address, const void* pc) {
  const dim3 g = machine.grid, b = machine.block_dim;
  const unsigned o = old.block, t = old.thread;
  report("race", machine.current, {pc_offset(pc), old.pc},
         "%s at byte %zu of %s; the other access: block (%u,%u,%u) thread (%u,%u,%u)", what, size_t(address - region.low),
         region.name.c_str(), o % g.x, o / g.x % g.y, o / g.x / g.y, t % b.x, t / b.x % b.y, t / b.x / b.y);
}

}  // namespace

void check_race(Region& region, uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  const Fiber& me = *machine.current;
  Access now{region.shared ? machine.block_serial : machine.launch, machine.block, pc_offset(pc), machine.epoch, me.clock,
             uint16_t(me.linear), 0, kind == Kind::atomic, ++machine.time};
  const uintptr_t base = region.low & ~uintptr_t(3);  // a buffer may start at any byte
  for (uintptr_t word = address & ~uintptr_t(3); word < address + bytes; word += 4) {
    Cell& cell = region.cells[(word - base) / 4];
    const unsigned first = unsigned(std::max(address, word) - word), last = unsigned(std::min(address + bytes, word + 4) - word);
    now.bytes = uint8_t(((1u << last) - 1) & ~((1u << first) - 1));
    const Access& w = cell.write;
    if (w.context && (w.bytes & now.bytes) && !(now.atomic && w.atomic) && !ordered(w, me, region))
      report_race(kind == Kind::read ? "read after an unordered write" : "write after an unordered write", w, region,
                  address, pc);
    if (kind != Kind::read) {
      for (const Access& r : cell.read)
        if (r.context && (r.bytes & now.bytes) && !ordered(r, me, region))
          report_race("write after an unordered read", r, region, address, pc);
      cell.write = now;
      cell.read[0].context = cell.read[1].context = 0;
    } else {
      const Access& r = cell.read[0];  // the second slot is for a reader of another warp: each may be unordered alone
      const bool keep = r.context == now.context && r.epoch == now.epoch && (r.thread / 32 != now.thread / 32 || r.block != now.block);
      cell.read[keep ? 1 : 0] = now;
    }
  }
}

void begin_launch_races() { released.clear(); }
void begin_block_races() { known.clear(); }

// Acquire what was released here. Release, if this thread has fenced, all that its block did and knows.
void race_atomic(const void* p) {
  Times& here = released[p];
  for (const auto& k : here) known[k.first] = std::max(known[k.first], k.second);
  if (!machine.current->fenced) return;
  for (const auto& k : known) here[k.first] = std::max(here[k.first], k.second);
  here[machine.block] = machine.time;
}

// All lanes learn what each of them had seen, and everything each of them did.
void race_warp_barrier(unsigned lanes, Fiber* warp) {
  uint32_t seen[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    for (int j = 0; j < 32; ++j) seen[j] = std::max(seen[j], warp[i].seen[j]);
    seen[i] = std::max(seen[i], ++warp[i].clock);
  }
  for (int i = 0; i < 32; ++i)
    if (lanes >> i & 1) std::copy(seen, seen + 32, warp[i].seen);
}

}  // namespace gmk_simt

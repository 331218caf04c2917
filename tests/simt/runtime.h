// What the parts of the runtime share. Only the *.cpp files here include it, and they are never compiled with
// -fsanitize=thread: their own accesses must not come back to them.
#pragma once
#include "simt.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <map>
#include <string>
#include <vector>

namespace gmk_simt {

constexpr size_t kStackBytes = 64 * 1024, kMaxThreads = 1024, kMaxShared = 227 * 1024;

// One remembered access to a cell of memory.
struct Access {
  uint32_t context;  // the launch (global memory) or the block's serial number (shared memory); 0: no access yet
  uint32_t block;    // linear
  uint32_t pc;       // offset in this module
  uint32_t epoch;    // block barriers passed
  uint32_t clock;    // warp barriers passed
  uint16_t thread;   // linear in its block
  uint8_t bytes;     // which of the cell's four bytes
  bool atomic;
  uint64_t time;  // global order of all accesses
};
// Four bytes of memory: who wrote last, and up to two readers since, from two warps.
struct Cell {
  Access write, read[2];
};

// A buffer or a shared array. Everything outside its [low, high) is out of bounds.
struct Region {
  uintptr_t low, high;
  std::string name;
  bool shared, read_only;
  bool defined;    // every byte is initialised, so nobody looks at `state`
  uint8_t* state;  // per byte: kInitialised, kWritten
  Cell* cells;     // per four bytes; nullptr for read-only memory, where nobody can race
  uint8_t* pages;  // per page of the buffer: has it been written?
};
enum : uint8_t { kInitialised = 1, kWritten = 2 };
constexpr size_t kPage = 4096;

struct Copy {  // a cp.async in flight
  char* to;
  const char* from;
  int bytes, source_bytes;
};

enum class WarpOp : uint8_t { barrier, shuffle, ballot, reduce, mma };
enum class Wait : uint8_t { ready, block, warp, done };

// A CUDA thread.
struct Fiber {
  void* stack_pointer;
  uintptr_t stack;  // lowest address
  uint3 index;
  int linear, lane;
  Wait wait;
  const void* pc;  // of the barrier or warp operation it waits in
  Vote vote;
  int vote_value, vote_result;
  unsigned mask;  // warp operation: who takes part, what they bring, where the result goes
  WarpOp op;
  int detail;  // shuffle: source lane; reduce: Reduction; mma: MmaKind
  const void* in;
  void* out;
  size_t bytes;
  uint32_t clock, seen[32];  // happens-before inside a warp: seen[l] > c means lane l's accesses at clock c are ordered
  bool fenced;
  uintptr_t recent[4];  // addresses it has read
  unsigned next_recent, repeats, idle_turns;
  uint64_t idle_since;  // machine.progress when it last waited in a loop
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies up to this index belong to the group
};

enum class Schedule : int { ascending, descending, random, preempt };
struct Options {
  Schedule schedule = Schedule::ascending;
  uint64_t seed = 0;
  bool check = true;
  std::vector<int64_t> blocks;  // run only these, negative ones from the last; empty: all
};
struct Report {
  std::string kind, kernel, message;
  uint3 block, thread;
  std::vector<uint32_t> pcs;  // the access, then what it collides with
  uint64_t count;
};
struct Counters {
  uint64_t threads, accesses, switches;
};

// The state of the machine: one kernel runs at a time.
struct Machine {
  Options options;
  Counters counters;
  std::vector<Report> reports;
  std::map<std::string, size_t> report_index;

  Fiber* current;  // nullptr: host code runs, and nothing is checked
  std::vector<Fiber> fibers;
  const char* kernel;
  dim3 grid, block_dim;
  uint3 block_index;
  uint32_t block;  // linear
  int threads, live;
  uint32_t launch, first_launch, block_serial, epoch;  // first_launch: of this call
  uint64_t time, random_state;
  uint64_t progress;  // writes, barriers passed, threads ended: what a thread may be waiting for
  bool aborted;       // this launch cannot go on
  const void* closure;
  size_t closure_bytes;
  size_t dynamic_bytes;
};
extern Machine machine;

// report.cpp
uint32_t pc_offset(const void* pc);
bool in_module(uintptr_t address);
void report(const char* kind, const Fiber* who, std::vector<uint32_t> pcs, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// memory.cpp
enum class Kind { read, write, atomic };
void access(uintptr_t address, size_t bytes, Kind kind, const void* pc);
Region* find_region(uintptr_t address);
bool inside(uintptr_t address, size_t bytes);  // all of it in one region
void begin_block_memory();
size_t shared_bytes_used();
uintptr_t allocate(size_t bytes, size_t phase, const std::string& name, bool read_only);
void map_file(uintptr_t address, int file, size_t period);  // its bytes, over and over, from the start of the region
std::vector<std::pair<size_t, size_t>> written_ranges(const Region& region);  // [first, past the last) byte
void free_all();

// race.cpp
void check_race(Region& region, uintptr_t address, size_t bytes, Kind kind, const void* pc);
void begin_launch_races();
void begin_block_races();
void race_atomic(const void* p);
void race_warp_barrier(unsigned lanes, Fiber* warp);

// warp.cpp, scheduler.cpp
void run_warp_op(WarpOp op, unsigned lanes, Fiber* warp);
void try_warp(int warp);
void wait_in_warp(WarpOp op, unsigned mask, int detail, const void* in, void* out, size_t bytes, const void* pc);
void make_ready(Fiber& fiber);
void yield_fiber();                                  // let another thread go on
void preempt_point();                                // perhaps
void watch_read(uintptr_t address, const void* pc);  // is it waiting in a loop?
void to_scheduler();                                 // the current fiber waits
[[noreturn]] void abort_launch();                    // from a fiber: drop every thread of this launch
uint64_t random_bits();

}  // namespace gmk_simt

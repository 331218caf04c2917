// Blocks run one after another; the threads of a block are fibers of one host thread. A fiber runs until it waits in a
// barrier or a warp operation; which one goes on then is the schedule. Nothing here depends on time: a run repeats
// exactly.
#include "runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>

namespace gmk_simt {
namespace {

// Saves the callee-saved registers on this stack, goes to the other one, restores them from there.
extern "C" __attribute__((visibility("hidden"))) void gmk_simt_switch(void** save, void* to);
asm(R"(
.text
.hidden gmk_simt_switch
.globl gmk_simt_switch
.type gmk_simt_switch,@function
gmk_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gmk_simt_switch, .-gmk_simt_switch
)");

constexpr unsigned kSpinReads = 1024, kIdleTurns = 16;  // a loop of so many reads lets others run; so often in vain

void* scheduler_stack;
std::deque<int> ready;
int at_barrier, preempt_in;
void (*kernel_call)(const void*);
sigjmp_buf crashed;

void release_barrier() {
  const Fiber* first = nullptr;
  int count = 0, all = 1;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.fibers[size_t(i)];
    if (fiber.wait != Wait::block) continue;
    count += fiber.vote_value;
    all &= fiber.vote_value;
    if (!first)
      first = &fiber;
    else if (fiber.pc != first->pc)
      report("barrier-divergence", &fiber, {pc_offset(fiber.pc), pc_offset(first->pc)},
             "threads of a block meet in different barriers; in the other one: thread (%u,%u,%u)", first->index.x,
             first->index.y, first->index.z);
  }
  if (machine.live != machine.threads)
    report("barrier-exited", first, {pc_offset(first->pc)}, "%d of %d threads had exited before this barrier",
           machine.threads - machine.live, machine.threads);
  at_barrier = 0;
  ++machine.epoch;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[size_t(i)];
    if (fiber.wait != Wait::block) continue;
    fiber.vote_result = fiber.vote == kCount ? count : fiber.vote == kOr ? count != 0 : all;
    make_ready(fiber);
  }
}

void exit_thread() {
  Fiber& me = *machine.current;
  if (!me.copies.empty())
    report("async-not-waited", &me, {}, "the thread ends with %zu asynchronous copies that nobody waited for",
           me.copies.size());
  me.wait = Wait::done;
  --machine.live;
  ++machine.progress;
  try_warp(me.linear / 32);
  if (machine.live && at_barrier == machine.live) release_barrier();
}

void fiber_main() {
  kernel_call(machine.closure);
  exit_thread();
  to_scheduler();
  abort();  // nobody resumes a thread that is done
}

char* stacks() {
  static char* memory = nullptr;
  if (memory) return memory;
  void* p = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  memory = static_cast<char*>(p);
  for (size_t i = 0; i < kMaxThreads; ++i) mprotect(memory + i * kStackBytes, 4096, PROT_NONE);  // overflow stops here
  machine.fibers.resize(kMaxThreads);
  return memory;
}

void start_fiber(int i) {
  Fiber& fiber = machine.fibers[size_t(i)];
  const unsigned x = machine.block_dim.x, y = machine.block_dim.y, u = unsigned(i);
  fiber.index = {u % x, u / x % y, u / x / y};
  fiber.linear = i;
  fiber.lane = i % 32;
  fiber.wait = Wait::ready;
  fiber.pc = nullptr;
  fiber.clock = 0;
  fiber.fenced = false;
  fiber.repeats = fiber.idle_turns = 0;
  std::fill(fiber.seen, fiber.seen + 32, 0);
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.stack = uintptr_t(stacks()) + size_t(i) * kStackBytes;
  // Tops at one offset in every stack would all fall into the same few cache sets: spread them.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64 - size_t(i % 32) * 128);
  *--top = nullptr;  // where fiber_main would return to: makes its stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  fiber.stack_pointer = top;
  ready.push_back(i);
}

int next_fiber() {
  size_t k = 0;
  if (machine.options.schedule == Schedule::descending) k = ready.size() - 1;
  if (machine.options.schedule >= Schedule::random) k = random_bits() % ready.size();
  const int id = ready[k];
  if (k == 0) {
    ready.pop_front();
  } else {
    ready[k] = ready.back();
    ready.pop_back();
  }
  return id;
}

void report_deadlock() {
  // One report per place where threads wait.
  std::map<const void*, std::pair<const Fiber*, int>> places;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.fibers[size_t(i)];
    if (fiber.wait == Wait::done) continue;
    auto& place = places[fiber.pc];
    if (!place.first) place.first = &fiber;
    ++place.second;
  }
  for (const auto& place : places)
    report("deadlock", place.second.first, {pc_offset(place.first)},
           "%d threads wait here in a %s forever; %d of %d threads have exited; the launch ends here",
           place.second.second, place.second.first->wait == Wait::block ? "block barrier" : "warp operation",
           machine.threads - machine.live, machine.threads);
}

// Whoever is not in a barrier reads the same few addresses over and over, and nobody has written since.
void report_spin() {
  std::map<const void*, std::pair<const Fiber*, int>> places;
  for (const int i : ready) {
    const Fiber& fiber = machine.fibers[size_t(i)];
    if (fiber.idle_turns < kIdleTurns || fiber.idle_since != machine.progress) return;
    auto& place = places[fiber.pc];
    if (!place.first) place.first = &fiber;
    ++place.second;
  }
  for (const auto& place : places)
    report(
        "spin", place.second.first, {pc_offset(place.first)},
        "%d threads wait here in a loop for memory that nobody will change; %d of %d threads have exited; the launch "
        "ends here",
        place.second.second, machine.threads - machine.live, machine.threads);
  if (!places.empty()) abort_launch();
}

void run_block(unsigned linear) {
  const dim3 g = machine.grid;
  machine.block = linear;
  machine.block_index = {linear % g.x, linear / g.x % g.y, linear / g.x / g.y};
  ++machine.block_serial;
  machine.epoch = 0;
  machine.live = machine.threads;
  at_barrier = 0;
  ready.clear();
  begin_block_memory();
  begin_block_races();
  for (int i = 0; i < machine.threads; ++i) start_fiber(i);
  machine.counters.threads += uint64_t(machine.threads);
  while (machine.live && !machine.aborted) {
    if (ready.empty()) {
      report_deadlock();
      machine.aborted = true;
      break;
    }
    machine.current = &machine.fibers[size_t(next_fiber())];
    gmk_simt_switch(&scheduler_stack, machine.current->stack_pointer);
    machine.current = nullptr;
  }
}

// What the checker cannot see before it happens. SIGSEGV: stack overflow and jumps into nowhere. SIGILL: the trap of
// -fsanitize=bounds, an index past the end of an array whose length the compiler knows. And a clock of CPU time, for
// loops that never end and never touch memory.
enum Ending : int { kCrash = 1, kTrap, kLoop };
constexpr int kTick = 100, kTicks = 4;  // milliseconds; so many without any access
void* ended_at;
uint64_t done_before;
int ticks;
void on_crash(int signal, siginfo_t* info, void*) {
  ended_at = info->si_addr;
  siglongjmp(crashed, signal == SIGILL ? kTrap : kCrash);
}
void on_tick(int, siginfo_t*, void* context) {
  const uint64_t done = machine.counters.accesses + machine.counters.switches;
  ticks = machine.current && done == done_before ? ticks + 1 : 0;
  done_before = done;
  if (ticks < kTicks) return;
  ended_at = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  siglongjmp(crashed, kLoop);
}

class CrashGuard {
 public:
  CrashGuard() {
    static char alternative[64 * 1024];
    stack_t stack{};
    stack.ss_sp = alternative;
    stack.ss_size = sizeof alternative;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_action_);
    sigaction(SIGILL, &action, &old_trap_);
    action.sa_sigaction = on_tick;
    action.sa_flags |= SA_RESTART;
    sigaction(kClock, &action, &old_clock_);
    struct sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = kClock;
    event._sigev_un._tid = gettid();
    const itimerspec interval{{0, kTick * 1000000}, {0, kTick * 1000000}};
    ticks = 0;
    running_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
    if (running_) timer_settime(timer_, 0, &interval, nullptr);
  }
  ~CrashGuard() {
    if (running_) timer_delete(timer_);
    sigaction(kClock, &old_clock_, nullptr);
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaction(SIGILL, &old_trap_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_{};
  struct sigaction old_action_{}, old_trap_{}, old_clock_{};
  const int kClock = SIGRTMIN + 7;
  timer_t timer_{};
  bool running_ = false;
};

void run_grid() {
  const uint64_t total = uint64_t(machine.grid.x) * machine.grid.y * machine.grid.z;
  std::vector<unsigned> order;
  for (const int64_t b : machine.options.blocks) {
    const uint64_t from_start = uint64_t(b < 0 ? b + int64_t(total) : b);
    if (from_start < total) order.push_back(unsigned(from_start));
  }
  if (machine.options.blocks.empty())
    for (uint64_t b = 0; b < total; ++b) order.push_back(unsigned(b));
  if (machine.options.schedule == Schedule::descending) std::reverse(order.begin(), order.end());
  if (machine.options.schedule >= Schedule::random)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  for (const unsigned block : order) {
    run_block(block);
    if (machine.aborted) return;
  }
}

}  // namespace

uint64_t random_bits() {
  uint64_t& s = machine.random_state;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s;
}

void make_ready(Fiber& fiber) {
  ++machine.progress;
  fiber.wait = Wait::ready;
  ready.push_back(fiber.linear);
}

void to_scheduler() {
  ++machine.counters.switches;
  gmk_simt_switch(&machine.current->stack_pointer, scheduler_stack);
}

void yield_fiber() {
  ready.push_back(machine.current->linear);
  to_scheduler();
}

void watch_read(uintptr_t address, const void* pc) {
  Fiber& me = *machine.current;
  if (std::find(me.recent, me.recent + 4, address) == me.recent + 4) {
    me.recent[me.next_recent++ % 4] = address;
    me.repeats = me.idle_turns = 0;
    return;
  }
  if (++me.repeats % kSpinReads) return;
  me.pc = pc;
  me.idle_turns = me.idle_since == machine.progress ? me.idle_turns + 1 : 0;
  me.idle_since = machine.progress;
  if (machine.options.schedule == Schedule::descending)  // the last to go on
    ready.push_front(me.linear);
  else
    ready.push_back(me.linear);
  report_spin();
  to_scheduler();
}

void preempt_point() {
  if (--preempt_in > 0) return;
  preempt_in = 1 + int(random_bits() % 16);
  yield_fiber();
}

void abort_launch() {
  machine.aborted = true;
  to_scheduler();
  abort();
}

static std::map<std::string, int>& bounds() {  // made when the first kernel file is loaded
  static std::map<std::string, int> all;
  return all;
}
Bound::Bound(const char* kernel, int threads, int) { bounds()[kernel] = threads; }
static int bound_of(const char* name) {  // "(kernel<T, 4>)"
  const std::string text = name + strspn(name, "(");
  const auto found = bounds().find(text.substr(0, text.find_first_of("<)")));
  return found == bounds().end() ? 0 : found->second;
}

int block_barrier(Vote vote, int value) {
  Fiber& me = *machine.current;
  me.vote = vote;
  me.vote_value = value;
  me.pc = __builtin_return_address(0);
  me.wait = Wait::block;
  if (++at_barrier == machine.live) release_barrier();
  to_scheduler();
  return me.vote_result;
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block_dim; }
dim3 grid_size() { return machine.grid; }
int lane_index() { return machine.current->lane; }

static unsigned most_blocks = 0;
void set_most_blocks(unsigned count) { most_blocks = count; }
const char* launch_any(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
                       const void* closure, size_t closure_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!threads || threads > kMaxThreads || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 2147483647u ||
      grid.y > 65535 || grid.z > 65535)
    return "invalid configuration argument (grid or block size)";
  if (const int bound = bound_of(name); bound && threads > unsigned(bound)) {
    static thread_local char text[128];
    snprintf(text, sizeof text, "too many threads for the kernel (%u in a block, __launch_bounds__ says %d)",
             unsigned(threads), bound);
    return text;
  }
  if (shared_bytes > kMaxShared) return "invalid argument (more than 227 KiB of shared memory)";
  stacks();
  machine.kernel = name;
  if (most_blocks && grid.x > most_blocks) grid.x = most_blocks;
  machine.grid = grid;
  machine.block_dim = block;
  machine.threads = int(threads);
  machine.dynamic_bytes = shared_bytes;
  machine.closure = closure;
  machine.closure_bytes = closure_bytes;
  machine.aborted = false;
  machine.random_state = machine.options.seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull;
  ++machine.launch;
  kernel_call = call;
  preempt_in = 8;
  begin_launch_races();
  const CrashGuard guard;
  const int ending = sigsetjmp(crashed, 1);
  if (ending == 0) {
    run_grid();
  } else {
    const std::vector<uint32_t> pc = {pc_offset(static_cast<char*>(ended_at) + 1)};
    if (ending == kTrap)
      report("out-of-bounds", machine.current, pc, "an index past the end of an array; the launch ends here");
    else if (ending == kLoop)
      report("spin", machine.current, in_module(uintptr_t(ended_at)) ? pc : std::vector<uint32_t>(),
             "a loop that does not end, and that touches no memory; the launch ends here");
    else
      report("crash", machine.current, {},
             "stack overflow (more than %zu KiB of locals), or a wild jump; the launch ends here", kStackBytes / 1024);
    machine.aborted = true;
  }
  machine.current = nullptr;
  return nullptr;
}

}  // namespace gmk_simt

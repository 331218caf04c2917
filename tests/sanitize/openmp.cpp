// OpenMP's run time for the TSan build: what GCC calls for the pragmas that the kernels use, on std::thread.
//
// libgomp is not instrumented: its barriers are invisible to TSan, which then reports every barrier as a race (or, with
// its reports suppressed, none at all). So the thread build takes this file instead. The kernels are compiled
// unchanged, with -fopenmp, and their pragmas become calls of the functions below, in this module alone (hidden
// visibility); run.py checks that no OpenMP function is left to be taken from libgomp.
//
// Only what OpenMP promises orders two accesses here: the begin and the end of a region, and barriers. Iterations of
// schedule(dynamic) go round-robin, so that even the smallest loop is shared by all threads; a lock or an atomic that
// hands them out would order iterations that OpenMP does not, and hide their races.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Team {
 public:
  const int size;
  explicit Team(int size) : size(size) {}

  // Two gates in turn. With one alone, a thread that wakes late from a barrier would lock the mutex after another had
  // gone through the next one: an order that OpenMP does not promise, and the races between the two would be hidden.
  void barrier(int turn) {
    Gate& gate = gates_[turn % 2];
    std::unique_lock<std::mutex> lock(gate.mutex);
    if (++gate.waiting == size) {
      gate.waiting = 0;
      ++gate.round;
      gate.all_here.notify_all();
      return;
    }
    const long mine = gate.round;
    gate.all_here.wait(lock, [&] { return gate.round != mine; });
  }

 private:
  struct Gate {
    std::mutex mutex;
    std::condition_variable all_here;
    int waiting = 0;
    long round = 0;
  };
  Gate gates_[2];
};

// Chunks of a loop for one thread: first, first + threads, ...
struct Loop {
  long start, end, step, chunk, next;
};

// Where a thread is; team = nullptr outside of regions.
struct Place {
  Team* team = nullptr;
  int index = 0;
  int singles = 0;
  int barriers = 0;
  Loop loop = {};
};
thread_local Place here;

int team_size() { return here.team ? here.team->size : 1; }

void begin(long start, long end, long step, long chunk) { here.loop = Loop{start, end, step, chunk, here.index}; }
bool next_chunk(long* from, long* to) {
  Loop& loop = here.loop;
  const long count = (loop.end - loop.start + loop.step - (loop.step > 0 ? 1 : -1)) / loop.step;
  const long first = loop.next * loop.chunk;
  if (first >= count) return false;
  loop.next += team_size();
  const long last = first + loop.chunk < count ? first + loop.chunk : count;
  *from = loop.start + first * loop.step;
  *to = loop.start + last * loop.step;
  return true;
}

template <class Body>
void run(unsigned threads, Body body) {
  Team team(threads ? int(threads) : 1);
  const auto work = [&](int index) {
    const Place outside = here;
    here = Place{&team, index, 0, 0, {}};
    body();
    here = outside;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < team.size; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& t : others) t.join();
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  run(threads, [=] { body(data); });
}
void GOMP_barrier() {
  if (here.team) here.team->barrier(here.barriers++);
}
bool GOMP_single_start() { return here.singles++ % team_size() == here.index; }

// schedule(dynamic)
bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  begin(start, end, step, chunk);
  return next_chunk(from, to);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return next_chunk(from, to); }
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads, long start, long end,
                                             long step, long chunk, unsigned) {
  run(threads, [=] {
    begin(start, end, step, chunk);
    body(data);
  });
}

// schedule(static) is computed from these two
int omp_get_thread_num() { return here.index; }
int omp_get_num_threads() { return team_size(); }
}

// The emulator as a kernel sees it. csrc/cuda/prims.cuh includes this file in place of the CUDA headers when GMK_SIMT
// is defined; cuda_language.h, included at the end, turns CUDA keywords and built-ins into calls of the functions
// below.
//
// How it works (docs/emulator.md): a kernel source is compiled by g++ with -fsanitize=thread, so that the compiler puts
// a call in front of every load and store. The runtime (the *.cpp beside this file) is linked in place of the
// sanitizer's library: it receives those calls, runs every CUDA thread as a fiber, and so sees each access of each
// thread.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "the emulator switches stacks with x86-64 assembly and needs GCC"
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace gmk_simt {

// Launch: runs every block of the grid, one after the other. nullptr, or why CUDA would have refused.
const char* launch_any(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
                       const void* closure, size_t closure_bytes);
template <class F>
const char* launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const F& body) {
  return launch_any(
      name, grid, block, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); }, &body, sizeof(F));
}

// What __launch_bounds__ says of a kernel. The build makes one GMK_BOUND of each (CMakeLists.txt).
struct Bound {
  Bound(const char* kernel, int threads, int blocks = 0);
};
#define GMK_BOUND(kernel, ...) const ::gmk_simt::Bound kernel##_bound{#kernel, __VA_ARGS__};

// Where this fiber is. `const`, because it never changes while a fiber lives.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] int lane_index();

// Shared memory. A Site is one GMK_SHARED declaration; all threads of a block get the same address for it.
struct Site {
  const char* name;
  size_t size, align;
};
void* shared_static(const Site* site);
void* shared_dynamic(size_t align);

// One access of several elements: aligned to its size (at most 16 bytes), and checked whole, even if the kernel then
// uses only a part of it.
void vector_load(const void* p, void* to, size_t bytes);
void vector_store(void* p, const void* from, size_t bytes);

// What memcpy and memset in a kernel become: the compiler puts no call of its own in front of them.
extern "C" void* gmk_simt_memcpy(void* to, const void* from, size_t bytes) noexcept;
extern "C" void* gmk_simt_memset(void* to, int value, size_t bytes) noexcept;

// The block's barrier, with the vote that __syncthreads_count, _or and _and take along.
enum Vote : int { kPlain, kCount, kOr, kAnd };
int block_barrier(Vote vote, int value);
void warp_barrier(unsigned mask);  // __syncwarp: the only warp operation that orders memory
void fence();                      // __threadfence

void shuffle(unsigned mask, int source_lane, const void* value, void* result, size_t bytes);
unsigned ballot(unsigned mask, bool value);
enum Reduction : int { kAdd, kMin, kMax };
int64_t reduce_integers(unsigned mask, int64_t value, Reduction how);

void atomic_load(void* p, void* old, size_t bytes);
void atomic_store(void* p, const void* value, size_t bytes);

// cp.async: the destination is undefined from here until the wait that covers its group.
void async_copy(void* shared, const void* global, int bytes, int source_bytes);
void async_commit();
void async_wait(int groups_left);

// mma.sync with the fragment layout of the PTX manual: d = a b + c. a: 4 registers (tf32, m16n8k8; bf16, f16,
// m16n8k16).
enum MmaKind : int { kMmaBf16, kMmaF16, kMmaTf32 };
void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b, const float* c);
bool has_mma();  // false: kernels take their path for a GPU without it
void set_has_mma(bool);
void set_most_blocks(unsigned);  // of a launch in x; 0: no limit. For kernels that stride over gridDim.x

}  // namespace gmk_simt

#include "cuda_language.h"

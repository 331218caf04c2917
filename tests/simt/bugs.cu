// clang-format off
// (the tests find lines by their comments)
// Kernels with one planted bug each (the line that says BUG), and the same kernels without it: what tests/test_simt.py shows
// to the emulator. n is a multiple of 64 unless a kernel says otherwise; blocks have 64 threads.
#include "bugs.h"

#include "cuda/prims.cuh"

namespace gmk {
namespace {

#define GMK_BUG_KERNEL(name) \
  template <bool bug>        \
  __global__ void name##_kernel(float* out, unsigned* state, float* x, float* host, int64_t n)
#define GMK_UNUSED (void)state, (void)host, (void)n
#define GMK_INDEX                                                           \
  const int tid = int(threadIdx.x);                                         \
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + tid;                 \
  GMK_UNUSED

constexpr int kMostThreads = 64;

// Memory ------------------------------------------------------------

GMK_BUG_KERNEL(read_past_end) {
  GMK_INDEX;
  if (i < n) out[i] = x[bug ? i + 1 : i];  // BUG read_past_end
}

GMK_BUG_KERNEL(write_past_end) {  // any n
  GMK_INDEX;
  if (bug ? i <= n : i < n) out[i] = 1.0f;  // BUG write_past_end
}

GMK_BUG_KERNEL(read_before_start) {
  GMK_INDEX;
  out[i] = x[bug ? i - 1 : i];  // BUG read_before_start
}

GMK_BUG_KERNEL(vector_past_end) {  // n = 4 m + 2: the last 16 bytes are not all there
  GMK_INDEX;
  if (4 * i + (bug ? 0 : 3) < n) {
    store_pack(out + 4 * i, load_pack<float, 4>(x + 4 * i));  // BUG vector_past_end
  } else if (!bug) {
    for (int64_t j = 4 * i; j < n; ++j) out[j] = x[j];
  }
}

GMK_BUG_KERNEL(shared_past_end) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  tile[tid] = x[i];
  __syncthreads();
  out[i] = tile[bug ? tid + 1 : tid];  // BUG shared_past_end
}

GMK_BUG_KERNEL(local_past_end) {
  GMK_INDEX;
  float v[4] = {};
  v[bug ? i % 8 : i % 4] = x[i];  // BUG local_past_end
  out[i] = v[0] + v[1] + v[2] + v[3];
}

GMK_BUG_KERNEL(dynamic_shared_past_end) {  // launched with 256 bytes
  GMK_DYN_SHARED(raw);
  float* const tile = reinterpret_cast<float*>(raw);
  GMK_INDEX;
  tile[bug ? 2 * tid : tid] = x[i];  // BUG dynamic_shared_past_end
  __syncthreads();
  out[i] = tile[bug ? 0 : tid];
}

GMK_BUG_KERNEL(copy_past_end) {
  GMK_INDEX;
  if (i >= n - 2) out[i] = x[i];
  if (i == 0) memcpy(out, x + 2, size_t(n - (bug ? 1 : 2)) * 4);  // BUG copy_past_end
}

GMK_BUG_KERNEL(atomic_past_end) {
  GMK_INDEX;
  out[i] = x[i];
  atomicAdd(state + (bug ? 1 : 0), 1u);  // BUG atomic_past_end
}

GMK_BUG_KERNEL(misaligned_vector) {
  GMK_INDEX;
  if (4 * i + 4 < n) store_pack(out + 4 * i, load_pack<float, 4>(x + 4 * i + (bug ? 1 : 0)));  // BUG misaligned_vector
  else for (int64_t j = 4 * i; j < n; ++j) out[j] = 0.0f;
}

GMK_BUG_KERNEL(misaligned_double) {
  GMK_INDEX;
  const double* const d = reinterpret_cast<const double*>(x + (bug ? 1 : 0));
  out[i] = i ? 0.0f : float(d[0]);  // BUG misaligned_double
}

GMK_BUG_KERNEL(uninitialised_output) {
  GMK_INDEX;
  out[i] = bug ? out[i] + x[i] : x[i];  // BUG uninitialised_output
}

GMK_BUG_KERNEL(uninitialised_shared) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  if (!bug || tid != 5) tile[tid] = x[i];
  __syncthreads();
  out[i] = tile[63 - tid];  // BUG uninitialised_shared
}

GMK_BUG_KERNEL(write_to_input) {
  GMK_INDEX;
  out[i] = x[i];
  if (bug) x[i] = 0.0f;  // BUG write_to_input
}

GMK_BUG_KERNEL(unwritten) {
  GMK_INDEX;
  if (!bug || i != 3) out[i] = x[i];
}

GMK_BUG_KERNEL(write_between) {  // out has a stride of two elements
  GMK_INDEX;
  if (i < n) out[2 * i] = x[i];
  if (bug && i + 1 < n) out[2 * i + 1] = x[i];
}

GMK_BUG_KERNEL(too_much_shared) {  // with the bug, launched with 227 KiB
  GMK_DYN_SHARED(raw);
  GMK_INDEX;
  raw[tid] = 1;
  GMK_SHARED(tile, float[64]);  // BUG too_much_shared
  tile[tid] = x[i];
  out[i] = tile[tid] * raw[tid];
}

GMK_BUG_KERNEL(host_read) {
  GMK_INDEX;
  out[i] = bug ? host[i] : x[i];  // BUG host_read
}

GMK_BUG_KERNEL(host_write) {
  GMK_INDEX;
  out[i] = x[i];
  if (bug) host[i] = 0.0f;  // BUG host_write
}

GMK_BUG_KERNEL(null_pointer) {
  GMK_INDEX;
  const float* const p = bug ? nullptr : x;
  out[i] = p[i];  // BUG null_pointer
}

GMK_BUG_KERNEL(other_threads_local) {
  GMK_SHARED(where, float*);
  GMK_INDEX;
  float mine[2] = {x[i], x[i]};
  if (tid == 0) where = mine;
  __syncthreads();
  float* const p = bug ? where : mine;
  out[i] = p[tid & 1];  // BUG other_threads_local
  __syncthreads();
}

__device__ __attribute__((noinline)) float deep(const float* x, int depth) {
  volatile float pad[64];
  pad[depth & 63] = *x;
  return depth ? deep(x, depth - 1) + pad[depth & 63] : 0.0f;
}
GMK_BUG_KERNEL(stack_overflow) {
  GMK_INDEX;
  out[i] = deep(x, bug ? 1000000 : 1);
}

// Races ------------------------------------------------------------

GMK_BUG_KERNEL(missing_barrier) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  tile[tid] = x[i];
  if (!bug) __syncthreads();
  out[i] = tile[63 - tid];  // BUG missing_barrier
}

GMK_BUG_KERNEL(missing_second_barrier) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  tile[tid] = x[i];
  __syncthreads();
  const float v = tile[63 - tid];
  if (!bug) __syncthreads();
  tile[tid] = 2.0f * v;  // BUG missing_second_barrier
  __syncthreads();
  out[i] = tile[tid];
}

GMK_BUG_KERNEL(two_threads_one_element) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  tile[bug ? tid & ~1 : tid] = x[i];  // BUG two_threads_one_element
  __syncthreads();
  out[i] = tile[bug ? tid & ~1 : tid];
}

GMK_BUG_KERNEL(two_blocks_one_element) {
  GMK_INDEX;
  out[i] = x[i];
  if (bug && tid == 0) out[1] = x[1];  // BUG two_blocks_one_element
}

GMK_BUG_KERNEL(missing_syncwarp) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  tile[tid] = x[i];
  if (!bug) __syncwarp();
  out[i] = tile[tid ^ 31];  // BUG missing_syncwarp
}

GMK_BUG_KERNEL(shuffle_is_no_barrier) {
  GMK_SHARED(tile, float[64]);
  GMK_INDEX;
  tile[tid] = x[i];
  const float v = __shfl_xor_sync(kFullWarp, x[i], 1);
  if (!bug) __syncwarp();
  out[i] = tile[tid ^ 31] + 0.0f * v;  // BUG shuffle_is_no_barrier
}

// The last block to arrive adds what all blocks left behind, so their writes have to be visible to it.
GMK_BUG_KERNEL(missing_fence) {
  GMK_SHARED(last, int);
  GMK_INDEX;
  if (tid == 0) {
    out[blockIdx.x] = x[i];
    if (!bug) __threadfence();
    last = atomicAdd(state, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[b];  // BUG missing_fence
  for (int64_t j = gridDim.x + tid; j < n; j += 64) out[j] = sum;
}

GMK_BUG_KERNEL(plain_counter) {
  GMK_INDEX;
  out[i] = x[i];
  if (bug) state[0] = state[0] + 1;  // BUG plain_counter
  else atomicAdd(state, 1u);
}

// Barriers and warps ------------------------------------------------------------

GMK_BUG_KERNEL(divergent_barrier) {
  GMK_INDEX;
  if (bug && tid < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // BUG divergent_barrier
  }
  out[i] = x[i];
}

GMK_BUG_KERNEL(exited_barrier) {  // n is no multiple of 64
  GMK_INDEX;
  if (bug && i >= n) return;
  __syncthreads();  // BUG exited_barrier
  if (i < n) out[i] = x[i];
}

GMK_BUG_KERNEL(deadlock) {
  GMK_INDEX;
  if (bug && tid == 0) __syncwarp();  // BUG deadlock
  else __syncthreads();
  out[i] = x[i];
}

GMK_BUG_KERNEL(spin) {
  GMK_SHARED(flag, int);
  GMK_INDEX;
  if (tid == 0) flag = 0;
  __syncthreads();
  if (tid == 63 && !bug) atomicExch(&flag, 1);
  while (tid < 32 && atomicAdd(&flag, 0) == 0) {}  // BUG spin
  out[i] = x[i];
}

GMK_BUG_KERNEL(endless_loop) {
  GMK_INDEX;
  const int64_t stride = bug ? 0 : 64;
  float sum = 0.0f;
  for (int64_t j = tid; j < n; j += stride) sum += 1.0f;  // BUG endless_loop
  out[i] = x[i] + sum;
}

GMK_BUG_KERNEL(wrong_mask) {
  GMK_INDEX;
  const float other = __shfl_xor_sync(bug ? 0x0000ffffu : kFullWarp, x[i], 1);  // BUG wrong_mask
  out[i] = other;
}

GMK_BUG_KERNEL(inactive_source) {
  GMK_INDEX;
  float v = x[i];
  if (tid % 32 < 16) v = __shfl_xor_sync(0x0000ffffu, v, bug ? 16 : 8);  // BUG inactive_source
  out[i] = v;
}

GMK_BUG_KERNEL(exited_lanes) {
  GMK_INDEX;
  out[i] = x[i];
  if (tid % 32 >= 16) return;
  out[i] = __shfl_xor_sync(bug ? kFullWarp : 0x0000ffffu, x[i], 1);  // BUG exited_lanes
}

GMK_BUG_KERNEL(vote_mask) {
  GMK_INDEX;
  const int all = __all_sync(bug ? 0x0000ffffu : kFullWarp, x[i] >= 0.0f);  // BUG vote_mask
  out[i] = float(all);
}

GMK_BUG_KERNEL(mma_with_half_a_warp) {
  GMK_INDEX;
  out[i] = x[i];
  if (bug && tid >= 48) return;
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  mma_bf16(d, a, b, d);  // BUG mma_with_half_a_warp
  out[i] = x[i] + d[0];
}

// cp.async ------------------------------------------------------------

GMK_BUG_KERNEL(missing_wait) {
  GMK_SHARED(tile, float[256]);
  GMK_INDEX;
  cp_async16(tile + 4 * tid, x + 4 * tid);
  cp_async_commit();
  if (!bug) cp_async_wait<0>();
  out[i] = tile[4 * tid];  // BUG missing_wait
  if (bug) cp_async_wait<0>();
}

GMK_BUG_KERNEL(wait_without_barrier) {
  GMK_SHARED(tile, float[256]);
  GMK_INDEX;
  cp_async16(tile + 4 * tid, x + 4 * tid);
  cp_async_commit();
  cp_async_wait<0>();  // waits for this thread's copies only
  if (!bug) __syncthreads();
  out[i] = tile[tid];  // BUG wait_without_barrier
}

GMK_BUG_KERNEL(copies_never_waited) {
  GMK_SHARED(tile, float[256]);
  GMK_INDEX;
  cp_async16(tile + 4 * tid, x + 4 * tid);
  cp_async_commit();
  if (!bug) cp_async_wait<0>();
  out[i] = x[i];
}

GMK_BUG_KERNEL(async_past_end) {
  GMK_SHARED(tile, float[256]);
  GMK_INDEX;
  cp_async16(tile + 4 * tid, x + 4 * tid + (bug ? 4 : 0));  // BUG async_past_end
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[4 * tid];
}

GMK_BUG_KERNEL(async_misaligned) {
  GMK_SHARED(tile, float[256]);
  GMK_INDEX;
  cp_async16(tile + 4 * tid, x + tid / 4 * 4 + (bug ? 1 : 0));  // BUG async_misaligned
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[4 * tid];
}

GMK_BUG_KERNEL(async_overwrites) {  // what others may still read
  GMK_SHARED(tile, float[256]);
  GMK_INDEX;
  cp_async16(tile + 4 * tid, x + 4 * tid);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float v = tile[255 - tid];
  if (!bug) __syncthreads();
  cp_async16(tile + 4 * tid, x + 4 * tid);  // BUG async_overwrites
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = v;
}

// Not bugs: primitives against their models ------------------------------------------------------------

// x: a[4], b[2], c[4] of each lane, 10 words each; out: d[4] of each lane.
template <MmaType type, bool shuffles>
__global__ void mma_kernel(float* out, const float* x) {
  const int lane = int(threadIdx.x);
  uint32_t a[4], b[2];
  float c[4], d[4];
  for (int j = 0; j < 4; ++j) a[j] = float_bits(x[10 * lane + j]);
  for (int j = 0; j < 2; ++j) b[j] = float_bits(x[10 * lane + 4 + j]);
  for (int j = 0; j < 4; ++j) c[j] = x[10 * lane + 6 + j];
  if (shuffles) mma_by_shuffles<type>(d, a, b, c);
  else if (type == kMmaBf16) mma_bf16(d, a, b, c);
  else if (type == kMmaF16) mma_f16(d, a, b, c);
  else mma_tf32(d, a, b, c);
  for (int j = 0; j < 4; ++j) out[4 * lane + j] = d[j];
}

__global__ void __launch_bounds__(kMostThreads, 2) bounded_kernel(float* out) { out[threadIdx.x] = 1.0f; }

// out[0..4): what each kind of vote and reduction gives to lane 5 of a warp whose lane l brings l.
__global__ void votes_kernel(float* out) {
  const int lane = int(threadIdx.x);
  const unsigned even = __ballot_sync(kFullWarp, lane % 2 == 0);
  const int sum = __reduce_add_sync(kFullWarp, lane), most = __reduce_max_sync(kFullWarp, lane);
  const int all = __all_sync(kFullWarp, lane < 32), any = __any_sync(kFullWarp, lane == 40);
  const int count = __syncthreads_count(lane < 7), either = __syncthreads_or(lane == 31), both = __syncthreads_and(lane < 31);
  const int down = __shfl_down_sync(kFullWarp, lane, 3), up = __shfl_up_sync(kFullWarp, lane, 3, 8);
  const float total = warp_sum(float(lane)), nan = warp_max(lane == 3 ? __int_as_float(0x7fc00000) : 1.0f);
  const float top = warp_max(0.25f * float(lane));
  if (lane != 5) return;
  const float values[] = {float(even == 0x55555555u), float(sum), float(most), float(all), float(any), float(count),
                          float(either), float(both), float(down), float(up), total, float(nan != nan), top};
  for (int j = 0; j < 13; ++j) out[j] = values[j];
}

}  // namespace

Status bug_cuda(const Bug& a, int, void* stream) {
  const auto named = [&](const char* name) { return !strcmp(a.name, name); };
#define GMK_RUN(name)                                                                                                  \
  if (named(#name))                                                                                                    \
    return a.bug ? GMK_LAUNCH((name##_kernel<true>), grid_for(a.n, 64), 64, 256, stream, a.out, a.state, a.x, a.host, a.n) \
                 : GMK_LAUNCH((name##_kernel<false>), grid_for(a.n, 64), 64, 256, stream, a.out, a.state, a.x, a.host, a.n)
  if (named("too_much_shared") && a.bug)
    return GMK_LAUNCH((too_much_shared_kernel<true>), 1, 64, 227 << 10, stream, a.out, a.state, a.x, a.host, a.n);
  GMK_RUN(too_much_shared);
  GMK_RUN(read_past_end);
  GMK_RUN(write_past_end);
  GMK_RUN(read_before_start);
  GMK_RUN(vector_past_end);
  GMK_RUN(shared_past_end);
  GMK_RUN(local_past_end);
  GMK_RUN(dynamic_shared_past_end);
  GMK_RUN(copy_past_end);
  GMK_RUN(atomic_past_end);
  GMK_RUN(misaligned_vector);
  GMK_RUN(misaligned_double);
  GMK_RUN(uninitialised_output);
  GMK_RUN(uninitialised_shared);
  GMK_RUN(write_to_input);
  GMK_RUN(unwritten);
  GMK_RUN(write_between);
  GMK_RUN(host_read);
  GMK_RUN(host_write);
  GMK_RUN(null_pointer);
  GMK_RUN(other_threads_local);
  GMK_RUN(stack_overflow);
  GMK_RUN(missing_barrier);
  GMK_RUN(missing_second_barrier);
  GMK_RUN(two_threads_one_element);
  GMK_RUN(two_blocks_one_element);
  GMK_RUN(missing_syncwarp);
  GMK_RUN(shuffle_is_no_barrier);
  GMK_RUN(missing_fence);
  GMK_RUN(plain_counter);
  GMK_RUN(divergent_barrier);
  GMK_RUN(exited_barrier);
  GMK_RUN(deadlock);
  GMK_RUN(spin);
  GMK_RUN(endless_loop);
  GMK_RUN(wrong_mask);
  GMK_RUN(inactive_source);
  GMK_RUN(exited_lanes);
  GMK_RUN(vote_mask);
  GMK_RUN(mma_with_half_a_warp);
  GMK_RUN(missing_wait);
  GMK_RUN(wait_without_barrier);
  GMK_RUN(copies_never_waited);
  GMK_RUN(async_past_end);
  GMK_RUN(async_misaligned);
  GMK_RUN(async_overwrites);
#define GMK_RUN_MMA(name, type)                                                                   \
  if (named(name))                                                                                \
    return a.bug ? GMK_LAUNCH((mma_kernel<type, true>), 1, 32, 0, stream, a.out, a.x)             \
                 : GMK_LAUNCH((mma_kernel<type, false>), 1, 32, 0, stream, a.out, a.x)
  GMK_RUN_MMA("mma_bf16", kMmaBf16);
  GMK_RUN_MMA("mma_f16", kMmaF16);
  GMK_RUN_MMA("mma_tf32", kMmaTf32);
  if (named("votes")) return GMK_LAUNCH((votes_kernel), 1, 32, 0, stream, a.out);
  if (named("launch_bounds")) return GMK_LAUNCH((bounded_kernel), 1, a.bug ? 96 : 64, 0, stream, a.out);
  if (named("too_many_threads")) return GMK_LAUNCH((votes_kernel), 1, a.bug ? 2048 : 32, 0, stream, a.out);
  return "no kernel of that name";
}

}  // namespace gmk

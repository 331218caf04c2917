// CUDA, full and tied covariances in float32 on tensor cores (sm_80 and up): what the kernels share.
//
// Precision. y = (x - mean) P must keep float32's digits, and a tf32 factor has 11 bits. So each factor is split, v = hi +
// lo, both tf32, and three products are added: lo hi + hi lo + hi hi ("3xTF32"); lo lo is below float32's rounding. A tensor
// core truncates its sums, so only one step of eight features is summed in it; the steps are added by rounded additions.
// The residual is formed before the split, never x P - mean P, which would cancel: "tied" is residual form too.
//
// Parameters are prepared once per call (gmm_prepare.cu): P_k cut into 8 x 8 blocks, each split and stored in the order in
// which the lanes of mma.sync want it, 16 bytes a lane. So a block of P is one conflict-free 128-bit load, what lies below
// the diagonal is neither stored nor multiplied, and edges are zeros. They reach shared memory by cp.async, a chunk of
// steps ahead of the products. One step = one row of blocks of P (eight features of x):
//   component:  step 0 .. tiles - 1       header (8 means, constant, 3 unused), then blocks (i, i .. tiles - 1) of P
//               step tiles .. 2 tiles - 1 blocks (0 .. j, j) of P, transposed: for the product with y. Only for grad_x
// Rows of x lie in shared memory with a stride of 4 modulo 8 floats: neither product then has a bank conflict.
#pragma once
#include "gmm/gmm_cuda.h"
#include "gmm/gmm_plain.cuh"

namespace gmk {
namespace {

constexpr int kHeader = 12, kBlock = 128;  // floats
constexpr int kMatrixThreads = 128;
template <int KT>  // blocks on a multiprocessor: KT = 8 x 8 tiles in a row of P at most
constexpr int kMatrixBlocks = KT == 16  ? 2
                              : KT == 8 ? 3
                                        : 4;

GMK_HD int step_offset(int tiles, int s) {
  const int first = s < tiles ? s : tiles, second = s - first;
  return kHeader * first + kBlock * (first * tiles - first * (first - 1) / 2 + second * (second + 1) / 2);
}

// Steps of a chunk: about one component of the largest d that a kernel serves, 8 * KT.
template <int KT>
constexpr int kChunkSteps = KT <= 8 ? 8 : 4;
inline int chunk_floats(int tiles, int steps, int per_chunk) {
  int most = 0;
  for (int s = 0; s < steps * per_chunk; s += per_chunk) {
    int floats = 0;
    for (int i = s; i < s + per_chunk; ++i) floats += step_offset(tiles, i % steps + 1) - step_offset(tiles, i % steps);
    most = floats > most ? floats : most;
  }
  return most;
}

constexpr uint32_t kNaN = 0x7fc00000u;
struct Split {
  uint32_t hi, lo;
};
template <bool tf32 = false>
GMK_DEV Split split(float v) {
  const uint32_t hi = (float_bits(v) + 0x1000u) & 0xffffe000u;  // to 11 bits; NaN may lose itself here, but not in lo
  if (tf32) return {v != v ? kNaN : hi, 0};                     // there is no lo
  return {hi, float_bits(v - bits_float(hi))};
}

// sum += a b: 16 x 8 += 16 x 8 times 8 x 8; tf32: the product of the leading parts alone.
template <bool tf32 = false>
GMK_DEV void multiply_add(float (&sum)[4], const uint32_t (&hi)[4], const uint32_t (&lo)[4], const Pack<float, 4>& b) {
  const uint32_t b_hi[2] = {float_bits(b.v[0]), float_bits(b.v[1])}, b_lo[2] = {float_bits(b.v[2]), float_bits(b.v[3])};
  const float zero[4] = {};
  float low[4], both[4] = {}, all[4];
  if (!tf32) {
    mma_tf32(low, lo, b_hi, zero);
    mma_tf32(both, hi, b_lo, low);
  }
  mma_tf32(all, hi, b_hi, both);
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] += all[e];
}

// The prepared parameters of one mixture, step after step. All threads of a block take the same steps.
template <bool pull, int per_chunk>
class Steps {
 public:
  GMK_DEV Steps(const float* from, float* buffers, int capacity, int tiles, int k)
      : from_(from), buffers_(buffers), capacity_(capacity), tiles_(tiles), total_(k * per_component()) {
    copy();
  }
  // Shared memory that holds the next step, of `floats` numbers.
  GMK_DEV const float* next(int floats) {
    if (left_ == 0) {
      cp_async_wait<0>();
      __syncthreads();  // the chunk has come, and nobody reads the one before it any more
      at_ = buffers_ + odd_ * capacity_;
      odd_ ^= 1;
      left_ = per_chunk;
      copy();
    }
    --left_;
    const float* const step = at_;
    at_ += floats;
    return step;
  }

 private:
  GMK_DEV int per_component() const { return pull ? 2 * tiles_ : tiles_; }
  GMK_DEV const float* address(int s) const {
    return from_ + int64_t(s / per_component()) * step_offset(tiles_, per_component()) +
           step_offset(tiles_, s % per_component());
  }
  GMK_DEV void copy() {
    if (ahead_ >= total_) return;
    const int end = ahead_ + per_chunk < total_ ? ahead_ + per_chunk : total_;
    const float* const begin = address(ahead_);
    const int packs = int(address(end) - begin) / 4;
    float* const to = buffers_ + odd_ * capacity_;
    for (int e = int(threadIdx.x); e < packs; e += int(blockDim.x)) cp_async16(to + 4 * e, begin + 4 * e);
    cp_async_commit();
    ahead_ = end;
  }
  const float* const from_;
  float* const buffers_;
  const int capacity_, tiles_, total_;
  const float* at_ = nullptr;
  int ahead_ = 0, left_ = 0, odd_ = 0;
};

// The place of a thread in the fragments of mma.sync (cuda/prims.cuh).
struct Lane {
  int g, t;
};
GMK_DEV Lane lane_of() { return {int(threadIdx.x) % 32 / 4, int(threadIdx.x) % 4}; }

// y += t P for one step (features 8 i .. 8 i + 7): 16 M rows of x from `x` on, in shared memory; columns of P from 8 `from`.
template <int M, int KT, bool subtract, bool tf32 = false>
GMK_DEV void multiply_step(float (&y)[M][KT][4], const float* x, int stride, const float* mean, const float* blocks,
                           int i, int tiles, int from = 0) {
  const Lane at = lane_of();
  uint32_t hi[M][4], lo[M][4];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int f = at.t + 4 * (e >> 1);
      float v = x[(16 * m + at.g + 8 * (e & 1)) * stride + 8 * i + f];
      if (subtract) v -= mean[f];
      const Split s = split<tf32>(v);
      hi[m][e] = s.hi;
      lo[m][e] = s.lo;
    }
#pragma unroll
  for (int j = 0; j < KT; ++j)
    if (from + j >= i && from + j < tiles) {
      const Pack<float, 4> b = load_pack<float, 4>(blocks + kBlock * (from + j - i) + int(threadIdx.x) % 32 * 4);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply_add<tf32>(y[m][j], hi[m], lo[m], b);
    }
}

// Each quad of lanes holds 2 M rows of y. The result is |y|^2 of one of them: that of own_row, counted from the warp's first.
template <int M>
GMK_DEV int own_row() {
  const Lane at = lane_of();
  return M == 2 ? 16 * (at.t >> 1) + 8 * (at.t & 1) + at.g : 8 * (at.t & 1) + at.g;
}
template <int M, int KT>
GMK_DEV float own_square(const float (&y)[M][KT][4]) {
  float sum[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < KT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][e >> 1] += y[m][j][e] * y[m][j][e];
  const Lane at = lane_of();
  const bool second = at.t & 1, upper = at.t & 2;
  float keep[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float mine = M == 2 && upper ? sum[M - 1][h] : sum[0][h],
                other = M == 2 && !upper ? sum[M - 1][h] : sum[0][h];
    keep[h] = mine + __shfl_xor_sync(kFullWarp, other, 2);
  }
  return (second ? keep[1] : keep[0]) + __shfl_xor_sync(kFullWarp, second ? keep[0] : keep[1], 1);
}
// own_row's number of every row whose y this lane holds: of rows g and g + 8 of each 16.
template <int M>
GMK_DEV void to_fragment(float (&rows)[M][2], float own) {
  const int quad = int(threadIdx.x) % 32 & ~3;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[m][h] = __shfl_sync(kFullWarp, own, quad + 2 * m + h);
}

// Rows of x, d features each, into a tile; zeros for features up to `padded` and for rows up to `all`.
// 16 bytes at a time where the addresses allow it. The caller waits (cp_async_wait or Steps::next).
GMK_DEV void load_tile(float* tile, int stride, const float* x, int rows, int all, int d, int padded) {
  if (d % 4 == 0 && aligned(x, 16)) {
    for (int e = int(threadIdx.x); e < all * (padded / 4); e += int(blockDim.x)) {
      const int row = e / (padded / 4), f = 4 * (e % (padded / 4));
      const bool inside = row < rows && f < d;
      cp_async16(tile + row * stride + f, inside ? x + int64_t(row) * d + f : x, inside ? 16 : 0);
    }
  } else {
    for (int e = int(threadIdx.x); e < all * padded; e += int(blockDim.x)) {
      const int row = e / padded, f = e % padded;
      tile[row * stride + f] = row < rows && f < d ? x[int64_t(row) * d + f] : 0.0f;
    }
  }
}

struct RowKind {
  bool nan, infinite;
};
GMK_DEV RowKind row_kind(const float* x, int d) {
  RowKind kind{};
  for (int f = 0; f < d; ++f) {
    kind.nan = kind.nan || x[f] != x[f];
    kind.infinite = kind.infinite || fabsf(x[f]) == infinity<float>();
  }
  return kind;
}

// f(Tiles<KT>) for the least KT that holds d features, 8 to a tile.
template <int N>
struct Tiles {
  static constexpr int value = N;
};
template <class F>
Status for_tiles(int64_t d, F f) {
  return d <= 32 ? f(Tiles<4>{}) : d <= 64 ? f(Tiles<8>{}) : f(Tiles<16>{});
}

}  // namespace
}  // namespace gmk

// Backward on tensor cores, full and tied in float32 (gmm_matrix.cuh: the layout, the precision).
//
// grad_x: as the forward, then per component -w P y, the second product: y stays in the registers it was computed in, for
// the accumulators of one product are the left factor of the next (gmm_prepare.cu orders P for that). A warp none of whose
// rows knows the component skips it.
//
// Statistics: one block is one component and one slab of rows, with P_k in shared memory throughout. Per tile of rows:
// t = x - mean, y, the weights w; then sum w t^T t, a product over rows, upper triangle only. A warp owns a fixed set of
// 16 x 8 blocks of the result (`low` and `high` rows of blocks: every warp gets KT + 2), in registers, added in float64 to
// the slab's sums every kFlush tiles. No atomics: each number has one owner, and the order depends on sizes only.
#include "gmm/gmm_matrix.cuh"

namespace gmk {
namespace {

constexpr int kFlush = 8;

// grad * responsibility; a responsibility below 1e-30 counts as 0, as on the CPU.
GMK_DEV float row_weight(float own, float square, float grad, float log_prob) {
  if (log_prob == -infinity<float>()) return 0.0f;
  float r = gmm_exp(own - 0.5f * square - log_prob);
  if (r < 1e-30f || (square != square && log_prob == log_prob)) r = 0.0f;  // NaN here: inf - inf among huge numbers
  return grad * r;
}

template <int KT>
constexpr int kPullBlocks = KT == 4 ? 3 : 2;
template <int KT>
constexpr int kPullM = KT <= 8 ? 2 : 1;  // y and grad_x take 8 M KT registers

struct alignas(16) Kept {
  int64_t first;  // row, of all mixtures
  int rows;
};

template <int KT>
__global__ void __launch_bounds__(kMatrixThreads, kPullBlocks<KT>)
    gmm_matrix_grad_x_kernel(GmmLogProbBackward a, int capacity) {
  if (!has_mma()) return;
  constexpr int M = kPullM<KT>;
  GMK_DYN_SHARED(bytes);
  const GmmInputs& in = a.in;
  const int d = int(in.d), k = int(in.k), tiles = (d + 7) / 8, stride = 8 * tiles + 4;
  const int rows = int(blockDim.x) / 32 * 16 * M, warp_row = int(threadIdx.x) / 32 * 16 * M;
  const int mine = warp_row + own_row<M>();
  // What is needed again after all components waits in shared memory: registers are scarce in between.
  Kept* const kept = reinterpret_cast<Kept*>(bytes);
  float* const tile = reinterpret_cast<float*>(bytes + sizeof(Kept));
  const int64_t blocks = (in.n + rows - 1) / rows, per = step_offset(tiles, 2 * tiles);
  for (int64_t job = blockIdx.x; job < in.b * blocks; job += gridDim.x) {
    const int64_t b = job / blocks, first = job % blocks * rows, rest = in.n - first;
    const int count = int(rest < rows ? rest : rows);
    __syncthreads();
    if (threadIdx.x == 0) *kept = {b * in.n + first, count};
    load_tile(tile, stride, static_cast<const float*>(in.x) + b * in.x_stride + first * d, count, rows, d, 8 * tiles);
    Steps<true, kChunkSteps<KT>> steps(static_cast<const float*>(a.prepared) + b * k * per, tile + rows * stride,
                                       capacity, tiles, k);
    float grad = 0.0f, log_prob = -infinity<float>();
    if (mine < count) {
      grad = static_cast<const float*>(a.grad)[b * in.n + first + mine];
      log_prob = static_cast<const float*>(a.log_prob)[b * in.n + first + mine];
    }
    float pull[M][KT][4] = {};
    for (int c = 0; c < k; ++c) {
      float y[M][KT][4] = {}, own = 0.0f;
      for (int i = 0; i < tiles; ++i) {
        const float* const step = steps.next(kHeader + kBlock * (tiles - i));
        own = step[8];
        if (own == -infinity<float>()) continue;
        multiply_step<M, KT, true>(y, tile + warp_row * stride, stride, step, step + kHeader, i, tiles);
      }
      const float w = own == -infinity<float>() ? 0.0f : row_weight(own, own_square(y), grad, log_prob);
      const bool used = __any_sync(kFullWarp, w != 0.0f);
      float weights[M][2];
      to_fragment<M>(weights, w);
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        if (j >= tiles) continue;
        const float* const step = steps.next(kBlock * (j + 1));
        if (!used) continue;
        uint32_t hi[M][4], lo[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float v = weights[m][e & 1];
            const Split s = split(v == 0.0f ? 0.0f : -v * y[m][j][(e & 1) * 2 + (e >> 1)]);
            hi[m][e] = s.hi;
            lo[m][e] = s.lo;
          }
#pragma unroll
        for (int r = 0; r <= j; ++r) {
          const Pack<float, 4> p = load_pack<float, 4>(step + kBlock * r + int(threadIdx.x) % 32 * 4);
#pragma unroll
          for (int m = 0; m < M; ++m) multiply_add(pull[m][r], hi[m], lo[m], p);
        }
      }
    }
    const Lane at = lane_of();  // through the tile, so that whole rows are written
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < KT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (j < tiles)
            tile[(warp_row + 16 * m + at.g + 8 * (e >> 1)) * stride + 8 * j + 2 * at.t + (e & 1)] = pull[m][j][e];
    __syncthreads();
    float* const out = static_cast<float*>(a.grad_x) + kept->first * d;
    const int stored = kept->rows;
    if (d % 4 == 0 && aligned(out, 16)) {
      for (int e = int(threadIdx.x); e < stored * (d / 4); e += int(blockDim.x))
        store_pack(out + 4 * int64_t(e), load_pack<float, 4>(tile + e / (d / 4) * stride + 4 * (e % (d / 4))));
    } else {
      for (int e = int(threadIdx.x); e < stored * d; e += int(blockDim.x)) out[e] = tile[e / d * stride + e % d];
    }
  }
}

// t = x - mean into a tile of `all` rows; zeros as in load_tile. The mean lies in the headers of the prepared steps.
GMK_DEV void load_residuals(float* tile, int stride, const float* x, const float* p, int rows, int all, int d,
                            int tiles) {
  const int packs = 2 * tiles;
  const bool wide = d % 4 == 0 && aligned(x, 16);
  for (int e = int(threadIdx.x); e < all * packs; e += int(blockDim.x)) {
    const int row = e / packs, f = 4 * (e % packs);
    const Pack<float, 4> mean = load_pack<float, 4>(p + step_offset(tiles, f / 8) + f % 8);
    Pack<float, 4> t{};
    if (row < rows) {
      const float* const from = x + int64_t(row) * d + f;
      if (wide) {
        if (f < d) t = load_pack<float, 4>(from);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) t.v[i] = f + i < d ? from[i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) t.v[i] -= mean.v[i];
    }
    store_pack(tile + row * stride + f, t);
  }
}

// 16 features from 16 m on (rows of the result) times eight rows of the tile, each times its weight.
template <bool tf32>
GMK_DEV void weighted_fragment(uint32_t (&hi)[4], uint32_t (&lo)[4], const float* rows, int stride, int m, int tiles,
                               float w0, float w1) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * m + (e & 1);
    const float t = column < tiles ? rows[(e >> 1) * stride + 8 * column + lane_of().g] : 0.0f;
    const Split s = split<tf32>((e >> 1 ? w1 : w0) * t);
    hi[e] = s.hi;
    lo[e] = s.lo;
  }
}

template <int KT, bool tf32>
__global__ void __launch_bounds__(kMatrixThreads, kMatrixBlocks<KT>)
    gmm_matrix_statistics_kernel(GmmLogProbBackward a, double* all_sums, int64_t slabs, int rows, int pull) {
  if (!has_mma()) return;
  constexpr int kPairs = KT / 4, kShares = 4 / kPairs, kSlots = KT + 2, kPanel = 4;
  GMK_DYN_SHARED(bytes);
  const GmmInputs& in = a.in;
  const int d = int(in.d), tiles = (d + 7) / 8, stride = 8 * tiles + 4, tid = int(threadIdx.x), warp = tid / 32;
  const int low = warp % kPairs, high = KT / 2 - 1 - low, share = warp / kPairs, in_low = KT - 2 * low;
  const Lane at = lane_of();
  float* const p = reinterpret_cast<float*>(bytes);
  float* const tile = p + step_offset(tiles, tiles);
  float* const weights = tile + rows * stride;
  int* const kept = reinterpret_cast<int*>(weights + rows);
  const int64_t count = 1 + d + int64_t(d) * (d + 1) / 2, per = step_offset(tiles, pull ? 2 * tiles : tiles);
  const int64_t slab_rows = ((in.n + slabs - 1) / slabs + kRows - 1) / kRows * kRows;
  for (int64_t job = blockIdx.x; job < slabs * in.b * in.k; job += gridDim.x) {
    const int64_t slab = job / (in.b * in.k), b = job / in.k % in.b;
    const float* const component = static_cast<const float*>(a.prepared) + job % (in.b * in.k) * per;
    double* const sums = all_sums + job * count;
    const float own = component[8];
    if (own == -infinity<float>()) {
      for (int64_t s = tid; s < count; s += kMatrixThreads) sums[s] = 0;
      continue;
    }
    __syncthreads();
    for (int e = 4 * tid; e < step_offset(tiles, tiles); e += 4 * kMatrixThreads) cp_async16(p + e, component + e);
    cp_async_commit();
    cp_async_wait<0>();
    if (tid == 0) *kept = d;
    float sum[kSlots][4] = {};
    double mass = 0, moment = 0;
    bool fresh = true;
    int unflushed = 0;
    const int64_t begin = slab * slab_rows, end = begin + slab_rows < in.n ? begin + slab_rows : in.n;
    for (int64_t first = begin;; first += rows) {
      if (first >= end || unflushed == kFlush) {
        for (int turn = 0; turn < kShares; ++turn) {  // one after another: the warps that share these numbers
          __syncthreads();
          if (turn != share) continue;
          const int features = *kept;  // from memory: else the addresses of all sums would stay in registers all along
          int row = 16 * low + at.g, column = 16 * low + 2 * at.t;
#pragma unroll
          for (int q = 0; q < kSlots; ++q) {
            if (q == in_low) row = 16 * high + at.g, column = 16 * high + 2 * at.t;
            // Where (row, column) is, and how far below it (row + 8, column).
            double* const to = sums + 1 + features + row * features - row * (row + 1) / 2 + column;
            const int below = 8 * features - 8 * row - 36;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if (row + 8 * (e >> 1) <= column + (e & 1) && column + (e & 1) < features) {
                double* const one = to + (e >> 1) * below + (e & 1);
                *one = (fresh && turn == 0 ? 0.0 : *one) + double(sum[q][e]);
              }
              sum[q][e] = 0.0f;
            }
            column += 8;
          }
        }
        fresh = false;
        unflushed = 0;
      }
      if (first >= end) break;
      ++unflushed;
      const int here = int(end - first < rows ? end - first : rows);
      __syncthreads();
      load_residuals(tile, stride, static_cast<const float*>(in.x) + b * in.x_stride + first * d, p, here, rows, d,
                     tiles);
      __syncthreads();
      if (16 * warp < rows) {
        float square = 0.0f;
#pragma unroll 1
        for (int from = 0; from < tiles; from += kPanel) {
          float y[1][kPanel][4] = {};
#pragma unroll 1
          for (int i = 0; i < tiles && i < from + kPanel; ++i)
            multiply_step<1, kPanel, false, tf32>(y, tile + 16 * warp * stride, stride, nullptr,
                                                  p + step_offset(tiles, i) + kHeader, i, tiles, from);
          square += own_square(y);
        }
        const int row = 16 * warp + own_row<1>();
        float w = 0.0f;
        if (row < here) {
          const int64_t i = b * in.n + first + row;
          w = row_weight(own, square, static_cast<const float*>(a.grad)[i], static_cast<const float*>(a.log_prob)[i]);
        }
        __syncwarp();
        if ((at.t & 2) == 0) {
          weights[row] = w;
          if (w == 0.0f && !(square < infinity<float>()))  // 0 times infinity must be 0
            for (int f = 0; f < 8 * tiles; ++f) tile[row * stride + f] = 0.0f;
        }
      }
      __syncthreads();
      float tile_mass = 0.0f, tile_moment = 0.0f;
      for (int r = 0; r < rows; r += 4) {
        const Pack<float, 4> w = load_pack<float, 4>(weights + r);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          tile_mass += w.v[i];
          if (tid < d) tile_moment += w.v[i] * tile[(r + i) * stride + tid];
        }
      }
      mass += double(tile_mass);
      moment += double(tile_moment);
      for (int s = share; s < rows / 8; s += kShares) {
        const int r = 8 * s + 2 * at.t;  // any order of the eight rows will do; this one has no bank conflict
        const float w0 = weights[r], w1 = weights[r + 1];
        if (!__any_sync(kFullWarp, w0 != 0.0f || w1 != 0.0f)) continue;
        const float* const t = tile + r * stride;
        uint32_t hi[4], lo[4];
        weighted_fragment<tf32>(hi, lo, t, stride, low, tiles, w0, w1);
        const float* right = t + 16 * low + at.g;
        int end_q = tiles - 2 * low;
#pragma unroll
        for (int q = 0; q < kSlots; ++q) {
          if (q == in_low) {
            weighted_fragment<tf32>(hi, lo, t, stride, high, tiles, w0, w1);
            right = t + 16 * high - 8 * in_low + at.g;
            end_q = tiles - 2 * high + in_low;
          }
          if (q >= end_q) continue;
          const Split u = split<tf32>(right[8 * q]), v = split<tf32>(right[stride + 8 * q]);
          multiply_add<tf32>(sum[q], hi, lo,
                             Pack<float, 4>{{bits_float(u.hi), bits_float(v.hi), bits_float(u.lo), bits_float(v.lo)}});
        }
      }
    }
    if (tid == 0) sums[0] = mass;
    if (tid < d) sums[1 + tid] = moment;
  }
}

template <int KT>
Status launch_grad_x(const GmmLogProbBackward& a, void* stream) {
  constexpr int M = kPullM<KT>;
  const int64_t n = a.in.n;
  const int tiles = int(a.in.d + 7) / 8, warps = int(n >= 64 * M ? 4 : (n + 16 * M - 1) / (16 * M));
  const int rows = warps * 16 * M, capacity = chunk_floats(tiles, 2 * tiles, kChunkSteps<KT>);
  const size_t bytes = sizeof(Kept) + (size_t(rows) * (8 * tiles + 4) + 2 * capacity) * sizeof(float);
  return GMK_LAUNCH((gmm_matrix_grad_x_kernel<KT>), grid_for(a.in.b * ((n + rows - 1) / rows), 1), 32 * warps, bytes,
                    stream, a, capacity);
}

template <int KT>
Status launch_statistics(const GmmLogProbBackward& a, double* sums, int64_t slabs, bool pull, void* stream) {
  const int tiles = int(a.in.d + 7) / 8, rows = tiles > 15 ? 48 : 64;  // in 99 KiB, the least of the generations
  const size_t bytes = (size_t(step_offset(tiles, tiles)) + rows * (8 * tiles + 4) + rows + 4) * sizeof(float);
  const auto grid = grid_for(slabs * a.in.b * a.in.k, 1);
  if (a.in.tf32)
    return GMK_LAUNCH((gmm_matrix_statistics_kernel<KT, true>), grid, kMatrixThreads, bytes, stream, a, sums, slabs,
                      rows, int(pull));
  return GMK_LAUNCH((gmm_matrix_statistics_kernel<KT, false>), grid, kMatrixThreads, bytes, stream, a, sums, slabs,
                    rows, int(pull));
}

}  // namespace

Status gmm_matrix_grad_x(const GmmLogProbBackward& a, void* stream) {
  return for_tiles(a.in.d, [&](auto t) { return launch_grad_x<decltype(t)::value>(a, stream); });
}
Status gmm_matrix_statistics(const GmmLogProbBackward& a, double* sums, int64_t slabs, bool pull, void* stream) {
  return for_tiles(a.in.d, [&](auto t) { return launch_statistics<decltype(t)::value>(a, sums, slabs, pull, stream); });
}

}  // namespace gmk

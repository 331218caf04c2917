// diag and spherical in float32, d <= 128: plain multiply-adds, three instructions per row, component and feature (t = x -
// mean, y = t scale, sum += y y), never on x^2. A tile of rows and a chunk of components lie in shared memory, features in
// packs of four, so that one 128-bit load feeds four features; a thread follows kOwn rows and meets kGroup components at a
// time, which makes 24 multiply-adds of each pair of loads and one rescaling of the log-sum-exp per kGroup.
// grad_x: the same, then a second run over the features; sums in shared memory, in component order.
// Statistics: a block is one group of components and one slab of rows. Per tile of rows first a thread is a row (weights),
// then a thread is a component and a feature (sums over the tile's rows, then float64). No atomics: one owner, fixed order.
#include "gmm/gmm_cuda.h"
#include "gmm/gmm_plain.cuh"

namespace gmk {
namespace {

constexpr int kOwn = 2, kGroup = 4, kChunk = 16;  // rows of a thread; components at a time, in shared memory
constexpr int kStatRows = 128, kStatGroup = 8;

// Shared memory: parameters[chunk][d / 4]{means 4, scales 4}, constants[chunk]; then rows with this stride.
GMK_HD int packed(int d) { return (d + 3) / 4; }
GMK_HD int row_stride(int d) { return 4 * packed(d) + (packed(d) % 2 ? 0 : 4); }  // 4 modulo 8: no bank conflict

// Components c0 .. c0 + chunk into shared memory, those past the last as components without weight.
GMK_DEV void load_components(float* to, float* constants, const Parameters<float>& p, int64_t c0, int chunk) {
  const int d = int(p.d), packs = packed(d);
  for (int e = int(threadIdx.x); e < chunk * 4 * packs; e += int(blockDim.x)) {
    const int c = e / (4 * packs), f = e % (4 * packs);
    const bool inside = c0 + c < p.k && f < d;
    float* const at = to + (c * packs + f / 4) * 8 + f % 4;
    at[0] = inside ? p.means[(c0 + c) * d + f] : 0.0f;
    at[4] = inside ? p.scale(c0 + c, f) : 0.0f;
  }
  const int lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  for (int c = int(threadIdx.x) / 32; c < chunk; c += warps) {
    double sum = 0;
    bool dead = c0 + c >= p.k || p.log_weights[c0 + c] == -infinity<float>();
    for (int f = lane; c0 + c < p.k && f < (p.covariance == kDiag ? d : 1); f += 32) {
      const float v = p.scale(c0 + c, f);
      dead = dead || v == 0.0f;
      sum += log(fabs(double(v))) * (p.covariance == kDiag ? 1 : d);
    }
    dead = __any_sync(kFullWarp, dead);
    sum = warp_sum(sum);
    if (lane == 0)
      constants[c] =
          dead ? -infinity<float>() : float(double(p.log_weights[c0 + c]) - 0.91893853320467274178 * d + sum);
  }
}

GMK_DEV void load_rows_packed(float* tile, const float* x, int rows, int all, int d) {
  const int packs = packed(d), stride = row_stride(d);
  const bool wide = d % 4 == 0 && aligned(x, 16);
  for (int e = int(threadIdx.x); e < all * packs; e += int(blockDim.x)) {
    const int row = e / packs, f = 4 * (e % packs);
    Pack<float, 4> v{};
    if (row < rows) {
      const float* const from = x + int64_t(row) * d + f;
      if (wide) {
        v = load_pack<float, 4>(from);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v.v[i] = f + i < d ? from[i] : 0.0f;
      }
    }
    store_pack(tile + row * stride + f, v);
  }
}

// square[r][c] = |y|^2 of the thread's rows and C components.
template <int R, int C>
GMK_DEV void squares(float (&square)[R][C], const float* tile, int step, int stride, const float* components,
                     int packs) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c) square[r][c] = 0.0f;
  for (int f = 0; f < packs; ++f) {
    Pack<float, 4> x[R];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = load_pack<float, 4>(tile + r * step * stride + 4 * f);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Pack<float, 4> mean = load_pack<float, 4>(components + (c * packs + f) * 8);
      const Pack<float, 4> scale = load_pack<float, 4>(components + (c * packs + f) * 8 + 4);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float y = (x[r].v[i] - mean.v[i]) * scale.v[i];
          square[r][c] += y * y;
        }
    }
  }
}

__global__ void __launch_bounds__(128, 4) gmm_diagonal_log_prob_kernel(GmmLogProb a) {
  GMK_DYN_SHARED(bytes);
  const GmmInputs& in = a.in;
  const int d = int(in.d), packs = packed(d), stride = row_stride(d), threads = int(blockDim.x), rows = threads * kOwn;
  float* const components = reinterpret_cast<float*>(bytes);
  float* const constants = components + kChunk * packs * 8;
  float* const tile = constants + kChunk;
  const float* const own = tile + int(threadIdx.x) * stride;
  const int64_t tiles = (in.n + rows - 1) / rows;
  for (int64_t job = blockIdx.x; job < in.b * tiles; job += gridDim.x) {
    const int64_t b = job / tiles, first = job % tiles * rows, rest = in.n - first;
    const Parameters<float> p = parameters<float>(in, b);
    __syncthreads();
    load_rows_packed(tile, static_cast<const float*>(in.x) + b * in.x_stride + first * d,
                     int(rest < rows ? rest : rows), rows, d);
    float best[kOwn], sum[kOwn] = {};
    for (int r = 0; r < kOwn; ++r) best[r] = -infinity<float>();
    for (int64_t c0 = 0; c0 < in.k; c0 += kChunk) {
      __syncthreads();
      load_components(components, constants, p, c0, kChunk);
      __syncthreads();
      for (int c = 0; c < kChunk && c0 + c < in.k; c += kGroup) {
        float lp[kOwn][kGroup];
        squares(lp, own, threads, stride, components + c * packs * 8, packs);
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          float top = best[r];
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const float constant = constants[c + i];
            lp[r][i] = constant == -infinity<float>() ? constant : constant - 0.5f * lp[r][i];
            top = lp[r][i] > top ? lp[r][i] : top;
          }
          const float from = top == -infinity<float>() ? 0.0f : top;
          sum[r] *= gmm_exp(best[r] - from);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) sum[r] += gmm_exp(lp[r][i] - from);  // NaN stays
          best[r] = top;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int row = int(threadIdx.x) + r * threads;
      if (row >= rest) continue;
      bool nan = false, infinite = false;
      for (int f = 0; f < d; ++f) {
        const float v = tile[row * stride + f];
        nan = nan || v != v;
        infinite = infinite || fabsf(v) == infinity<float>();
      }
      const bool none = sum[r] == 0.0f || (infinite && !nan);
      static_cast<float*>(a.out)[b * in.n + first + row] = none ? -infinity<float>() : best[r] + gmm_log(sum[r]);
    }
  }
}

GMK_DEV float diagonal_weight(float constant, float square, float grad, float log_prob) {
  if (log_prob == -infinity<float>() || constant == -infinity<float>()) return 0.0f;
  return grad * gmm_exp(constant - 0.5f * square - log_prob);
}

__global__ void __launch_bounds__(128, 4) gmm_diagonal_grad_x_kernel(GmmLogProbBackward a) {
  GMK_DYN_SHARED(bytes);
  const GmmInputs& in = a.in;
  const int d = int(in.d), packs = packed(d), stride = row_stride(d), threads = int(blockDim.x), rows = threads * kOwn;
  float* const components = reinterpret_cast<float*>(bytes);
  float* const constants = components + kChunk * packs * 8;
  float* const tile = constants + kChunk;
  float* const sums = tile + rows * stride;
  const int64_t tiles = (in.n + rows - 1) / rows;
  for (int64_t job = blockIdx.x; job < in.b * tiles; job += gridDim.x) {
    const int64_t b = job / tiles, first = job % tiles * rows, rest = in.n - first;
    const int count = int(rest < rows ? rest : rows);
    const Parameters<float> p = parameters<float>(in, b);
    __syncthreads();
    load_rows_packed(tile, static_cast<const float*>(in.x) + b * in.x_stride + first * d, count, rows, d);
    float grad[kOwn], log_prob[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int row = int(threadIdx.x) + r * threads;
      const int64_t at = b * in.n + first + row;
      grad[r] = row < count ? static_cast<const float*>(a.grad)[at] : 0.0f;
      log_prob[r] = row < count ? static_cast<const float*>(a.log_prob)[at] : -infinity<float>();
      for (int f = 0; f < packs; ++f) store_pack(sums + row * stride + 4 * f, Pack<float, 4>{});
    }
    for (int64_t c0 = 0; c0 < in.k; c0 += kChunk) {
      __syncthreads();
      load_components(components, constants, p, c0, kChunk);
      __syncthreads();
      for (int c = 0; c < kChunk && c0 + c < in.k; c += kGroup) {
        const float* const group = components + c * packs * 8;
        float w[kOwn][kGroup];
        squares(w, tile + int(threadIdx.x) * stride, threads, stride, group, packs);
        bool used = false;
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            w[r][i] = diagonal_weight(constants[c + i], w[r][i], grad[r], log_prob[r]);
            used = used || w[r][i] != 0.0f;
          }
        if (!used) continue;
        for (int f = 0; f < packs; ++f) {
          Pack<float, 4> x[kOwn], sum[kOwn];
#pragma unroll
          for (int r = 0; r < kOwn; ++r) {
            const int at = (int(threadIdx.x) + r * threads) * stride + 4 * f;
            x[r] = load_pack<float, 4>(tile + at);
            sum[r] = load_pack<float, 4>(sums + at);
          }
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const Pack<float, 4> mean = load_pack<float, 4>(group + (i * packs + f) * 8);
            const Pack<float, 4> scale = load_pack<float, 4>(group + (i * packs + f) * 8 + 4);
#pragma unroll
            for (int r = 0; r < kOwn; ++r)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const float pull = w[r][i] * ((x[r].v[e] - mean.v[e]) * scale.v[e]) * scale.v[e];
                sum[r].v[e] -= w[r][i] == 0.0f ? 0.0f : pull;
              }
          }
#pragma unroll
          for (int r = 0; r < kOwn; ++r) store_pack(sums + (int(threadIdx.x) + r * threads) * stride + 4 * f, sum[r]);
        }
      }
    }
    __syncthreads();
    float* const out = static_cast<float*>(a.grad_x) + (b * in.n + first) * d;
    if (d % 4 == 0 && aligned(out, 16)) {
      for (int e = int(threadIdx.x); e < count * packs; e += threads)
        store_pack(out + 4 * int64_t(e), load_pack<float, 4>(sums + e / packs * stride + 4 * (e % packs)));
    } else {
      for (int e = int(threadIdx.x); e < count * d; e += threads) out[e] = sums[e / d * stride + e % d];
    }
  }
}

// all_sums is [slabs][b][k][1 + 2 d]: sum w, sum w y, sum w y^2.
__global__ void __launch_bounds__(kStatRows, 4)
    gmm_diagonal_statistics_kernel(GmmLogProbBackward a, double* all_sums, int64_t slabs) {
  GMK_DYN_SHARED(bytes);
  const GmmInputs& in = a.in;
  const int d = int(in.d), packs = packed(d), stride = row_stride(d), tid = int(threadIdx.x), count = 1 + 2 * d;
  double* const sums = reinterpret_cast<double*>(bytes);
  float* const components = reinterpret_cast<float*>(sums + kStatGroup * (count + 1));
  float* const constants = components + kStatGroup * packs * 8;
  float* const weights = constants + kStatGroup;  // [kStatGroup][kStatRows]
  float* const tile = weights + kStatGroup * kStatRows;
  const int64_t groups = (in.k + kStatGroup - 1) / kStatGroup;
  const int64_t slab_rows = ((in.n + slabs - 1) / slabs + kRows - 1) / kRows * kRows;
  for (int64_t job = blockIdx.x; job < slabs * in.b * groups; job += gridDim.x) {
    const int64_t slab = job / (in.b * groups), b = job / groups % in.b, c0 = job % groups * kStatGroup;
    const Parameters<float> p = parameters<float>(in, b);
    __syncthreads();
    load_components(components, constants, p, c0, kStatGroup);
    for (int s = tid; s < kStatGroup * count; s += kStatRows) sums[s] = 0;
    const int64_t end = (slab + 1) * slab_rows < in.n ? (slab + 1) * slab_rows : in.n;
    for (int64_t first = slab * slab_rows; first < end; first += kStatRows) {
      const int rows = int(end - first < kStatRows ? end - first : kStatRows);
      __syncthreads();
      load_rows_packed(tile, static_cast<const float*>(in.x) + b * in.x_stride + first * d, rows, kStatRows, d);
      __syncthreads();
      float square[1][kStatGroup];
      squares(square, tile + tid * stride, 0, stride, components, packs);
      const int64_t row = b * in.n + first + tid;
      const float grad = tid < rows ? static_cast<const float*>(a.grad)[row] : 0.0f;
      const float log_prob = tid < rows ? static_cast<const float*>(a.log_prob)[row] : -infinity<float>();
#pragma unroll
      for (int c = 0; c < kStatGroup; ++c)
        weights[c * kStatRows + tid] = diagonal_weight(constants[c], square[0][c], grad, log_prob);
      __syncthreads();
      for (int s = tid; s < kStatGroup * (d + 1); s += kStatRows) {
        const int c = s / (d + 1), f = s % (d + 1) - 1;
        if (constants[c] == -infinity<float>()) continue;
        const float* const at = components + (c * packs + (f < 0 ? 0 : f) / 4) * 8 + (f < 0 ? 0 : f) % 4;
        const float mean = at[0], scale = at[4];
        float one = 0.0f, two = 0.0f;
        for (int r = 0; r < kStatRows; r += 4) {
          const Pack<float, 4> w = load_pack<float, 4>(weights + c * kStatRows + r);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float y = f < 0 ? 1.0f : (tile[(r + i) * stride + f] - mean) * scale;
            if (w.v[i] == 0.0f) continue;  // y may be infinite
            one += w.v[i] * y;
            two += w.v[i] * y * y;
          }
        }
        if (f < 0) {
          sums[c * count] += double(one);
        } else {
          sums[c * count + 1 + f] += double(one);
          sums[c * count + 1 + d + f] += double(two);
        }
      }
    }
    __syncthreads();
    double* const out = all_sums + ((slab * in.b + b) * in.k + c0) * count;
    const int64_t here = in.k - c0 < kStatGroup ? in.k - c0 : kStatGroup;
    for (int s = tid; s < here * count; s += kStatRows) out[s] = sums[s];
  }
}

int threads_for(int64_t n, int64_t d, int tiles) {  // as many as give two blocks or more a multiprocessor
  int threads = d * tiles <= 32 ? 128 : d * tiles <= 64 ? 64 : 32;
  while (threads > 32 && n <= threads * kOwn / 2) threads /= 2;
  return threads;
}
size_t shared_bytes(int threads, int64_t d, int tiles) {
  const int64_t floats = kChunk * packed(int(d)) * 8 + kChunk + threads * kOwn * row_stride(int(d)) * int64_t(tiles);
  return size_t(floats) * sizeof(float);
}

}  // namespace

Status gmm_diagonal_log_prob(const GmmLogProb& a, void* stream) {
  const int threads = threads_for(a.in.n, a.in.d, 1), rows = threads * kOwn;
  return GMK_LAUNCH((gmm_diagonal_log_prob_kernel), grid_for(a.in.b * ((a.in.n + rows - 1) / rows), 1), threads,
                    shared_bytes(threads, a.in.d, 1), stream, a);
}
Status gmm_diagonal_grad_x(const GmmLogProbBackward& a, void* stream) {
  const int threads = threads_for(a.in.n, a.in.d, 2), rows = threads * kOwn;
  return GMK_LAUNCH((gmm_diagonal_grad_x_kernel), grid_for(a.in.b * ((a.in.n + rows - 1) / rows), 1), threads,
                    shared_bytes(threads, a.in.d, 2), stream, a);
}
Status gmm_diagonal_statistics(const GmmLogProbBackward& a, double* sums, int64_t slabs, void* stream) {
  const int d = int(a.in.d);
  const size_t bytes = kStatGroup * (2 + 2 * d) * sizeof(double) +
                       (kStatGroup * (packed(d) * 8 + 1 + kStatRows) + kStatRows * row_stride(d)) * sizeof(float);
  const int64_t groups = (a.in.k + kStatGroup - 1) / kStatGroup;
  return GMK_LAUNCH((gmm_diagonal_statistics_kernel), grid_for(slabs * a.in.b * groups, 1), kStatRows, bytes, stream, a,
                    sums, slabs);
}

}  // namespace gmk

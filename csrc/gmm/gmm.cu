// Forward. full, tied in float32 with tensor cores (gmm_matrix.cuh says how): a block holds a tile of rows in shared memory
// and meets the components in order; every warp has rows of its own, 16 M of them, all of their y in registers, and each
// lane follows the log-sum-exp of one row. Everything else: the plain path (gmm_plain.cuh).
// Bound: full, tied d^2/2 multiply-adds per row and component, three times that on the tensor cores; diag 3 d instructions.
#include "gmm/gmm_matrix.cuh"

namespace gmk {
namespace {

template <class T>
__global__ void __launch_bounds__(kRows, kBlocks) gmm_log_prob_kernel(GmmLogProb a, int shared) {
  GMK_DYN_SHARED(bytes);
  GMK_SHARED(constants, T[kRows]);
  T* const tile = reinterpret_cast<T*>(bytes);
  const GmmInputs& in = a.in;
  const int64_t tiles = (in.n + kRows - 1) / kRows;
  for (int64_t job = blockIdx.x; job < in.b * tiles; job += gridDim.x) {
    const int64_t b = job / tiles, first = job % tiles * kRows, rest = in.n - first, rows = rest < kRows ? rest : kRows;
    const Parameters<T> p = parameters<T>(in, b);
    const Row<T> x = load_rows(tile, shared, static_cast<const T*>(in.x) + b * in.x_stride, first, rows, in.d);
    T best = -infinity<T>(), sum = T(0);
    for (int64_t c0 = 0; c0 < in.k; c0 += kRows) {
      __syncthreads();
      if (c0 + threadIdx.x < in.k) constants[threadIdx.x] = constant(p, c0 + threadIdx.x);
      __syncthreads();
      for (int64_t c = c0; c < in.k && c < c0 + kRows; ++c) {
        const T own = constants[c - c0];
        if (own == -infinity<T>()) continue;
        const T lp = own - T(0.5) * square_distance(x, p, c);
        if (lp > best) {
          sum = sum * gmm_exp(best - lp) + T(1);
          best = lp;
        } else if (lp != -infinity<T>()) {
          sum += gmm_exp(lp - best);  // NaN stays
        }
      }
    }
    bool nan = false, inf = false;
    for (int64_t f = 0; f < in.d; ++f) {
      nan = nan || x[f] != x[f];
      inf = inf || x[f] == infinity<T>() || x[f] == -infinity<T>();
    }
    T r = sum == T(0) ? -infinity<T>() : best + gmm_log(sum);
    if (in.k == 0 || (inf && !nan)) r = -infinity<T>();
    if (threadIdx.x < rows) static_cast<T*>(a.out)[b * in.n + first + threadIdx.x] = r;
  }
}

template <int KT>
constexpr int kForwardM = KT <= 8 ? 2 : 1;  // y takes 4 M KT registers

template <int KT, bool tf32>
__global__ void __launch_bounds__(kMatrixThreads, kMatrixBlocks<KT>)
    gmm_matrix_log_prob_kernel(GmmLogProb a, int capacity) {
  if (!has_mma()) return;
  constexpr int M = kForwardM<KT>;
  GMK_DYN_SHARED(bytes);
  const GmmInputs& in = a.in;
  const int d = int(in.d), k = int(in.k), tiles = (d + 7) / 8, stride = 8 * tiles + 4;
  const int rows = int(blockDim.x) / 32 * 16 * M;
  const int mine = int(threadIdx.x) / 32 * 16 * M + own_row<M>();
  float* const tile = reinterpret_cast<float*>(bytes);
  const float* const first_row = tile + int(threadIdx.x) / 32 * 16 * M * stride;
  const int64_t blocks = (in.n + rows - 1) / rows, per = step_offset(tiles, tiles);
  for (int64_t job = blockIdx.x; job < in.b * blocks; job += gridDim.x) {
    const int64_t b = job / blocks, first = job % blocks * rows, rest = in.n - first;
    __syncthreads();
    load_tile(tile, stride, static_cast<const float*>(in.x) + b * in.x_stride + first * d,
              int(rest < rows ? rest : rows), rows, d, 8 * tiles);
    Steps<false, kChunkSteps<KT>> steps(static_cast<const float*>(a.scratch) + b * k * per, tile + rows * stride,
                                        capacity, tiles, k);
    float best = -infinity<float>(), sum = 0.0f;
    bool any = false;
    for (int c = 0; c < k; ++c) {
      float y[M][KT][4] = {}, own = 0.0f;
      for (int i = 0; i < tiles; ++i) {
        const float* const step = steps.next(kHeader + kBlock * (tiles - i));
        own = step[8];
        if (own == -infinity<float>()) continue;
        multiply_step<M, KT, true, tf32>(y, first_row, stride, step, step + kHeader, i, tiles);
      }
      if (own == -infinity<float>()) continue;
      any = true;
      const float lp = own - 0.5f * own_square(y);
      if (lp > best) {
        sum = sum * gmm_exp(best - lp) + 1.0f;
        best = lp;
      } else if (lp > -infinity<float>() || own != own) {  // products of huge numbers may be inf - inf: no density
        sum += gmm_exp(lp - best);
      }
    }
    const RowKind kind = row_kind(tile + mine * stride, d);
    float r = sum == 0.0f || (kind.infinite && !kind.nan) ? -infinity<float>() : best + gmm_log(sum);
    if (kind.nan && any) r = bits_float(0x7fc00000u);
    if (mine < rest && (M == 2 || (threadIdx.x & 2) == 0)) static_cast<float*>(a.out)[b * in.n + first + mine] = r;
  }
}

template <class T>
Status launch(const GmmLogProb& a, void* stream) {
  const int64_t bytes = a.in.d * kRows * int64_t(sizeof(T));
  const int shared = bytes <= kTileBytes;
  return GMK_LAUNCH((gmm_log_prob_kernel<T>), grid_for(a.in.b * ((a.in.n + kRows - 1) / kRows), 1), kRows,
                    shared ? size_t(bytes) : 0, stream, a, shared);
}

template <int KT>
Status launch_matrix(const GmmLogProb& a, void* stream) {
  constexpr int M = kForwardM<KT>;
  const Status status = gmm_prepare(a.in, static_cast<float*>(a.scratch), false, stream);
  if (status) return status;
  const int tiles = int(a.in.d + 7) / 8, warps = int(a.in.n >= 64 * M ? 4 : (a.in.n + 16 * M - 1) / (16 * M));
  const int rows = warps * 16 * M, capacity = chunk_floats(tiles, tiles, kChunkSteps<KT>);
  const size_t bytes = (size_t(rows) * (8 * tiles + 4) + 2 * capacity) * sizeof(float);
  const auto grid = grid_for(a.in.b * ((a.in.n + rows - 1) / rows), 1);
  if (a.in.tf32)
    return GMK_LAUNCH((gmm_matrix_log_prob_kernel<KT, true>), grid, 32 * warps, bytes, stream, a, capacity);
  return GMK_LAUNCH((gmm_matrix_log_prob_kernel<KT, false>), grid, 32 * warps, bytes, stream, a, capacity);
}

}  // namespace

Status gmm_row_log_prob(const GmmLogProb& a, void* stream) {
  if (a.in.dtype == kFloat64) return launch<double>(a, stream);
  const bool tensor_cores = gmm_has_tensor_cores();
  if (diagonal_path(a.in, tensor_cores)) return gmm_diagonal_log_prob(a, stream);
  if (tensor_cores && matrix_path(a.in, a.scratch_bytes, false))
    return for_tiles(a.in.d, [&](auto t) { return launch_matrix<decltype(t)::value>(a, stream); });
  return launch<float>(a, stream);
}

Status gmm_log_prob_cuda(const GmmLogProb& a, int device, void* stream) {
  if (a.in.b <= 0 || a.in.n <= 0) return kOk;
  const DeviceGuard guard(device);
  return gmm_row_log_prob(a, stream);
}

}  // namespace gmk

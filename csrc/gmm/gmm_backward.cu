// Backward: the kernels of the plain path (gmm_plain.cuh), and what both paths end with.
// grad_x is summed per row in component order. The parameters' statistics are summed per (slab of rows, component) by one
// block each, in float64 across tiles, then over the slabs in order: no atomics, and slabs depend on sizes only, so the
// result is the same on every GPU and for every grid.
// Bound: full 2 k d^2 multiply-adds per row, diag 8 k d.
#include "gmm/gmm_cuda.h"
#include "gmm/gmm_plain.cuh"

namespace gmk {
namespace {

// grad_x -= w P y
template <class T>
GMK_DEV void subtract_pull(T* grad_x, int64_t step, Row<T> x, const Parameters<T>& p, int64_t c, T w) {
  const T* const mean = p.means + c * p.d;
  if (!p.matrix()) {
    for (int64_t f = 0; f < p.d; ++f) {
      const T scale = p.scale(c, f);
      grad_x[f * step] -= w * ((x[f] - mean[f]) * scale) * scale;
    }
    return;
  }
  const T* const q = p.matrix_of(c);
  for (int64_t j = 0; j < p.d; j += kColumns) {
    T y[kColumns];
    times_columns(y, x, mean, q, p.d, j);
    for (int64_t r = 0; r < p.d && r < j + kColumns; ++r) {
      T pull = T(0);
      for (int e = 0; e < kColumns; ++e)
        if (j + e < p.d && r <= j + e) pull += q[r * p.d + j + e] * y[e];
      grad_x[r * step] -= w * pull;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kRows, kBlocks) gmm_grad_x_kernel(GmmLogProbBackward a, int shared) {
  GMK_DYN_SHARED(bytes);
  GMK_SHARED(constants, T[kRows]);
  T* const tile = reinterpret_cast<T*>(bytes);
  const GmmInputs& in = a.in;
  T* const sums = tile + in.d * kRows;  // grad_x of the tile, [d][kRows]
  const int64_t tiles = (in.n + kRows - 1) / kRows;
  for (int64_t job = blockIdx.x; job < in.b * tiles; job += gridDim.x) {
    const int64_t b = job / tiles, first = job % tiles * kRows, rest = in.n - first, rows = rest < kRows ? rest : kRows;
    const bool active = threadIdx.x < rows;
    const Parameters<T> p = parameters<T>(in, b);
    const Row<T> x = load_rows(tile, shared, static_cast<const T*>(in.x) + b * in.x_stride, first, rows, in.d);
    T* const out = static_cast<T*>(a.grad_x) + (b * in.n + first) * in.d;
    T* const grad_x = shared ? sums + threadIdx.x : out + threadIdx.x * in.d;
    const int64_t step = shared ? kRows : 1, row = b * in.n + first + (active ? threadIdx.x : 0);
    const T grad = static_cast<const T*>(a.grad)[row], log_prob = static_cast<const T*>(a.log_prob)[row];
    if (active)
      for (int64_t f = 0; f < in.d; ++f) grad_x[f * step] = T(0);
    for (int64_t c0 = 0; c0 < in.k; c0 += kRows) {
      __syncthreads();
      if (c0 + threadIdx.x < in.k) constants[threadIdx.x] = constant(p, c0 + threadIdx.x);
      __syncthreads();
      if (active)
        for (int64_t c = c0; c < in.k && c < c0 + kRows; ++c) {
          const T w = weight(x, p, c, constants[c - c0], grad, log_prob);
          if (w != T(0)) subtract_pull(grad_x, step, x, p, c, w);
        }
    }
    __syncthreads();
    if (shared)
      for (int64_t i = threadIdx.x; i < rows * in.d; i += kRows) out[i] = sums[i % in.d * kRows + i / in.d];
  }
}

template <class T>
__global__ void __launch_bounds__(kRows, kBlocks)
    gmm_statistics_kernel(GmmLogProbBackward a, int shared, int64_t slabs) {
  GMK_DYN_SHARED(bytes);
  GMK_SHARED(weights, T[kRows]);
  T* const tile = reinterpret_cast<T*>(bytes);
  const GmmInputs& in = a.in;
  const int64_t count = statistics_of(in), d = in.d;
  const int64_t per = ((in.n + slabs - 1) / slabs + kRows - 1) / kRows * kRows;  // rows of a slab
  for (int64_t job = blockIdx.x; job < slabs * in.b * in.k; job += gridDim.x) {
    const int64_t slab = job / (in.b * in.k), b = job / in.k % in.b, c = job % in.k;
    const Parameters<T> p = parameters<T>(in, b);
    const T own = constant(p, c);
    const T* const mean = p.means + c * d;
    double* const sums = static_cast<double*>(a.scratch) + job * count;
    for (int64_t s = threadIdx.x; s < count; s += kRows) sums[s] = 0;
    const int64_t end = (slab + 1) * per < in.n ? (slab + 1) * per : in.n;
    for (int64_t first = slab * per; first < end; first += kRows) {
      const int64_t rows = end - first < kRows ? end - first : kRows;
      const T* const global = static_cast<const T*>(in.x) + b * in.x_stride;
      const Row<T> x = load_rows(tile, shared, global, first, rows, d);
      __syncthreads();
      if (threadIdx.x < rows) {
        const int64_t row = b * in.n + first + threadIdx.x;
        weights[threadIdx.x] =
            weight(x, p, c, own, static_cast<const T*>(a.grad)[row], static_cast<const T*>(a.log_prob)[row]);
      }
      __syncthreads();
      const T* const all = shared ? tile : global + first * d;
      const int64_t step = shared ? kRows : 1, next = shared ? 1 : d;  // to the next feature, to the next row
      for (int64_t s = threadIdx.x; s < count; s += kRows) {
        double sum = 0;
        int64_t i = s - 1, j = -1;  // features; j < 0: none
        if (p.matrix() && s > d) {
          int64_t left = s - 1 - d;
          for (i = 0; left >= d - i; ++i) left -= d - i;
          j = i + left;
        } else if (!p.matrix() && s > d) {
          i = j = s - 1 - d;
        }
        const T scale_i = i >= 0 && !p.matrix() ? p.scale(c, i) : T(1);
        const T scale_j = j >= 0 && !p.matrix() ? p.scale(c, j) : T(1);
        for (int64_t r = 0; r < rows; ++r) {
          const T w = weights[r];
          if (w == T(0)) continue;
          T e = w;
          if (i >= 0) e *= (all[i * step + r * next] - mean[i]) * scale_i;
          if (j >= 0) e *= (all[j * step + r * next] - mean[j]) * scale_j;
          sum += double(e);
        }
        sums[s] += sum;
      }
    }
  }
}

// Slabs added in order, into slab 0.
__global__ void __launch_bounds__(kRows) gmm_sum_slabs_kernel(double* sums, int64_t count, int64_t slabs) {
  for (int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x; i < count; i += int64_t(gridDim.x) * kRows) {
    double sum = 0;
    for (int64_t s = 0; s < slabs; ++s) sum += sums[s * count + i];
    sums[i] = sum;
  }
}

// One gradient of P[row][column] from one component's statistics.
template <class T>
GMK_DEV double matrix_gradient(const double* sums, const T* p, int64_t d, int64_t row, int64_t column) {
  if (row > column) return 0;
  double g = 0;
  for (int64_t i = 0; i <= column; ++i) g -= sums[second_moment_at(d, row, i)] * double(p[i * d + column]);
  if (row == column && sums[0] != 0) g += sums[0] / double(p[row * d + row]);
  return g;
}

// One thread is one number of the parameters' gradients.
template <class T>
__global__ void __launch_bounds__(kRows) gmm_grad_parameters_kernel(GmmLogProbBackward a) {
  const GmmInputs& in = a.in;
  const int64_t count = statistics_of(in), k = in.k, d = in.d;
  const int64_t matrix = covariance_numbers(k, d, in.covariance), per = k + k * d + matrix;
  for (int64_t job = int64_t(blockIdx.x) * kRows + threadIdx.x; job < in.b * per; job += int64_t(gridDim.x) * kRows) {
    const int64_t b = job / per;
    int64_t i = job % per;
    const Parameters<T> p = parameters<T>(in, b);
    const double* const mixture = static_cast<const double*>(a.scratch) + b * k * count;
    if (i < k) {
      static_cast<T*>(a.grad_log_weights)[b * k + i] = T(mixture[i * count]);
      continue;
    }
    i -= k;
    if (i < k * d) {
      const int64_t c = i / d, f = i % d;
      const double* const s = mixture + c * count;
      double g = 0;
      if (left_out(p, c)) {     // 0 times whatever it holds
      } else if (p.matrix()) {  // (P P^T s1)[f]
        const T* const q = p.matrix_of(c);
        for (int64_t e = f; e < d; ++e) {
          double projected = 0;
          for (int64_t r = 0; r <= e; ++r) projected += s[1 + r] * double(q[r * d + e]);
          g += double(q[f * d + e]) * projected;
        }
      } else {
        g = double(p.scale(c, f)) * s[1 + f];
      }
      static_cast<T*>(a.grad_means)[b * k * d + i] = T(g);
      continue;
    }
    i -= k * d;
    double g = 0;
    if (in.covariance == kFull) {
      const int64_t c = i / (d * d), row = i / d % d;
      if (!left_out(p, c)) g = matrix_gradient(mixture + c * count, p.matrix_of(c), d, row, i % d);
    } else if (in.covariance == kTied) {
      for (int64_t c = 0; c < k; ++c)
        if (!left_out(p, c)) g += matrix_gradient(mixture + c * count, p.precisions, d, i / d, i % d);
    } else {
      const int64_t c = in.covariance == kDiag ? i / d : i;
      const int64_t begin = in.covariance == kDiag ? i % d : 0, end = in.covariance == kDiag ? begin + 1 : d;
      const double* const s = mixture + c * count;
      for (int64_t f = begin; f < end; ++f) {
        const double rest = s[0] - s[1 + d + f];
        if (rest != 0) g += rest / double(p.scale(c, f));
      }
    }
    static_cast<T*>(a.grad_precisions)[b * matrix + i] = T(g);
  }
}

struct Paths {
  bool matrix, diagonal;
};
Paths paths_of(const GmmLogProbBackward& a) {
  if (a.in.dtype == kFloat64) return {false, false};
  const bool tensor_cores = gmm_has_tensor_cores();
  return {tensor_cores && matrix_path(a.in, a.prepared_bytes, a.need_x), diagonal_path(a.in, tensor_cores)};
}

template <class T>
int64_t tile_bytes(const GmmInputs& in) {  // of the plain kernels; 0: rows are read from global memory
  const int64_t bytes = in.d * kRows * int64_t(sizeof(T));
  return bytes <= kTileBytes ? bytes : 0;
}

template <class T>
Status row_sums(const GmmLogProbBackward& a, Paths paths, int64_t slabs, void* stream) {
  const GmmInputs& in = a.in;
  const int64_t count = in.b * in.k * statistics_of(in), bytes = tile_bytes<T>(in);
  if (!count) return kOk;
  double* const sums = static_cast<double*>(a.scratch);
  const Status status = paths.matrix     ? gmm_matrix_statistics(a, sums, slabs, a.need_x, stream)
                        : paths.diagonal ? gmm_diagonal_statistics(a, sums, slabs, stream)
                                         : GMK_LAUNCH((gmm_statistics_kernel<T>), grid_for(slabs * in.b * in.k, 1),
                                                      kRows, size_t(bytes), stream, a, int(bytes > 0), slabs);
  return status ? status
                : GMK_LAUNCH((gmm_sum_slabs_kernel), grid_for(count, kRows), kRows, 0, stream, sums, count, slabs);
}

template <class T>
Status launch_backward(const GmmLogProbBackward& a, Paths paths, void* stream) {
  const GmmInputs& in = a.in;
  if (paths.matrix && in.n > 0) {
    const Status status = gmm_prepare(in, static_cast<float*>(a.prepared), a.need_x, stream);
    if (status) return status;
  }
  if (a.need_x && in.n > 0) {
    const int64_t bytes = tile_bytes<T>(in);
    const unsigned grid = grid_for(in.b * ((in.n + kRows - 1) / kRows), 1);
    const Status status = paths.matrix     ? gmm_matrix_grad_x(a, stream)
                          : paths.diagonal ? gmm_diagonal_grad_x(a, stream)
                                           : GMK_LAUNCH((gmm_grad_x_kernel<T>), grid, kRows, size_t(2 * bytes), stream,
                                                        a, int(bytes > 0));
    if (status) return status;
  }
  if (!a.need_parameters) return kOk;
  const int64_t count = in.b * in.k * statistics_of(in);
  const int64_t slabs = count ? a.scratch_bytes / (count * int64_t(sizeof(double))) : 1;
  if (slabs < 1) return "scratch is too small";
  const Status status = row_sums<T>(a, paths, slabs, stream);
  if (status) return status;
  const unsigned grid = grid_for(in.b * in.k * (1 + 2 * in.d), kRows);
  return GMK_LAUNCH((gmm_grad_parameters_kernel<T>), grid, kRows, 0, stream, a);
}

}  // namespace

Status gmm_row_sums(const GmmLogProbBackward& a, int64_t slabs, void* stream) {
  return a.in.dtype == kFloat64 ? row_sums<double>(a, paths_of(a), slabs, stream)
                                : row_sums<float>(a, paths_of(a), slabs, stream);
}

Status gmm_log_prob_backward_cuda(const GmmLogProbBackward& a, int device, void* stream) {
  if (a.in.b <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.in.dtype == kFloat64 ? launch_backward<double>(a, paths_of(a), stream)
                                : launch_backward<float>(a, paths_of(a), stream);
}

}  // namespace gmk

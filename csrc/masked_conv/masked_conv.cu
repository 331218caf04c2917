// Implicit matrix products over the list of live taps: a tile of kTile x kTile results per block, 4 x 4 per thread, both
// factors through shared memory kDepth at a time. Plain multiply-adds, so bound by them (67 TFLOP/s in float32 on an
// H200). No atomics: every result is one thread's, summed in a fixed order.
#include "cuda/prims.cuh"
#include "masked_conv/masked_conv.h"

namespace gmk {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256, kPerThread = kTile * kDepth / kThreads;

struct Strides {  // elements, of [b, c, h, w] in either format
  int64_t b, c, y, x;
};
GMK_DEV Strides strides(bool nhwc, int64_t c, int64_t h, int64_t w) {
  return nhwc ? Strides{c * h * w, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

struct Pixel {
  int64_t image;  // -1: none
  int64_t y, x;
};
GMK_DEV Pixel pixel_of(int64_t index, int64_t end, int64_t h, int64_t w) {
  return index < end ? Pixel{index / (h * w), index / w % h, index % w} : Pixel{-1, 0, 0};
}

template <class T>
GMK_DEV T seen(const T* x, const Strides& s, const Pixel& p, int64_t channel, int64_t dy, int64_t dx, int64_t h,
               int64_t w) {
  const int64_t y = p.y + dy, x0 = p.x + dx;
  const bool inside = p.image >= 0 && y >= 0 && y < h && x0 >= 0 && x0 < w;
  return inside ? x[p.image * s.b + channel * s.c + y * s.y + x0 * s.x] : T(0);
}

// acc[i][j] += sum over k of a[k][row i of this thread] * b[k][column j of this thread]. A thread's columns are 2 tx, 2 tx + 1
// and the same in the second half of the tile: where that holds sigmoid channels, gate partners meet in one thread.
GMK_DEV int tile_row(int i) { return int(threadIdx.x) / 16 * 4 + i; }
GMK_DEV int tile_column(int j) { return j / 2 * (kTile / 2) + int(threadIdx.x) % 16 * 2 + j % 2; }
template <class T>
GMK_DEV void multiply(const T (&a)[kDepth][kTile + 1], const T (&b)[kDepth][kTile], T (&acc)[4][4]) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    T u[4], v[4];
    for (int i = 0; i < 4; ++i) u[i] = a[k][tile_row(i)];
    for (int j = 0; j < 4; ++j) v[j] = b[k][tile_column(j)];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] += u[i] * v[j];
  }
}

// Output channel of a tile's column, or -1. With a gate a tile is kTile / 2 tanh channels and their sigmoid partners.
GMK_DEV int64_t channel_of(const MaskedConv& a, int64_t tile, int column) {
  if (a.gate == kPlain) return tile * kTile + column < a.c_out ? tile * kTile + column : -1;
  const int64_t gated = a.c_out / 2, channel = tile * (kTile / 2) + column % (kTile / 2);
  return channel >= gated ? -1 : column < kTile / 2 ? channel : gated + channel;
}

template <class T>
__global__ void __launch_bounds__(kThreads) masked_conv2d_kernel(MaskedConv a) {
  GMK_SHARED(xs, T[kDepth][kTile + 1]);
  GMK_SHARED(ws, T[kDepth][kTile]);
  GMK_SHARED(pixel, Pixel[kTile]);
  const T* const x = static_cast<const T*>(a.x);
  const T* const weight = static_cast<const T*>(a.weight);
  const T* const bias = static_cast<const T*>(a.bias);
  const T* const grad = static_cast<const T*>(a.grad);
  T* const out = static_cast<T*>(a.out);
  const int64_t pixels = a.b * a.h * a.w, gated = a.c_out / 2, tile = blockIdx.y;
  const Strides sx = strides(a.x_nhwc, a.c_in, a.h, a.w);
  const Strides so = strides(a.out_nhwc, a.gate == kGate ? gated : a.c_out, a.h, a.w);
  const Strides sg = strides(a.grad_nhwc, gated, a.h, a.w);
  const int tid = int(threadIdx.x);
  for (int64_t first = int64_t(blockIdx.x) * kTile; first < pixels; first += int64_t(gridDim.x) * kTile) {
    __syncthreads();
    if (tid < kTile) pixel[tid] = pixel_of(first + tid, pixels, a.h, a.w);
    T acc[4][4];
    for (int j = 0; j < 4; ++j) {
      const int64_t channel = channel_of(a, tile, tile_column(j));
      const T start = bias && channel >= 0 ? bias[channel] : T(0);
      for (int i = 0; i < 4; ++i) acc[i][j] = start;
    }
    for (int t = 0; t < a.taps.count; ++t) {
      const int64_t dy = tap_dy(a.taps, t), dx = tap_dx(a.taps, t);
      for (int64_t c0 = 0; c0 < a.c_in; c0 += kDepth) {
        __syncthreads();
        for (int i = 0; i < kPerThread; ++i) {
          const int e = tid + i * kThreads;  // neighbouring threads read neighbouring addresses of x
          const int k = a.x_nhwc ? e % kDepth : e / kTile, p = a.x_nhwc ? e / kDepth : e % kTile;
          xs[k][p] = c0 + k < a.c_in ? seen(x, sx, pixel[p], c0 + k, dy, dx, a.h, a.w) : T(0);
          const int64_t row = c0 + e / kTile, channel = channel_of(a, tile, e % kTile);
          const bool used = row < a.c_in && channel >= 0;
          ws[e / kTile][e % kTile] = used ? weight[channel * a.weight_out + row * a.weight_in + a.taps.index[t]] : T(0);
        }
        __syncthreads();
        multiply(xs, ws, acc);
      }
    }
    __syncthreads();  // without taps nothing else orders the writes of `pixel` before these reads
#pragma unroll        // here and below: an index of acc known only at run time would put it into local memory
    for (int i = 0; i < 4; ++i) {
      const Pixel p = pixel[tile_row(i)];
      if (p.image < 0) continue;
      const int64_t at = p.image * so.b + p.y * so.y + p.x * so.x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t channel = channel_of(a, tile, tile_column(j));
        if (channel < 0) continue;
        if (a.gate == kPlain) {
          out[at + channel * so.c] = acc[i][j];
        } else if (j < 2) {
          const T tanh_z = tanh(acc[i][j]), sigmoid_z = T(1) / (T(1) + exp(-acc[i][j + 2]));
          if (a.gate == kGate) {
            out[at + channel * so.c] = tanh_z * sigmoid_z;
          } else {
            const T g = grad[p.image * sg.b + channel * sg.c + p.y * sg.y + p.x * sg.x];
            out[at + channel * so.c] = g * sigmoid_z * ((T(1) - tanh_z) * (T(1) + tanh_z));
            out[at + (gated + channel) * so.c] = g * tanh_z * (sigmoid_z * (T(1) - sigmoid_z));
          }
        }
      }
    }
  }
}

// workspace[group][row][o] = sum over the group's pixels of x[pixel][row] * grad[pixel][o]; row = a live tap and an input
// channel, and after the last one the bias, whose x is 1.
template <class T>
__global__ void __launch_bounds__(kThreads) masked_conv2d_products_kernel(MaskedConvWeight a) {
  GMK_SHARED(xs, T[kDepth][kTile + 1]);
  GMK_SHARED(gs, T[kDepth][kTile]);
  GMK_SHARED(pixel, Pixel[kDepth]);
  const T* const x = static_cast<const T*>(a.x);
  const T* const grad = static_cast<const T*>(a.grad);
  const int64_t pixels = a.b * a.h * a.w, rows = a.taps.count * a.c_in, group = blockIdx.z;
  const int64_t first = pixels * group / a.groups, last = pixels * (group + 1) / a.groups;
  const int64_t row0 = int64_t(blockIdx.x) * kTile, column0 = int64_t(blockIdx.y) * kTile;
  const Strides sx = strides(a.x_nhwc, a.c_in, a.h, a.w), sg = strides(a.grad_nhwc, a.c_out, a.h, a.w);
  const int tid = int(threadIdx.x);
  T acc[4][4] = {};
  for (int64_t p0 = first; p0 < last; p0 += kDepth) {
    __syncthreads();
    if (tid < kDepth) pixel[tid] = pixel_of(p0 + tid, last, a.h, a.w);
    __syncthreads();
    for (int i = 0; i < kPerThread; ++i) {
      const int e = tid + i * kThreads;
      int k = a.x_nhwc ? e / kTile : e % kDepth, n = a.x_nhwc ? e % kTile : e / kDepth;
      const int64_t row = row0 + n;
      if (row < rows) {
        const int t = int(row / a.c_in);
        xs[k][n] = seen(x, sx, pixel[k], row % a.c_in, tap_dy(a.taps, t), tap_dx(a.taps, t), a.h, a.w);
      } else {
        xs[k][n] = row == rows ? T(1) : T(0);
      }
      k = a.grad_nhwc ? e / kTile : e % kDepth;
      n = a.grad_nhwc ? e % kTile : e / kDepth;
      gs[k][n] = column0 + n < a.c_out ? seen(grad, sg, pixel[k], column0 + n, 0, 0, a.h, a.w) : T(0);
    }
    __syncthreads();
    multiply(xs, gs, acc);
  }
  T* const out = static_cast<T*>(a.workspace) + group * (rows + 1) * a.c_out;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + tile_row(i), column = column0 + tile_column(j);
      if (row <= rows && column < a.c_out) out[row * a.c_out + column] = acc[i][j];
    }
}

// weight[o][c][t] = the sum of its groups in order, 0 for dead taps; one thread per (o, c), and one per bias.
template <class T>
__global__ void __launch_bounds__(kThreads) masked_conv2d_sum_groups_kernel(MaskedConvWeight a) {
  const T* const part = static_cast<const T*>(a.workspace);
  const int64_t rows = a.taps.count * a.c_in, kernel = int64_t(a.taps.kh) * a.taps.kw, pairs = a.c_out * a.c_in;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t job = int64_t(blockIdx.x) * kThreads + threadIdx.x; job < pairs + a.c_out; job += stride) {
    const bool bias = job >= pairs;
    const int64_t o = bias ? job - pairs : job / a.c_in, c = bias ? 0 : job % a.c_in;
    T* const weight = static_cast<T*>(a.weight) + job * kernel;
    if (!bias)
      for (int64_t t = 0; t < kernel; ++t) weight[t] = T(0);
    if (bias && !a.bias) continue;
    for (int t = 0; t < (bias ? 1 : a.taps.count); ++t) {
      const int64_t row = bias ? rows : t * a.c_in + c;
      T sum = T(0);
      for (int64_t g = 0; g < a.groups; ++g) sum += part[(g * (rows + 1) + row) * a.c_out + o];
      if (bias) {
        static_cast<T*>(a.bias)[o] = sum;
      } else {
        weight[a.taps.index[t]] = sum;
      }
    }
  }
}

template <class T>
Status convolve(const MaskedConv& a, void* stream) {
  const dim3 grid(grid_for(a.b * a.h * a.w, kTile), unsigned((a.c_out + kTile - 1) / kTile));
  return GMK_LAUNCH((masked_conv2d_kernel<T>), grid, kThreads, 0, stream, a);
}
template <class T>
Status gradient(const MaskedConvWeight& a, void* stream) {
  const int64_t rows = a.taps.count * a.c_in + 1;
  const dim3 grid(unsigned((rows + kTile - 1) / kTile), unsigned((a.c_out + kTile - 1) / kTile), unsigned(a.groups));
  if (const Status status = GMK_LAUNCH((masked_conv2d_products_kernel<T>), grid, kThreads, 0, stream, a)) return status;
  return GMK_LAUNCH((masked_conv2d_sum_groups_kernel<T>), grid_for(a.c_out * (a.c_in + 1), kThreads), kThreads, 0,
                    stream, a);
}

}  // namespace

Status masked_conv2d_cuda(const MaskedConv& a, int device, void* stream) {
  if (a.b <= 0 || a.h <= 0 || a.w <= 0 || a.c_out <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.dtype == kFloat32   ? convolve<float>(a, stream)
         : a.dtype == kFloat64 ? convolve<double>(a, stream)
                               : "unknown dtype";
}

Status masked_conv2d_backward_weight_cuda(const MaskedConvWeight& a, int device, void* stream) {
  if (a.c_out <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.dtype == kFloat32   ? gradient<float>(a, stream)
         : a.dtype == kFloat64 ? gradient<double>(a, stream)
                               : "unknown dtype";
}

}  // namespace gmk

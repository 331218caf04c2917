// Before and between the passes over the rows (kmeans.cu): the start, the tolerance, and centres to the means of their
// rows.
#include "kmeans/kmeans_cuda.cuh"

namespace gmk {
namespace {

// Centres, the way the kernels read them, and nobody done. The places of the last group that are no centre are infinitely
// far.
template <class T>
__global__ void __launch_bounds__(kThreads) kmeans_begin_kernel(KmeansLloyd a) {
  const KmeansInputs& in = a.in;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = int64_t(gridDim.x) * kThreads;
  const int64_t k = in.k, d = in.d, places = (k + kCenters - 1) / kCenters * kCenters;
  for (int64_t i = first; i < in.b * places * d; i += stride) {
    const int64_t b = i / (places * d), f = i / kCenters % d;
    const int64_t c = i % (places * d) / (d * kCenters) * kCenters + i % kCenters;
    const T value = c < k ? static_cast<const T*>(a.init)[b * a.init_stride + c * d + f] : T(HUGE_VAL);
    static_cast<T*>(a.grouped)[i] = value;
    if (c < k) static_cast<T*>(a.centers)[(b * k + c) * d + f] = value;
  }
  for (int64_t b = first; b <= in.b; b += stride) {
    a.state[b] = KmeansState{0, 0, 0};
    if (b < in.b) a.n_iter[b] = 0;
  }
}

// Every empty centre takes the row that is farthest from its own (of equals the first), as on the CPU. `sums` are those
// of one data set. The block reads all rows once per empty centre.
template <class T>
GMK_DEV void relocate(const KmeansLloyd& a, int64_t b, double* sums, int64_t empty, double* warp_far,
                      int64_t* warp_row) {
  const int64_t k = a.in.k, d = a.in.d;
  const T* const x = rows_of<T>(a.in, b);
  const T* const centers = static_cast<const T*>(a.centers) + b * k * d;
  const int32_t* const labels = a.labels + b * a.in.n;
  const Weights<T> weights(a.in, b);
  double taken = HUGE_VAL;  // distance and row of the one before
  int64_t taken_row = -1;
  for (int64_t c = 0; c < k && empty > 0; ++c) {
    if (sums[c * (d + 1) + d] > 0) continue;
    double far = 0;
    int64_t row = a.in.n;
    for (int64_t i = threadIdx.x; i < a.in.n; i += kThreads) {
      if (!(weights[i] > T(0))) continue;
      const double distance = squared_distance(x + i * d, centers + labels[i] * d, d);
      if (distance > far && (distance < taken || (distance == taken && i > taken_row))) far = distance, row = i;
    }
    for (int o = 16; o; o >>= 1) {
      const double other = __shfl_xor_sync(kFullWarp, far, o);
      const int64_t other_row = __shfl_xor_sync(kFullWarp, row, o);
      if (other > far || (other == far && other_row < row)) far = other, row = other_row;
    }
    if (threadIdx.x % 32 == 0) warp_far[threadIdx.x / 32] = far, warp_row[threadIdx.x / 32] = row;
    __syncthreads();
    taken = 0;
    for (int i = 0; i < kWarps; ++i)
      if (warp_far[i] > taken || (warp_far[i] == taken && warp_row[i] < taken_row))
        taken = warp_far[i], taken_row = warp_row[i];
    if (!(taken > 0)) break;  // every row is at its centre
    const int64_t old = labels[taken_row];
    const double weight = double(weights[taken_row]);
    for (int64_t f = threadIdx.x; f <= d; f += kThreads) {
      const double part = f == d ? weight : weight * double(x[taken_row * d + f]);
      sums[old * (d + 1) + f] -= part;
      sums[c * (d + 1) + f] = part;
    }
    --empty;
    __syncthreads();
  }
  __syncthreads();
}

// One block is one data set: centres to the means of their rows. Is it done?
template <class T>
__global__ void __launch_bounds__(kThreads) kmeans_move_kernel(KmeansLloyd a, int64_t iteration) {
  GMK_SHARED(parts, double[kWarps]);
  GMK_SHARED(warp_row, int64_t[kWarps]);
  const int64_t k = a.in.k, d = a.in.d, groups = (k + kCenters - 1) / kCenters;
  for (int64_t b = blockIdx.x; b < a.in.b; b += gridDim.x) {
    KmeansState& state = a.state[b];
    if (state.done) continue;
    double* const sums = a.slab_sums + b * kmeans_slab_numbers(k, d);
    double none = 0;
    for (int64_t c = threadIdx.x; c < k; c += kThreads) none += !(sums[c * (d + 1) + d] > 0);
    const int64_t empty = int64_t(block_sum<kWarps>(none, parts));
    int64_t heaviest = 0;
    if (empty) {
      relocate<T>(a, b, sums, empty, parts, warp_row);
      for (int64_t c = 1; c < k; ++c)
        if (sums[c * (d + 1) + d] > sums[heaviest * (d + 1) + d]) heaviest = c;
    }
    double shift = 0;
    for (int64_t c = threadIdx.x / 32; c < k; c += kWarps) {
      const double* const from = sums + (sums[c * (d + 1) + d] > 0 ? c : heaviest) * (d + 1);
      T* const center = static_cast<T*>(a.centers) + (b * k + c) * d;
      T* const grouped = static_cast<T*>(a.grouped) + (b * groups + c / kCenters) * d * kCenters + c % kCenters;
      for (int64_t f = threadIdx.x % 32; f < d; f += 32) {
        const T now = T(from[f] / from[d]);
        const double t = double(now) - double(center[f]);
        shift += t * t;
        center[f] = grouped[f * kCenters] = now;
      }
    }
    shift = block_sum<kWarps>(shift, parts);
    if (threadIdx.x == 0) {
      a.n_iter[b] = iteration;
      state.fresh = shift == 0;
      state.done = sums[k * (d + 1) + 1] == 0 || shift <= state.enough;
      if (state.done) atomicAdd(reinterpret_cast<unsigned long long*>(&a.state[a.in.b].done), 1ull);
    }
  }
}

// Weighted sums of the features and of their squares, about the first row, per slab.
template <class T>
__global__ void __launch_bounds__(kThreads) kmeans_spread_kernel(KmeansLloyd a, int64_t slab_rows) {
  GMK_SHARED(parts, double[2 * kThreads]);
  const KmeansInputs& in = a.in;
  const int64_t d = in.d, width = d + 1, copies = width < kThreads ? kThreads / width : 1;  // the last is the weight
  for (int64_t job = blockIdx.x; job < a.slabs * in.b; job += gridDim.x) {
    const int64_t b = job % in.b, begin = job / in.b * slab_rows;
    const int64_t end = begin + slab_rows < in.n ? begin + slab_rows : in.n;
    const T* const x = rows_of<T>(in, b);
    const Weights<T> weights(in, b);
    double* const slab = a.slab_sums + job * kmeans_slab_numbers(in.k, d);
    for (int64_t f0 = 0; f0 < width; f0 += kThreads) {
      const int64_t item = f0 + threadIdx.x, f = item % width;
      double first = 0, second = 0;
      for (int64_t i = begin + item / width; item < copies * width && i < end; i += copies) {
        const double w = double(weights[i]), t = f == d ? 1.0 : double(x[i * d + f]) - double(x[f]);
        first += w * t;
        second += w * t * t;
      }
      parts[threadIdx.x] = first;
      parts[kThreads + threadIdx.x] = second;
      __syncthreads();
      if (item < width) {
        for (int64_t copy = 1; copy < copies; ++copy) {
          first += parts[copy * width + f];
          second += parts[kThreads + copy * width + f];
        }
        slab[f == d ? 2 * d : f] = first;
        if (f < d) slab[d + f] = second;
      }
      __syncthreads();
    }
  }
}

// The squared shift that ends a data set: tol times the mean variance.
__global__ void __launch_bounds__(kThreads, 2) kmeans_enough_kernel(KmeansLloyd a) {
  GMK_SHARED(parts, double[kWarps]);
  const int64_t d = a.in.d;
  for (int64_t b = blockIdx.x; b < a.in.b; b += gridDim.x) {
    const double* const sums = a.slab_sums + b * kmeans_slab_numbers(a.in.k, d);
    double variance = 0;
    for (int64_t f = threadIdx.x; f < d; f += kThreads) {
      const double mean = sums[f] / sums[2 * d];
      variance += sums[d + f] / sums[2 * d] - mean * mean;
    }
    variance = block_sum<kWarps>(variance, parts);
    if (threadIdx.x == 0) a.state[b].enough = a.tol * (variance / double(d));
  }
}

template <class T>
Status launch_begin(const KmeansLloyd& a, void* stream) {
  const int64_t places = (a.in.k + kCenters - 1) / kCenters * kCenters;
  const unsigned grid = grid_for(a.in.b * places * a.in.d + a.in.b + 1, kThreads);
  return GMK_LAUNCH((kmeans_begin_kernel<T>), grid, kThreads, 0, stream, a);
}

template <class T>
Status launch_spread(const KmeansLloyd& a, int64_t slab_rows, void* stream) {
  const unsigned grid = grid_for(a.slabs * a.in.b, 1);
  return GMK_LAUNCH((kmeans_spread_kernel<T>), grid, kThreads, 0, stream, a, slab_rows);
}

template <class T>
Status launch_move(const KmeansLloyd& a, int64_t iteration, void* stream) {
  return GMK_LAUNCH((kmeans_move_kernel<T>), grid_for(a.in.b, 1), kThreads, 0, stream, a, iteration);
}

}  // namespace

Status kmeans_begin(const KmeansLloyd& a, void* stream) {
  return a.in.dtype == kFloat64 ? launch_begin<double>(a, stream) : launch_begin<float>(a, stream);
}

Status kmeans_spread(const KmeansLloyd& a, int64_t slab_rows, void* stream) {
  return a.in.dtype == kFloat64 ? launch_spread<double>(a, slab_rows, stream)
                                : launch_spread<float>(a, slab_rows, stream);
}

Status kmeans_enough(const KmeansLloyd& a, void* stream) {
  return GMK_LAUNCH((kmeans_enough_kernel), grid_for(a.in.b, 1), kThreads, 0, stream, a);
}

Status kmeans_move(const KmeansLloyd& a, int64_t iteration, void* stream) {
  return a.in.dtype == kFloat64 ? launch_move<double>(a, iteration, stream) : launch_move<float>(a, iteration, stream);
}

}  // namespace gmk

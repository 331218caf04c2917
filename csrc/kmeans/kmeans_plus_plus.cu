// Greedy k-means++: two kernels per centre, and nothing of the host between them. kmeans_look_kernel, one pass over the
// rows: distances are brought up to date with the centre before, and summed per group of rows and candidate as they
// would be. kmeans_draw_kernel: the best candidate, and the next ones, a block for each, from those sums: the group of
// rows first, then the row. No atomics; sums in orders that follow from sizes. Bound: reading x once per centre, or
// (trials + 1) d subtract-multiply-adds per row.
#include "kmeans/kmeans_cuda.cuh"

namespace gmk {
namespace {

template <class T>
constexpr int kFeatures = 64 / int(sizeof(T));  // in shared memory at a time
constexpr int kStride = kThreads + 1;           // from one of them to the next
constexpr size_t kTileBytes = 64 * kStride;

GMK_DEV int64_t groups_of(const KmeansInputs& in) { return (in.n + kKmeansGroupRows - 1) / kKmeansGroupRows; }

// Numbers begin .. begin + count of shared memory, of which one is positive: the first whose running sum, from `before`
// on, exceeds `at`. Numbers that are 0 are never taken; rounding may hide the step: then the last that is not. `before`
// becomes the sum in front of it.
GMK_DEV int pick(const double* values, int count, double at, double& before) {
  int found = -1;
  double sum = before;
  for (int i = 0; i < count; ++i) {
    if (!(values[i] > 0)) continue;
    if (found >= 0) sum += values[found];
    found = i;
    if (sum + values[i] > at) break;
  }
  before = sum;
  return found;
}

// The place in begin .. end that a draw by mass(i) finds, at the running sum `at`; share: at that share of the whole sum,
// which then takes the place of `at`. -1: there is no mass. Every thread of the block calls it. parts: kThreads + kWarps
// numbers of shared memory.
template <class Mass>
GMK_DEV int64_t draw(double* parts, int64_t begin, int64_t end, bool share, double& at, double& before, Mass mass) {
  while (true) {
    const int64_t per = (end - begin + kThreads - 1) / kThreads, first = begin + threadIdx.x * per;
    double own = 0;
    for (int64_t i = first; i < end && i < first + per; ++i) own += mass(i);
    parts[threadIdx.x] = own;
    own = warp_sum(own);
    if (threadIdx.x % 32 == 0) parts[kThreads + threadIdx.x / 32] = own;
    __syncthreads();
    if (share) {
      double total = 0;
      for (int i = 0; i < kWarps; ++i) total += parts[kThreads + i];
      at *= total;
    }
    share = false;
    const int warp = pick(parts + kThreads, kWarps, at, before);
    const int thread = warp < 0 ? 0 : warp * 32 + pick(parts + warp * 32, 32, at, before);
    __syncthreads();
    if (warp < 0) return -1;
    begin += thread * per;
    end = end < begin + per ? end : begin + per;
    if (per == 1) return begin;
  }
}

// Centre 0: a row drawn by weight.
template <class T>
__global__ void __launch_bounds__(kThreads) kmeans_first_kernel(KmeansPlusPlus a) {
  GMK_SHARED(parts, double[kThreads + kWarps]);
  for (int64_t b = blockIdx.x; b < a.in.b; b += gridDim.x) {
    const Weights<T> weights(a.in, b);
    double at = a.uniforms[b * a.uniforms_stride], before = 0;
    int64_t row = int64_t(at * double(a.in.n));
    if (weights.given) row = draw(parts, 0, a.in.n, true, at, before, [&](int64_t i) { return double(weights[i]); });
    if (threadIdx.x == 0) a.indices[b * a.in.k] = row;
  }
}

// Centre c's candidates. The points are the centre before (the first one for c = 0, which has no candidates) and then the
// candidates.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) kmeans_look_kernel(KmeansPlusPlus a, int64_t c) {
  GMK_DYN_SHARED(bytes);
  GMK_SHARED(points, T[kFeatures<T> * kCenters]);
  GMK_SHARED(parts, double[kWarps * kCenters]);
  T* const tile = reinterpret_cast<T*>(bytes);
  const KmeansInputs& in = a.in;
  const int64_t d = in.d, groups = groups_of(in), count = c ? 1 + a.trials : 1;
  for (int64_t job = blockIdx.x; job < in.b * groups; job += gridDim.x) {
    const int64_t b = job / groups, group = job % groups, begin = group * kKmeansGroupRows;
    const int64_t end = begin + kKmeansGroupRows < in.n ? begin + kKmeansGroupRows : in.n;
    const T* const x = rows_of<T>(in, b);
    const Weights<T> weights(in, b);
    T* const closest = static_cast<T*>(a.closest) + b * in.n;
    const int64_t* const candidates = a.candidates + (c % 2 * in.b + b) * a.trials;
    const int64_t center = a.indices[b * in.k + (c ? c - 1 : 0)];
    for (int64_t p0 = 0; p0 < count; p0 += kCenters) {
      double left[kCenters] = {};
      for (int64_t first = begin; first < end; first += kThreads) {
        const int rows = int(end - first < kThreads ? end - first : kThreads);
        T distance[kCenters] = {};
        for (int64_t f0 = 0; f0 < d; f0 += kFeatures<T>) {
          const int width = int(d - f0 < kFeatures<T> ? d - f0 : kFeatures<T>);
          __syncthreads();
          load_rows(tile, kStride, x + first * d, rows, d, f0, width);
          for (int i = threadIdx.x; i < width * kCenters; i += kThreads) {
            const int64_t point = p0 + i % kCenters;
            const int64_t row = point == 0 || point >= count ? center : candidates[point - 1];
            points[i] = x[row * d + f0 + i / kCenters];
          }
          __syncthreads();
          add_squares(distance, tile + (int(threadIdx.x) < rows ? threadIdx.x : 0), kStride, points, width);
        }
        if (int(threadIdx.x) >= rows) continue;
        T* const own = closest + first + threadIdx.x;
        T now = distance[0];
        if (p0 > 0 || (c > 0 && *own < now)) now = *own;
        if (p0 == 0) *own = now;
        const double w = double(weights[first + threadIdx.x]);
#pragma unroll
        for (int j = 0; j < kCenters; ++j) left[j] += w * double(distance[j] < now ? distance[j] : now);
      }
#pragma unroll
      for (int j = 0; j < kCenters; ++j) {
        const double sum = warp_sum(left[j]);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32 * kCenters + j] = sum;
      }
      __syncthreads();
      if (threadIdx.x < kCenters && p0 + threadIdx.x < count) {
        double sum = 0;
        for (int i = 0; i < kWarps; ++i) sum += parts[i * kCenters + threadIdx.x];
        a.left[(b * (1 + a.trials) + p0 + threadIdx.x) * groups + group] = sum;
      }
      __syncthreads();
    }
  }
}

// Centre c is the candidate that leaves least, the first of equals; then the candidates for the centre behind it, a block
// for each. looked: kmeans_look_kernel has seen centre c's (else there is one).
template <class T>
__global__ void __launch_bounds__(kThreads, 2) kmeans_draw_kernel(KmeansPlusPlus a, int64_t c, int looked) {
  GMK_SHARED(parts, double[kThreads + kWarps]);
  const KmeansInputs& in = a.in;
  const int64_t n = in.n, k = in.k, d = in.d, groups = groups_of(in), draws = c + 1 < k ? a.trials : 1;
  for (int64_t job = blockIdx.x; job < in.b * draws; job += gridDim.x) {
    const int64_t b = job / draws, trial = job % draws;
    const double* const left = a.left + b * (1 + a.trials) * groups;
    int64_t best = 0;
    double least = HUGE_VAL;
    for (int64_t t = 0; c > 0 && looked && t < a.trials; ++t) {
      double own = 0;
      for (int64_t g = threadIdx.x; g < groups; g += kThreads) own += left[(1 + t) * groups + g];
      const double sum = block_sum<kWarps>(own, parts);
      if (sum < least) least = sum, best = t;
    }
    const int64_t center = c ? a.candidates[(c % 2 * in.b + b) * a.trials + best] : a.indices[b * k];
    if (c > 0 && trial == 0 && threadIdx.x == 0) a.indices[b * k + c] = center;
    if (c + 1 == k) continue;
    const T* const x = rows_of<T>(in, b);
    const T* const closest = static_cast<const T*>(a.closest) + b * n;
    const double* const mass = left + (c ? 1 + best : 0) * groups;
    const Weights<T> weights(in, b);
    double at = a.uniforms[b * a.uniforms_stride + 1 + c * a.trials + trial], before = 0;
    int64_t row = draw(parts, 0, groups, true, at, before, [&](int64_t g) { return mass[g]; });
    if (row < 0) {  // all rows are centres: the first that counts
      at = -1;
      row = draw(parts, 0, n, false, at, before, [&](int64_t i) { return double(weights[i]); });
    } else {
      const int64_t begin = row * kKmeansGroupRows, end = begin + kKmeansGroupRows;
      row = draw(parts, begin, end < n ? end : n, false, at, before, [&](int64_t i) {
        T distance = T(0);
        for (int64_t f = 0; f < d; ++f) {
          const T t = x[i * d + f] - x[center * d + f];
          distance += t * t;
        }
        return double(weights[i]) * double(distance < closest[i] ? distance : closest[i]);
      });
      if (row < 0) row = begin;
    }
    if (threadIdx.x == 0) a.candidates[((c + 1) % 2 * in.b + b) * a.trials + trial] = row;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) kmeans_gather_kernel(KmeansPlusPlus a) {
  const int64_t k = a.in.k, d = a.in.d, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.in.b * k * d; i += stride)
    static_cast<T*>(a.centers)[i] = rows_of<T>(a.in, i / (k * d))[a.indices[i / d] * d + i % d];
}

template <class T>
Status launch(const KmeansPlusPlus& a, void* stream) {
  const KmeansInputs& in = a.in;
  const unsigned looks = grid_for(in.b * ((in.n + kKmeansGroupRows - 1) / kKmeansGroupRows), 1);
  Status status = GMK_LAUNCH((kmeans_first_kernel<T>), grid_for(in.b, 1), kThreads, 0, stream, a);
  for (int64_t c = 0; !status && c < in.k && in.k > 1; ++c) {
    const int look = c + 1 < in.k || a.trials > 1;
    if (look) status = GMK_LAUNCH((kmeans_look_kernel<T>), looks, kThreads, kTileBytes, stream, a, c);
    const unsigned draws = grid_for(in.b * (c + 1 < in.k ? a.trials : 1), 1);
    if (!status) status = GMK_LAUNCH((kmeans_draw_kernel<T>), draws, kThreads, 0, stream, a, c, look);
  }
  if (status || in.d == 0) return status;
  return GMK_LAUNCH((kmeans_gather_kernel<T>), grid_for(in.b * in.k * in.d, kThreads), kThreads, 0, stream, a);
}

}  // namespace

Status kmeans_plus_plus_cuda(const KmeansPlusPlus& a, int device, void* stream) {
  if (a.in.b <= 0 || a.in.k <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.in.dtype == kFloat64 ? launch<double>(a, stream) : launch<float>(a, stream);
}

}  // namespace gmk

// Lloyd's iteration in three kernels: rows to their nearest centres and into the sums of their slab; the slabs' sums
// added; centres to the means. A thread is a row, with eight centres at a time in registers. The sums are float64; a row is
// added to them by the threads (copy p, feature f), which take the rows p, p + copies, ... in order. No atomics: copies
// and slabs are added in order, and depend on sizes only, so the result is the same on every GPU and for every grid.
// Convergence is decided on the GPU, per data set: kernels pass over what is done. The host launches ahead, and waits only
// after 8, 16, 32, ... iterations to hear whether all are done: max_iter may be any number, and launches cost more than
// that. Bound: d subtract-multiply-adds per row and centre; for few centres, reading x.
#include "kmeans/kmeans_cuda.cuh"

namespace gmk {
namespace {

constexpr int kStagedBytes = 16 << 10;  // of x, of centres and of sums that a block has in shared memory, about
constexpr int64_t kFirstRound = 8;      // iterations before the host asks
constexpr int kSumNumbers = 16, kSumParts = kThreads / kSumNumbers;

enum Pass { kFirst, kNext, kLast };  // every label is new; sums; labels and inertia alone

// Sizes of kmeans_assign_kernel.
struct Tiles {
  int rows;                     // of a tile; the kThreads / rows threads of a row share the centres
  int features;                 // of it at a time: all, where d allows, and then a tile is read once
  int groups;                   // of kCenters centres at a time
  int copies;                   // of the sums; 0: they lie in the slab's part of the workspace
  int64_t slab;                 // rows of a slab
  int centers_at, x_at, bytes;  // in shared memory: sums, centres, x; 58 KB at most with the static arrays (sm_75: 64)
};

template <class T>
Tiles tiles_for(const KmeansInputs& in, int64_t slabs) {
  Tiles t{};
  const int64_t numbers = kStagedBytes / int64_t(sizeof(T)), d = in.d > 1 ? in.d : 1, sums = in.k * (in.d + 1);
  for (t.rows = kThreads; t.rows > 32 && t.rows * d > numbers;) t.rows /= 2;
  const int parts = kThreads / t.rows;
  t.features = t.rows * d <= numbers ? int(d) : int(numbers / (parts * kCenters));
  const int64_t groups = (in.k + kCenters - 1) / kCenters, fit = numbers / (t.features * kCenters);
  const int64_t staged = fit > parts ? fit : parts;  // features in turns: one group for every part
  t.groups = int(groups < staged ? groups : staged);
  if (sums * 8 <= kStagedBytes) {
    const int64_t most = kStagedBytes / 8 / sums, busy = kThreads / (in.d + 1);
    t.copies = int(busy < 1 ? 1 : busy < most ? busy : most);
  }
  const int64_t slab = (in.n + slabs - 1) / slabs;
  t.slab = (slab + t.rows - 1) / t.rows * t.rows;
  t.centers_at = int(t.copies * sums + 1) / 2 * 16;
  t.x_at = t.centers_at + t.groups * t.features * kCenters * int(sizeof(T));
  t.bytes = t.x_at + (t.rows + 1) * t.features * int(sizeof(T));
  return t;
}

// A tile's rows into the sums, by label.
template <class T, class Value>
GMK_DEV void add_rows(double* sums, const int* label, const T* weight, int rows, int64_t k, int64_t d, int copies,
                      Value value) {
  for (int64_t item = threadIdx.x; item < copies * (d + 1); item += kThreads) {
    const int64_t copy = item / (d + 1), f = item % (d + 1);
    double* const own = sums + copy * k * (d + 1) + f;
#pragma unroll 1  // each waits for the one before
    for (int r = int(copy); r < rows; r += copies) {
      const double w = double(weight[r]);
      if (w != 0) own[label[r] * (d + 1)] += f == d ? w : w * double(value(r, f));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) kmeans_assign_kernel(KmeansLloyd a, Tiles t, int pass) {
  GMK_DYN_SHARED(bytes);
  GMK_SHARED(closest, T[kThreads]);
  GMK_SHARED(label, int[kThreads]);
  GMK_SHARED(weight, T[kThreads]);
  GMK_SHARED(parts, double[kWarps]);
  const KmeansInputs& in = a.in;
  const int64_t k = in.k, d = in.d, groups = (k + kCenters - 1) / kCenters, count = k * (d + 1);
  const bool whole = t.features >= d, once = whole && groups <= t.groups;  // x per tile, centres per slab
  const int stride = t.rows + 1, own_row = int(threadIdx.x) % t.rows, own_part = int(threadIdx.x) / t.rows;
  double* const shared_sums = reinterpret_cast<double*>(bytes);
  T* const centers = reinterpret_cast<T*>(bytes + t.centers_at);
  T* const tile = reinterpret_cast<T*>(bytes + t.x_at);
  for (int64_t job = blockIdx.x; job < a.slabs * in.b; job += gridDim.x) {
    const int64_t b = job % in.b, begin = job / in.b * t.slab, end = begin + t.slab < in.n ? begin + t.slab : in.n;
    if (pass == kLast ? a.state[b].fresh : a.state[b].done) continue;
    const T* const x = rows_of<T>(in, b);
    const T* const grouped = static_cast<const T*>(a.grouped) + b * groups * kCenters * d;
    const Weights<T> weights(in, b);
    double* const slab = a.slab_sums + job * kmeans_slab_numbers(k, d);
    __syncthreads();
    if (pass != kLast) {
      double* const sums = t.copies ? shared_sums : slab;
      for (int64_t i = threadIdx.x; i < (t.copies ? t.copies : 1) * count; i += kThreads) sums[i] = 0;
    }
    double inertia = 0;
    int changed = 0;
    for (int64_t first = begin; first < end; first += t.rows) {
      const int rows = int(end - first < t.rows ? end - first : t.rows);
      T least = T(HUGE_VAL), sum[kCenters];
      int nearest = 0;
      for (int64_t g0 = 0; g0 < groups; g0 += t.groups) {
        const int staged = int(groups - g0 < t.groups ? groups - g0 : t.groups);
        int64_t f0 = 0;
        do {
          const int width = int(d - f0 < t.features ? d - f0 : t.features);
          __syncthreads();
          if (g0 == 0 || !whole) load_rows(tile, stride, x + first * d, rows, d, f0, width);
          if (first == begin || !once) {
            constexpr int n = 16 / sizeof(T);
            for (int g = int(threadIdx.x) / 32; g < staged; g += kWarps) {
              const T* const from = grouped + ((g0 + g) * d + f0) * kCenters;
              T* const to = centers + g * t.features * kCenters;
#pragma unroll 2
              for (int i = int(threadIdx.x) % 32 * n; i < width * kCenters; i += 32 * n)
                store_pack(to + i, load_pack<T, n>(from + i));
            }
          }
          __syncthreads();
          for (int g = own_part; g < staged; g += kThreads / t.rows) {
            if (f0 == 0) {
#pragma unroll
              for (int j = 0; j < kCenters; ++j) sum[j] = T(0);
            }
            add_squares(sum, tile + (own_row < rows ? own_row : 0), stride, centers + g * t.features * kCenters, width);
            if (f0 + width < d) continue;
#pragma unroll
            for (int j = 0; j < kCenters; ++j)
              if (sum[j] < least) least = sum[j], nearest = int((g0 + g) * kCenters) + j;
          }
          f0 += t.features;
        } while (f0 < d);
      }
      closest[threadIdx.x] = least;
      label[threadIdx.x] = nearest;
      if (int(threadIdx.x) < rows) weight[threadIdx.x] = weights[first + threadIdx.x];
      __syncthreads();
      if (int(threadIdx.x) < rows) {
        for (int other = int(threadIdx.x) + t.rows; other < kThreads; other += t.rows) {
          const bool before = closest[other] == least && label[other] < nearest;
          if (closest[other] < least || before) least = closest[other], nearest = label[other];
        }
        int32_t* const out = a.labels + b * in.n + first + threadIdx.x;
        inertia += double(weight[threadIdx.x]) * double(least);
        changed += pass != kNext || *out != nearest;
        *out = label[threadIdx.x] = nearest;
      }
      if (pass == kLast) continue;
      __syncthreads();
      const auto staged_x = [&](int r, int64_t f) { return tile[f * stride + r]; };
      const auto global_x = [&](int r, int64_t f) { return x[(first + r) * d + f]; };
      if (t.copies && whole) {
        add_rows(shared_sums, label, weight, rows, k, d, t.copies, staged_x);
      } else if (t.copies) {
        add_rows(shared_sums, label, weight, rows, k, d, t.copies, global_x);
      } else if (whole) {
        add_rows(slab, label, weight, rows, k, d, 1, staged_x);
      } else {
        add_rows(slab, label, weight, rows, k, d, 1, global_x);
      }
    }
    inertia = block_sum<kWarps>(inertia, parts);
    const double all_changed = block_sum<kWarps>(double(changed), parts);
    if (t.copies && pass != kLast)
      for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        double sum = 0;
        for (int copy = 0; copy < t.copies; ++copy) sum += shared_sums[copy * count + i];
        slab[i] = sum;
      }
    if (threadIdx.x < 2) slab[count + threadIdx.x] = threadIdx.x ? all_changed : inertia;
  }
}

// Numbers begin .. end of all slabs, added in order into slab 0. A block takes kSumNumbers of a data set; the slabs are
// split into kSumParts ranges.
__global__ void __launch_bounds__(kThreads)
    kmeans_sum_kernel(KmeansLloyd a, int64_t begin, int64_t end, int64_t inertia_at, int pass) {
  GMK_SHARED(sums, double[kThreads]);
  const int64_t b_count = a.in.b, numbers = kmeans_slab_numbers(a.in.k, a.in.d);
  const int64_t chunks = (end - begin + kSumNumbers - 1) / kSumNumbers, per = (a.slabs + kSumParts - 1) / kSumParts;
  for (int64_t job = blockIdx.x; job < b_count * chunks; job += gridDim.x) {
    const int64_t b = job / chunks, at = begin + job % chunks * kSumNumbers + threadIdx.x % kSumNumbers;
    if (pass == kLast ? a.state[b].fresh : a.state[b].done) continue;
    const int64_t first = threadIdx.x / kSumNumbers * per, past = first + per < a.slabs ? first + per : a.slabs;
    double sum = 0;
    if (at < end) {
#pragma unroll 8
      for (int64_t s = first; s < past; ++s) sum += a.slab_sums[(s * b_count + b) * numbers + at];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kSumNumbers && at < end) {
      for (int part = 1; part < kSumParts; ++part) sum += sums[part * kSumNumbers + threadIdx.x];
      a.slab_sums[b * numbers + at] = sum;
      if (at == inertia_at) a.inertia[b] = sum;
    }
    __syncthreads();
  }
}

template <class T>
Status launch(const KmeansLloyd& a, void* stream) {
  const KmeansInputs& in = a.in;
  const Tiles t = tiles_for<T>(in, a.slabs);
  const int64_t inertia = in.k * (in.d + 1);  // which of the sums
  const auto assign = [&](int pass) {
    const unsigned grid = grid_for(a.slabs * in.b, 1);
    return GMK_LAUNCH((kmeans_assign_kernel<T>), grid, kThreads, size_t(t.bytes), stream, a, t, pass);
  };
  const auto add = [&](int64_t begin, int64_t end, int64_t inertia_at, int pass) {
    const unsigned grid = grid_for(in.b * ((end - begin + kSumNumbers - 1) / kSumNumbers), 1);
    return GMK_LAUNCH((kmeans_sum_kernel), grid, kThreads, 0, stream, a, begin, end, inertia_at, pass);
  };
  Status status = kmeans_begin(a, stream);
  if (a.max_iter > 0 && a.tol > 0 && in.d > 0) {
    if (!status) status = kmeans_spread(a, t.slab, stream);
    if (!status) status = add(0, 2 * in.d + 1, -1, kFirst);
    if (!status) status = kmeans_enough(a, stream);
  }
  int64_t done = 0, round = kFirstRound;
  for (int64_t it = 1; !status && it <= a.max_iter && done < in.b; ++it) {
    const int pass = it == 1 ? kFirst : kNext;
    status = assign(pass);
    if (!status) status = add(0, inertia + 2, inertia, pass);
    if (!status) status = kmeans_move(a, it, stream);
    if (status || it < round || it == a.max_iter) continue;
    round *= 2;
    status = wait_for(&done, &a.state[in.b].done, stream);
  }
  if (!status) status = assign(kLast);
  return status ? status : add(inertia, inertia + 1, inertia, kLast);
}

}  // namespace

Status kmeans_cuda(const KmeansLloyd& a, int device, void* stream) {
  if (a.in.b <= 0 || a.in.k <= 0) return kOk;
  const DeviceGuard guard(device);
  return a.in.dtype == kFloat64 ? launch<double>(a, stream) : launch<float>(a, stream);
}

}  // namespace gmk

// Greedy k-means++ (Arthur and Vassilvitskii, 2007; the trials as scikit-learn has them). One pass over the rows per
// centre: it brings every row's distance up to date with the centre chosen last, and sums, per group and candidate, what
// would be left. So the next draw needs no pass of its own: its group follows from the sums, its row from that group's
// rows. Bound: reading x, or (trials + 1) d subtract-multiply-adds per row.
#include <omp.h>

#include "kmeans/kmeans_rows.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// Distances between calls, four bytes each: a double without the lower half of its digits, for what they decide is drawn at
// random. Not a float, which ends at 1e38.
typedef uint32_t vupper __attribute__((vector_size(GMK_VECTOR_BYTES / 2)));
GMK_INLINE vdouble unpack(const uint32_t* p) {
  vupper x;
  memcpy(&x, p, sizeof x);
  return (vdouble)(__builtin_convertvector(x, vulong) << 32);
}
GMK_INLINE vfloat unpack(const float* p) { return load(p); }
GMK_INLINE void pack(uint32_t* p, vdouble x) {
  const vlong number = (vlong)(((vulong)x + 0x80000000u) >> 32), lost = (number == 0) & (vlong)(x > vdouble{});
  const vupper upper = __builtin_convertvector((vulong)(number - lost), vupper);  // what is not 0 does not become it
  memcpy(p, &upper, sizeof upper);
}
GMK_INLINE void pack(float* p, vfloat x) { store(p, x); }
template <class T>
struct Stored {
  using type = T;
};
template <>
struct Stored<double> {
  using type = uint32_t;
};

template <class T>
class PlusPlus {
  using v = typename simd<T>::v;
  using Distance = typename Stored<T>::type;
  static constexpr int kHalves = sizeof(v) / sizeof(T) / simd<double>::n;  // words of float64 in a word of T

 public:
  PlusPlus(const KmeansPlusPlus& a, int64_t b, int threads)
      : a_(a),
        rows_(a.in, b),
        threads_(rows_.groups() > 1 ? threads : 1),
        uniforms_(a.uniforms + b * a.uniforms_stride),
        centers_((T*)a.centers + b * a.in.k * a.in.d),
        indices_(a.indices + b * a.in.k),
        scratch_size_((a.in.d * kTileRows<T> + 2 * kTileRows<T> + 15) / 16 * 16),
        scratch_(threads_ * scratch_size_),
        closest_(rows_.groups() * kKmeansGroupRows),
        candidates_(a.trials * a.in.d),
        left_(rows_.groups() * (a.trials + 1)),
        ids_(a.trials) {}

  Status run() {
    if (!scratch_.ok() || !closest_.ok() || !candidates_.ok() || !left_.ok() || !ids_.ok()) return kOutOfMemory;
    const int64_t k = a_.in.k, d = a_.in.d, trials = a_.trials;
    ids_.get()[0] = first();
    for (int64_t c = 0; c < k; ++c) {
      const int64_t count = c ? trials : 1;
      if (c)
        for (int64_t t = 0; t < trials; ++t) ids_.get()[t] = draw(uniforms_[1 + (c - 1) * trials + t], c);
      for (int64_t t = 0; t < count; ++t) copy(candidates_.get() + t * d, rows_.x + ids_.get()[t] * d, d);
      const int64_t best = count == 1 && c == k - 1 ? 0 : look(c, count);
      indices_[c] = ids_.get()[best];
      copy(centers_ + c * d, (const T*)candidates_.get() + best * d, d);
    }
    return kOk;
  }

 private:
  double* group_left(int64_t g) { return left_.get() + g * (a_.trials + 1); }  // [0]: now; [1 + t]: with candidate t
  T* scratch() { return scratch_.get() + (threads_ > 1 ? omp_get_thread_num() : 0) * scratch_size_; }

  // A row, drawn by weight.
  int64_t first() {
    const double u = uniforms_[0];
    if (!rows_.weight) return int64_t(u * double(rows_.n));
    double total = 0, sum = 0;
    for (int64_t i = 0; i < rows_.n; ++i) total += double(rows_.weight[i]);
    int64_t last = 0;
    for (int64_t i = 0; i < rows_.n; ++i) {
      sum += double(rows_.weight[i]);
      if (rows_.weight[i] > 0) last = i;
      if (sum > u * total) break;
    }
    return last;
  }

  // distance[row] = min(closest, |x - centre c - 1|^2) for a tile.
  void update(Distance* distance, const Distance* closest, const T* tile, int64_t c) {
    v now[1][kWords];
    distances<T, 1>(now, tile, centers_ + (c - 1) * a_.in.d, a_.in.d);
    for (int u = 0; u < kWords; ++u) {
      if (c > 1) now[0][u] = vmin(now[0][u], unpack(closest + u * simd<T>::n));
      pack(distance + u * simd<T>::n, now[0][u]);
    }
  }

  // A row, drawn by weight times squared distance to the nearest of c centres. Where all are 0: the first that counts.
  int64_t draw(double u, int64_t c) {
    double total = 0, sum = 0;
    for (int64_t g = 0; g < rows_.groups(); ++g) total += group_left(g)[0];
    const double at = u * total;
    int64_t group = -1;
    for (int64_t g = 0; g < rows_.groups(); ++g) {
      if (!(group_left(g)[0] > 0)) continue;
      if (group >= 0) sum += group_left(group)[0];
      group = g;
      if (sum + group_left(g)[0] > at) break;
    }
    if (group < 0) {
      int64_t i = 0;
      while (i < rows_.n - 1 && !(rows_.weight_of(i) > 0)) ++i;
      return i;
    }
    int64_t last = -1;  // rounding may hide the last step: then the last row that could be drawn
    bool found = false;
    T* const tile = scratch();
    T* const distance = tile + a_.in.d * kTileRows<T>;
    Distance now[kTileRows<T>];
    rows_.tiles(tile, group, [&](int64_t begin, int64_t count) {
      if (found) return;
      update(now, closest_.get() + begin, tile, c);
      for (int u = 0; u < kWords; ++u) store(distance + u * simd<T>::n, unpack(now + u * simd<T>::n));
      for (int64_t r = 0; r < count && !found; ++r) {
        const double part = rows_.weight_of(begin + r) * double(distance[r]);
        sum += part;
        if (part > 0) last = begin + r;
        found = sum > at && part > 0;
      }
    });
    if (last >= 0) return last;
    int64_t i = group * kKmeansGroupRows;
    while (i + 1 < rows_.group_end(group) && !(rows_.weight_of(i) > 0)) ++i;
    return i;
  }

  // The candidate that leaves least, its group sums in place of the present ones.
  int64_t look(int64_t c, int64_t count) {
    const int64_t groups = rows_.groups();
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t g = 0; g < groups; ++g) group(g, c, count);
    int64_t best = 0;
    double least = INFINITY;
    for (int64_t t = 0; t < count; ++t) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += group_left(g)[1 + t];
      if (sum < least) least = sum, best = t;
    }
    for (int64_t g = 0; g < groups; ++g) group_left(g)[0] = group_left(g)[1 + best];
    return best;
  }

  void group(int64_t g, int64_t c, int64_t count) {
    T* const tile = scratch();
    T* const weight = tile + a_.in.d * kTileRows<T>;
    double* const left = group_left(g) + 1;
    for (int64_t t = 0; t < count; ++t) left[t] = 0;
    rows_.tiles(tile, g, [&](int64_t begin, int64_t rows) {
      Distance* const closest = closest_.get() + begin;
      if (c) update(closest, closest, tile, c);
      for (int64_t r = 0; r < kTileRows<T>; ++r)
        weight[r] = r >= rows ? T(0) : rows_.weight ? rows_.weight[begin + r] : T(1);
      for_blocks<kCenters>(count, [&](auto size, int64_t t) __attribute__((always_inline)) {
        constexpr int J = decltype(size)::value;
        v now[J][kWords];
        distances<T, J>(now, tile, candidates_.get() + t * a_.in.d, a_.in.d);
        for (int j = 0; j < J; ++j) {
          T* const distance = weight + kTileRows<T>;
          for (int u = 0; u < kWords; ++u)
            store(distance + u * simd<T>::n, c ? vmin(now[j][u], unpack(closest + u * simd<T>::n)) : now[j][u]);
          vdouble sum{};
          for (int h = 0; h < kWords * kHalves; ++h)
            sum = madd(wide(distance + h * simd<double>::n), wide(weight + h * simd<double>::n), sum);
          left[t + j] += hsum(sum);
        }
      });
    });
  }

  const KmeansPlusPlus& a_;
  const Rows<T> rows_;
  const int threads_;
  const double* const uniforms_;
  T* const centers_;
  int64_t* const indices_;
  const int64_t scratch_size_;
  Scratch<T> scratch_;
  Scratch<Distance> closest_;
  Scratch<T> candidates_;
  Scratch<double> left_;
  Scratch<int64_t> ids_;
};

template <class T>
static Status run(const KmeansPlusPlus& a, int threads) {
  return each_of_batch(a.in.b, a.in.b * (a.in.n * a.in.k * (a.in.d + 1)), threads,
                       [&](int64_t b, int own) { return PlusPlus<T>(a, b, own).run(); });
}

Status plus_plus(const KmeansPlusPlus& a, int threads) {
  if (a.in.b <= 0 || a.in.k <= 0) return kOk;
  return a.in.dtype == kFloat64 ? run<double>(a, threads) : run<float>(a, threads);
}

}  // namespace

extern const KmeansStartKernels kmeans_start_kernels;
const KmeansStartKernels kmeans_start_kernels = {plus_plus};

}  // namespace GMK_ISA_NS
}  // namespace gmk

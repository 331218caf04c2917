// Lloyd's iteration in one pass over the rows: a group's rows go to their nearest centres, and into float64 sums of that
// group; the groups' sums are added in order, whatever the threads. Bound: per row and centre d subtract-multiply-adds.
#include <omp.h>

#include "kmeans/kmeans_rows.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kWaveBytes = 8 << 20;  // sums of the groups that are under way

template <class T>
GMK_INLINE void add_row(double* sum, const T* x, double weight, int64_t d) {
  constexpr int n = simd<double>::n;
  int64_t f = 0;
  for (; f + n <= d; f += n) store(sum + f, madd(wide(x + f), splat(weight), load(sum + f)));
  for (; f < d; ++f) sum[f] += weight * double(x[f]);
}

struct FarRow {
  double far;  // squared distance to its centre
  int64_t row;
};
// Farther away, or as far and earlier.
GMK_INLINE bool before(const FarRow& a, const FarRow& b) { return a.far > b.far || (a.far == b.far && a.row < b.row); }

template <class T>
class Lloyd {
 public:
  Lloyd(const KmeansLloyd& a, int64_t b, int threads)
      : a_(a),
        b_(b),
        k_(a.in.k),
        d_(a.in.d),
        rows_(a.in, b),
        threads_(rows_.groups() > 1 ? threads : 1),
        step_((d_ + simd<double>::n - 1) / simd<double>::n * simd<double>::n),
        size_((k_ * (step_ + 1) + 2 + 7) / 8 * 8),
        wave_(wave()),
        tile_size_(((d_ + 1) * kTileRows<T> + 15) / 16 * 16),
        labels_(a.labels + b * a.in.n),
        centers_((T*)a.centers + b * k_ * d_),
        before_(k_ * d_),
        tiles_(threads_ * tile_size_),
        slots_(wave_ * size_),
        total_(size_) {}

  Status run() {
    if (!before_.ok() || !tiles_.ok() || !slots_.ok() || !total_.ok()) return kOutOfMemory;
    copy(centers_, (const T*)a_.init + b_ * a_.init_stride, k_ * d_);
    for (int64_t i = 0; i < rows_.n; ++i) labels_[i] = -1;
    double enough = 0;
    if (a_.max_iter > 0 && a_.tol > 0 && d_ > 0) {
      if (!mean_variance(&enough)) return kOutOfMemory;
      enough *= a_.tol;
    }
    bool fresh = false;  // do labels and inertia belong to the centres?
    int64_t it = 0;
    while (it < a_.max_iter) {
      ++it;
      pass(true);
      copy(before_.get(), (const T*)centers_, k_ * d_);
      if (!move()) return kOutOfMemory;
      double shift = 0;
      for (int64_t c = 0; c < k_; ++c) shift += squared_distance(centers_ + c * d_, before_.get() + c * d_, d_);
      fresh = shift == 0;
      if (changed() == 0 || shift <= enough) break;
    }
    a_.n_iter[b_] = it;
    if (!fresh) pass(false);
    a_.inertia[b_] = inertia();
    return kOk;
  }

 private:
  int64_t wave() const {
    int64_t w = kWaveBytes / (size_ * 8);
    w = w < threads_ ? threads_ : w;
    return w < rows_.groups() ? w : rows_.groups();
  }
  // Of a slot: sums [k][step], weights [k], inertia, rows with a new label.
  double* weights(double* slot) const { return slot + k_ * step_; }
  double& inertia() const { return total_.get()[k_ * (step_ + 1)]; }
  double& changed() const { return total_.get()[k_ * (step_ + 1) + 1]; }

  void group(int64_t g, T* tile, double* slot, bool sums) {
    using i = typename simd<T>::i;
    memset(slot, 0, size_t(size_) * sizeof(double));
    double inertia = 0;
    int64_t changed = 0;
    rows_.tiles(tile, g, [&](int64_t begin, int64_t count) {
      T* const distance = tile + d_ * kTileRows<T>;
      i label[kWords];
      nearest(distance, label, tile, centers_, k_, d_);
      decltype(label[0][0] + 0) at[kTileRows<T>];
      memcpy(at, label, sizeof at);
      for (int64_t r = 0; r < count; ++r) {
        const double w = rows_.weight_of(begin + r);
        inertia += w * double(distance[r]);
        changed += labels_[begin + r] != int32_t(at[r]);
        labels_[begin + r] = int32_t(at[r]);
        if (!sums || w == 0) continue;
        add_row(slot + at[r] * step_, rows_.x + (begin + r) * d_, w, d_);
        weights(slot)[at[r]] += w;
      }
    });
    slot[k_ * (step_ + 1)] = inertia;
    slot[k_ * (step_ + 1) + 1] = double(changed);
  }

  // Labels of all rows; their sums if they are wanted.
  void pass(bool sums) {
    const int64_t groups = rows_.groups();
    double* const total = total_.get();
    memset(total, 0, size_t(size_) * sizeof(double));
    for (int64_t g0 = 0; g0 < groups; g0 += wave_) {
      const int64_t now = groups - g0 < wave_ ? groups - g0 : wave_;
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
      {
        T* const tile = tiles_.get() + (threads_ > 1 ? omp_get_thread_num() : 0) * tile_size_;
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < now; ++g) group(g0 + g, tile, slots_.get() + g * size_, sums);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < size_; i += 8)
          for (int64_t g = 0; g < now; ++g)
            for (int64_t e = i; e < i + 8; ++e) total[e] += slots_.get()[g * size_ + e];
      }
    }
  }

  // Centres to the means of their rows. false: out of memory.
  bool move() {
    double* const sums = total_.get();
    double* const w = weights(sums);
    int64_t empty = 0, heaviest = 0;
    for (int64_t c = 0; c < k_; ++c) empty += !(w[c] > 0);
    if (empty && !relocate(empty)) return false;
    for (int64_t c = 0; c < k_; ++c)
      if (w[c] > w[heaviest]) heaviest = c;
    for (int64_t c = 0; c < k_; ++c) {
      const int64_t from = w[c] > 0 ? c : heaviest;
      for (int64_t f = 0; f < d_; ++f) centers_[c * d_ + f] = T(sums[from * step_ + f] / w[from]);
    }
    return true;
  }

  // Every empty centre takes the row that is farthest from its own, as in scikit-learn.
  bool relocate(int64_t empty) {
    Scratch<FarRow> heap_rows(empty);
    if (!heap_rows.ok()) return false;
    FarRow* const heap = heap_rows.get();  // the rows that come first; the root is the last of them
    int64_t held = 0;
    const auto sink = [&](int64_t at) {
      for (int64_t child; (child = 2 * at + 1) < held; at = child) {
        if (child + 1 < held && before(heap[child], heap[child + 1])) ++child;
        if (before(heap[child], heap[at])) return;
        const FarRow row = heap[at];
        heap[at] = heap[child];
        heap[child] = row;
      }
    };
    for (int64_t i = 0; i < rows_.n; ++i) {
      if (!(rows_.weight_of(i) > 0)) continue;
      const FarRow row = {squared_distance(rows_.x + i * d_, centers_ + labels_[i] * d_, d_), i};
      if (!(row.far > 0)) continue;
      if (held < empty) {
        heap[held++] = row;
        if (held == empty)
          for (int64_t at = held / 2; at-- > 0;) sink(at);
      } else if (before(row, heap[0])) {
        heap[0] = row;
        sink(0);
      }
    }
    const int64_t found = held;
    if (found < empty)
      for (int64_t at = held / 2; at-- > 0;) sink(at);
    while (held > 1) {  // heap sort: the first one first
      const FarRow row = heap[0];
      heap[0] = heap[--held];
      heap[held] = row;
      sink(0);
    }
    double* const sums = total_.get();
    double* const w = weights(sums);
    int64_t next = 0;
    for (int64_t c = 0; c < k_ && next < found; ++c) {
      if (w[c] > 0) continue;
      const int64_t row = heap[next++].row, old = labels_[row];
      const double weight = rows_.weight_of(row);
      for (int64_t f = 0; f < d_; ++f) {
        const double part = weight * double(rows_.x[row * d_ + f]);
        sums[old * step_ + f] -= part;
        sums[c * step_ + f] = part;
      }
      w[c] = weight;
      w[old] -= weight;
    }
    return true;
  }

  // Of the features, weighted, about the first row. false: out of memory.
  bool mean_variance(double* variance) {
    const int64_t groups = rows_.groups(), size = 2 * d_ + 1;
    Scratch<double> parts(groups * size);
    if (!parts.ok()) return false;
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      double* const sum = parts.get() + g * size;
      memset(sum, 0, size_t(size) * sizeof(double));
      for (int64_t i = g * kKmeansGroupRows; i < rows_.group_end(g); ++i) {
        const double w = rows_.weight_of(i);
        for (int64_t f = 0; f < d_; ++f) {
          const double t = double(rows_.x[i * d_ + f]) - double(rows_.x[f]);
          sum[f] += w * t;
          sum[d_ + f] += w * t * t;
        }
        sum[2 * d_] += w;
      }
    }
    double* const all = parts.get();
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t e = 0; e < size; ++e) all[e] += all[g * size + e];
    double sum = 0;
    for (int64_t f = 0; f < d_; ++f) {
      const double mean = all[f] / all[2 * d_];
      sum += all[d_ + f] / all[2 * d_] - mean * mean;
    }
    *variance = sum / double(d_);
    return true;
  }

  const KmeansLloyd& a_;
  const int64_t b_, k_, d_;
  const Rows<T> rows_;
  const int threads_;
  const int64_t step_, size_, wave_, tile_size_;
  int32_t* const labels_;
  T* const centers_;
  Scratch<T> before_, tiles_;
  Scratch<double> slots_, total_;
};

template <class T>
static Status run(const KmeansLloyd& a, int threads) {
  return each_of_batch(a.in.b, a.in.b * (a.in.n * a.in.k * (a.in.d + 1) / 4), threads,
                       [&](int64_t b, int own) { return Lloyd<T>(a, b, own).run(); });
}

Status lloyd(const KmeansLloyd& a, int threads) {
  if (a.in.b <= 0 || a.in.k <= 0) return kOk;
  return a.in.dtype == kFloat64 ? run<double>(a, threads) : run<float>(a, threads);
}

}  // namespace

extern const KmeansKernels kmeans_kernels;
const KmeansKernels kmeans_kernels = {lloyd};

}  // namespace GMK_ISA_NS
}  // namespace gmk

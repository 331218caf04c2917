// CPU only: the sums of one group of rows. A block of rows becomes responsibilities (gmm_em_block.h), then the features
// 1, t, and products of t are formed a chunk at a time and meet them (gmm_em_sums.h); neither ever goes beyond the cache.
#pragma once
#include "core/scratch.h"
#include "gmm/gmm_em.h"
#include "gmm/gmm_em_block.h"
#include "gmm/gmm_em_prune.h"
#include "gmm/gmm_em_sparse.h"
#include "gmm/gmm_em_sums.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kSparse = 8;               // blocks of which at most one in so many responsibilities is not 0
constexpr int64_t kLaneBytes = 1 << 20;  // sums spread over lanes, one thread's: they stay in L2

// Sums of one mixture while they grow: [linear][step], then [shared]. Features of `linear`: 1, t, and
//   full t_a t_b (a <= b), diag t^2, spherical |t|^2; tied has its t_a t_b in `shared`, for all components at once.
struct Sums {
  int64_t k, d, step, linear, shared;
  int covariance;
  bool narrow;
  int64_t numbers() const { return linear * step + shared; }
};
template <class A>
static Sums sums_of(const GmmInputs& in) {
  constexpr int64_t n = simd<A>::n;
  Sums s{};
  s.k = in.k;
  s.d = in.d;
  s.covariance = in.covariance;
  const int64_t pairs = in.d * (in.d + 1) / 2;
  s.shared = in.covariance == kTied ? pairs : 0;
  s.linear = 1 + in.d +
             (in.covariance == kFull   ? pairs
              : in.covariance == kDiag ? in.d
              : in.covariance == kTied ? 0
                                       : 1);
  s.narrow = 4 * in.k <= 3 * n && (s.linear * in.k + s.shared) * n * int64_t(sizeof(A)) <= kLaneBytes;
  s.step = s.narrow ? in.k : (in.k + n - 1) / n * n;
  return s;
}

template <class T, class A, bool narrow>
struct Worker {
  static constexpr int rows = narrow ? 1024 / int(sizeof(T)) : 64;
  static constexpr int n = simd<A>::n;
  static constexpr int chunk = narrow ? 24 : 384 / int(sizeof(A));  // features at once: a multiple of all of kTall
  static constexpr bool same = sizeof(T) == sizeof(A);

  Block<T, rows> block;
  Pruning<T, rows> pruning;    // wide only
  SparseSums<A, rows> sparse;  // wide only
  T* mixture;
  A *t, *features, *r, *transposed, *row_weight, *lanes, *shared_lanes;

  static int64_t numbers_t(const GmmInputs& in) {
    return (Mixture<T>::scratch(in) + Block<T, rows>::numbers(in) + 15) / 16 * 16;
  }
  static int64_t numbers_a(const Sums& s) {
    return (s.d + chunk + 1 + (same ? 0 : s.k) + (narrow ? 0 : s.step)) * rows + (narrow ? s.linear * s.k * n : 0) +
           s.shared * n + (narrow ? 0 : SparseSums<A, rows>(s.d, s.k, s.covariance).numbers());
  }
  void take(const GmmInputs& in, const Sums& s, T* at, A* more) {
    mixture = at;
    block.take(in, at + Mixture<T>::scratch(in));
    t = more;
    features = t + s.d * rows;
    row_weight = features + chunk * rows;
    r = row_weight + rows;
    transposed = r + (same ? 0 : s.k) * rows;
    lanes = transposed + (narrow ? 0 : s.step) * rows;
    shared_lanes = lanes + (narrow ? s.linear * s.k * n : 0);
    if (narrow) return;
    sparse = SparseSums<A, rows>(s.d, s.k, s.covariance);
    sparse.take(shared_lanes + s.shared * n);
  }

  // The responsibilities in A, [k][rows].
  const A* responsibilities(const Sums& s) {
    if (same) {
      if (narrow)
        for (int64_t c = 0; c < s.k; ++c)
          for (int row = 0; row < block.used; row += simd<T>::n) {
            T* const e = block.e + c * rows + row;
            store(e, load(e) * load(block.scale + row));
          }
      return reinterpret_cast<const A*>(block.e);
    }
    for (int64_t c = 0; c < s.k; ++c)
      for (int row = 0; row < block.used; ++row) r[c * rows + row] = A(block.e[c * rows + row] * block.scale[row]);
    return r;
  }
  void transpose_responsibilities(const Sums& s, const A* from) {
    for (int64_t c = 0; c < s.step; c += n)
      for (int row = 0; row < block.used; row += n) {
        typename simd<A>::v e[n];
        typename simd<A>::v scale = splat(A(1));
        if (same) scale = load(reinterpret_cast<const A*>(block.scale) + row);
#pragma GCC unroll 16
        for (int l = 0; l < n; ++l)
          e[l] = c + l < s.k ? load(from + (c + l) * rows + row) * scale : typename simd<A>::v{};
        transpose<A>(e);
#pragma GCC unroll 16
        for (int l = 0; l < n; ++l) store(transposed + (row + l) * s.step + c, e[l]);
      }
  }

  // `count` features [rows], from feature `first` on, meet their responsibilities.
  void add_linear(const Sums& s, A* slot, const A* from, const A* f, int64_t first, int64_t count) {
    if (narrow)
      narrow_sums<A, rows>(lanes + first * s.k * n, f, from, s.k, count, block.used);
    else
      wide_sums<A, rows>(slot + first * s.step, f, transposed, s.step, count, block.used);
  }
  void add_shared(const A* f, int64_t first, int64_t count) {
    narrow_sums<A, rows>(shared_lanes + first * n, f, row_weight, 1, count, block.used);
  }

  struct Stream {  // features on their way to the sums
    Worker& w;
    const Sums& s;
    const A* r;
    A* slot;
    int64_t done = 0;
    int count = 0;
    bool shared = false;

    A* next() {
      if (count == chunk) flush();
      return w.features + rows * count++;
    }
    void turn_to_shared() {
      flush();
      shared = true;
      done = 0;
    }
    void flush() {
      if (shared)
        w.add_shared(w.features, done, count);
      else
        w.add_linear(s, slot, r, w.features, done, count);
      done += count;
      count = 0;
    }
  };

  void multiply(A* to, const A* a, const A* b) {
    for (int row = 0; row < rows; row += n) store(to + row, load(a + row) * load(b + row));
  }

  // All features of the rows in t, in the order of the sums; out.next(): where the next one goes.
  template <class Out>
  void form_features(const Sums& s, Out& out) {
    A* const one = out.next();
    for (int row = 0; row < rows; ++row) one[row] = A(1);
    for (int64_t f = 0; f < s.d; ++f) memcpy(out.next(), t + f * rows, sizeof(A) * rows);
    if (s.covariance == kDiag)
      for (int64_t f = 0; f < s.d; ++f) multiply(out.next(), t + f * rows, t + f * rows);
    if (s.covariance == kSpherical) {
      A* const square = out.next();
      for (int row = 0; row < rows; row += n) {
        typename simd<A>::v sum{};
        for (int64_t f = 0; f < s.d; ++f) sum = madd(load(t + f * rows + row), load(t + f * rows + row), sum);
        store(square + row, sum);
      }
    }
    if (matrix_covariance(s.covariance)) form_products(s, out);
  }
  template <class Out>
  void form_products(const Sums& s, Out& out) {
    if (s.covariance == kTied) out.turn_to_shared();
    for (int64_t a = 0; a < s.d; ++a)
      for (int64_t b = a; b < s.d; ++b) multiply(out.next(), t + a * rows, t + b * rows);
  }
  void weigh_rows(const Sums& s) {
    if (s.covariance != kTied) return;
    for (int row = 0; row < rows; ++row) {
      const T scale = block.scale[row];  // NaN where the row has one, which then is in every product
      row_weight[row] = scale == T(0) ? A(0) : A(scale == scale ? block.weight[row] : scale);
    }
  }
  void subtract(const Sums& s, const T* shift) {
    for (int64_t f = 0; f < s.d; ++f)
      for (int row = 0; row < rows; ++row) t[f * rows + row] = A(block.x[f * rows + row]) - A(shift[f]);
  }
  void add_features(const Sums& s, const T* shift, const A* from, A* slot) {
    subtract(s, shift);
    weigh_rows(s);
    Stream out{*this, s, from, slot};
    form_features(s, out);
    out.flush();
  }
  const A* final_responsibilities(const Sums& s) {  // as the sums take them
    const A* const from = responsibilities(s);
    if (!narrow) transpose_responsibilities(s, from);
    return from;
  }

  void begin_sums(const Sums& s, A* slot) {
    memset(slot, 0, size_t(s.numbers()) * sizeof(A));
    if (narrow) memset(lanes, 0, size_t(s.linear * s.k * n) * sizeof(A));
    memset(shared_lanes, 0, size_t(s.shared * n) * sizeof(A));
    memset(block.log_likelihood, 0, sizeof block.log_likelihood);
  }
  // The rows in block.x, with block.e times block.scale as responsibilities.
  void add_block(const Sums& s, const T* shift, A* slot) { add_features(s, shift, final_responsibilities(s), slot); }
  double end_sums(const Sums& s, A* slot) {  // the log-likelihood
    if (narrow) add_lanes(slot, lanes, s.linear * s.k);
    add_lanes(slot + s.linear * s.step, shared_lanes, s.shared);
    double sum = 0;
    for (int l = 0; l < simd<T>::n; ++l) sum += block.log_likelihood[l];
    return sum;
  }

  // slot: the sums, overwritten. heads: log-likelihood and weight.
  void group(const Sums& s, const Mixture<T>& m, bool matrix, const T* x, const T* weights, const T* shift,
             int64_t count, A* slot, double* heads) {
    begin_sums(s, slot);
    heads[1] = 0;
    bool scattered = false;
    for (int64_t row = 0; row < count; row += rows) {
      const int64_t some = count - row < rows ? count - row : rows;
      block.load_rows(x + row * s.d, weights ? weights + row : nullptr, some, s.d);
      for (int i = 0; i < rows; ++i) heads[1] += double(block.weight[i]);
      if (narrow)
        block.densities(m, matrix);
      else
        pruning.densities(block, m, matrix);
      block.softmax(s.k, s.d, kNegligible<T>);
      if (narrow || block.nonzero * kSparse > rows * s.k) {
        add_block(s, shift, slot);
        continue;
      }
      if (!scattered) memset(sparse.sums, 0, size_t(s.k * sparse.per) * sizeof(A));
      scattered = true;
      sparse.load_rows(x + row * s.d, shift, some);
      sparse.add(block.e, block.scale);
      if (s.covariance != kTied) continue;
      subtract(s, shift);
      weigh_rows(s);
      Stream out{*this, s, nullptr, slot};
      form_products(s, out);
      out.flush();
    }
    if (scattered) sparse.move(slot, s.step);
    heads[0] = end_sums(s, slot);
  }
};

// From the growing form to GmmEmStatistics::sums, components begin .. end, and back.
static void unpack(double* out, const double* sums, const Sums& s, int64_t begin, int64_t end) {
  double* const nk = out + 2;
  double* const s1 = nk + s.k;
  double* const s2 = s1 + s.k * s.d;
  for (int64_t c = begin; c < end; ++c) {
    const double* from = sums + c;
    nk[c] = *from;
    for (int64_t f = 0; f < s.d; ++f) s1[c * s.d + f] = from[(1 + f) * s.step];
    from += (1 + s.d) * s.step;
    if (s.covariance == kDiag)
      for (int64_t f = 0; f < s.d; ++f) s2[c * s.d + f] = from[f * s.step];
    if (s.covariance == kSpherical) s2[c] = *from;
    if (s.covariance == kFull)
      for (int64_t a = 0; a < s.d; ++a)
        for (int64_t b = a; b < s.d; ++b, from += s.step)
          s2[(c * s.d + a) * s.d + b] = s2[(c * s.d + b) * s.d + a] = *from;
  }
  if (s.covariance != kTied || begin) return;
  const double* from = sums + s.linear * s.step;
  for (int64_t a = 0; a < s.d; ++a)
    for (int64_t b = a; b < s.d; ++b) s2[a * s.d + b] = s2[b * s.d + a] = *from++;
}
static __attribute__((unused)) void pack(double* sums, const double* in, const Sums& s) {
  const double* const nk = in + 2;
  const double* const s1 = nk + s.k;
  const double* const s2 = s1 + s.k * s.d;
  for (int64_t c = 0; c < s.k; ++c) {
    double* to = sums + c;
    *to = nk[c];
    for (int64_t f = 0; f < s.d; ++f) to[(1 + f) * s.step] = s1[c * s.d + f];
    to += (1 + s.d) * s.step;
    if (s.covariance == kDiag)
      for (int64_t f = 0; f < s.d; ++f) to[f * s.step] = s2[c * s.d + f];
    if (s.covariance == kSpherical) *to = s2[c];
    if (s.covariance == kFull)
      for (int64_t a = 0; a < s.d; ++a)
        for (int64_t b = a; b < s.d; ++b, to += s.step) *to = s2[(c * s.d + a) * s.d + b];
  }
  if (s.covariance != kTied) return;
  double* to = sums + s.linear * s.step;
  for (int64_t a = 0; a < s.d; ++a)
    for (int64_t b = a; b < s.d; ++b) *to++ = s2[a * s.d + b];
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

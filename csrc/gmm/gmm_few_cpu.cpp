// Many mixtures of a few rows each (a mixture density network has one): the mixtures lie on the SIMD lanes. A job turns
// the tensors of one word of mixtures into [number][lane], where every formula of gmm.h is plain arithmetic on words.
// Bound: the parameters are read once, and their gradients written once, through a transposition.
#include <omp.h>

#include "core/scratch.h"
#include "gmm/gmm_few.h"
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kLaneBytes = 512 << 10;  // of one job: it stays in L2

template <class T>
struct Few {  // words of lanes: element i of a tensor at p + i * simd<T>::n
  T *x, *log_weights, *means, *precisions, *constants, *lp, *t, *y;
  T *grad, *log_prob, *grad_x, *grad_log_weights, *grad_means, *grad_precisions;
};
GMK_INLINE int64_t matrix_size(const GmmInputs& in) { return covariance_numbers(in.k, in.d, in.covariance); }
// Where each tensor lies behind `at`; the words in all.
template <class T>
GMK_INLINE int64_t few_words(const GmmInputs& in, bool backward, T* at, Few<T>* few) {
  int64_t words = 0;
  auto take = [&](int64_t count) {
    T* const p = at ? at + words * simd<T>::n : nullptr;
    words += count;
    return p;
  };
  Few<T> f{};
  f.x = take(in.n * in.d);
  f.log_weights = take(in.k);
  f.means = take(in.k * in.d);
  f.precisions = take(matrix_size(in));
  f.constants = take(in.k);
  f.lp = take(in.k);
  f.t = take(in.d);
  f.y = take(in.d);
  if (backward) {
    f.grad = take(in.n);
    f.log_prob = take(in.n);
    f.grad_x = take(in.n * in.d);
    f.grad_log_weights = take(in.k);
    f.grad_means = take(in.k * in.d);
    f.grad_precisions = take(matrix_size(in));
  }
  if (few) *few = f;
  return words;
}

template <class T>
GMK_INLINE void load_lanes(T* to, const void* from, int64_t stride, int64_t first, int64_t count, int64_t size) {
  const T* const p = (const T*)from;
  if (stride) return load_tile(to, simd<T>::n, p + first * stride, count, size);
  for (int64_t i = 0; i < size; ++i) store(to + i * simd<T>::n, splat(p[i]));  // shared by all mixtures
}

// One word of mixtures.
template <class T>
struct Word {
  GmmInputs in;
  Few<T> f;
  bool matrix;
};

#define GMK_WORD                 \
  using v = typename simd<T>::v; \
  constexpr int n = simd<T>::n;  \
  const GmmInputs& in = w.in;    \
  const Few<T>& f = w.f;         \
  const int64_t d = in.d;        \
  (void)n, (void)d, (void)f
#define GMK_AT(p, i) load((p) + (i) * n)

// constants[c] = log weight + log|det P| - d/2 log 2 pi
template <class T>
static void constants(const Word<T>& w, int64_t first, int64_t count) {
  GMK_WORD;
  for (int64_t c = 0; c < in.k; ++c) {
    double sum[n];
    for (int l = 0; l < n; ++l) sum[l] = double(f.log_weights[c * n + l]) - 0.91893853320467274178 * double(d);
    for (int64_t j = 0; j < d; ++j) {
      const v p = GMK_AT(f.precisions, precision_at(in.covariance, d, c, j, j)), log_abs = vlog(vmax(p, -p));
      for (int l = 0; l < n; ++l) sum[l] += double(log_abs[l]);
    }
    for (int l = 0; l < n; ++l)
      f.constants[c * n + l] = l < count && left_out<T>(in, first + l, c) ? T(-INFINITY) : T(sum[l]);
  }
}

// t = x - mean, y = t P of a row and a component; its log-density, -inf if the component is left out.
template <class T>
GMK_INLINE typename simd<T>::v component(const Word<T>& w, int64_t row, int64_t c) {
  GMK_WORD;
  v square{};
  for (int64_t j = 0; j < d; ++j) store(f.t + j * n, GMK_AT(f.x, row * d + j) - GMK_AT(f.means, c * d + j));
  for (int64_t j = 0; j < d; ++j) {
    v y{};
    for (int64_t i = w.matrix ? 0 : j; i <= j; ++i)
      y = madd(GMK_AT(f.t, i), GMK_AT(f.precisions, precision_at(in.covariance, d, c, i, j)), y);
    store(f.y + j * n, y);
    square = madd(y, y, square);
  }
  const v constant = GMK_AT(f.constants, c), dead = splat(T(-INFINITY));
  return select(constant == dead, dead, madd(square, splat(T(-0.5)), constant));
}

template <class T>
GMK_INLINE typename simd<T>::v row_log_prob(const Word<T>& w, int64_t row) {
  GMK_WORD;
  const v least = splat(T(sizeof(T) == 4 ? -3.4028234e38 : -1.7976931348623157e308));  // -inf - -inf would be NaN
  v best = least, sum{}, odd{};
  for (int64_t c = 0; c < in.k; ++c) {
    const v lp = component(w, row, c);
    store(f.lp + c * n, lp);
    best = vmax(lp, best);
  }
  for (int64_t c = 0; c < in.k; ++c) sum += vexp_nonpositive(GMK_AT(f.lp, c) - best);
  v r = best + vlog(sum);
  for (int64_t j = 0; j < d; ++j) odd += GMK_AT(f.x, row * d + j) * splat(T(0));  // NaN where x is not finite
  for (int l = 0; l < n; ++l)
    if (odd[l] != odd[l]) {
      bool nan = false;
      for (int64_t j = 0; j < d; ++j) nan |= f.x[(row * d + j) * n + l] != f.x[(row * d + j) * n + l];
      if (!nan) r[l] = T(-INFINITY);  // a NaN has reached r, if there is any component
    }
  return r;
}

// The gradients of one row and component. Where its weight is 0, t, y and P may be anything.
template <class T>
GMK_INLINE void add_gradients(const Word<T>& w, int64_t row, int64_t c, typename simd<T>::v weight, bool need_x,
                              bool need_parameters) {
  GMK_WORD;
  const auto zero = weight == v{};
  const auto kept = [&](v x) __attribute__((always_inline)) { return select(zero, v{}, x); };
  if (need_parameters) store(f.grad_log_weights + c * n, GMK_AT(f.grad_log_weights, c) + weight);
  for (int64_t i = 0; i < d; ++i) {
    v pull{};  // (P y)_i
    for (int64_t j = i; j < (w.matrix ? d : i + 1); ++j)
      pull = madd(GMK_AT(f.precisions, precision_at(in.covariance, d, c, i, j)), GMK_AT(f.y, j), pull);
    pull = kept(pull * weight);
    if (need_x) store(f.grad_x + (row * d + i) * n, GMK_AT(f.grad_x, row * d + i) - pull);
    if (!need_parameters) continue;
    store(f.grad_means + (c * d + i) * n, GMK_AT(f.grad_means, c * d + i) + pull);
    const v t = GMK_AT(f.t, i);
    for (int64_t j = i; j < (w.matrix ? d : i + 1); ++j) {
      T* const to = f.grad_precisions + precision_at(in.covariance, d, c, i, j) * n;
      v g = weight * t * GMK_AT(f.y, j);
      if (i == j) g -= weight / GMK_AT(f.precisions, precision_at(in.covariance, d, c, i, i));
      store(to, load(to) - kept(g));
    }
  }
}

template <class T>
static void backward_word(const Word<T>& w, bool need_x, bool need_parameters) {
  GMK_WORD;
  const v least = splat(T(sizeof(T) == 4 ? 1e-30 : 1e-278)), none = splat(T(-INFINITY));
  for (int64_t row = 0; row < in.n; ++row) {
    const v log_prob = GMK_AT(f.log_prob, row), grad = GMK_AT(f.grad, row);
    for (int64_t c = 0; c < in.k; ++c) {
      const v lp = component(w, row, c);
      v r = vexp(lp - log_prob);
      const auto out = (r < least) | (lp == none) | (log_prob == none);
      const v weight = select(out, v{}, r * grad);
      add_gradients(w, row, c, weight, need_x, need_parameters);
    }
  }
}

template <class T>
Status run(const GmmInputs& in, T* log_prob, const GmmLogProbBackward* back, int threads) {
  constexpr int n = simd<T>::n;
  const int64_t words = few_words<T>(in, back != nullptr, nullptr, nullptr), jobs = (in.b + n - 1) / n;
  const int64_t pairs = matrix_covariance(in.covariance) ? in.d * (in.d + 1) / 2 : in.d;
  threads = team(in.b * (in.k + 1) * (in.n * (pairs + 4) + 4) * (back ? 3 : 1) / 4, threads);
  Scratch<T> scratch(threads * words * n);
  if (!scratch.ok()) return kOutOfMemory;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < jobs; ++job) {
    Word<T> w;
    w.in = in;
    w.matrix = matrix_covariance(in.covariance);
    T* const own = scratch.get() + omp_get_thread_num() * words * n;
    few_words<T>(in, back != nullptr, own, &w.f);
    const Few<T>& f = w.f;
    const int64_t first = job * n, rest = in.b - first, count = rest < n ? rest : n, size = matrix_size(in);
    load_lanes(f.x, in.x, in.x_stride, first, count, in.n * in.d);
    load_lanes(f.log_weights, in.log_weights, in.weights_stride, first, count, in.k);
    load_lanes(f.means, in.means, in.means_stride, first, count, in.k * in.d);
    load_lanes(f.precisions, in.precisions, in.precisions_stride, first, count, size);
    constants(w, first, count);
    if (!back) {
      for (int64_t row = 0; row < in.n; ++row) {
        const auto r = row_log_prob(w, row);
        for (int64_t l = 0; l < count; ++l) log_prob[(first + l) * in.n + row] = r[l];
      }
      continue;
    }
    load_lanes(f.grad, back->grad, in.n, first, count, in.n);
    load_lanes(f.log_prob, back->log_prob, in.n, first, count, in.n);
    const int64_t sums = in.n * in.d + in.k + in.k * in.d + size;  // the four gradients lie side by side
    memset(f.grad_x, 0, size_t(sums * n) * sizeof(T));
    backward_word(w, back->need_x, back->need_parameters);
    if (back->need_x) store_tile((T*)back->grad_x + first * in.n * in.d, f.grad_x, n, count, in.n * in.d);
    if (!back->need_parameters) continue;
    store_tile((T*)back->grad_log_weights + first * in.k, f.grad_log_weights, n, count, in.k);
    store_tile((T*)back->grad_means + first * in.k * in.d, f.grad_means, n, count, in.k * in.d);
    store_tile((T*)back->grad_precisions + first * size, f.grad_precisions, n, count, size);
  }
  return kOk;
}

template <class T>
bool fits(const GmmInputs& in, bool backward) {
  return 2 * in.n <= simd<T>::n &&
         few_words<T>(in, backward, nullptr, nullptr) * simd<T>::n * int64_t(sizeof(T)) <= kLaneBytes;
}

}  // namespace

bool gmm_few(const GmmInputs& in, bool backward) {
  return in.dtype == kFloat64 ? fits<double>(in, backward) : fits<float>(in, backward);
}
Status gmm_few_log_prob(const GmmLogProb& a, int threads) {
  return a.in.dtype == kFloat64 ? run<double>(a.in, (double*)a.out, nullptr, threads)
                                : run<float>(a.in, (float*)a.out, nullptr, threads);
}
Status gmm_few_log_prob_backward(const GmmLogProbBackward& a, int threads) {
  return a.in.dtype == kFloat64 ? run<double>(a.in, nullptr, &a, threads) : run<float>(a.in, nullptr, &a, threads);
}

}  // namespace GMK_ISA_NS
}  // namespace gmk

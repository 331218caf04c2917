// The E-step and its sums. Rows are cut into groups of kEmGroupRows; a group is summed in the dtype of the
// accumulators, and the groups are added in float64 in order, whatever the threads. Bound: per row and component
// d^2/2 + 3d/2 multiply-adds for the density (full) and as many for the sums, 4 d (diag), one exponential.
#include <omp.h>

#include "core/batch.h"
#include "gmm/gmm_em_group.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kWaveBytes = 8 << 20;  // sums of the groups that are under way

// shift = sum_c softmax(log_weights)_c mean_c, or the one that was given; rounded to T.
template <class T>
static void find_shift(const GmmEmStatistics& a, int64_t b, double* out, T* rounded) {
  const GmmInputs& in = a.in;
  const T* const log_weights = (const T*)in.log_weights + b * in.weights_stride;
  const T* const means = (const T*)in.means + b * in.means_stride;
  double top = -1e300, total = 0;
  for (int64_t f = 0; f < in.d; ++f) out[f] = a.shift ? a.shift[b * a.shift_stride + f] : 0;
  if (!a.shift) {
    for (int64_t c = 0; c < in.k; ++c) top = double(log_weights[c]) > top ? double(log_weights[c]) : top;
    for (int64_t c = 0; c < in.k; ++c) {
      const double w = exp(double(log_weights[c]) - top);
      total += w;
      if (w != 0)
        for (int64_t f = 0; f < in.d; ++f) out[f] += w * double(means[c * in.d + f]);
    }
    for (int64_t f = 0; f < in.d; ++f) out[f] /= total > 1e-300 ? total : 1e-300;
  }
  for (int64_t f = 0; f < in.d; ++f) out[f] = double(rounded[f] = T(out[f]));
}

// Sums about `shift` lose (mean - shift)^2 / variance of their digits when a covariance is made of them. Beyond this
// limit float32 data are summed in float64: 256 * 2^-24 is 1.5e-5 of a variance. Variance: given the other features.
constexpr double kSpreadLimit = 256;

template <class T>
static bool spread_out(const GmmInputs& in, int64_t b, const Mixture<T>& m, const T* shift) {
  const T* const p = (const T*)in.precisions + b * in.precisions_stride;
  const int64_t d = in.d;
  for (int64_t c = 0; c < in.k; ++c) {
    if (m.constants[c] == T(-INFINITY)) continue;
    double all = 0;
    for (int64_t f = 0; f < d; ++f) {
      double precision = 0;
      if (matrix_covariance(in.covariance)) {
        const T* const row = p + c * m.matrix_step + f * d;
        T sum = 0;
        for (int64_t g = f; g < d; ++g) sum += row[g] * row[g];
        precision = double(sum);
      } else {
        precision = double(m.scales[c * d + f]) * double(m.scales[c * d + f]);
      }
      const double t = double(m.means[c * d + f]) - double(shift[f]), spread = t * t * precision;
      if (in.covariance != kSpherical && !(spread <= kSpreadLimit)) return true;
      all += spread;
    }
    if (in.covariance == kSpherical && !(all <= kSpreadLimit * double(d))) return true;
  }
  return false;
}

// Everything of one call that does not depend on the mixture; T: of the data, A: of the accumulators.
template <class T, class A, bool narrow>
struct Run {
  using W = Worker<T, A, narrow>;
  const GmmEmStatistics& a;
  const Sums s;
  const bool matrix;
  const int64_t groups, numbers_t, numbers_a;

  explicit Run(const GmmEmStatistics& args)
      : a(args),
        s(sums_of<A>(args.in)),
        matrix(matrix_covariance(args.in.covariance)),
        groups((args.in.n + kEmGroupRows - 1) / kEmGroupRows),
        numbers_t(W::numbers_t(args.in)),
        numbers_a((W::numbers_a(s) + 15) / 16 * 16) {}

  void group(W& w, const Mixture<T>& m, int64_t b, int64_t g, const T* shift, A* slot, double* heads) const {
    const GmmInputs& in = a.in;
    const int64_t begin = g * kEmGroupRows, count = in.n - begin < kEmGroupRows ? in.n - begin : kEmGroupRows;
    const T* const weights = a.sample_weight ? (const T*)a.sample_weight + b * a.sample_weight_stride + begin : nullptr;
    w.group(s, m, matrix, (const T*)in.x + b * in.x_stride + begin * in.d, weights, shift, count, slot, heads);
  }
  double* out(int64_t b) const { return a.sums + b * em_numbers(s.k, s.d, s.covariance); }
  void start(int64_t b, double* total) const {
    const double* const initial = a.initial ? a.initial + b * em_numbers(s.k, s.d, s.covariance) : nullptr;
    memset(total, 0, size_t(s.numbers()) * sizeof(double));
    out(b)[0] = initial ? initial[0] : 0;
    out(b)[1] = initial ? initial[1] : 0;
    if (initial) pack(total, initial, s);
  }

  // One mixture on one thread.
  void alone(W& w, const Mixture<T>& m, int64_t b, const T* shift, A* slot, double* total) const {
    start(b, total);
    for (int64_t g = 0; g < groups; ++g) {
      double heads[2];
      group(w, m, b, g, shift, slot, heads);
      for (int64_t i = 0; i < s.numbers(); ++i) total[i] += double(slot[i]);
      out(b)[0] += heads[0];
      out(b)[1] += heads[1];
    }
    unpack(out(b), total, s, 0, s.k);
  }

  // One mixture on all threads: a wave of groups, then the sums of that wave in order.
  Status together(int64_t b, const T* shift, int threads) const {
    const int64_t size = (s.numbers() + 15) / 16 * 16;
    int64_t wave = kWaveBytes / (size * int64_t(sizeof(A)));
    wave = wave > 64 ? 64 : wave;
    wave = wave < threads ? threads : wave;
    wave = wave > groups ? groups : wave;
    Scratch<T> scratch_t(threads * numbers_t);
    Scratch<A> scratch_a(threads * numbers_a), slots(wave * size);
    Scratch<double> total(size), heads(2 * wave);
    if (!scratch_t.ok() || !scratch_a.ok() || !slots.ok() || !total.ok() || !heads.ok()) return kOutOfMemory;
    start(b, total.get());
#pragma omp parallel num_threads(threads)
    {
      W w;
      w.take(a.in, s, scratch_t.get() + omp_get_thread_num() * numbers_t,
             scratch_a.get() + omp_get_thread_num() * numbers_a);
      const Mixture<T> m = prepare<T>(a.in, b, w.mixture);
      w.pruning.take(m, matrix);
      for (int64_t g0 = 0; g0 < groups; g0 += wave) {
        const int64_t now = groups - g0 < wave ? groups - g0 : wave;
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < now; ++g) group(w, m, b, g0 + g, shift, slots.get() + g * size, heads.get() + 2 * g);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < size; i += 16)
          for (int64_t g = 0; g < now; ++g)
            for (int64_t e = i; e < i + 16; ++e) total.get()[e] += double(slots.get()[g * size + e]);
#pragma omp single
        for (int64_t g = 0; g < now; ++g) {
          out(b)[0] += heads.get()[2 * g];
          out(b)[1] += heads.get()[2 * g + 1];
        }
      }
#pragma omp for schedule(static)
      for (int64_t c = 0; c < (s.k ? s.k : 1); ++c) unpack(out(b), total.get(), s, c, c < s.k ? c + 1 : c);
    }
    return kOk;
  }
};

// One mixture or, on one thread, a range of them.
template <class T, class A, bool narrow>
static Status run(const GmmEmStatistics& a, int64_t b, const T* shift, int threads) {
  const Run<T, A, narrow> r(a);
  if (threads > 1 && r.groups > 1) return r.together(b, shift, threads);
  Scratch<T> scratch_t(r.numbers_t);
  Scratch<A> scratch_a(r.numbers_a), slot(r.s.numbers());
  Scratch<double> total(r.s.numbers());
  if (!scratch_t.ok() || !scratch_a.ok() || !slot.ok() || !total.ok()) return kOutOfMemory;
  Worker<T, A, narrow> w;
  w.take(a.in, r.s, scratch_t.get(), scratch_a.get());
  const Mixture<T> m = prepare<T>(a.in, b, w.mixture);
  w.pruning.take(m, r.matrix);
  r.alone(w, m, b, shift, slot.get(), total.get());
  return kOk;
}

template <class T>
static Status mixture_statistics(const GmmEmStatistics& a, int64_t b, int threads) {
  Scratch<T> scratch(a.in.d + Mixture<T>::scratch(a.in));
  if (!scratch.ok()) return kOutOfMemory;
  T* const shift = scratch.get();
  find_shift<T>(a, b, a.used_shift + b * a.in.d, shift);
  bool wide_range = false;
  if (sizeof(T) == 4) wide_range = spread_out(a.in, b, prepare<T>(a.in, b, shift + a.in.d), shift);
  if (wide_range)
    return sums_of<double>(a.in).narrow ? run<T, double, true>(a, b, shift, threads)
                                        : run<T, double, false>(a, b, shift, threads);
  return sums_of<T>(a.in).narrow ? run<T, T, true>(a, b, shift, threads) : run<T, T, false>(a, b, shift, threads);
}

template <class T>
static Status statistics(const GmmEmStatistics& a, int threads) {
  const GmmInputs& in = a.in;
  return each_of_batch(in.b, in.b * in.n * (in.k + 1) * (in.d + 1) / 4, threads,
                       [&](int64_t b, int own) { return mixture_statistics<T>(a, b, own); });
}

Status gmm_em_statistics(const GmmEmStatistics& a, int threads) {
  if (a.in.b <= 0) return kOk;
  return a.in.dtype == kFloat64 ? statistics<double>(a, threads) : statistics<float>(a, threads);
}

template <class T>
Status responsibilities(const GmmResponsibilities& a, int threads) {
  constexpr int rows = 64;
  constexpr int64_t kJob = 1024;
  const GmmInputs& in = a.in;
  const bool matrix = matrix_covariance(in.covariance);
  const int64_t jobs = (in.n + kJob - 1) / kJob;
  threads = team(in.b * in.n * (in.k + 1) * (in.d + 1) / 8, threads);
  const int64_t size = (Mixture<T>::scratch(in) + Block<T, rows>::numbers(in) + 15) / 16 * 16;
  Scratch<T> scratch(threads * size);
  if (!scratch.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* const own = scratch.get() + omp_get_thread_num() * size;
    Block<T, rows> block;
    block.take(in, own + Mixture<T>::scratch(in));
    Mixture<T> m{};
    int64_t ready = -1;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < in.b * jobs; ++job) {
      const int64_t b = job / jobs, begin = job % jobs * kJob, end = begin + kJob < in.n ? begin + kJob : in.n;
      if (b != ready) m = prepare<T>(in, b, own);
      ready = b;
      for (int64_t row = begin; row < end; row += rows) {
        const int64_t count = end - row < rows ? end - row : rows;
        block.load_rows((const T*)in.x + b * in.x_stride + row * in.d, nullptr, count, in.d);
        block.densities(m, matrix);
        block.softmax(in.k, in.d, kSubnormal<T>);
        for (int64_t c = 0; c < in.k; ++c)
          for (int i = 0; i < rows; ++i) block.e[c * rows + i] *= block.scale[i];
        store_tile((T*)a.out + (b * in.n + row) * in.k, block.e, rows, count, in.k);
      }
    }
  }
  return kOk;
}

Status gmm_responsibilities(const GmmResponsibilities& a, int threads) {
  if (a.in.b <= 0 || a.in.n <= 0 || a.in.k <= 0) return kOk;
  return a.in.dtype == kFloat64 ? responsibilities<double>(a, threads) : responsibilities<float>(a, threads);
}

}  // namespace

extern const GmmEmKernels gmm_em_kernels;
const GmmEmKernels gmm_em_kernels = {gmm_em_statistics, gmm_responsibilities};

}  // namespace GMK_ISA_NS
}  // namespace gmk

// Backward. Rows are cut into groups that do not depend on the threads; each group sums its statistics, a chunk of
// components at a time, on SIMD lanes over one tile of rows at a time, and adds the lanes to float64 every kFlush rows.
// Then the groups are added in order and turned into gradients (gmm.h). Bound: per row and component 3 d^2/2
// multiply-adds (full), 6 d (diag), one exponential; a word of rows in which a component has no responsibility is left
// out.
#include <omp.h>

#include "core/scratch.h"
#include "gmm/gmm_few.h"
#include "gmm/gmm_statistics.h"
#include "gmm/gmm_tile.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kFlush = 4096;               // rows between two additions to float64
constexpr int64_t kMostGroups = 16;            // of rows, in one mixture
constexpr int64_t kRowsPerGroup = 2048;        // at least
constexpr int64_t kStatisticBytes = 12 << 20;  // float64 statistics at a time, if one group fits
constexpr int64_t kLaneBytes = 512 << 10;      // sums that are still spread over lanes, one thread's: they stay in L2

// One thread's buffers; tiles are [feature][stride].
template <class T>
struct Buffers {
  T *mixture, *x, *grad_x, *y, *t, *wt, *w, *grad, *log_prob, *lanes;
  int64_t stride, size, lane_count, chunk;
};
template <class T>
GMK_INLINE Buffers<T> buffers(const GmmInputs& in, const Layout& s, T* at) {
  constexpr int n = simd<T>::n;
  Buffers<T> u{};
  u.stride = int64_t(tile_words(in.d)) * n;
  const int64_t per = (s.first + (s.tied ? 0 : s.second)) * n * int64_t(sizeof(T));
  u.chunk = kLaneBytes / per;
  u.chunk = u.chunk < 1 ? 1 : u.chunk > in.k ? in.k : u.chunk;
  T* const begin = at;
  auto take = [&](int64_t count) {
    T* const p = at;
    at += (count + 15) / 16 * 16;
    return p;
  };
  u.mixture = take(Mixture<T>::scratch(in));
  u.x = take(in.d * u.stride);
  u.grad_x = take(in.d * u.stride);
  u.y = take(in.d * u.stride);
  u.t = take(s.matrix ? s.padded * u.stride : 0);
  u.wt = take(s.matrix ? s.padded * u.stride : 0);
  u.w = take(u.stride);
  u.grad = take(u.stride);
  u.log_prob = take(u.stride);
  u.lane_count = s.total(u.chunk) * n;
  u.lanes = take(u.lane_count);
  u.size = at - begin;
  return u;
}

template <class V>
GMK_INLINE bool all_zero(V w) {  // false for NaN
  bool zero = true;
  const auto is = w == V{};
  for (size_t l = 0; l < sizeof(V) / sizeof(w[0]); ++l) zero &= is[l] != 0;
  return zero;
}
#if defined(__AVX512F__)
GMK_INLINE bool all_zero(vfloat w) { return _mm512_cmp_ps_mask((__m512)w, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0; }
GMK_INLINE bool all_zero(vdouble w) { return _mm512_cmp_pd_mask((__m512d)w, _mm512_setzero_pd(), _CMP_NEQ_UQ) == 0; }
#elif defined(__AVX2__)
GMK_INLINE bool all_zero(vfloat w) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)w, _mm256_setzero_ps(), _CMP_NEQ_UQ)) == 0;
}
GMK_INLINE bool all_zero(vdouble w) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)w, _mm256_setzero_pd(), _CMP_NEQ_UQ)) == 0;
}
#endif

// w = grad * exp(component's log-density - log_prob). A responsibility below 1e-30 (double: 1e-278) counts as 0: its
// products would be subnormal, at a hundred cycles each (seen: half of the time on photographs).
template <class T>
GMK_INLINE typename simd<T>::v weight(typename simd<T>::v square, T constant, const T* grad, const T* log_prob) {
  using v = typename simd<T>::v;
  const v e = madd(square, splat(T(-0.5)), splat(constant) - load(log_prob));
  const auto tiny = (typename simd<T>::i)(e < splat(T(sizeof(T) == 4 ? -69 : -640)));
  return load(grad) * select(tiny, v{}, vexp_nonpositive(e));
}

// grad_x -= P (w y) for one word of rows; y holds -w y.
template <class T>
GMK_INLINE void subtract_rows(T* grad_x, int64_t stride, const T* y, const T* p, int64_t d) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  for_blocks<kChains>(d, [&](auto size, int64_t a) __attribute__((always_inline)) {
    constexpr int J = decltype(size)::value;
    v g[J];
#pragma GCC unroll 16
    for (int c = 0; c < J; ++c) {
      const v e = load(y + (a + c) * n);
      g[c] = load(grad_x + (a + c) * stride);
#pragma GCC unroll 16
      for (int r = 0; r <= c; ++r) g[r] = madd(splat(p[(a + r) * d + a + c]), e, g[r]);
    }
    for (int64_t b = a + J; b < d; ++b) {
      const v e = load(y + b * n);
#pragma GCC unroll 16
      for (int r = 0; r < J; ++r) g[r] = madd(splat(p[(a + r) * d + b]), e, g[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < J; ++r) store(grad_x + (a + r) * stride, g[r]);
  });
}

// second[a][b] += sum wt_a t_b and, in a diagonal block, first[a] += sum wt_a, over the words named in `live`. Only
// columns begin .. end of the block: AVX2 has registers for half a block.
template <class T, bool diagonal, int begin, int end>
GMK_INLINE void add_block(T* second, T* first, const T* wt, const T* t, int64_t stride, const int* live, int count) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  v sum[kBlock][end - begin], mass[kBlock];
#pragma GCC unroll 4
  for (int a = 0; a < kBlock; ++a) {
    mass[a] = v{};
#pragma GCC unroll 4
    for (int b = begin; b < end; ++b) sum[a][b - begin] = v{};
  }
  for (int i = 0; i < count; ++i) {
    const int64_t at = int64_t(live[i]) * n;
    v left[kBlock], right[end - begin];
#pragma GCC unroll 4
    for (int a = 0; a < kBlock; ++a) left[a] = load(wt + a * stride + at);
#pragma GCC unroll 4
    for (int b = begin; b < end; ++b) right[b - begin] = load(t + b * stride + at);
#pragma GCC unroll 4
    for (int a = 0; a < kBlock; ++a) {
      if (diagonal && begin == 0) mass[a] += left[a];
#pragma GCC unroll 4
      for (int b = begin; b < end; ++b)
        if (!diagonal || a <= b) sum[a][b - begin] = madd(left[a], right[b - begin], sum[a][b - begin]);
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < kBlock; ++a) {
    if (diagonal && begin == 0) store(first + a * n, load(first + a * n) + mass[a]);
#pragma GCC unroll 4
    for (int b = begin; b < end; ++b) {
      T* const s = second + (a * kBlock + b) * n;
      if (!diagonal || a <= b) store(s, load(s) + sum[a][b - begin]);
    }
  }
}
template <class T, bool diagonal>
GMK_INLINE void add_block(T* second, T* first, const T* wt, const T* t, int64_t stride, const int* live, int count) {
#if defined(__AVX512F__)
  add_block<T, diagonal, 0, 4>(second, first, wt, t, stride, live, count);
#else
  add_block<T, diagonal, 0, 2>(second, first, wt, t, stride, live, count);
  add_block<T, diagonal, 2, 4>(second, first, wt, t, stride, live, count);
#endif
}

// A tile meets one component. first, second: this component's sums, one word of lanes each.
template <class T, bool need_x, bool need_parameters>
static void full_component(const Buffers<T>& u, const Layout& s, const Mixture<T>& m, int64_t c, int words, T* first,
                           T* second) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  const T* const mean = m.means + c * m.d;
  const T* const p = m.matrices + c * m.matrix_step;
  int live[kTileWords], count = 0;
  v mass{};
  for (int word = 0; word < words; ++word) {
    const int64_t at = int64_t(word) * n;
    const T* const x = u.x + at;
    v square{};
    for_blocks<kChains>(m.d, [&](auto size, int64_t j) __attribute__((always_inline)) {
      constexpr int J = decltype(size)::value;
      v y[J][1];
      times_columns<T, J, 1>(y, x, u.stride, mean, p, m.d, j);
#pragma GCC unroll 16
      for (int e = 0; e < J; ++e) {
        square = madd(y[e][0], y[e][0], square);
        if (need_x) store(u.y + (j + e) * n, y[e][0]);
      }
    });
    const v w = weight(square, m.constants[c], u.grad + at, u.log_prob + at);
    if (all_zero(w)) continue;
    live[count++] = word;
    if (need_x) {
      for (int64_t f = 0; f < m.d; ++f) store(u.y + f * n, load(u.y + f * n) * -w);
      subtract_rows(u.grad_x + at, u.stride, u.y, p, m.d);
    }
    if (need_parameters) {
      mass += w;
      for (int64_t f = 0; f < m.d; ++f) {
        const v t = load(x + f * u.stride) - splat(mean[f]);
        store(u.t + f * u.stride + at, t);
        store(u.wt + f * u.stride + at, w * t);
      }
    }
  }
  if (!need_parameters || !count) return;
  store(first, load(first) + mass);
  for (int64_t b = 0; b < s.padded; b += kBlock) {
    const T* const t = u.t + b * u.stride;
    for (int64_t a = 0; a < b; a += kBlock)
      add_block<T, false>(second + block_at(a / kBlock, b / kBlock) * n, nullptr, u.wt + a * u.stride, t, u.stride,
                          live, count);
    add_block<T, true>(second + block_at(b / kBlock, b / kBlock) * n, first + (1 + b) * n, u.wt + b * u.stride, t,
                       u.stride, live, count);
  }
}

// V words of rows, from word `word` on.
template <class T, int V, bool centred, bool need_x, bool need_parameters>
GMK_INLINE void diag_words(const Buffers<T>& u, const Mixture<T>& m, int64_t c, int word, T* first) {
  using v = typename simd<T>::v;
  constexpr int n = simd<T>::n;
  const int64_t at = int64_t(word) * n;
  v w[V], square[V] = {};
  for (int64_t f = 0; f < m.d; ++f)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      const v y = scaled<centred>(load(u.x + f * u.stride + at + i * n), m, c * m.d + f);
      store(u.y + f * u.stride + at + i * n, y);
      square[i] = madd(y, y, square[i]);
    }
  bool none = true;
  v mass{};
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) {
    w[i] = weight(square[i], m.constants[c], u.grad + at + i * n, u.log_prob + at + i * n);
    none &= all_zero(w[i]);
    mass += w[i];
  }
  if (none) return;
  if (need_parameters) store(first, load(first) + mass);
  for (int64_t f = 0; f < m.d; ++f) {
    const v scale = splat(-m.scales[c * m.d + f]);
    T* const s1 = first + (1 + 2 * f) * n;
    v sum = need_parameters ? load(s1) : v{}, squares = need_parameters ? load(s1 + n) : v{};
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      const v y = load(u.y + f * u.stride + at + i * n), wy = w[i] * y;
      if (need_x) {
        T* const g = u.grad_x + f * u.stride + at + i * n;
        store(g, madd(scale, wy, load(g)));
      }
      if (need_parameters) {
        sum += wy;
        squares = madd(wy, y, squares);
      }
    }
    if (need_parameters) {
      store(s1, sum);
      store(s1 + n, squares);
    }
  }
}
template <class T, bool centred, bool need_x, bool need_parameters>
static void diag_component(const Buffers<T>& u, const Mixture<T>& m, int64_t c, int words, T* first) {
  int word = 0;
  for (; word + 8 <= words; word += 8) diag_words<T, 8, centred, need_x, need_parameters>(u, m, c, word, first);
  for (; word + 2 <= words; word += 2) diag_words<T, 2, centred, need_x, need_parameters>(u, m, c, word, first);
  for (; word < words; ++word) diag_words<T, 1, centred, need_x, need_parameters>(u, m, c, word, first);
}

template <class T, bool need_x, bool need_parameters>
static void tile_component(const Buffers<T>& u, const Layout& s, const Mixture<T>& m, int64_t c, int words, T* first,
                           T* second) {
  if (s.matrix)
    full_component<T, need_x, need_parameters>(u, s, m, c, words, first, second);
  else if (m.centred)
    diag_component<T, true, need_x, need_parameters>(u, m, c, words, first);
  else
    diag_component<T, false, need_x, need_parameters>(u, m, c, words, first);
}

// The tile of rows begin .. begin + rows of mixture b. A row of zero density (log_prob = -inf) has no gradient: it is
// made harmless (0 * inf would be NaN), as are the lanes past the last row.
template <class T>
static void load_rows(const Buffers<T>& u, const GmmLogProbBackward& a, const Mixture<T>& m, int64_t b, int64_t begin,
                      int64_t rows, int words) {
  constexpr int n = simd<T>::n;
  const GmmInputs& in = a.in;
  load_tile(u.x, u.stride, (const T*)in.x + b * in.x_stride + begin * in.d, rows, in.d);
  if (m.centred)
    for (int64_t f = 0; f < in.d; ++f)
      for (int w = 0; w < words; ++w) {
        T* const x = u.x + f * u.stride + w * n;
        store(x, load(x) - splat(m.centre[f]));
      }
  const T* const grad = (const T*)a.grad + b * in.n + begin;
  const T* const log_prob = (const T*)a.log_prob + b * in.n + begin;
  for (int64_t row = 0; row < words * n; ++row) {
    u.grad[row] = row < rows ? grad[row] : T(0);
    u.log_prob[row] = row < rows ? log_prob[row] : T(INFINITY);
    if (row < rows && log_prob[row] != T(-INFINITY)) continue;
    u.grad[row] = T(0);
    u.log_prob[row] = T(INFINITY);
    for (int64_t f = 0; f < in.d; ++f) u.x[f * u.stride + row] = T(0);
  }
}

template <class T>
static void flush(double* statistics, const Buffers<T>& u, const Layout& s, int64_t k, int64_t c0, int64_t count) {
  constexpr int n = simd<T>::n;
  double* const first = statistics + c0 * s.first;
  for (int64_t i = 0; i < count * s.first; ++i) first[i] += double(hsum(load(u.lanes + i * n)));
  double* const second = statistics + k * s.first + (s.tied ? 0 : c0 * s.second);
  const T* const lanes = u.lanes + count * s.first * n;
  for (int64_t i = 0; i < (s.tied ? 1 : count) * s.second; ++i) second[i] += double(hsum(load(lanes + i * n)));
  memset(u.lanes, 0, size_t(s.total(count)) * n * sizeof(T));
}

// Rows begin .. end of mixture b: their grad_x, and their statistics into `statistics` (zero before).
template <class T, bool need_x, bool need_parameters>
static void group(const Buffers<T>& u, const Layout& s, const GmmLogProbBackward& a, int64_t b, int64_t begin,
                  int64_t end, double* statistics) {
  constexpr int n = simd<T>::n;
  const GmmInputs& in = a.in;
  const Mixture<T> m = prepare<T>(in, b, u.mixture);
  T* const grad_x = need_x ? (T*)a.grad_x + b * in.n * in.d : nullptr;
  memset(u.lanes, 0, size_t(u.lane_count) * sizeof(T));
  if (s.matrix) {
    memset(u.t, 0, size_t(s.padded * u.stride) * sizeof(T));
    memset(u.wt, 0, size_t(s.padded * u.stride) * sizeof(T));
  }
  for (int64_t c0 = 0; c0 < in.k; c0 += u.chunk) {
    const int64_t count = in.k - c0 < u.chunk ? in.k - c0 : u.chunk;
    int64_t unflushed = 0;
    for (int64_t row = begin; row < end; row += u.stride) {
      const int64_t rows = end - row < u.stride ? end - row : u.stride;
      const int words = int((rows + n - 1) / n);
      load_rows(u, a, m, b, row, rows, words);
      if (need_x) {
        if (c0)
          load_tile(u.grad_x, u.stride, grad_x + row * in.d, rows, in.d);
        else
          memset(u.grad_x, 0, size_t(in.d * u.stride) * sizeof(T));
      }
      for (int64_t c = 0; c < count; ++c)
        if (m.constants[c0 + c] != T(-INFINITY))
          tile_component<T, need_x, need_parameters>(u, s, m, c0 + c, words, u.lanes + c * s.first * n,
                                                     u.lanes + (count * s.first + (s.tied ? 0 : c * s.second)) * n);
      if (need_x) store_tile(grad_x + row * in.d, u.grad_x, u.stride, rows, in.d);
      unflushed += rows;
      if (need_parameters && (unflushed >= kFlush || row + u.stride >= end)) {
        flush(statistics, u, s, in.k, c0, count);
        unflushed = 0;
      }
    }
  }
  if (need_x && in.k == 0) memset(grad_x + begin * in.d, 0, size_t((end - begin) * in.d) * sizeof(T));
}

template <class T>
Status backward(const GmmLogProbBackward& a, int threads) {
  const GmmInputs& in = a.in;
  const Layout s = layout(in);
  const bool need_x = a.need_x, need_parameters = a.need_parameters;
  if (!need_x && !need_parameters) return kOk;
  const int64_t bytes = s.total(in.k) * int64_t(sizeof(double));
  int64_t groups = (in.n + kRowsPerGroup - 1) / kRowsPerGroup;
  if (groups > kMostGroups) groups = kMostGroups;
  if (groups * bytes > kStatisticBytes) groups = kStatisticBytes / bytes;
  if (groups < 1) groups = 1;
  const Buffers<T> sizes = buffers<T>(in, s, nullptr);
  const int64_t per = ((in.n + groups - 1) / groups + sizes.stride - 1) / sizes.stride * sizes.stride;
  int64_t together = kStatisticBytes / (groups * (bytes + 1));  // mixtures at a time
  together = together < 1 ? 1 : together > in.b ? in.b : together;
  threads = team(in.b * in.n * (in.k + 1) * (in.d + 1) / 4, threads);
  Scratch<T> scratch(threads * sizes.size);
  Scratch<double> statistics(together * groups * s.total(in.k));
  if (!scratch.ok() || !statistics.ok()) return kOutOfMemory;
  for (int64_t b0 = 0; b0 < in.b; b0 += together) {
    const int64_t now = in.b - b0 < together ? in.b - b0 : together;
    memset(statistics.get(), 0, size_t(now * groups * bytes));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (int64_t job = 0; job < now * groups; ++job) {
      const int64_t b = b0 + job / groups, begin = job % groups * per, end = begin + per < in.n ? begin + per : in.n;
      if (begin >= end) continue;
      const Buffers<T> u = buffers<T>(in, s, scratch.get() + omp_get_thread_num() * sizes.size);
      double* const sums = statistics.get() + job * s.total(in.k);
      if (need_x && need_parameters)
        group<T, true, true>(u, s, a, b, begin, end, sums);
      else if (need_x)
        group<T, true, false>(u, s, a, b, begin, end, sums);
      else
        group<T, false, true>(u, s, a, b, begin, end, sums);
    }
    if (!need_parameters) continue;
    for (int64_t i = 0; i < now; ++i) {
      double* const sums = statistics.get() + i * groups * s.total(in.k);
      for (int64_t g = 1; g < groups; ++g)
        for (int64_t e = 0; e < s.total(in.k); ++e) sums[e] += sums[g * s.total(in.k) + e];
      finish<T>(a, s, b0 + i, sums, team(in.k * in.d * in.d * (s.matrix ? in.d : 1), threads));
    }
  }
  return kOk;
}

}  // namespace

extern Status gmm_log_prob_backward(const GmmLogProbBackward& a, int threads);
Status gmm_log_prob_backward(const GmmLogProbBackward& a, int threads) {
  if (a.in.b <= 0) return kOk;
  if (a.in.n > 0 && gmm_few(a.in, true)) return gmm_few_log_prob_backward(a, threads);
  return a.in.dtype == kFloat64 ? backward<double>(a, threads) : backward<float>(a, threads);
}

}  // namespace GMK_ISA_NS
}  // namespace gmk

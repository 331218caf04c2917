// The gradients for weight and bias: kTile weights x one panel of output channels stay in registers while the pixels of a
// band go by. The sum over bands is cut into groups by the sizes alone; a group adds its bands in order and the groups are
// added in order, so the bits do not depend on threads.
#include <omp.h>

#include "masked_conv/band.h"
#include "masked_conv/pairs_weight.h"
#include "masked_conv/winograd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class T>
using V = typename simd<T>::v;

// How a band is walked: its rows, and in each `count` items (pixels, or pairs of them) of `step` values.
struct Walk {
  int64_t rows, count, pitch, step;
};

// partial[row] += sum over the band's items of x[item][row] * g[item], row = where a run goes by; partial moves past the rows.
template <class T, int vectors>
__attribute__((noinline)) void band_products(const Run* run, int runs, const Walk& walk, const T* scratch, const T* g,
                                             T*& partial, int64_t pitch) {
  constexpr int n = simd<T>::n;
  for (int r = 0; r < runs; ++r) {
    const int64_t length = run[r].length;
    for (int64_t k = 0; k < length; k += kTile, partial += kTile * pitch) {
      V<T> acc[kTile][vectors];
      for (int i = 0; i < kTile; ++i)
        for (int j = 0; j < vectors; ++j) acc[i][j] = V<T>{};
      const T* word = g;
      for (int64_t y = 0; y < walk.rows; ++y) {
        const T* q = scratch + y * walk.pitch + run[r].offset + k;
        for (int64_t x = 0; x < walk.count; ++x, q += walk.step, word += vectors * n) {
          V<T> v[vectors];
          for (int j = 0; j < vectors; ++j) v[j] = load(word + j * n);
          for (int i = 0; i < kTile; ++i) {
            const V<T> value = splat(q[i]);
            for (int j = 0; j < vectors; ++j) acc[i][j] = madd(value, v[j], acc[i][j]);
          }
        }
      }
      const int live = int(least(kTile, length - k));
      for (int i = 0; i < live; ++i)
        for (int j = 0; j < vectors; ++j) {
          T* const p = partial + i * pitch + j * n;
          store(p, load(p) + acc[i][j]);
        }
      if (live < kTile) partial -= (kTile - live) * pitch;
    }
  }
}

// By winograd.h: its sums are linear in the weights too, so a product's gradient takes of a pair's gradients e what the
// product adds to: e0, e0 + e1, e0 - e1, e1. g: [pixel][vectors]; pairs: room for one of the four.
template <int vectors>
void pair_products(const Winograd& f, const Band& band, const float* scratch, const float* g, float* pairs,
                   float* partial, int64_t pitch) {
  constexpr int64_t width = vectors * kLanes;
  const Walk walk{band.rows, (band.cols + 1) / 2, f.pitch, f.planes * f.channels};
  for (int point = 0; point < kPoints; ++point) {
    float* to = pairs;
    for (int64_t y = 0; y < band.rows; ++y)
      for (int64_t x = 0; x < band.cols; x += 2, to += width) {
        const float* const e = g + (y * band.cols + x) * width;
        const bool both = x + 1 < band.cols;
        for (int64_t l = 0; l < width; l += kLanes) {
          const vfloat a = load(e + l), b = both ? load(e + width + l) : vfloat{};
          store(to + l, point == 0 ? a : point == 1 ? a + b : point == 2 ? a - b : b);
        }
      }
    band_products<float, vectors>(f.run[point], f.runs[point], walk, scratch, pairs, partial, pitch);
  }
}

template <class T, int vectors>
GMK_INLINE void panel_products(const Bands& s, const Winograd* f, const Band& band, const T* scratch, T* panel,
                               T* partial, int64_t pitch) {
  if constexpr (kSame<T, float>)
    if (f) return pair_products<vectors>(*f, band, scratch, panel, panel + s.pixels() * kWidth<T>, partial, pitch);
  const Walk walk{band.rows, band.cols, s.pitch * s.channels, s.channels};
  band_products<T, vectors>(s.run, s.runs, walk, scratch, panel, partial, pitch);
}

// partial: [rows + 1][pitch] of this panel's columns; the last row is the bias.
template <class T, class S>
void one_panel(const MaskedConvWeight& a, const Bands& s, const Winograd* f, const Band& band, int64_t channel,
               int64_t count, int vectors, const T* scratch, T* panel, T* partial, int64_t rows, int64_t pitch) {
  constexpr int n = simd<T>::n;
  const int64_t width = vectors * n;
  if (count < width) memset(panel, 0, size_t(band.pixels() * width) * sizeof(T));
  load_panel(s, band, static_cast<const S*>(a.grad), a.grad_nhwc, a.c_out, channel, count, panel, width);
  switch (vectors) {
    case 1:
      panel_products<T, 1>(s, f, band, scratch, panel, partial, pitch);
      break;
    case 2:
      panel_products<T, 2>(s, f, band, scratch, panel, partial, pitch);
      break;
    case 3:
      panel_products<T, kThree>(s, f, band, scratch, panel, partial, pitch);
      break;
    default:
      panel_products<T, kVectors>(s, f, band, scratch, panel, partial, pitch);
  }
  for (int j = 0; j < vectors; ++j) {
    V<T> sum{};
    for (int64_t p = 0; p < band.pixels(); ++p) sum += load(panel + p * width + j * n);
    T* const bias = partial + rows * pitch + j * n;
    store(bias, load(bias) + sum);
  }
}

// The sum of `groups` partial sums, from [taps][c_in][pitch] to weight[o][c_in][kernel] for `count` channels from o on.
constexpr int64_t kOutputs = 16, kInputs = 64;
template <class T, class S>
void put_weights(const MaskedConvWeight& a, const T* partial, int64_t pitch, int64_t o, int64_t count) {
  const int64_t kernel = int64_t(a.taps.kh) * a.taps.kw;
  S* const weight = static_cast<S*>(a.weight) + o * a.c_in * kernel;
  if (a.c_in > 0) memset(weight, 0, size_t(count * a.c_in * kernel) * sizeof(S));  // dead taps stay so
  for (int t = 0; t < a.taps.count; ++t)
    for (int64_t c = 0; c < a.c_in; c += kInputs) {
      const int64_t inputs = least(kInputs, a.c_in - c);
      S block[kOutputs * kInputs];
      transpose_out(partial + (t * a.c_in + c) * pitch + o, pitch, inputs, count, block, kInputs);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < inputs; ++k)
          weight[(i * a.c_in + c + k) * kernel + a.taps.index[t]] = block[i * kInputs + k];
    }
  if (a.bias) narrow(partial + a.taps.count * a.c_in * pitch + o, count, static_cast<S*>(a.bias) + o);
}

// [tap][c_in][pitch] from [product][c_in][pitch], of one input channel.
GMK_INLINE void take_apart(const Winograd& f, int64_t c, const float* products, float* taps, int64_t pitch) {
  int at[kPoints][kMaxSegments], k = 0;
  each_product(f, [&](int point, int i) { at[point][i] = k++; });
  for (int i = 0; i < f.segments; ++i) {
    const int count = f.segment[i].taps;
    const auto product = [&](int point) { return products + (at[point][i] * f.channels + c) * pitch; };
    const auto tap = [&](int t) { return taps + ((f.segment[i].tap + t) * f.channels + c) * pitch; };
    const float *const m0 = product(0), *const m3 = product(3);
    const float *const m1 = count > 1 ? product(1) : nullptr, *const m2 = count > 2 ? product(2) : nullptr;
    for (int64_t l = 0; l < pitch; l += kLanes) {
      const vfloat first = load(m0 + l), last = load(m3 + l), half = splat(0.5f);
      if (count == 1) {
        store(tap(0) + l, first + last);
      } else if (count == 2) {
        const vfloat both = load(m1 + l);
        store(tap(0) + l, first + both);
        store(tap(1) + l, both + last);
      } else {
        const vfloat sum = half * (load(m1 + l) + load(m2 + l));
        store(tap(0) + l, first + sum);
        store(tap(1) + l, half * (load(m1 + l) - load(m2 + l)));
        store(tap(2) + l, sum + last);
      }
    }
  }
}

// T: of sums; S: of tensors; X: of factors, T or, where products are of pairs, S.
template <class T, class S, class X = T>
Status run(const MaskedConvWeight& a, int threads) {
  const int64_t kernel = int64_t(a.taps.kh) * a.taps.kw, k = a.taps.count * a.c_in;
  if (a.b <= 0 || a.h <= 0 || a.w <= 0) {
    if (a.c_in > 0) memset(a.weight, 0, size_t(a.c_out * a.c_in * kernel) * sizeof(S));
    if (a.bias) memset(a.bias, 0, size_t(a.c_out) * sizeof(S));
    return kOk;
  }
  const int64_t all = a.b * a.h * a.w, pitch = ceil_div(a.c_out, kWidth<T>) * kWidth<T>, panels = pitch / kWidth<T>;
  threads = team(all * (k + 8) / 64 * pitch, threads);
  Bands s;
  const int64_t budget = (512 << 10) / int64_t(sizeof(X));
  cut(s, a.taps, a.h, a.w, a.c_in, 128, budget);
  int64_t rows = k, values = s.scratch(), panel = s.rows * (s.cols + 1) * kWidth<T>;  // a row may end in half a pair
  Winograd winograd;
  const Winograd* f = nullptr;
  if constexpr (kSame<X, float>)
    if (plan(winograd, s, a.taps)) {
      cut(s, a.taps, a.h, a.w, a.c_in, 256, budget);  // as many pairs
      f = &winograd;
      rows = f->products * a.c_in;
      values = row_size(s) + plane_size(*f, s);
      panel = (s.pixels() + s.rows * ((s.cols + 1) / 2)) * kWidth<T>;
    }
  const int64_t jobs = a.b * s.per_image();
  // Partial sums: at most 16, and together no larger than the tensors that are read.
  const int64_t groups = most(1, least(least(jobs, 16), all * (a.c_in + a.c_out) / ((rows + 1) * pitch)));
  // Panels of a group share a band of x; they are worked on apart where there would be too few items for the threads.
  const int64_t parts = groups >= 4 * threads ? 1 : panels;
  const int64_t slots = (values + 31) / 32 * 32, own = slots + panel;
  const Scratch<T> partial(groups * (rows + 1) * pitch);
  const Scratch<X> scratch(threads * own);
  const Scratch<T> apart(f ? (k + 1) * pitch : 0);
  const Scratch<int64_t> start(k);  // of a weight's first factor in planes
  if (!partial.ok() || !scratch.ok() || !apart.ok() || !start.ok()) return kOutOfMemory;
  for (int64_t row = 0; row < k; ++row) {
    const int tap = int(row / a.c_in);
    const int64_t y = tap_dy(a.taps, tap) - s.top, x = tap_dx(a.taps, tap) - s.left;
    start.get()[row] = (row % a.c_in * (s.rows + s.halo_y) + y) * s.pitch + x;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    X* const mine = scratch.get() + omp_get_thread_num() * own;
    if (!f) memset(mine, 0, size_t(s.scratch()) * sizeof(X));
    X* const buffer = mine + slots;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < groups * parts; ++item) {
      const int64_t group = item / parts, part = item % parts;
      const int64_t o = pitch / kWidth<T> * part / parts * kWidth<T>;
      const int64_t end = pitch / kWidth<T> * (part + 1) / parts * kWidth<T>;
      T* const sums = partial.get() + group * (rows + 1) * pitch;
      for (int64_t row = 0; row <= rows; ++row) memset(sums + row * pitch + o, 0, size_t(end - o) * sizeof(T));
      for (int64_t job = jobs * group / groups; job < jobs * (group + 1) / groups; ++job) {
        const Band band = band_of(s, job);
        const S* const x = static_cast<const S*>(a.x);
        const X* factors = mine;
        if constexpr (kSame<X, float>)
          if (f) {
            pack_planes(*f, s, band, x, a.x_nhwc, mine, mine + row_size(s));
            factors = mine + row_size(s);
          }
        if (!f) {
#ifdef GMK_PAIRS
          if constexpr (!kSame<T, X>)
            pack_planes(s, band, x, a.x_nhwc, mine);
          else
#endif
            pack_band(s, band, x, a.x_nhwc, mine);
        }
        for (int64_t channel = o; channel < end; channel += kWidth<T>) {
          const int64_t count = least(kWidth<T>, a.c_out - channel);
          const int vectors = int(ceil_div(count, simd<T>::n));
#ifdef GMK_PAIRS
          if constexpr (!kSame<T, X>)
            pair_panel(s, band, a, start.get(), channel, count, vectors, mine, buffer, sums + channel, pitch);
          else
#endif
            one_panel<T, S>(a, s, f, band, channel, count, vectors, factors, buffer, sums + channel, rows, pitch);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row <= rows; ++row) {
      T* const sum = partial.get() + row * pitch;
      for (int64_t group = 1; group < groups; ++group)
        for (int64_t o = 0; o < a.c_out; ++o) sum[o] += sum[group * (rows + 1) * pitch + o];
    }
    const T* weights = partial.get();
    if constexpr (kSame<X, float>)
      if (f) {
#pragma omp for schedule(static)
        for (int64_t c = 0; c <= a.c_in; ++c)
          if (c < a.c_in) {
            take_apart(*f, c, partial.get(), apart.get(), pitch);
          } else {
            memcpy(apart.get() + k * pitch, partial.get() + rows * pitch, size_t(pitch) * sizeof(T));
          }
        weights = apart.get();
      }
#pragma omp for schedule(static)
    for (int64_t o = 0; o < a.c_out; o += kOutputs)
      put_weights<T, S>(a, weights, pitch, o, least(kOutputs, a.c_out - o));
  }
  return kOk;
}

Status backward_weight(const MaskedConvWeight& a, int threads) {
  if (a.c_out <= 0) return kOk;
  return by_dtype(a.dtype, [&](auto type) {
    using S = typename decltype(type)::of;
    using T = typename Arithmetic<S>::real;
#ifdef GMK_PAIRS
    if constexpr (kSame<S, bf16>)
      if (has_pairs()) return run<T, S, S>(a, threads);
#endif
    return run<T, S>(a, threads);
  });
}

}  // namespace

extern const MaskedConvWeightKernels masked_conv_weight_kernels;
const MaskedConvWeightKernels masked_conv_weight_kernels = {backward_weight};

}  // namespace GMK_ISA_NS
}  // namespace gmk

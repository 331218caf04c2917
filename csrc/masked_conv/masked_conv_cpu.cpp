// Forward, gate, gate gradient and the gradient for x: kTile pixels x one panel of output channels stay in registers while
// every live tap and input channel goes by; in float32 kTile pairs of pixels (winograd.h). Bound by multiply-adds. A pixel is
// summed in the same order whatever tile, row of bands or thread it falls to, so bands may be cut to suit the threads.
#include <omp.h>

#include "masked_conv/pairs.h"
#include "masked_conv/panel.h"
#include "masked_conv/winograd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// Rows of a matrix, `stride` apart, of which some columns are wanted: to[where(column)][row], whole squares at a time.
template <class T, class S, class Where>
GMK_INLINE void pack_columns(const S* from, int64_t stride, int64_t rows, int64_t columns, const Where& where) {
  constexpr int n = Square<T>::n > 1 ? Square<T>::n : sizeof(T) == 2 ? 32 : 8;
  for (int64_t j = 0; j < columns; j += n) {
    const int64_t across = least(n, columns - j);
    for (int64_t i = 0; i < rows; i += n) {
      const int64_t down = least(n, rows - i);
      T block[n * n];
      transpose_in(from + i * stride + j, stride, down, across, block, n);
      for (int64_t k = 0; k < across; ++k)
        if (T* const to = where(j + k)) memcpy(to + i, block + k * n, size_t(down) * sizeof(T));
    }
  }
}

// Weights of a panel as [tap][c_in][lanes], and its bias; lanes without a channel are zero. place: of each tap in the list, or -1.
template <class T, class S, class X>
void pack_weights(const MaskedConv& a, const Panel& panel, const int16_t* place, X* packed, T* bias) {
  const int64_t lanes = panel.vectors * simd<T>::n, k = a.taps.count * a.c_in, area = int64_t(a.taps.kh) * a.taps.kw;
  memset(bias, 0, size_t(lanes) * sizeof(T));
  if (panel.count * (panel.second ? 2 : 1) < lanes) memset(packed, 0, size_t(k * lanes) * sizeof(X));
  for (int half = 0; half < (panel.second ? 2 : 1); ++half) {
    const int64_t channel = panel.channel + half * (a.c_out / 2), lane0 = half * panel.second;
    const S* const weight = static_cast<const S*>(a.weight) + channel * a.weight_out;
    const bool together = a.weight_in == area;  // taps of all input channels in a row
    for (int64_t c0 = 0; c0 < (together ? 1 : a.c_in); ++c0)
      pack_columns<X>(weight + c0 * a.weight_in, a.weight_out, panel.count, together ? a.c_in * area : area,
                      [&](int64_t column) {
                        const int64_t c = together ? column / area : c0, t = place[column % area];
                        return t < 0 ? nullptr : packed + (t * a.c_in + c) * lanes + lane0;
                      });
    if (a.bias) widen(static_cast<const S*>(a.bias) + channel, panel.count, bias + lane0);
  }
}

// acc[p] += weights times what the runs find from slot[p] on; w moves past the weights.
template <int vectors, class T>
GMK_INLINE void add_products(const T* const (&slot)[kTile], const Run* run, int runs, const T*& w,
                             V<T> (&acc)[kTile][vectors]) {
  constexpr int n = simd<T>::n;
  for (int r = 0; r < runs; ++r) {
    const T* q[kTile];
    for (int p = 0; p < kTile; ++p) q[p] = slot[p] + run[r].offset;
    for (int64_t c = 0; c < run[r].length; ++c, w += vectors * n) {
      V<T> word[vectors];
      for (int j = 0; j < vectors; ++j) word[j] = load(w + j * n);
      for (int p = 0; p < kTile; ++p) {
        const V<T> value = splat(q[p][c]);
        for (int j = 0; j < vectors; ++j) acc[p][j] = madd(value, word[j], acc[p][j]);
      }
    }
  }
}

template <int vectors, class T>
__attribute__((noinline)) void panel_pixels(const Bands& s, const Band& band, const T* scratch, const T* weights,
                                            const T* bias, const Target<T>& to) {
  constexpr int n = simd<T>::n;
  const int64_t pixels = band.pixels();
  int64_t y = 0, x = 0;
  for (int64_t first = 0; first < pixels; first += kTile) {
    Tile<T> tile;
    next_tile(s, band, scratch, pixels - first, y, x, tile);
    V<T> acc[kTile][vectors];
    for (int j = 0; j < vectors; ++j) {
      const V<T> b = load(bias + j * n);
      for (int p = 0; p < kTile; ++p) acc[p][j] = b;
    }
    const T* w = weights;
    add_products<vectors>(tile.slot, s.run, s.runs, w, acc);
    finish<T>(tile, to, acc);
  }
}

// As panel_pixels, by winograd.h: a tile is of pairs of pixels.
template <int vectors>
__attribute__((noinline)) void panel_pairs(const Winograd& f, const Band& band, const float* scratch,
                                           const float* weights, const float* bias, const Target<float>& to) {
  const int64_t across = (band.cols + 1) / 2, pairs = band.rows * across;
  int64_t y = 0, x = 0;
  for (int64_t first = 0; first < pairs; first += kTile) {
    const float* slot[kTile];
    int64_t row[kTile], column[kTile];
    const int live = int(least(kTile, pairs - first));
    for (int p = 0; p < kTile; ++p) {
      slot[p] = p < live ? scratch + y * f.pitch + x * f.planes * f.channels : slot[p - 1];
      row[p] = y;
      column[p] = 2 * x;
      if (++x == across) {
        x = 0;
        ++y;
      }
    }
    vfloat sum[kPoints][kTile][vectors];
    const float* w = weights;
    for (int point = 0; point < kPoints; ++point) {
      vfloat acc[kTile][vectors];
      for (int j = 0; j < vectors; ++j) {
        const vfloat b = point == 1 ? load(bias + j * kLanes) : vfloat{};  // m1 is in both pixels
        for (int p = 0; p < kTile; ++p) acc[p][j] = b;
      }
      add_products<vectors>(slot, f.run[point], f.runs[point], w, acc);
      for (int p = 0; p < kTile; ++p)
        for (int j = 0; j < vectors; ++j) sum[point][p][j] = acc[p][j];
    }
    Tile<float> tile;
    tile.live = 0;
    vfloat acc[kTile][vectors];
    for (int p = 0; p < live; ++p)
      for (int second = 0; second < 2 && column[p] + second < band.cols; ++second) {
        for (int j = 0; j < vectors; ++j)
          acc[tile.live][j] =
              second ? sum[1][p][j] - sum[2][p][j] + sum[3][p][j] : sum[0][p][j] + sum[1][p][j] + sum[2][p][j];
        tile.row[tile.live] = row[p];
        tile.column[tile.live] = column[p] + second;
        if (++tile.live < kTile) continue;
        finish<float>(tile, to, acc);
        tile.live = 0;
      }
    if (tile.live) finish<float>(tile, to, acc);
  }
}

template <int vectors, class T, class X>
GMK_INLINE void panel_sums(const Bands& s, const Winograd* f, const Band& band, const X* scratch, const X* weights,
                           const T* bias, const Target<X>& to) {
  if constexpr (kSame<X, float>)
    if (f) return panel_pairs<vectors>(*f, band, scratch, weights, bias, to);
  panel_pixels<vectors>(s, band, scratch, weights, bias, to);
}

template <class T, class S, class X>
void one_panel(const MaskedConv& a, const Bands& s, const Winograd* f, const Band& band, const Panel& panel,
               const X* scratch, const X* weights, const T* bias, X* buffer) {
  const int64_t gated = a.c_out / 2, channels = a.gate == kGate ? gated : a.c_out, second = panel.second ? gated : 0;
  const int64_t width = panel.vectors * simd<T>::n;
  Target<X> to{};
  to.gate = a.gate;
  to.identity = a.identity;
  to.count = panel.count;
  const bool direct = kSame<X, S> && a.out_nhwc;
  const auto result = [&](void* tensor, int64_t all) {
    const int64_t pixel = (band.image * a.h + band.y) * a.w + band.x;
    if (direct) return Lines<X>{static_cast<X*>(tensor) + pixel * all + panel.channel, all, a.w * all, gated};
    const Lines<X> lines{buffer, width, band.cols * width, panel.second};
    buffer += s.pixels() * kWidth<T>;
    return lines;
  };
  to.out_count = direct ? panel.count : width;
  to.out = result(a.out, channels);
  if (a.z) to.z = result(a.z, a.c_out);
  T shifted[kWidth<T>];
  if (a.cond && !a.cond_map) {
    memset(shifted, 0, sizeof shifted);
    const S* const cond = static_cast<const S*>(a.cond) + band.image * a.c_out + panel.channel;
    widen(cond, panel.count, shifted);
    if (second) widen(cond + second, panel.count, shifted + panel.second);
    for (int64_t l = 0; l < width; ++l) shifted[l] += bias[l];
    bias = shifted;
  }
  X* next = buffer;
  if (a.cond_map) to.cond = lines_of<T, X, S>(a, s, band, panel, a.cond, a.cond_nhwc, a.c_out, second, next);
  to.residual = lines_of<T, X, S>(a, s, band, panel, a.residual, a.residual_nhwc, channels, 0, next);
  to.grad = lines_of<T, X, S>(a, s, band, panel, a.grad, a.grad_nhwc, gated, 0, next);
  switch (panel.vectors) {
    case 1:
      panel_sums<1>(s, f, band, scratch, weights, bias, to);
      break;
    case 2:
      panel_sums<2>(s, f, band, scratch, weights, bias, to);
      break;
    case 3:
      panel_sums<kThree>(s, f, band, scratch, weights, bias, to);
      break;
    default:
      panel_sums<kVectors>(s, f, band, scratch, weights, bias, to);
  }
  if (direct) return;
  const auto bring = [&](void* tensor, const X* from, int64_t all, int64_t channel) {
    store_panel(s, band, from, width, static_cast<S*>(tensor), a.out_nhwc, all, channel, panel.count);
  };
  bring(a.out, to.out.at, channels, panel.channel);
  if (a.gate == kGateGradient) bring(a.out, to.out.at + panel.second, channels, gated + panel.channel);
  if (!a.z) return;
  bring(a.z, to.z.at, a.c_out, panel.channel);
  bring(a.z, to.z.at + panel.second, a.c_out, gated + panel.channel);
}

// T: of sums; S: of tensors; X: of factors, T or, where products are of pairs, S.
// With `packed_size`: only how many bytes the packed weight has.
template <class T, class S, class X = T>
Status run(const MaskedConv& a, int threads, int64_t* packed_size) {
  const int64_t k = a.taps.count * a.c_in, all = a.b * a.h * a.w, area = int64_t(a.taps.kh) * a.taps.kw;
  threads = team(all * (k + 8) / 64 * ceil_div(a.c_out, 16) * 16, threads);
  Bands s;
  // Bands: four for each thread, yet enough pixels that a panel of weights, read once per band, costs little beside them.
  const int64_t pixels = most(96, least(1024, all / (4 * threads)));
  cut(s, a.taps, a.h, a.w, a.c_in, pixels, (512 << 10) / int64_t(sizeof(X)));
  int64_t rows = k, slots = s.scratch();
  Winograd winograd;
  const Winograd* f = nullptr;
  if constexpr (kSame<X, float>)
    if (plan(winograd, s, a.taps)) {
      f = &winograd;
      rows = f->products * a.c_in;
      slots = row_size(s) + plane_size(*f, s);
    }
#ifdef GMK_PAIRS
  if constexpr (!kSame<T, X>) rows = paired_rows(s);
#endif
  const int64_t count = panels<T>(a), panel_size = rows * kWidth<T>, jobs = a.b * s.per_image();
  const int tensors = 1 + (a.z != nullptr) + (a.cond && a.cond_map) + (a.residual != nullptr) + (a.grad != nullptr);
  // A thread's own: a band of x (before that, weights tap by tap where the sums take them otherwise), and panels.
  slots = (most(slots, kSame<T, X> && !f ? 0 : k * kWidth<T>) + 31) / 32 * 32;
  const int64_t own = tensors * ((s.pixels() * kWidth<T> + 31) / 32 * 32);
  const int64_t bias_at = (count * panel_size * int64_t(sizeof(X)) + 63) / 64 * 64;
  const int64_t packed = bias_at + count * kWidth<T> * int64_t(sizeof(T));
  if (packed_size) {
    *packed_size = packed;
    return kOk;
  }
  if (a.workspace && a.workspace_size < packed) return "the workspace is too small";
  const Scratch<X> scratch(threads * slots), buffers(threads * own);
  const Scratch<char> unkept(a.workspace ? 0 : packed);
  const Scratch<int16_t> place(area);
  if (!unkept.ok() || !scratch.ok() || !buffers.ok() || !place.ok()) return kOutOfMemory;
  char* const kept = a.workspace ? static_cast<char*>(a.workspace) : unkept.get();
  X* const weights = reinterpret_cast<X*>(kept);
  T* const bias = reinterpret_cast<T*>(kept + bias_at);
  for (int64_t t = 0; t < area; ++t) place.get()[t] = -1;
  for (int t = 0; t < a.taps.count; ++t) place.get()[a.taps.index[t]] = int16_t(t);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    X* const mine = scratch.get() + omp_get_thread_num() * slots;
#pragma omp for schedule(static)
    for (int64_t i = a.packed ? count : 0; i < count; ++i) {
      const Panel panel = panel_of<T>(a, i);
      X* const to = weights + i * panel_size;
      pack_weights<T, S>(a, panel, place.get(), kSame<T, X> && !f ? to : mine, bias + i * kWidth<T>);
      if constexpr (kSame<X, float>)
        if (f) combine_weights(*f, mine, panel.vectors * kLanes, to);
#ifdef GMK_PAIRS
      if constexpr (!kSame<T, X>) pair_weights(s, mine, panel.vectors * kLanes, to);
#endif
    }
    if (!f) memset(mine, 0, size_t(s.scratch()) * sizeof(X));
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < jobs; ++job) {
      const Band band = band_of(s, job);
      const X* factors = mine;
      if constexpr (kSame<X, float>)
        if (f) {
          pack_planes(*f, s, band, static_cast<const S*>(a.x), a.x_nhwc, mine, mine + row_size(s));
          factors = mine + row_size(s);
        }
      if (!f) pack_band(s, band, static_cast<const S*>(a.x), a.x_nhwc, mine);
      for (int64_t i = 0; i < count; ++i)
        one_panel<T, S>(a, s, f, band, panel_of<T>(a, i), factors, weights + i * panel_size, bias + i * kWidth<T>,
                        buffers.get() + omp_get_thread_num() * own);
    }
  }
  return kOk;
}

Status of_dtype(const MaskedConv& a, int threads, int64_t* packed_size) {
  if (a.b <= 0 || a.h <= 0 || a.w <= 0 || a.c_out <= 0) return kOk;
  return by_dtype(a.dtype, [&](auto type) {
    using S = typename decltype(type)::of;
    using T = typename Arithmetic<S>::real;
#ifdef GMK_PAIRS
    if constexpr (kSame<S, bf16>)
      if (has_pairs()) return run<T, S, S>(a, threads, packed_size);
#endif
    return run<T, S>(a, threads, packed_size);
  });
}

Status forward(const MaskedConv& a, int threads) { return of_dtype(a, threads, nullptr); }
int64_t packed_size(const MaskedConv& a, int threads) {
  int64_t size = 0;
  return of_dtype(a, threads, &size) ? 0 : size;
}

}  // namespace

extern const MaskedConvKernels masked_conv_kernels;
const MaskedConvKernels masked_conv_kernels = {forward, packed_size};

}  // namespace GMK_ISA_NS
}  // namespace gmk

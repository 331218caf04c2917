// Forward, gate, gate gradient and the gradient for x: kTile pixels x one panel of output channels stay in registers while
// every live tap and input channel goes by. Bound by multiply-adds. A pixel is summed in the order of the taps whatever
// tile, band or thread it falls to, so bands may be cut to suit the threads.
#include <omp.h>

#include "masked_conv/band.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class T>
using V = typename simd<T>::v;

// A panel is up to kVectors words of output channels. With a gate its first half are tanh channels and its second half
// the sigmoid channels that belong to them, so that both halves of a pixel meet in one tile.
struct Panel {
  int64_t channel, count;  // of the gate's output channels where there is a gate
  int64_t second;          // lane where the second half starts; 0 without a gate
  int vectors;
};
template <class T>
Panel panel_of(const MaskedConv& a, int64_t i) {
  constexpr int n = simd<T>::n;
  if (a.gate == kPlain) {
    const int64_t count = least(kWidth<T>, a.c_out - i * kWidth<T>);
    return Panel{i * kWidth<T>, count, 0, int(ceil_div(count, n))};
  }
  const int64_t count = least(kWidth<T> / 2, a.c_out / 2 - i * (kWidth<T> / 2)), words = ceil_div(count, n);
  return Panel{i * (kWidth<T> / 2), count, words * n, int(2 * words)};
}
template <class T>
int64_t panels(const MaskedConv& a) {
  return ceil_div(a.c_out, kWidth<T>);
}

// Rows of a matrix, `stride` apart, of which some columns are wanted: to[where(column)][row], whole squares at a time.
template <class T, class S, class Where>
GMK_INLINE void pack_columns(const S* from, int64_t stride, int64_t rows, int64_t columns, const Where& where) {
  constexpr int n = Square<T>::n > 1 ? Square<T>::n : 8;
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
template <class T, class S>
void pack_weights(const MaskedConv& a, const Panel& panel, const int16_t* place, T* packed, T* bias) {
  const int64_t lanes = panel.vectors * simd<T>::n, k = a.taps.count * a.c_in, area = int64_t(a.taps.kh) * a.taps.kw;
  memset(bias, 0, size_t(lanes) * sizeof(T));
  if (panel.count * (panel.second ? 2 : 1) < lanes) memset(packed, 0, size_t(k * lanes) * sizeof(T));
  for (int half = 0; half < (panel.second ? 2 : 1); ++half) {
    const int64_t channel = panel.channel + half * (a.c_out / 2), lane0 = half * panel.second;
    const S* const weight = static_cast<const S*>(a.weight) + channel * a.weight_out;
    const bool together = a.weight_in == area;  // taps of all input channels in a row
    for (int64_t c0 = 0; c0 < (together ? 1 : a.c_in); ++c0)
      pack_columns<T>(weight + c0 * a.weight_in, a.weight_out, panel.count, together ? a.c_in * area : area,
                      [&](int64_t column) {
                        const int64_t c = together ? column / area : c0, t = place[column % area];
                        return t < 0 ? nullptr : packed + (t * a.c_in + c) * lanes + lane0;
                      });
    if (a.bias) widen(static_cast<const S*>(a.bias) + channel, panel.count, bias + lane0);
  }
}

template <class T>
GMK_INLINE void put(T* p, V<T> x, int64_t count) {
  if (count >= simd<T>::n) {
    store(p, x);
  } else if (count > 0) {
    store_some(p, x, count);
  }
}
template <class T>
GMK_INLINE V<T> get(const T* p, int64_t count) {
  return count >= simd<T>::n ? load(p) : count > 0 ? load_some(p, count) : V<T>{};
}

// A tensor's part of a panel: in the tensor where its channels are adjacent and of type T, else in a panel buffer.
template <class T>
struct Lines {
  T* at;               // the band's first pixel; nullptr: no such tensor
  int64_t pitch, row;  // from pixel to pixel, from band row to band row
  int64_t half;        // from the first half's channels to the second half's
};
template <class T>
struct Target {
  Lines<T> out;
  Lines<const T> cond, residual, grad;
  int64_t count, out_count;  // channels of a half that may be read, and written: buffers have room for whole words
  int gate;
  bool identity;
};

template <class T, int vectors>
__attribute__((noinline)) void panel_pixels(const Bands& s, const Band& band, const T* scratch, const T* weights,
                                            const T* bias, const Target<T>& to) {
  constexpr int n = simd<T>::n;
  const int64_t pixels = band.pixels();
  int64_t y = 0, x = 0;
  for (int64_t first = 0; first < pixels; first += kTile) {
    const T* slot[kTile];
    int64_t row[kTile], column[kTile];
    const int live = int(least(kTile, pixels - first));
    for (int p = 0; p < kTile; ++p) {
      if (p >= live) {  // a short tile works on its last pixel again
        slot[p] = slot[p - 1];
        continue;
      }
      slot[p] = scratch + (y * s.pitch + x) * s.channels;
      row[p] = y;
      column[p] = x;
      if (++x == band.cols) {
        x = 0;
        ++y;
      }
    }
    V<T> acc[kTile][vectors];
    for (int j = 0; j < vectors; ++j) {
      const V<T> b = load(bias + j * n);
      for (int p = 0; p < kTile; ++p) acc[p][j] = b;
    }
    const T* w = weights;
    for (int r = 0; r < s.runs; ++r) {
      const T* q[kTile];
      for (int p = 0; p < kTile; ++p) q[p] = slot[p] + s.run[r].offset;
      for (int64_t c = 0; c < s.run[r].length; ++c, w += vectors * n) {
        V<T> word[vectors];
        for (int j = 0; j < vectors; ++j) word[j] = load(w + j * n);
        for (int p = 0; p < kTile; ++p) {
          const V<T> value = splat(q[p][c]);
          for (int j = 0; j < vectors; ++j) acc[p][j] = madd(value, word[j], acc[p][j]);
        }
      }
    }
    const auto at = [&](const auto& lines, int p) {
      return lines.at ? lines.at + row[p] * lines.row + column[p] * lines.pitch : nullptr;
    };
    constexpr int words = vectors > 1 ? vectors / 2 : 1;  // of half a panel
    for (int p = 0; p < live; ++p) {
      T* const out = at(to.out, p);
      if (const T* const cond = at(to.cond, p))
        for (int j = 0; j < vectors; ++j) {
          const int k = to.gate != kPlain && j >= words ? j - words : j;
          acc[p][j] += get(cond + (k < j ? to.cond.half : 0) + k * n, to.count - k * n);
        }
      const T* const residual = at(to.residual, p);
      if (to.gate == kPlain) {
        for (int j = 0; j < vectors; ++j) {
          if (residual) acc[p][j] += get(residual + j * n, to.count - j * n);
          put(out + j * n, acc[p][j], to.out_count - j * n);
        }
        continue;
      }
      const T* const grad = at(to.grad, p);
      for (int j = 0; j < words; ++j) {
        const V<T> one = splat(T(1)), z = acc[p][j], f = to.identity ? z : vtanh(z);
        const V<T> g = vsigmoid(acc[p][vectors > 1 ? j + words : j]);
        if (to.gate == kGate) {
          V<T> result = f * g;
          if (residual) result += get(residual + j * n, to.count - j * n);
          put(out + j * n, result, to.out_count - j * n);
        } else {
          const V<T> d = get(grad + j * n, to.count - j * n);
          put(out + j * n, to.identity ? d * g : d * g * ((one - f) * (one + f)), to.out_count - j * n);
          put(out + to.out.half + j * n, d * f * (g * (one - g)), to.out_count - j * n);
        }
      }
    }
  }
}

// What a tensor of `channels` adds to a panel: from `channel` on, and from `channel` + `second` where that is not 0.
template <class T, class S>
Lines<const T> lines_of(const MaskedConv& a, const Bands& s, const Band& band, const Panel& panel, const void* tensor,
                        bool nhwc, int64_t channels, int64_t second, T*& buffer) {
  const S* const x = static_cast<const S*>(tensor);
  if (!x) return Lines<const T>{};
  if constexpr (kSame<T, S>) {
    const int64_t pixel = (band.image * a.h + band.y) * a.w + band.x;
    if (nhwc) return {x + pixel * channels + panel.channel, channels, a.w * channels, second};
  }
  const int64_t width = panel.vectors * simd<T>::n;
  load_panel(s, band, x, nhwc, channels, panel.channel, panel.count, buffer, width);
  if (second) load_panel(s, band, x, nhwc, channels, panel.channel + second, panel.count, buffer + panel.second, width);
  const Lines<const T> lines{buffer, width, band.cols * width, panel.second};
  buffer += s.pixels() * kWidth<T>;
  return lines;
}

template <class T, class S>
void one_panel(const MaskedConv& a, const Bands& s, const Band& band, const Panel& panel, const T* scratch,
               const T* weights, const T* bias, T* buffer) {
  const int64_t gated = a.c_out / 2, channels = a.gate == kGate ? gated : a.c_out, second = panel.second ? gated : 0;
  const int64_t width = panel.vectors * simd<T>::n;
  Target<T> to{};
  to.gate = a.gate;
  to.identity = a.identity;
  to.count = panel.count;
  S* const out = static_cast<S*>(a.out);
  const bool direct = kSame<T, S> && a.out_nhwc;
  if (direct) {
    const int64_t pixel = (band.image * a.h + band.y) * a.w + band.x;
    to.out = {reinterpret_cast<T*>(out) + pixel * channels + panel.channel, channels, a.w * channels, gated};
    to.out_count = panel.count;
  } else {
    to.out = {buffer, width, band.cols * width, panel.second};
    to.out_count = width;
    buffer += s.pixels() * kWidth<T>;
  }
  T shifted[kWidth<T>];
  if (a.cond && !a.cond_map) {
    T* more = shifted;
    memset(shifted, 0, sizeof shifted);
    const S* const cond = static_cast<const S*>(a.cond) + band.image * a.c_out + panel.channel;
    widen(cond, panel.count, more);
    if (second) widen(cond + second, panel.count, more + panel.second);
    for (int64_t l = 0; l < width; ++l) shifted[l] += bias[l];
    bias = shifted;
  }
  T* next = buffer;
  if (a.cond_map) to.cond = lines_of<T, S>(a, s, band, panel, a.cond, a.cond_nhwc, a.c_out, second, next);
  to.residual = lines_of<T, S>(a, s, band, panel, a.residual, a.residual_nhwc, channels, 0, next);
  to.grad = lines_of<T, S>(a, s, band, panel, a.grad, a.grad_nhwc, gated, 0, next);
  switch (panel.vectors) {
    case 1:
      panel_pixels<T, 1>(s, band, scratch, weights, bias, to);
      break;
    case 2:
      panel_pixels<T, 2>(s, band, scratch, weights, bias, to);
      break;
    case 3:
      panel_pixels<T, kThree>(s, band, scratch, weights, bias, to);
      break;
    default:
      panel_pixels<T, kVectors>(s, band, scratch, weights, bias, to);
  }
  if (direct) return;
  store_panel(s, band, to.out.at, width, out, a.out_nhwc, channels, panel.channel, panel.count);
  if (a.gate == kGateGradient)
    store_panel(s, band, to.out.at + panel.second, width, out, a.out_nhwc, channels, gated + panel.channel,
                panel.count);
}

template <class T, class S>
Status run(const MaskedConv& a, int threads) {
  const int64_t k = a.taps.count * a.c_in, all = a.b * a.h * a.w, area = int64_t(a.taps.kh) * a.taps.kw;
  threads = team(all * (k + 8) / 64 * ceil_div(a.c_out, 16) * 16, threads);
  Bands s;
  // Bands: four for each thread, yet enough pixels that a panel of weights, read once per band, costs little beside them.
  const int64_t pixels = most(96, least(1024, all / (4 * threads)));
  cut(s, a.taps, a.h, a.w, a.c_in, pixels, (512 << 10) / int64_t(sizeof(T)));
  const int64_t count = panels<T>(a), panel_size = k * kWidth<T>, jobs = a.b * s.per_image();
  const int tensors = 1 + (a.cond && a.cond_map) + (a.residual != nullptr) + (a.grad != nullptr);
  const int64_t own = (s.scratch() + 15) / 16 * 16 + tensors * ((s.pixels() * kWidth<T> + 15) / 16 * 16);
  const Scratch<T> weights(count * panel_size), bias(count * kWidth<T>), scratch(threads * own);
  const Scratch<int16_t> place(area);
  if (!weights.ok() || !bias.ok() || !scratch.ok() || !place.ok()) return kOutOfMemory;
  for (int64_t t = 0; t < area; ++t) place.get()[t] = -1;
  for (int t = 0; t < a.taps.count; ++t) place.get()[a.taps.index[t]] = int16_t(t);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* const mine = scratch.get() + omp_get_thread_num() * own;
    T* const buffer = mine + (s.scratch() + 15) / 16 * 16;
    memset(mine, 0, size_t(s.scratch()) * sizeof(T));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      pack_weights<T, S>(a, panel_of<T>(a, i), place.get(), weights.get() + i * panel_size, bias.get() + i * kWidth<T>);
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < jobs; ++job) {
      const Band band = band_of(s, job);
      pack_band(s, band, static_cast<const S*>(a.x), a.x_nhwc, mine);
      for (int64_t i = 0; i < count; ++i)
        one_panel<T, S>(a, s, band, panel_of<T>(a, i), mine, weights.get() + i * panel_size, bias.get() + i * kWidth<T>,
                        buffer);
    }
  }
  return kOk;
}

Status forward(const MaskedConv& a, int threads) {
  if (a.b <= 0 || a.h <= 0 || a.w <= 0 || a.c_out <= 0) return kOk;
  switch (a.dtype) {
    case kFloat32:
      return run<float, float>(a, threads);
    case kFloat64:
      return run<double, double>(a, threads);
    case kBFloat16:
      return run<float, bf16>(a, threads);
    case kFloat16:
      return run<float, f16>(a, threads);
  }
  return "unknown dtype";
}

}  // namespace

extern const MaskedConvKernels masked_conv_kernels;
const MaskedConvKernels masked_conv_kernels = {forward};

}  // namespace GMK_ISA_NS
}  // namespace gmk

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

// Weights of a panel as [tap][c_in][lanes], and its bias; lanes without a channel are zero.
template <class T>
void pack_weights(const MaskedConv& a, const Panel& panel, T* packed, T* bias) {
  const int64_t lanes = panel.vectors * simd<T>::n, k = a.taps.count * a.c_in;
  memset(bias, 0, size_t(lanes) * sizeof(T));
  if (panel.count * (panel.second ? 2 : 1) < lanes) memset(packed, 0, size_t(k * lanes) * sizeof(T));
  for (int half = 0; half < (panel.second ? 2 : 1); ++half) {
    const int64_t channel = panel.channel + half * (a.c_out / 2), lane0 = half * panel.second;
    const T* const weight = static_cast<const T*>(a.weight) + channel * a.weight_out;
    for (int64_t c = 0; c < a.c_in; ++c)
      for (int t = 0; t < a.taps.count; ++t) {
        const T* const src = weight + c * a.weight_in + a.taps.index[t];
        T* const dst = packed + (t * a.c_in + c) * lanes + lane0;
        for (int64_t l = 0; l < panel.count; ++l) dst[l] = src[l * a.weight_out];
      }
    if (a.bias) memcpy(bias + lane0, static_cast<const T*>(a.bias) + channel, size_t(panel.count) * sizeof(T));
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

// Where a panel's results go, and where its gate's gradient comes from: into the tensor where channels are adjacent there,
// else to the panel buffers, which have room for whole words.
template <class T>
struct Target {
  T* out;
  const T* grad;
  int64_t pitch, grad_pitch;  // from pixel to pixel
  int64_t row, grad_row;      // from band row to band row
  int64_t half;               // from the first half's results to the second half's (kGateGradient)
  int64_t count, grad_count;  // results that may be touched
};

template <class T, int vectors>
__attribute__((noinline)) void panel_pixels(const Bands& s, const Band& band, const T* scratch, const T* weights,
                                            const T* bias, int gate, const Target<T>& to) {
  constexpr int n = simd<T>::n;
  const int64_t pixels = band.pixels();
  int64_t y = 0, x = 0;
  for (int64_t first = 0; first < pixels; first += kTile) {
    const T* slot[kTile];
    T* out[kTile];
    const T* grad[kTile];
    const int live = int(least(kTile, pixels - first));
    for (int p = 0; p < kTile; ++p) {
      if (p >= live) {  // a short tile works on its last pixel again
        slot[p] = slot[p - 1];
        continue;
      }
      slot[p] = scratch + (y * s.pitch + x) * s.channels;
      out[p] = to.out + y * to.row + x * to.pitch;
      grad[p] = gate == kGateGradient ? to.grad + y * to.grad_row + x * to.grad_pitch : nullptr;
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
    if (gate == kPlain) {
      for (int p = 0; p < live; ++p)
        for (int j = 0; j < vectors; ++j) put(out[p] + j * n, acc[p][j], to.count - j * n);
      continue;
    }
    constexpr int words = vectors > 1 ? vectors / 2 : 1;
    for (int p = 0; p < live; ++p)
      for (int j = 0; j < words; ++j) {
        const V<T> t = vtanh(acc[p][j]), g = vsigmoid(acc[p][vectors > 1 ? j + words : j]);
        if (gate == kGate) {
          put(out[p] + j * n, t * g, to.count - j * n);
        } else {
          const V<T> d = get(grad[p] + j * n, to.grad_count - j * n), one = splat(T(1));
          put(out[p] + j * n, d * g * ((one - t) * (one + t)), to.count - j * n);
          put(out[p] + to.half + j * n, d * t * (g * (one - g)), to.count - j * n);
        }
      }
  }
}

template <class T>
void one_panel(const MaskedConv& a, const Bands& s, const Band& band, const Panel& panel, const T* scratch,
               const T* weights, const T* bias, T* buffer) {
  const bool gradient = a.gate == kGateGradient;
  const int64_t channels = a.gate == kGate ? a.c_out / 2 : a.c_out, pixel = (band.image * a.h + band.y) * a.w + band.x;
  const int64_t width = panel.vectors * simd<T>::n, words = panel.second ? panel.second : width;
  Target<T> to{};
  to.count = to.grad_count = panel.count;
  T* const out = static_cast<T*>(a.out);
  if (a.out_nhwc) {
    to.out = out + pixel * channels + panel.channel;
    to.pitch = channels;
    to.row = a.w * channels;
    to.half = a.c_out / 2;
  } else {
    to.out = buffer;
    to.pitch = width;
    to.row = band.cols * width;
    to.half = panel.second;
    to.count = width;
  }
  if (gradient && a.grad_nhwc) {
    to.grad = static_cast<const T*>(a.grad) + pixel * (a.c_out / 2) + panel.channel;
    to.grad_pitch = a.c_out / 2;
    to.grad_row = a.w * (a.c_out / 2);
  } else if (gradient) {
    T* const loaded = buffer + (a.out_nhwc ? 0 : s.pixels() * kWidth<T>);
    load_panel(s, band, static_cast<const T*>(a.grad), false, a.c_out / 2, panel.channel, panel.count, loaded, words);
    to.grad = loaded;
    to.grad_pitch = words;
    to.grad_row = band.cols * words;
  }
  switch (panel.vectors) {
    case 1:
      panel_pixels<T, 1>(s, band, scratch, weights, bias, a.gate, to);
      break;
    case 2:
      panel_pixels<T, 2>(s, band, scratch, weights, bias, a.gate, to);
      break;
    case 3:
      panel_pixels<T, kThree>(s, band, scratch, weights, bias, a.gate, to);
      break;
    default:
      panel_pixels<T, kVectors>(s, band, scratch, weights, bias, a.gate, to);
  }
  if (a.out_nhwc) return;
  store_panel(s, band, buffer, width, out, channels, panel.channel, panel.count);
  if (gradient)
    store_panel(s, band, buffer + panel.second, width, out, channels, a.c_out / 2 + panel.channel, panel.count);
}

template <class T>
Status run(const MaskedConv& a, int threads) {
  const int64_t k = a.taps.count * a.c_in, all = a.b * a.h * a.w;
  threads = team(all * (k + 8) / 64 * ceil_div(a.c_out, 16) * 16, threads);
  Bands s;
  // Bands: four for each thread, yet enough pixels that a panel of weights, read once per band, costs little beside them.
  const int64_t pixels = most(96, least(1024, all / (4 * threads)));
  cut(s, a.taps, a.h, a.w, a.c_in, pixels, (512 << 10) / int64_t(sizeof(T)));
  const int64_t count = panels<T>(a), panel_size = k * kWidth<T>, jobs = a.b * s.per_image();
  const int64_t buffers =
      (a.out_nhwc ? 0 : s.pixels() * kWidth<T>)+(a.gate == kGateGradient && !a.grad_nhwc ? s.pixels() * kWidth<T> : 0);
  const int64_t own = (s.scratch() + 15) / 16 * 16 + (buffers + 15) / 16 * 16;
  const Scratch<T> weights(count * panel_size), bias(count * kWidth<T>), scratch(threads * own);
  if (!weights.ok() || !bias.ok() || !scratch.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* const mine = scratch.get() + omp_get_thread_num() * own;
    T* const buffer = mine + (s.scratch() + 15) / 16 * 16;
    memset(mine, 0, size_t(s.scratch()) * sizeof(T));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      pack_weights(a, panel_of<T>(a, i), weights.get() + i * panel_size, bias.get() + i * kWidth<T>);
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < jobs; ++job) {
      const Band band = band_of(s, job);
      pack_band(s, band, static_cast<const T*>(a.x), a.x_nhwc, mine);
      for (int64_t i = 0; i < count; ++i)
        one_panel(a, s, band, panel_of<T>(a, i), mine, weights.get() + i * panel_size, bias.get() + i * kWidth<T>,
                  buffer);
    }
  }
  return kOk;
}

Status forward(const MaskedConv& a, int threads) {
  if (a.b <= 0 || a.h <= 0 || a.w <= 0 || a.c_out <= 0) return kOk;
  return a.dtype == kFloat32 ? run<float>(a, threads) : a.dtype == kFloat64 ? run<double>(a, threads) : "unknown dtype";
}

}  // namespace

extern const MaskedConvKernels masked_conv_kernels;
const MaskedConvKernels masked_conv_kernels = {forward};

}  // namespace GMK_ISA_NS
}  // namespace gmk

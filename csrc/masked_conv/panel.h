// CPU kernels only: a panel of output channels, the tensors it is combined with, and what is made of the sums of a tile.
#pragma once
#include "core/simd_math.h"
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
// bfloat16 panels: where products are of pairs (pairs.h), so that the CPU has the conversion too.
GMK_INLINE void put(bf16* p, vfloat x, int64_t count) {
#if defined(__AVX512BW__)
  __m256i half;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(x));  // the intrinsic would ask for the target in every caller
  if (count >= kLanes) {
    _mm256_storeu_si256((__m256i*)p, half);
  } else if (count > 0) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), half);
  }
#else
  store_float_some(p, x, least(count, kLanes));
#endif
}
GMK_INLINE vfloat get(const bf16* p, int64_t count) {
  return count >= kLanes ? load_float(p) : count > 0 ? load_float_some(p, count) : vfloat{};
}

// A tensor's part of a panel: in the tensor where its channels are adjacent and of type X, else in a panel buffer of X.
template <class X>
struct Lines {
  X* at;               // the band's first pixel; nullptr: no such tensor
  int64_t pitch, row;  // from pixel to pixel, from band row to band row
  int64_t half;        // from the first half's channels to the second half's
};
template <class X>
struct Target {
  Lines<X> out, z;
  Lines<const X> cond, residual, grad;
  int64_t count, out_count;  // channels of a half that may be read, and written: buffers have room for whole words
  int gate;
  bool identity;
};

// Pixels of a register tile.
template <class X>
struct Tile {
  const X* slot[kTile];  // in band scratch
  int64_t row[kTile], column[kTile];
  int live;
};
template <class X>
GMK_INLINE void next_tile(const Bands& s, const Band& band, const X* scratch, int64_t left, int64_t& y, int64_t& x,
                          Tile<X>& tile) {
  tile.live = int(least(kTile, left));
  for (int p = 0; p < kTile; ++p) {
    if (p >= tile.live) {  // a short tile works on its last pixel again
      tile.slot[p] = tile.slot[p - 1];
      continue;
    }
    tile.slot[p] = scratch + (y * s.pitch + x) * s.channels;
    tile.row[p] = y;
    tile.column[p] = x;
    if (++x == band.cols) {
      x = 0;
      ++y;
    }
  }
}

template <class T, int vectors, class X>
GMK_INLINE void finish(const Tile<X>& tile, const Target<X>& to, V<T> (&acc)[kTile][vectors]) {
  constexpr int n = simd<T>::n;
  const auto at = [&](const auto& lines, int p) {
    return lines.at ? lines.at + tile.row[p] * lines.row + tile.column[p] * lines.pitch : nullptr;
  };
  if (to.gate == kPlain && !to.cond.at && !to.residual.at) {  // sums stay in registers
    for (int p = 0; p < kTile; ++p)
      for (int j = 0; j < vectors; ++j)
        if (p < tile.live) put(at(to.out, p) + j * n, acc[p][j], to.out_count - j * n);
    return;
  }
  constexpr int words = vectors > 1 ? vectors / 2 : 1;  // of half a panel
  for (int p = 0; p < tile.live; ++p) {
    X* const out = at(to.out, p);
    if (const X* const cond = at(to.cond, p))
      for (int j = 0; j < vectors; ++j) {
        const int k = to.gate != kPlain && j >= words ? j - words : j;
        acc[p][j] += get(cond + (k < j ? to.cond.half : 0) + k * n, to.count - k * n);
      }
    const X* const residual = at(to.residual, p);
    if (to.gate == kPlain) {
      for (int j = 0; j < vectors; ++j) {
        if (residual) acc[p][j] += get(residual + j * n, to.count - j * n);
        put(out + j * n, acc[p][j], to.out_count - j * n);
      }
      continue;
    }
    if (X* const z = at(to.z, p))
      for (int j = 0; j < vectors; ++j) {
        const int k = j < words ? j : j - words;
        put(z + (k < j ? to.z.half : 0) + k * n, acc[p][j], to.out_count - k * n);
      }
    const X* const grad = at(to.grad, p);
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

// What a tensor of `channels` adds to a panel: from `channel` on, and from `channel` + `second` where that is not 0.
template <class T, class X, class S>
Lines<const X> lines_of(const MaskedConv& a, const Bands& s, const Band& band, const Panel& panel, const void* tensor,
                        bool nhwc, int64_t channels, int64_t second, X*& buffer) {
  const S* const x = static_cast<const S*>(tensor);
  if (!x) return Lines<const X>{};
  if constexpr (kSame<X, S>) {
    const int64_t pixel = (band.image * a.h + band.y) * a.w + band.x;
    if (nhwc) return {x + pixel * channels + panel.channel, channels, a.w * channels, second};
  }
  const int64_t width = panel.vectors * simd<T>::n;
  load_panel(s, band, x, nhwc, channels, panel.channel, panel.count, buffer, width);
  if (second) load_panel(s, band, x, nhwc, channels, panel.channel + second, panel.count, buffer + panel.second, width);
  const Lines<const X> lines{buffer, width, band.cols * width, panel.second};
  buffer += s.pixels() * kWidth<T>;
  return lines;
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

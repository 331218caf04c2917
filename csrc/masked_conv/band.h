// CPU kernels only: an image is worked on band by band. A band of x is copied, once, to scratch as [row][column][channel]
// with the rows and columns that its taps reach, zeros outside the image; so a tap is a constant offset for every pixel,
// neighbouring taps are one contiguous run, and NCHW is converted on the way.
#pragma once
#include "core/scratch.h"
#include "masked_conv/masked_conv.h"
#include "masked_conv/transpose.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int kTile = 6;                                  // pixels (or weights) of a register tile
constexpr int kVectors = GMK_VECTOR_BYTES == 64 ? 4 : 2;  // its SIMD words: 24 of 32 registers, or 12 of 16
constexpr int kThree = kVectors > 3 ? 3 : kVectors;       // three words, where panels have more
template <class T>
constexpr int kWidth = kVectors * simd<T>::n;  // channels of a full panel

struct Run {
  int64_t offset;  // in band scratch, from the slot of a pixel to the first value that the run multiplies
  int64_t length;  // values: adjacent taps * channels
};

// How the image is cut, and where its taps are in the scratch of one band.
struct Bands {
  int64_t h, w, channels;
  int64_t rows, cols;      // of one band; the last ones may be smaller
  int64_t down, across;    // bands of an image
  int64_t top, left;       // offset of the first row and column that any tap reaches
  int64_t halo_y, halo_x;  // rows and columns beyond the band's own
  int64_t pitch;           // columns of scratch
  int runs;
  Run run[kMaxTaps];

  int64_t per_image() const { return down * across; }
  int64_t pixels() const { return rows * cols; }
  // A register tile may read past the last value: what it makes of it is thrown away.
  int64_t scratch() const { return (rows + halo_y) * pitch * channels + kTile; }
};

// `pixels`: about as many as a band should have; `budget`: values of scratch that it should stay below.
GMK_INLINE void cut(Bands& s, const Taps& taps, int64_t h, int64_t w, int64_t channels, int64_t pixels,
                    int64_t budget) {
  s.h = h;
  s.w = w;
  s.channels = channels;
  int64_t bottom = 0, right = 0;
  s.top = s.left = 0;
  for (int i = 0; i < taps.count; ++i) {
    s.top = least(s.top, tap_dy(taps, i));
    bottom = most(bottom, tap_dy(taps, i));
    s.left = least(s.left, tap_dx(taps, i));
    right = most(right, tap_dx(taps, i));
  }
  s.halo_y = bottom - s.top;
  s.halo_x = right - s.left;
  s.cols = ceil_div(ceil_div(w, ceil_div(w, 256)), 2) * 2;  // a band ends in half a pair only where the image does
  s.across = ceil_div(w, s.cols);
  if (s.across == 1) s.cols = w;
  s.pitch = s.cols + s.halo_x;
  int64_t rows = least(ceil_div(pixels, s.cols), budget / most(1, s.pitch * channels) - s.halo_y);
  rows = most(1, least(rows, h));
  s.rows = ceil_div(h, ceil_div(h, rows));
  s.down = ceil_div(h, s.rows);
  s.runs = 0;
  for (int i = 0; i < taps.count; ++i) {
    const int64_t dy = tap_dy(taps, i), dx = tap_dx(taps, i);
    const bool adjacent = i > 0 && dy == tap_dy(taps, i - 1) && dx == tap_dx(taps, i - 1) + 1;
    if (adjacent) {
      s.run[s.runs - 1].length += channels;
    } else {
      s.run[s.runs++] = Run{((dy - s.top) * s.pitch + dx - s.left) * channels, channels};
    }
  }
}

// One band: the image it belongs to, its first pixel, its size.
struct Band {
  int64_t image, y, x, rows, cols;
  int64_t pixels() const { return rows * cols; }
};
GMK_INLINE Band band_of(const Bands& s, int64_t job) {
  const int64_t within = job % s.per_image(), y = within / s.across * s.rows, x = within % s.across * s.cols;
  return Band{job / s.per_image(), y, x, least(s.rows, s.h - y), least(s.cols, s.w - x)};
}

// Row r of a band of x, `cols` columns and its halo. False where it is above or below the image: then nothing is written.
template <class T, class S>
GMK_INLINE bool pack_row(const Bands& s, const Band& band, int64_t r, int64_t cols, const S* x, bool nhwc, T* row) {
  const int64_t c = s.channels, first = band.x + s.left, end = first + cols + s.halo_x, y = band.y + s.top + r;
  const int64_t from = least(most(first, 0), s.w), to = most(from, least(end, s.w));
  if (y < 0 || y >= s.h || from == to) return false;
  memset(row, 0, size_t((from - first) * c) * sizeof(T));
  T* const inside = row + (from - first) * c;
  if (nhwc) {
    widen(x + ((band.image * s.h + y) * s.w + from) * c, (to - from) * c, inside);
  } else {
    transpose_in(x + (band.image * c * s.h + y) * s.w + from, s.h * s.w, c, to - from, inside, c);
  }
  memset(row + (to - first) * c, 0, size_t((end - to) * c) * sizeof(T));
  return true;
}
template <class T, class S>
void pack_band(const Bands& s, const Band& band, const S* x, bool nhwc, T* scratch) {
  for (int64_t r = 0; r < band.rows + s.halo_y; ++r) {
    T* const row = scratch + r * s.pitch * s.channels;
    if (!pack_row(s, band, r, band.cols, x, nhwc, row))
      memset(row, 0, size_t((band.cols + s.halo_x) * s.channels) * sizeof(T));
  }
}

// The panel buffer holds [pixel][width]: `count` channels of a band, from `channel` on, of a tensor with `channels`.
template <class T, class S>
void load_panel(const Bands& s, const Band& band, const S* x, bool nhwc, int64_t channels, int64_t channel,
                int64_t count, T* panel, int64_t width) {
  const bool whole = band.cols == s.w;
  const int64_t segments = whole ? 1 : band.rows, length = whole ? band.pixels() : band.cols;
  for (int64_t r = 0; r < segments; ++r, panel += length * width) {
    const int64_t y = band.y + r;
    if (nhwc) {
      const S* src = x + ((band.image * s.h + y) * s.w + band.x) * channels + channel;
      for (int64_t p = 0; p < length; ++p) widen(src + p * channels, count, panel + p * width);
    } else {
      transpose_in(x + ((band.image * channels + channel) * s.h + y) * s.w + band.x, s.h * s.w, count, length, panel,
                   width);
    }
  }
}
// The way back.
template <class T, class S>
void store_panel(const Bands& s, const Band& band, const T* panel, int64_t width, S* out, bool nhwc, int64_t channels,
                 int64_t channel, int64_t count) {
  const bool whole = band.cols == s.w;
  const int64_t segments = whole ? 1 : band.rows, length = whole ? band.pixels() : band.cols;
  for (int64_t r = 0; r < segments; ++r, panel += length * width) {
    const int64_t y = band.y + r;
    if (!nhwc) {
      transpose_out(panel, width, length, count, out + ((band.image * channels + channel) * s.h + y) * s.w + band.x,
                    s.h * s.w);
    } else {
      S* const to = out + ((band.image * s.h + y) * s.w + band.x) * channels + channel;
      for (int64_t p = 0; p < length; ++p) narrow(panel + p * width, count, to + p * channels);
    }
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

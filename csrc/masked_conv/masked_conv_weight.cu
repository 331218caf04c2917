// The gradient for the weight: partial[group][row][o] = sum over the group's pixels of image[pixel][row] grad[pixel][o], with the
// image as the matrix of conv_tile.cuh: a row per pair of a live tap and an input channel, and a last one of ones for the bias.
// The sum goes over pixels, a chunk of 4 V at a time; a second kernel adds the groups, which sizes alone determine, in order.
//
//   shared   Both factors as they lie in channels_last: 128-byte lines, 8 V channels of one pixel, V channels a slot. An mma
//            wants two neighbouring pixels of one channel in a register of two halves: a thread loads the slots of pixels
//            2 t, 2 t + 1 and pairs their halves itself (PRMT), which is what ldmatrix.trans would do, at the same count of
//            shared-memory reads. Slots are xor-ed with the pixel: no conflicts.
//   lanes    row V g + j and channels V (2 t + i) + v of a warp's tile belong to thread (g, t), so results leave 16 bytes at a
//            time.
#include "masked_conv/conv_tile.cuh"

namespace gmk {
namespace {

constexpr int kStages = 3, kLineBytes = 128;

template <class T, int down, int across>
struct Tile {
  static constexpr int V = kVector<T>, kThreads = 32 * down * across;
  static constexpr int kRows = 8 * V * down, kColumns = kWarpColumns * across, kLines = kWarpColumns / (8 * V);
  static constexpr int kBlockBytes = kChunk<T> * kLineBytes;  // a line of each pixel
  static constexpr int kImageBytes = down * kBlockBytes, kGradBytes = across * kLines * kBlockBytes;
  static constexpr int kStageBytes = kImageBytes + kGradBytes, kBytes = kStages * kStageBytes;
  static constexpr int kImagePieces = kImageBytes / 16 / kThreads, kGradPieces = kGradBytes / 16 / kThreads;
  static_assert(kImageBytes % (16 * kThreads) == 0 && kGradBytes % (16 * kThreads) == 0, "every thread has as many");
};

GMK_DEV int slot_of(int block_bytes, int pixel, int slot) {
  return slot / 8 * block_bytes + pixel * kLineBytes + ((slot ^ pixel) & 7) * 16;
}
template <class T>
GMK_DEV Pack<T, kVector<T>> slot(const unsigned char* lines, int pixel, int slot) {
  return load_pack<T, kVector<T>>(reinterpret_cast<const T*>(lines + pixel * kLineBytes + ((slot ^ pixel) & 7) * 16));
}

// acc += image lines^T * grad lines, one chunk of pixels.
template <class T>
GMK_DEV void multiply_plain(Accumulators<T>& acc, const unsigned char* image, const unsigned char* grad) {
  constexpr int V = kVector<T>;
#pragma unroll 2
  for (int pixel = 0; pixel < kChunk<T>; ++pixel) {
    const Pack<T, V> x = slot<T>(image, pixel, lane_g());
#pragma unroll
    for (int line = 0; line < 8 / V; ++line)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Pack<T, V> y = slot<T>(grad + line * (kChunk<T> * kLineBytes), pixel, 2 * lane_t() + i);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
          for (int j = 0; j < V; ++j) acc[j / 2][line * V + v][2 * (j % 2) + i] += to_sum(x.v[j]) * to_sum(y.v[v]);
      }
  }
}

// Pixel p and p + 1 of V channels -> for each channel the register of an mma.
GMK_DEV void pair(uint32_t (&to)[8], const Pack<uint32_t, 4>& p, const Pack<uint32_t, 4>& q) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = (p.v[i] & 0xffffu) | q.v[i] << 16;
    to[2 * i + 1] = p.v[i] >> 16 | (q.v[i] & 0xffff0000u);
  }
}
template <class T>
GMK_DEV Pack<uint32_t, 4> words(const unsigned char* lines, int pixel, int slot) {
  return load_pack<uint32_t, 4>(
      reinterpret_cast<const uint32_t*>(lines + pixel * kLineBytes + ((slot ^ pixel) & 7) * 16));
}

template <class T>
GMK_DEV void multiply_mma(Accumulators<T>& acc, const unsigned char* image, const unsigned char* grad) {
  constexpr int V = kVector<T>, M = V / 2, step_pixels = 2 * V;
  const int g = lane_g(), t = lane_t();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int p = step * step_pixels + 2 * t;
    if constexpr (kIsFloat<T>) {
      uint32_t hi[M][4], lo[M][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto x = words<T>(image, p + i, g);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Split both = split(x.v[j]);
          hi[j / 2][j % 2 + 2 * i] = both.hi;
          lo[j / 2][j % 2 + 2 * i] = both.lo;
        }
      }
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        const unsigned char* const lines = grad + line * (kChunk<T> * kLineBytes);
        const Pack<uint32_t, 4> y[2] = {words<T>(lines, p, g), words<T>(lines, p + 1, g)};
#pragma unroll
        for (int v = 0; v < V; v += 2) {
          uint32_t high[2][2], low[2][2];
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const Split both = split(y[i].v[v + e]);
              high[e][i] = both.hi;
              low[e][i] = both.lo;
            }
          float sum[2][M][4] = {};
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int m = 0; m < M; ++m) mma_tf32(sum[e][m], lo[m], high[e], sum[e][m]);
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int m = 0; m < M; ++m) mma_tf32(sum[e][m], hi[m], low[e], sum[e][m]);
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int m = 0; m < M; ++m) mma_tf32(sum[e][m], hi[m], high[e], sum[e][m]);
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[m][line * V + v + e][i] += sum[e][m][i];
        }
      }
    } else {
      uint32_t first[8], second[8], y[2][8];  // pixels p, p + 1 and p + 8, p + 9
      pair(first, words<T>(image, p, g), words<T>(image, p + 1, g));
      pair(second, words<T>(image, p + 8, g), words<T>(image, p + 9, g));
      pair(y[0], words<T>(grad, p, g), words<T>(grad, p + 1, g));
      pair(y[1], words<T>(grad, p + 8, g), words<T>(grad, p + 9, g));
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint32_t column[2] = {y[0][n], y[1][n]};
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const uint32_t x[4] = {first[2 * m], first[2 * m + 1], second[2 * m], second[2 * m + 1]};
          Mma<T>::add(acc[m][n], x, column);
        }
      }
    }
  }
}

// The pixels of a chunk, P = kChunk<T> of x and the same of grad; thread i < 2 P keeps entry i and moves it on by a chunk.
template <class T>
struct Walk {
  int64_t image = 0, left = 0;
  int y = 0, x = 0;

  GMK_DEV void start(const Image<T>& m, int64_t pixel, int64_t last) {
    left = last - pixel;
    if (left <= 0) return;
    const int64_t area = int64_t(m.h) * m.w, in = pixel % area;
    image = pixel / area;
    y = int(in / m.w);
    x = int(in % m.w);
  }
  GMK_DEV Place place(const Image<T>& m) const {
    return Place{left > 0 ? image * m.stride_b + y * m.stride_y + x * m.stride_x : -1, y, x};
  }
  GMK_DEV void advance(const Image<T>& m, int by) {
    if ((left -= by) <= 0) return;
    x += by;
    while (x >= m.w) {
      x -= m.w;
      if (++y == m.h) {
        y = 0;
        ++image;
      }
    }
  }
};

// whole: both factors come by cp.async. Two kernels, for the registers of both ways at once would spill.
template <class T, int down, int across, bool whole>
__global__ void __launch_bounds__(256, 1) masked_conv2d_products_kernel(MaskedConvWeight a) {
  using S = Tile<T, down, across>;
  constexpr int V = kVector<T>, P = kChunk<T>;
  GMK_DYN_SHARED(bytes);
  Place* const places = reinterpret_cast<Place*>(bytes + S::kBytes);  // [2][x, grad][P]
  Tap* const taps = reinterpret_cast<Tap*>(places + 4 * P);           // and a last one that is the pixel itself
  const int64_t pixels = a.b * a.h * a.w, rows = a.taps.count * a.c_in, group = blockIdx.z;
  const int64_t first = pixels * group / a.groups, last = pixels * (group + 1) / a.groups;
  const int64_t first_row = int64_t(blockIdx.x) * S::kRows;
  const int first_column = int(blockIdx.y) * S::kColumns, count = a.taps.count;
  const int tid = int(threadIdx.x), warp = tid / 32, warp_row = warp % down, warp_column = warp / down;
  const Image<T> image = image_of<T>(a.x, a.x_nhwc, a.c_in, a.h, a.w);
  const Image<T> grad = image_of<T>(a.grad, a.grad_nhwc, a.c_out, a.h, a.w);
  make_taps(taps, a.taps, image, S::kThreads);
  if (tid == 0) taps[count] = Tap{0, 0, 0};

  Walk<T> walk;
  walk.start(image, first + tid % P, last);
  Place *here = places, *there = places + 2 * P;
  const auto locate = [&](Place* to) {
    if (tid < 2 * P) {
      const Place p = walk.place(image), q = walk.place(grad);
      to[tid] = tid < P ? p : q;
      walk.advance(image, P);
    }
  };
  // Pieces of a thread: neighbouring threads along channels where memory is contiguous in them, else along pixels.
  constexpr int row_slots = 8 * down, column_slots = 8 * S::kLines * across;
  const auto pixel_of = [&](bool nhwc, int slots, int u) {
    return whole || nhwc ? (tid + u * S::kThreads) / slots : (tid + u * S::kThreads) % P;
  };
  const auto slot_at = [&](bool nhwc, int slots, int u) {
    return whole || nhwc ? (tid + u * S::kThreads) % slots : (tid + u * S::kThreads) / P;
  };
  const Column own = column_of(first_row + tid % row_slots * V, image.channels, count);  // where whole
  const auto copy = [&](unsigned char* stage) {
#pragma unroll
    for (int u = 0; u < S::kImagePieces; ++u) {
      const int pixel = pixel_of(true, row_slots, u);
      unsigned char* const to = stage + slot_of(S::kBlockBytes, pixel, slot_at(true, row_slots, u));
      if (own.tap < count) {
        copy_piece(to, image, here[pixel], taps, count, own);
      } else {  // ones, then zeros
        Pack<T, V> piece{};
        if (own.tap == count && own.channel == 0 && here[pixel].base >= 0) piece.v[0] = FromSum<T>::of(1);
        store_pack(reinterpret_cast<T*>(to), piece);
      }
    }
#pragma unroll
    for (int u = 0; u < S::kGradPieces; ++u) {
      const int pixel = pixel_of(true, column_slots, u), slot = slot_at(true, column_slots, u);
      const Column k{first_column + slot * V < a.c_out ? 0 : 1, first_column + slot * V};
      copy_piece(stage + S::kImageBytes + slot_of(S::kBlockBytes, pixel, slot), grad, here[P + pixel], taps + count, 1,
                 k);
    }
  };
  const auto collect = [&](unsigned char* stage) {
    Pack<T, V> pieces[S::kImagePieces > S::kGradPieces ? S::kImagePieces : S::kGradPieces];
#pragma unroll
    for (int u = 0; u < S::kImagePieces; ++u) {
      const Column k = column_of(first_row + slot_at(image.nhwc, row_slots, u) * V, image.channels, count);
      pieces[u] = gather(image, here[pixel_of(image.nhwc, row_slots, u)], taps, count, k, true);
    }
#pragma unroll
    for (int u = 0; u < S::kImagePieces; ++u) {
      const int pixel = pixel_of(image.nhwc, row_slots, u), slot = slot_at(image.nhwc, row_slots, u);
      store_pack(reinterpret_cast<T*>(stage + slot_of(S::kBlockBytes, pixel, slot)), pieces[u]);
    }
#pragma unroll
    for (int u = 0; u < S::kGradPieces; ++u) {
      const int channel = first_column + slot_at(grad.nhwc, column_slots, u) * V;
      const Column k{channel < a.c_out ? 0 : 1, channel};
      pieces[u] = gather(grad, here[P + pixel_of(grad.nhwc, column_slots, u)], taps + count, 1, k, false);
    }
#pragma unroll
    for (int u = 0; u < S::kGradPieces; ++u) {
      const int pixel = pixel_of(grad.nhwc, column_slots, u), slot = slot_at(grad.nhwc, column_slots, u);
      store_pack(reinterpret_cast<T*>(stage + S::kImageBytes + slot_of(S::kBlockBytes, pixel, slot)), pieces[u]);
    }
  };
  const auto turn = [&] {
    Place* const next = here;
    here = there;
    there = next;
  };

  const int chunks = int((last - first + P - 1) / P);
  Accumulators<T> acc = {};
  locate(here);
  __syncthreads();
#pragma unroll 1
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < chunks) {
      if constexpr (whole)
        copy(bytes + chunk * S::kStageBytes);
      else
        collect(bytes + chunk * S::kStageBytes);
    }
    cp_async_commit();
    locate(there);
    turn();
    __syncthreads();
  }
  unsigned char *stage = bytes, *coming = bytes + (kStages - 1) * S::kStageBytes;
#pragma unroll 1
  for (int left = chunks; left > 0; --left) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // what the other threads copied is there, and all have left the stage and the places that come next
    if constexpr (whole)
      if (left >= kStages) copy(coming);
    cp_async_commit();
    locate(there);
    const unsigned char* const lines = stage + warp_row * S::kBlockBytes;
    const unsigned char* const grads = stage + S::kImageBytes + warp_column * (S::kLines * S::kBlockBytes);
    if constexpr (kHasMma<T>) {
      if (has_mma())
        multiply_mma<T>(acc, lines, grads);
      else
        multiply_plain<T>(acc, lines, grads);
    } else {
      multiply_plain<T>(acc, lines, grads);
    }
    if constexpr (!whole)
      if (left >= kStages) collect(coming);
    turn();
    coming = stage;  // free after the next barrier
    stage += S::kStageBytes;
    if (stage == bytes + S::kBytes) stage = bytes;
  }

  constexpr int E = int(16 / sizeof(Sum<T>));
  Sum<T>* const out = static_cast<Sum<T>*>(a.workspace) + group * (rows + 1) * a.c_out;
  const bool together = a.c_out % E == 0 && aligned(a.workspace, 16);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t r = first_row + warp_row * (8 * V) + lane_g() * V + j;
    if (r > rows) continue;
#pragma unroll
    for (int line = 0; line < S::kLines; ++line)
#pragma unroll
      for (int v = 0; v < 2 * V; v += E) {
        const int column = first_column + warp_column * kWarpColumns + line * (8 * V) + lane_t() * (2 * V) + v;
        Pack<Sum<T>, E> z;
#pragma unroll
        for (int e = 0; e < E; ++e) z.v[e] = acc[j / 2][line * V + (v + e) % V][2 * (j % 2) + (v + e) / V];
        if (together) {
          if (column < a.c_out) store_pack(out + r * a.c_out + column, z);
        } else {
#pragma unroll
          for (int e = 0; e < E; ++e)
            if (column + e < a.c_out) out[r * a.c_out + column + e] = z.v[e];
        }
      }
  }
}

// weight[o][c][t] = the sum of its groups in order, 0 for dead taps; one thread per (c, o), and one per bias.
template <class T>
__global__ void __launch_bounds__(256) masked_conv2d_sum_groups_kernel(MaskedConvWeight a) {
  const Sum<T>* const part = static_cast<const Sum<T>*>(a.workspace);
  const int64_t rows = a.taps.count * a.c_in, kernel = int64_t(a.taps.kh) * a.taps.kw, pairs = a.c_out * a.c_in;
  const int64_t stride = int64_t(gridDim.x) * 256;
  for (int64_t job = int64_t(blockIdx.x) * 256 + threadIdx.x; job < pairs + a.c_out; job += stride) {
    const bool bias = job >= pairs;
    const int64_t o = job % a.c_out, c = job / a.c_out;
    T* const weight = static_cast<T*>(a.weight) + (o * a.c_in + c) * kernel;
    if (!bias)
      for (int64_t t = 0; t < kernel; ++t) weight[t] = T{};
    if (bias && !a.bias) continue;
    for (int t = 0; t < (bias ? 1 : a.taps.count); ++t) {
      const int64_t row = bias ? rows : t * a.c_in + c;
      Sum<T> sum(0);
      for (int64_t g = 0; g < a.groups; ++g) sum += part[(g * (rows + 1) + row) * a.c_out + o];
      if (bias) {
        static_cast<T*>(a.bias)[o] = FromSum<T>::of(sum);
      } else {
        weight[a.taps.index[t]] = FromSum<T>::of(sum);
      }
    }
  }
}

template <class T, int down, int across, bool whole>
Status products(const MaskedConvWeight& a, void* stream) {
  using S = Tile<T, down, across>;
  const int64_t rows = a.taps.count * a.c_in + 1, row_tiles = (rows + S::kRows - 1) / S::kRows;
  const int64_t column_tiles = (a.c_out + S::kColumns - 1) / S::kColumns;
  if (row_tiles > 0x7fffffff || column_tiles > 65535 || a.b * a.h * a.w / a.groups > int64_t(0x7fffffff) * kChunk<T>)
    return "more blocks or chunks than a kernel can have";
  const dim3 grid(unsigned(row_tiles), unsigned(column_tiles), unsigned(a.groups));
  const size_t bytes = S::kBytes + 4 * kChunk<T> * sizeof(Place) + size_t(a.taps.count + 1) * sizeof(Tap);
  return GMK_LAUNCH((masked_conv2d_products_kernel<T, down, across, whole>), grid, S::kThreads, bytes, stream, a);
}
template <class T>
Status gradient(const MaskedConvWeight& a, void* stream) {
  Status status;
  if constexpr (!kHasMma<T>) {
    status = products<T, 4, 1, false>(a, stream);
  } else {
    constexpr int down = kIsFloat<T> ? 4 : 2;
    const bool whole =
        image_of<T>(a.x, a.x_nhwc, a.c_in, a.h, a.w).whole && image_of<T>(a.grad, a.grad_nhwc, a.c_out, a.h, a.w).whole;
    status = whole ? products<T, down, 2, true>(a, stream) : products<T, down, 2, false>(a, stream);
  }
  if (status) return status;
  return GMK_LAUNCH((masked_conv2d_sum_groups_kernel<T>), grid_for(a.c_out * (a.c_in + 1), 256), 256, 0, stream, a);
}

}  // namespace

Status masked_conv2d_backward_weight_cuda(const MaskedConvWeight& a, int device, void* stream) {
  if (a.c_out <= 0) return kOk;
  if (!fits(a.h, a.w, a.c_in, a.c_out)) return kTooLarge;
  const DeviceGuard guard(device);
  return by_dtype(a.dtype, [&](auto type) { return gradient<typename decltype(type)::of>(a, stream); });
}

}  // namespace gmk

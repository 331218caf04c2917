// Forward, gate, gate gradient, and the gradient for x: out[pixel][o] = sum over k of image[pixel][k] weight[k][o], with the
// matrices of conv_tile.cuh. A block makes a tile of pixels x channels, a chunk of 64 bytes of k at a time.
//
//   weight   masked_conv2d_pack_kernel writes it once per call in the order of the tiles' shared memory: masked taps left
//            out, zeros past the ends, in float32 split into hi and lo. So all strides (the gradient for x exchanges the
//            channels) are the pack's business, and the product's loads are 16-byte copies without a condition. Weights
//            are small beside the image: 0.3 MB for 3x3 B 128 -> 128 in bfloat16, against 34 MB at 128x32x32.
//   shared   rows of 64 bytes, 2 or 3 stages. Thread (g, t) of a warp takes the 16-byte slot t of row g: words 0, 1 are its
//            share of the first mma, words 2, 3 of the second. A sum may be taken in any order as long as both factors
//            agree, so the k of a chunk are dealt to the lanes this way and no ldmatrix is needed: 16 LDS.128 for 64 mma.
//            The slot is xor-ed with the row's j: the loads, and the writes of both memory formats, are free of conflicts.
//   columns  come in groups of 4 V channels, in which thread t holds channels V t ... V t + V - 1: one 16-byte store. With a
//            gate, groups alternate between tanh and sigmoid channels, so that partners meet in one thread.
//   pixels   a thread holds V neighbouring ones: one 16-byte store per channel where the format is contiguous.
// The order of every sum depends on k alone: no atomics, and a sample does not depend on its batch.
#include "masked_conv/conv_tile.cuh"

namespace gmk {
namespace {

constexpr int kRowBytes = 64, kPanelBytes = kWarpColumns * kRowBytes;  // a panel: 64 channels x one chunk
template <class T>
constexpr int kPlanes = kIsFloat<T> ? 2 : 1;
template <class T>
constexpr int kStages = kIsFloat<T> ? 2 : 3;

#ifdef GMK_SIMT
constexpr int kBusy = 0;  // so that small cases see all kernels
#else
constexpr int kBusy = 132;  // blocks: a multiprocessor of an H200 each
#endif

struct Sizes {
  int64_t pixels, depth, chunks, panels;  // depth: all k
};
template <class T>
GMK_HD Sizes sizes_of(const MaskedConv& a) {
  const int group = kChunk<T>;
  const int64_t gated = a.c_out / 2, columns = a.gate == kPlain ? a.c_out : (gated + group - 1) / group * group * 2;
  Sizes s;
  s.pixels = a.b * a.h * a.w;
  s.depth = a.taps.count * a.c_in;
  s.chunks = (s.depth + kChunk<T> - 1) / kChunk<T>;
  s.panels = (columns + kWarpColumns - 1) / kWarpColumns;
  return s;
}
// First of the V output channels that thread t holds in a group of columns; with a gate group 2 i is tanh, 2 i + 1 sigmoid.
template <class T>
GMK_HD int64_t first_channel(bool gate, int64_t group, int t) {
  return (gate ? group / 2 : group) * (4 * kVector<T>)+t * kVector<T>;
}

// workspace [panel][chunk][plane][column][k]
template <class T>
__global__ void __launch_bounds__(256) masked_conv2d_pack_kernel(MaskedConv a) {
  constexpr int V = kVector<T>, chunk = kChunk<T>;
  const Sizes s = sizes_of<T>(a);
  const T* const weight = static_cast<const T*>(a.weight);
  const int64_t all = s.panels * s.chunks * (kWarpColumns * chunk), limit = a.gate == kPlain ? a.c_out : a.c_out / 2;
  for (int64_t e = blockIdx.x * int64_t(256) + threadIdx.x; e < all; e += int64_t(gridDim.x) * 256) {
    const int64_t tile = e / (kWarpColumns * chunk), panel = tile / s.chunks;
    const int inside = int(e % (kWarpColumns * chunk)), column = inside / chunk;
    const int64_t k = tile % s.chunks * chunk + inside % chunk;
    // columns of a group: 8 (v / 2) + 2 t + v % 2
    const int64_t group = panel * (kWarpColumns / (4 * V)) + column / (4 * V);
    const int in_group = column % (4 * V), t = in_group % 8 / 2, v = in_group / 8 * 2 + in_group % 2;
    int64_t channel = first_channel<T>(a.gate != kPlain, group, t) + v;
    const bool used = k < s.depth && channel < limit;
    if (a.gate != kPlain && group % 2) channel += limit;
    T value{};
    if (used) value = weight[channel * a.weight_out + k % a.c_in * a.weight_in + a.taps.index[k / a.c_in]];
    T* const to = static_cast<T*>(a.workspace) + tile * (kPlanes<T> * kWarpColumns * chunk) + inside;
    if constexpr (kIsFloat<T>) {
      const Split both = split(float_bits(value));
      to[0] = bits_float(both.hi);
      to[kWarpColumns * chunk] = bits_float(both.lo);
    } else {
      to[0] = value;
    }
  }
}

// A block: `down` x `across` warps of 8 V pixels x 64 columns.
template <class T, int down, int across>
struct Tile {
  static constexpr int kThreads = 32 * down * across, kPixels = 8 * kVector<T> * down;
  static constexpr int kImageBytes = kPixels * kRowBytes, kWeightBytes = across * kPlanes<T> * kPanelBytes;
  static constexpr int kStageBytes = kImageBytes + kWeightBytes, kBytes = kStages<T> * kStageBytes;
  static constexpr int kPieces = kPixels * 4 / kThreads;  // per thread and chunk
  static_assert(kPixels * 4 % kThreads == 0, "every thread has as many");
};

// Where pixel V g + j of a warp's rows is: row 8 j + g, slots xor-ed with j.
template <class T>
GMK_DEV int slot_of(int pixel, int piece) {
  constexpr int V = kVector<T>;
  const int in_warp = pixel % (8 * V), g = in_warp / V, j = in_warp % V;
  return pixel / (8 * V) * (8 * V * kRowBytes) + j * 512 + g / 2 * 128 + ((((g & 1) << 2) | piece) ^ j) * 16;
}
GMK_DEV int own_slot(int j, int piece) {
  const int g = lane_g();
  return j * 512 + g / 2 * 128 + ((((g & 1) << 2) | piece) ^ j) * 16;
}

// acc += image rows * weight columns, one chunk.
template <class T>
GMK_DEV void multiply_plain(Accumulators<T>& acc, const unsigned char* image, const unsigned char* weight) {
  constexpr int V = kVector<T>, K = V < 4 ? V : 4;  // k at a time: all 8 of the halves would spill
#pragma unroll 1
  for (int part = 0; part < 4 * V / K; ++part) {
    const int piece = part / (V / K), rest = part % (V / K) * int(K * sizeof(T));
    Pack<T, K> rows[V];
#pragma unroll
    for (int j = 0; j < V; ++j)
      rows[j] = load_pack<T, K>(reinterpret_cast<const T*>(image + own_slot(j, piece) + rest));
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const unsigned char* const at = weight + (n / 2 * 8 + 2 * lane_t() + n % 2) * kRowBytes + piece * 16 + rest;
      const Pack<T, K> column = load_pack<T, K>(reinterpret_cast<const T*>(at));
      Sum<T> w[K];
#pragma unroll
      for (int k = 0; k < K; ++k) w[k] = to_sum(column.v[k]);
      if constexpr (kIsFloat<T>) {
        const Pack<T, K> low = load_pack<T, K>(reinterpret_cast<const T*>(at + kPanelBytes));
#pragma unroll
        for (int k = 0; k < K; ++k) w[k] += low.v[k];  // exact
      }
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int j = 0; j < V; ++j) acc[j / 2][n / 2][2 * (j % 2) + n % 2] += to_sum(rows[j].v[k]) * w[k];
    }
  }
}

using Words = Pack<uint32_t, 4>;
GMK_DEV Words words(const unsigned char* p) { return load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(p)); }

// zero: 0, but not to the compiler's knowledge
template <class T>
GMK_DEV void multiply_mma(Accumulators<T>& acc, const unsigned char* image, const unsigned char* weight,
                          uint32_t zero) {
  constexpr int V = kVector<T>, M = V / 2;
  const unsigned char* const own = weight + lane_g() * kRowBytes + lane_t() * 16;
  if constexpr (kIsFloat<T>) {
    uint32_t hi[2][M][4], lo[2][M][4], finite[2][M][4];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Words x = words(image + own_slot(j, lane_t()));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Split both = split(x.v[i]);
        const int step = i / 2, m = j / 2, r = j % 2 + 2 * (i % 2);
        hi[step][m][r] = both.hi;
        lo[step][m][r] = both.lo;
        finite[step][m][r] = both.finite;
      }
    }
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      Words high[2], low[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        high[e] = words(own + (n + e) * 8 * kRowBytes);
        low[e] = words(own + (n + e) * 8 * kRowBytes + kPanelBytes);
      }
      float sum[2][M][4] = {};  // four chains, so that the tensor cores need not wait for one
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int part = 0; part < 3; ++part)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Words& from = part == 1 ? low[e] : high[e];
            const uint32_t w[2] = {from.v[2 * step], from.v[2 * step + 1]};
#pragma unroll
            for (int m = 0; m < M; ++m)
              mma_tf32(sum[e][m], part == 0 ? lo[step][m] : part == 1 ? finite[step][m] : hi[step][m], w, sum[e][m]);
          }
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n + e][i] += sum[e][m][i];
    }
  } else {
    Words rows[V];
#pragma unroll
    for (int j = 0; j < V; ++j) rows[j] = words(image + own_slot(j, lane_t()));
    // An mma takes its four words from four registers in a row, which come from two loads. Left alone, ptxas moves all four
    // before each of 8 mma that use them; an `or` it cannot see through is done once.
    uint32_t x[2][M][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[step][m][i] = rows[2 * m + i % 2].v[2 * step + i / 2] | zero;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const Words column = words(own + n * 8 * kRowBytes);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t w[2] = {column.v[2 * step], column.v[2 * step + 1]};
#pragma unroll
        for (int m = 0; m < M; ++m) {
          Mma<T>::add(acc[m][n], x[step][m], w);
        }
      }
    }
  }
}

// What leaves the kernel: kLines pixels x 2 groups of V channels per thread at a time, through the thread's own column of shared
// memory, so that the code that follows is a short loop and not 128 copies of tanh.
template <class T>
constexpr int kLines = kVector<T> < 4 ? kVector<T> : 4;

struct Target {  // a tensor of `channels`, a thread's first pixel
  int64_t channels, area, pixels, pixel;
  bool whole;  // neighbouring elements may be moved together

  GMK_HD_MEMBER int64_t at(bool nhwc, int64_t p, int64_t channel) const {
    return nhwc ? p * channels + channel : p + (p / area * (channels - 1) + channel) * area;
  }
};
// N elements along channels (nhwc) or pixels
template <class T, int N, bool nhwc>
GMK_DEV void store(T* out, const Target& o, int64_t pixel, int64_t channel, int64_t end, const Sum<T> (&z)[N]) {
  Pack<T, N> line;
#pragma unroll
  for (int e = 0; e < N; ++e) line.v[e] = FromSum<T>::of(z[e]);
  if (o.whole) {
    if (channel < end && pixel < o.pixels) store_pack(out + o.at(nhwc, pixel, channel), line);
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const int64_t p = nhwc ? pixel : pixel + e, c = nhwc ? channel + e : channel;
    if (c < end && p < o.pixels) out[o.at(nhwc, p, c)] = line.v[e];
  }
}

// An element of what is read beside the image: [b, channels, h, w], or [b, channels].
template <class T>
struct Beside {
  const void* data;
  int64_t channels, area;
  bool map, nhwc;

  GMK_DEV Sum<T> operator()(int64_t p, int64_t channel) const {
    const Target all{channels, map ? area : 1, 0, 0, false};
    return to_sum(static_cast<const T*>(data)[all.at(map && nhwc, map ? p : p / area, channel)]);
  }
};

template <class T, bool nhwc>
GMK_DEV void finish(const MaskedConv& a, const Sum<T>* staged, int threads, int64_t pixels, int64_t first_pixel,
                    int64_t group) {
  constexpr int V = kVector<T>, N = nhwc ? V : kLines<T>;
  const int64_t gated = a.c_out / 2, area = a.h * a.w;
  const bool plain = a.gate == kPlain;
  const int64_t first = first_channel<T>(!plain, group, lane_t());
  const int64_t second = plain ? first_channel<T>(false, group + 1, lane_t()) : gated + first;
  const int64_t end = plain ? a.c_out : gated;
  const T* const bias = static_cast<const T*>(a.bias);
  const bool even = nhwc ? (plain ? a.c_out : gated) % V == 0 : area % kLines<T> == 0;
  const Target out{a.gate == kGate ? gated : a.c_out, area, pixels, first_pixel, even && aligned(a.out, sizeof(T) * N)};
#pragma unroll 1
  for (int line = 0; line < (nhwc ? kLines<T> : V); ++line) {
    const int64_t pixel = nhwc ? first_pixel + line : first_pixel, step = nhwc ? 0 : line;
    Sum<T> z[N], other[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int j = nhwc ? line : e, v = nhwc ? e : line;
      const int64_t c = first + v, d = second + v, p = nhwc ? pixel : pixel + e;
      const bool has_c = c < end, has_d = d < a.c_out, has_p = p < pixels;
      z[e] = staged[(j * (2 * V) + v) * threads] + (bias && has_c ? to_sum(bias[c]) : Sum<T>(0));
      other[e] = staged[(j * (2 * V) + V + v) * threads] + (bias && has_d ? to_sum(bias[d]) : Sum<T>(0));
      if (a.cond && has_p) {
        const Beside<T> cond{a.cond, a.c_out, area, a.cond_map, a.cond_nhwc};
        if (has_c) z[e] += cond(p, c);
        if (has_d) other[e] += cond(p, d);
      }
    }
    if (a.z) {
      const Target kept{a.c_out, area, pixels, first_pixel, even && aligned(a.z, sizeof(T) * N)};
      store<T, N, nhwc>(static_cast<T*>(a.z), kept, pixel, first + step, end, z);
      store<T, N, nhwc>(static_cast<T*>(a.z), kept, pixel, second + step, a.c_out, other);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int v = nhwc ? e : line;
      const int64_t c = first + v, d = second + v, p = nhwc ? pixel : pixel + e;
      const bool has_c = c < end, has_d = d < a.c_out, has_p = p < pixels;
      const Beside<T> residual{a.residual, out.channels, area, true, a.residual_nhwc};
      const bool has_residual = a.residual && has_p && a.gate != kGateGradient;
      if (plain) {
        if (has_residual && has_c) z[e] += residual(p, c);
        if (has_residual && has_d) other[e] += residual(p, d);
        continue;
      }
      const Sum<T> one(1), f = a.identity ? z[e] : tanh(z[e]), sigmoid_z = one / (one + exp(-other[e]));
      z[e] = f * sigmoid_z;
      if (has_residual && has_c) z[e] += residual(p, c);
      if (a.gate == kGate) continue;
      const Beside<T> grad{a.grad, gated, area, true, a.grad_nhwc};
      const Sum<T> g = has_c && has_p ? grad(p, c) : Sum<T>(0);
      z[e] = a.identity ? g * sigmoid_z : g * sigmoid_z * ((one - f) * (one + f));
      other[e] = g * f * (sigmoid_z * (one - sigmoid_z));
    }
    store<T, N, nhwc>(static_cast<T*>(a.out), out, pixel, first + step, end, z);
    if (a.gate != kGate) store<T, N, nhwc>(static_cast<T*>(a.out), out, pixel, second + step, a.c_out, other);
  }
}

// whole: the image comes by cp.async. Two kernels, for the registers of both ways at once would spill.
template <class T, int down, int across, bool whole>
__global__ void __launch_bounds__(256, 1) masked_conv2d_kernel(MaskedConv a) {
  using S = Tile<T, down, across>;
  constexpr int V = kVector<T>, stages = kStages<T>;
  GMK_DYN_SHARED(bytes);
  Place* const places = reinterpret_cast<Place*>(bytes + S::kBytes);
  Tap* const taps = reinterpret_cast<Tap*>(places + S::kPixels);
  const Sizes s = sizes_of<T>(a);
  const int tid = int(threadIdx.x), warp = tid / 32, warp_row = warp % down, warp_panel = warp / down;
  const int64_t tiles = (s.panels + across - 1) / across, first_panel = blockIdx.x % tiles * across;
  const int64_t first_pixel = blockIdx.x / tiles * S::kPixels;
  const Image<T> image = image_of<T>(a.x, a.x_nhwc, a.c_in, a.h, a.w);
  make_taps(taps, a.taps, image, S::kThreads);

  for (int i = tid; i < S::kPixels; i += S::kThreads) places[i] = place_of(image, first_pixel + i, s.pixels);
  __syncthreads();

  // Pieces of a thread: neighbouring threads along k where memory is contiguous in that, else along pixels.
  constexpr int weight_size = kPlanes<T> * kPanelBytes;
  const unsigned char* packed[across];  // of the chunk to be fetched next
#pragma unroll
  for (int i = 0; i < across; ++i) {  // past the last panel: any, for nobody stores what it makes
    const int64_t panel = first_panel + i < s.panels ? first_panel + i : first_panel;
    packed[i] = static_cast<const unsigned char*>(a.workspace) + panel * s.chunks * weight_size + tid * 16;
  }
  Column next = column_of((whole || image.nhwc ? tid % 4 : tid / S::kPixels) * V, image.channels, a.taps.count);
  const auto copy = [&](unsigned char* stage) {  // asynchronously: the weight, and the image where it is whole
    if constexpr (whole) {
#pragma unroll
      for (int u = 0; u < S::kPieces; ++u) {
        // in the order of shared memory: neighbours are free of conflicts
        const int row = tid / 4 + u * (S::kThreads / 4),
                  pixel = row / (8 * V) * (8 * V) + row % 8 * V + row % (8 * V) / 8;
        copy_piece(stage + slot_of<T>(pixel, tid % 4), image, places[pixel], taps, a.taps.count, next);
      }
      advance(next, kChunk<T>, image.channels);
    }
#pragma unroll
    for (int panel = 0; panel < across; ++panel) {
#pragma unroll
      for (int i = 0; i < weight_size; i += S::kThreads * 16)
        cp_async16(stage + S::kImageBytes + panel * weight_size + i + tid * 16, packed[panel] + i);
      packed[panel] += weight_size;
    }
  };
  const auto collect = [&](unsigned char* stage) {  // the image where it is not
    Column k = next;
    int last_piece = image.nhwc ? tid % 4 : tid / S::kPixels;
#pragma unroll
    for (int u0 = 0; u0 < S::kPieces; u0 += 4) {
      Pack<T, V> pieces[4];
      int slots[4];
#pragma unroll
      for (int u = 0; u < 4 && u0 + u < S::kPieces; ++u) {
        const int e = tid + (u0 + u) * S::kThreads, pixel = image.nhwc ? e / 4 : e % S::kPixels;
        const int piece = image.nhwc ? tid % 4 : e / S::kPixels;
        for (; last_piece < piece; ++last_piece) advance(k, V, image.channels);
        pieces[u] = gather(image, places[pixel], taps, a.taps.count, k, false);
        slots[u] = slot_of<T>(pixel, piece);
      }
#pragma unroll
      for (int u = 0; u < 4 && u0 + u < S::kPieces; ++u) store_pack(reinterpret_cast<T*>(stage + slots[u]), pieces[u]);
    }
    advance(next, kChunk<T>, image.channels);
  };

  Accumulators<T> acc = {};
  const int chunks = int(s.chunks);
#pragma unroll 1
  for (int chunk = 0; chunk < stages - 1; ++chunk) {
    if (chunk < chunks) {
      copy(bytes + chunk * S::kStageBytes);
      if constexpr (!whole) collect(bytes + chunk * S::kStageBytes);
    }
    cp_async_commit();
  }
  unsigned char *stage = bytes, *coming = bytes + (stages - 1) * S::kStageBytes;
#pragma unroll 1
  for (int left = chunks; left > 0; --left) {
    cp_async_wait<stages - 2>();
    __syncthreads();  // what the other threads copied is there, and all have left the stage that comes next
    if (left >= stages) copy(coming);
    cp_async_commit();
    const unsigned char* const rows = stage + warp_row * (8 * V * kRowBytes);
    const unsigned char* const columns = stage + S::kImageBytes + warp_panel * weight_size;
    if constexpr (kHasMma<T>) {
      if (has_mma())
        multiply_mma<T>(acc, rows, columns, uint32_t(a.w >> 40));
      else
        multiply_plain<T>(acc, rows, columns);
    } else {
      multiply_plain<T>(acc, rows, columns);
    }
    if constexpr (!whole)
      if (left >= stages) collect(coming);
    coming = stage;  // free after the next barrier
    stage += S::kStageBytes;
    if (stage == bytes + S::kBytes) stage = bytes;
  }

  constexpr int lines = kLines<T>, parts = V / lines, pairs = kWarpColumns / (8 * V);
  static_assert(lines * 2 * V * S::kThreads * int(sizeof(Sum<T>)) <= S::kBytes,
                "the results fit where the stages were");
  Sum<T>* const staged = reinterpret_cast<Sum<T>*>(bytes) + tid;
  __syncthreads();
#pragma unroll 1
  for (int round = 0; round < parts * pairs; ++round) {
#pragma unroll
    for (int i = 0; i < parts * pairs; ++i)
      if (i == round) {  // so that every index of acc is a constant
#pragma unroll
        for (int e = 0; e < lines * 2 * V; ++e) {
          const int j = i % parts * lines + e / (2 * V), n = i / parts * (2 * V) + e % (2 * V);
          staged[e * S::kThreads] = acc[j / 2][n / 2][2 * (j % 2) + n % 2];
        }
      }
    const int64_t pixel = first_pixel + warp_row * (8 * V) + lane_g() * V + round % parts * lines;
    const int64_t group = (first_panel + warp_panel) * (kWarpColumns / (4 * V)) + round / parts * 2;
    if (a.out_nhwc)
      finish<T, true>(a, staged, S::kThreads, s.pixels, pixel, group);
    else
      finish<T, false>(a, staged, S::kThreads, s.pixels, pixel, group);
  }
}

template <class T, int down, int across, bool whole>
Status convolve(const MaskedConv& a, const Sizes& s, void* stream) {
  using S = Tile<T, down, across>;
  const int64_t blocks = (s.pixels + S::kPixels - 1) / S::kPixels * ((s.panels + across - 1) / across);
  if (blocks > 0x7fffffff || s.chunks > 0x7fffffff) return "more blocks or chunks than a kernel can have";
  const size_t bytes = S::kBytes + S::kPixels * sizeof(Place) + size_t(a.taps.count) * sizeof(Tap);
  return GMK_LAUNCH((masked_conv2d_kernel<T, down, across, whole>), dim3(unsigned(blocks)), S::kThreads, bytes, stream,
                    a);
}
template <class T>
Status forward(const MaskedConv& a, void* stream) {
  const Sizes s = sizes_of<T>(a);
  const int64_t all = s.panels * s.chunks * (kWarpColumns * kChunk<T>);
  if (all * kPlanes<T> > a.workspace_size) return "the workspace is too small";
  if (all)
    if (const Status status = GMK_LAUNCH((masked_conv2d_pack_kernel<T>), grid_for(all, 4 * 256), 256, 0, stream, a))
      return status;
  if constexpr (!kHasMma<T>) {
    return convolve<T, 4, 1, false>(a, s, stream);
  } else {
    constexpr int down = kIsFloat<T> ? 4 : 2;
    if (!image_of<T>(a.x, a.x_nhwc, a.c_in, a.h, a.w).whole) return convolve<T, down, 2, false>(a, s, stream);
    // Two panels a block read the image half as often; one panel a block where blocks are few, or an odd panel is left.
    const bool wide = s.panels % 2 == 0 && s.pixels / 128 * (s.panels / 2) >= kBusy;
    return wide ? convolve<T, down, 2, true>(a, s, stream) : convolve<T, down, 1, true>(a, s, stream);
  }
}

}  // namespace

Status masked_conv2d_cuda(const MaskedConv& a, int device, void* stream) {
  if (a.b <= 0 || a.h <= 0 || a.w <= 0 || a.c_out <= 0) return kOk;
  if (!fits(a.h, a.w, a.c_in, a.c_out)) return kTooLarge;
  const DeviceGuard guard(device);
  return by_dtype(a.dtype, [&](auto type) { return forward<typename decltype(type)::of>(a, stream); });
}

}  // namespace gmk

// A block draws a slice of images from their first row to their last, and waits for no other block. A warp makes one panel of
// outputs of up to four pixels, lane by lane; weights come from L2 in whole lines, what they are multiplied with is read by all
// lanes at once from shared memory (a pixel) or global memory (a row). Where a map has fewer panels than there are warps, its sums
// are cut into parts that are added in order. Bound with few images: the reading of the weights of a pixel, one map after the other.
#include "cuda/prims.cuh"
#include "likelihood/logistic_sample.h"
#include "pixelcnn/pixelcnn.h"

namespace gmk {
namespace {

constexpr int kLanes = kPixelCnnCudaLanes, kWarps = kPixelCnnWarps, kThreads = kWarps * kLanes;
constexpr int kTile = 4;          // pixels of a warp
constexpr int kMostImages = 16;   // of a block
constexpr int kManyBlocks = 132;  // before a block takes a second image

struct Launch {
  PixelCnn a;
  PixelCnnPlan plan;
  int64_t slice;    // images of a block
  int64_t scratch;  // floats of the pixel pass of an image
  bool shared;      // in shared memory, else behind the workspace
};

// A linear map of pixels (row, column): of an image and its columns, or of one row, which are the images. Run i of its inputs starts at slot first + i of a ring of `rows` slots.
struct Map {
  const float* in;
  int64_t in_row, in_column;
  int runs, first, rows;
  int64_t pitch;         // from slot to slot
  int64_t length, last;  // of a run, of the last one
  int64_t k;             // of all
  const float* weights;
  int64_t outputs;  // with a gate, of a half
  const float* add;
  int64_t add_row, add_column, half;
  const float* residual;  // nullptr: none
  float* out;
  int64_t out_row, out_column;  // of `residual` too
  bool gate, relu;
  bool wide;  // inputs may be read four at a time
};

GMK_DEV int64_t panels_of(const Map& m) { return (m.outputs + kLanes - 1) / kLanes; }
GMK_DEV bool is_wide(const Map& m) {
  return aligned(m.in, 16) && m.in_row % 4 == 0 && m.in_column % 4 == 0 && m.pitch % 4 == 0 &&
         (m.runs == 1 || m.length % 4 == 0);
}

// acc += the terms [from, to) of the sums of one panel.
template <int T, int halves>
GMK_DEV void add_terms(const Map& m, const float* const (&in)[T], int64_t panel, int64_t from, int64_t to,
                       float (&acc)[T][halves]) {
  const int lane = int(threadIdx.x) % kLanes;
  const float* w = m.weights + (panel * m.k + from) * halves * kLanes + lane;
  int64_t start = 0;
  for (int r = 0; r < m.runs; ++r) {
    const int64_t length = r + 1 == m.runs ? m.last : m.length;
    const int64_t begin = from > start ? from - start : 0, end = to - start < length ? to - start : length;
    const int slot = m.first + r < m.rows ? m.first + r : m.first + r - m.rows;
    const int64_t offset = slot * m.pitch;
    int64_t k = begin;
    if (m.wide) {
#pragma unroll 1
      for (; k + 4 <= end; k += 4, w += 4 * halves * kLanes) {
        float weight[4][halves];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < halves; ++j) weight[i][j] = w[(i * halves + j) * kLanes];
#pragma unroll
        for (int p = 0; p < T; ++p) {
          const Pack<float, 4> x = load_pack<float, 4>(in[p] + offset + k);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < halves; ++j) acc[p][j] = fmaf(x.v[i], weight[i][j], acc[p][j]);
        }
      }
    }
    for (; k < end; ++k, w += halves * kLanes) {
#pragma unroll
      for (int p = 0; p < T; ++p) {
        const float x = in[p][offset + k];
#pragma unroll
        for (int j = 0; j < halves; ++j) acc[p][j] = fmaf(x, w[j * kLanes], acc[p][j]);
      }
    }
    start += length;
  }
}

GMK_DEV float gated(float t, float s) { return tanhf(t) / (1.0f + expf(-s)); }

// From the sum (or the gate of two) to the output.
GMK_DEV void finish(const Map& m, float z, int64_t at) {
  if (m.residual) z += m.residual[at];
  if (m.relu) z = z < 0 ? 0.0f : z;  // NaN stays
  m.out[at] = z;
}

// The pixels first .. first + T - 1 of a row, part `part` of `parts` of their sums: to the output, or to `partial` if there are
// parts, [part][pixel][half][lane of all panels].
template <int T, int halves>
GMK_DEV void make_tile(const Map& m, int64_t row, int64_t first, int64_t columns, int64_t panel, int part, int parts,
                       float* partial) {
  const int64_t output = panel * kLanes + int(threadIdx.x) % kLanes, last = columns - 1;
  const bool live = output < m.outputs;
  const float* in[T];
  float acc[T][halves];
#pragma unroll
  for (int p = 0; p < T; ++p) {
    const int64_t x = first + p < last ? first + p : last;  // past the last: that one again
    in[p] = m.in + row * m.in_row + x * m.in_column;
#pragma unroll
    for (int j = 0; j < halves; ++j)
      acc[p][j] = live && parts == 1 ? m.add[row * m.add_row + x * m.add_column + j * m.half + output] : 0.0f;
  }
  // Parts start at multiples of 4, so that their inputs stay aligned.
  const int64_t from = part ? m.k * part / parts / 4 * 4 : 0;
  const int64_t to = part + 1 < parts ? m.k * (part + 1) / parts / 4 * 4 : m.k;
  add_terms<T, halves>(m, in, panel, from, to, acc);
#pragma unroll
  for (int p = 0; p < T; ++p) {
    if (first + p > last) break;
    if (parts > 1) {
#pragma unroll
      for (int j = 0; j < halves; ++j)
        partial[((part * columns + first + p) * halves + j) * panels_of(m) * kLanes + output] = acc[p][j];
    } else if (live) {
      finish(m, halves == 2 ? gated(acc[p][0], acc[p][halves - 1]) : acc[p][0],
             row * m.out_row + (first + p) * m.out_column + output);
    }
  }
}

// Warps take tiles in turn, panel by panel, column by column, row by row, part by part.
template <int T>
GMK_DEV void make_tiles(const Map& m, int64_t rows, int64_t columns, int parts, float* partial) {
  const int64_t panels = panels_of(m);
  int64_t panel = int(threadIdx.x) / kLanes, column = 0, row = 0;
  for (int part = 0;; panel += kWarps) {
    for (; panel >= panels; panel -= panels) {
      column += T;
      if (column < columns) continue;
      column = 0;
      if (++row < rows) continue;
      row = 0;
      ++part;
    }
    if (part >= parts) return;
    if (m.gate) {
      make_tile<T, 2>(m, row, column, columns, panel, part, parts, partial);
    } else {
      make_tile<T, 1>(m, row, column, columns, panel, part, parts, partial);
    }
  }
}

// The map of one pixel of each image. All threads; afterwards they may read what it has made.
GMK_DEV void apply_pixel(const Map& m, int64_t images, float* partial) {
  const int parts = pixelcnn_parts(m.outputs, m.k);
  if (images == 1) {
    make_tiles<1>(m, 1, 1, parts, partial);
  } else {
    make_tiles<kTile>(m, 1, images, parts, partial);
  }
  __syncthreads();
  if (parts == 1) return;
  const int halves = m.gate ? 2 : 1, lanes = int(panels_of(m)) * kLanes, outputs = int(m.outputs);
  for (int i = int(threadIdx.x); i < int(images) * outputs; i += kThreads) {
    const int b = i / outputs, output = i % outputs;
    float z[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j >= halves) break;
      z[j] = m.add[b * m.add_column + j * m.half + output];
      for (int part = 0; part < parts; ++part)
        z[j] += partial[((part * int(images) + b) * halves + j) * lanes + output];
    }
    finish(m, m.gate ? gated(z[0], z[1]) : z[0], b * m.out_column + output);
  }
  __syncthreads();
}

struct Block {
  const Launch& launch;
  int64_t first, images;
  float *state, *link, *pixel, *partial;

  GMK_DEV const PixelCnn& a() const { return launch.a; }
  GMK_DEV const PixelCnnPlan& plan() const { return launch.plan; }
  GMK_DEV const float* layer(int64_t l) const {
    return a().weights + (l ? plan().layer[0] + (l - 1) * plan().layer[1] : 0);
  }
  GMK_DEV float* vertical(int64_t l) const { return state + plan().vertical + l * plan().rows * plan().pitch; }
  GMK_DEV int64_t ring_size() const { return (a().size.kernel / 2 + 1) * a().size.features; }
  GMK_DEV float* h(int64_t l) const { return pixel + l * ring_size(); }
  GMK_DEV float* gated_features(int64_t l) const { return h(a().size.layers) + l * a().size.features; }
  GMK_DEV float* top() const { return gated_features(a().size.layers); }
  GMK_DEV float* hidden() const { return top() + a().size.features; }
  GMK_DEV float* outputs() const { return hidden() + a().size.hidden; }
  GMK_DEV const float* out_bias() const {
    return a().biases + a().size.layers * (a().v_rows + a().h_rows) * 2 * a().size.features;
  }
};

GMK_DEV void from_biases(Map& m, const float* bias, int64_t l, int64_t rows, int64_t first, int64_t width) {
  m.add = bias + (l * rows + (rows > 1 ? first : 0)) * width;
  m.add_row = rows > 1 ? width : 0;
}

// The vertical stack of row y, and what it gives to the horizontal one.
GMK_DEV void make_row(const Block& t, int64_t y) {
  const PixelCnn& a = t.a();
  const PixelCnnSizes& s = a.size;
  const PixelCnnPlan& plan = t.plan();
  const int64_t C = s.features;
  const int r0 = s.kernel0 / 2, r = s.kernel / 2;
  for (int64_t step = 0; step < 2 * s.layers; ++step) {
    const int64_t l = step / 2, here = y % plan.rows * plan.pitch + r * C;
    Map m{};
    m.rows = m.runs = 1;
    m.outputs = C;
    m.in_row = plan.state;
    m.in_column = m.out_column = C;
    if (step % 2) {
      m.in = t.vertical(l) + here;
      m.k = m.last = C;
      m.weights = t.layer(l) + plan.link[l > 0];
      m.outputs = 2 * C;
      from_biases(m, a.biases + s.layers * a.v_rows * 2 * C, l, a.h_rows, t.first, 2 * C);
      m.out = t.link + l * s.w * 2 * C;
      m.out_row = plan.link_row;
      m.out_column = 2 * C;
    } else {
      m.rows = int(l ? plan.rows : plan.image_rows);
      m.runs = l ? r + 1 : r0;
      m.first = int((y + 1) % m.rows);  // the oldest: y - r, or y - r0, one row behind which is y
      m.pitch = l ? plan.pitch : plan.image_pitch;
      m.length = m.last = l ? s.kernel * C : s.kernel0 * s.channels;
      m.k = m.runs * m.length;
      m.in = l ? t.vertical(l - 1) : t.state;
      if (!l) m.in_column = s.channels;
      m.weights = t.layer(l);
      m.gate = true;
      from_biases(m, a.biases, l, a.v_rows, t.first, 2 * C);
      m.half = C;
      if (l) m.residual = t.vertical(l - 1) + here;
      m.out = t.vertical(l) + here;
      m.out_row = plan.state;
    }
    m.wide = is_wide(m);
    make_tiles<kTile>(m, t.images, s.w, 1, nullptr);
    __syncthreads();
  }
  const int64_t size = s.layers * t.ring_size();  // to the left of the first pixel
  for (int64_t i = threadIdx.x; i < t.images * size; i += kThreads) t.pixel[i / size * plan.pixel + i % size] = 0.0f;
  __syncthreads();
}

// The horizontal stack and the head at one pixel, as far as group g has them.
GMK_DEV void make_pixel(const Block& t, int64_t y, int64_t x, int g) {
  const PixelCnn& a = t.a();
  const PixelCnnSizes& s = a.size;
  const PixelCnnPlan& plan = t.plan();
  const PixelCnnGroup& q = plan.group[g];
  const int64_t C = s.features, slots = s.kernel / 2 + 1, slot = x % slots * C, count = q.feature_end - q.feature;
  const float* const head_bias = t.out_bias() + s.layers * C;
  for (int64_t step = 0; step < 2 * s.layers + 2; ++step) {
    const int64_t l = step / 2;
    Map m{};
    m.rows = m.runs = 1;
    m.in_column = m.out_column = plan.pixel;
    m.outputs = count;
    if (step >= 2 * s.layers) {
      const bool second = step % 2;
      m.in = second ? t.hidden() : t.top();
      m.k = m.last = second ? q.hidden_end : q.feature_end;
      m.weights = a.weights + (second ? q.head2 : q.head1);
      m.outputs = second ? q.output_end - q.output : q.hidden_end - q.hidden;
      m.add = head_bias + (second ? s.hidden + q.output : q.hidden);
      m.out = second ? t.outputs() + q.output : t.hidden() + q.hidden;
      m.relu = !second;
    } else if (step % 2) {
      const bool last = l + 1 == s.layers;
      m.in = t.gated_features(l);
      m.k = m.last = q.feature_end;
      m.weights = t.layer(l) + q.out[l > 0];
      m.add = t.out_bias() + l * C + q.feature;
      if (l) m.residual = t.h(l - 1) + slot + q.feature;
      m.relu = last;
      m.out = (last ? t.top() : t.h(l) + slot) + q.feature;
    } else {
      m.weights = t.layer(l) + q.horizontal[l > 0];
      m.gate = true;
      m.add = t.link + (l * s.w + x) * 2 * C + q.feature;
      m.add_column = plan.link_row;
      m.half = C;
      m.out = t.gated_features(l) + q.feature;
      if (l) {
        m.in = t.h(l - 1);
        m.runs = m.rows = int(slots);
        m.first = int((x + 1) % slots);
        m.pitch = m.length = C;
        m.last = q.feature_end;
      } else {
        m.in = t.state + y % plan.image_rows * plan.image_pitch + x * s.channels;
        m.in_column = plan.state;
        m.last = s.kernel0 / 2 * s.channels + g;
      }
      m.k = (m.runs - 1) * m.length + m.last;
    }
    m.wide = is_wide(m);
    if (m.outputs) apply_pixel(m, t.images, t.partial);
  }
}

GMK_DEV void set_level(const Block& t, int64_t b, int64_t channel, int64_t y, int64_t x, int64_t level, bool bad) {
  const PixelCnnSizes& s = t.a().size;
  if (bad) {
    level = 0;
    t.a().bad[t.first + b] = 1;
  }
  t.a().levels[(((t.first + b) * s.channels + channel) * s.h + y) * s.w + x] = level;
  t.state[b * t.plan().state + y % t.plan().image_rows * t.plan().image_pitch + (x + s.kernel0 / 2) * s.channels +
          channel] = t.a().values[level];
}

// By one warp: the first level whose cumulative softmax(logits / temperature) exceeds u; -1: no distribution. A lane has a stretch
// of levels.
GMK_DEV int64_t draw(const float* logits, int64_t levels, double temperature, float u) {
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t stretch = (levels + kLanes - 1) / kLanes, begin = lane * stretch < levels ? lane * stretch : levels;
  const int64_t end = begin + stretch < levels ? begin + stretch : levels;
  float top = -INFINITY;
  for (int64_t i = begin; i < end; ++i) top = logits[i] > top || logits[i] != logits[i] ? logits[i] : top;
  top = warp_max(top);
  if (!(top - top == 0)) return -1;
  int64_t level = -1;
  bool mine;
  if (temperature == 0) {
    for (int64_t i = begin; i < end && level < 0; ++i)
      if (logits[i] == top) level = i;
    mine = level >= 0;
  } else {
    const float t = temperature < 1e-37  ? 1e-37f
                    : temperature > 1e37 ? 1e37f
                                         : float(temperature);  // neither 0 nor inf
    double own = 0;
    for (int64_t i = begin; i < end; ++i) own += double(expf((logits[i] - top) / t));
    double sum = own;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const double before = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += before;
    }
    const double limit = double(u) * __shfl_sync(kFullWarp, sum, kLanes - 1);
    double before = __shfl_up_sync(kFullWarp, sum, 1);
    if (lane == 0) before = 0;
    mine = sum > limit;
    for (int64_t i = begin; i < end && mine; ++i) {
      const float weight = expf((logits[i] - top) / t);
      before += double(weight);
      if (weight > 0) level = i;  // the last with a weight where rounding leaves the limit above the sum
      if (before > limit) break;
    }
    mine = level >= 0;
  }
  const unsigned found = __ballot_sync(kFullWarp, mine);
  return __shfl_sync(kFullWarp, level, __ffs(int(found)) - 1);
}

// What the outputs of group g draw: a warp, of the mixture a thread, for each image.
template <int head>
GMK_DEV void draw_levels(const Block& t, int64_t y, int64_t x, int g) {
  const PixelCnn& a = t.a();
  const PixelCnnSizes& s = a.size;
  const PixelCnnGroup& q = t.plan().group[g];
  const int64_t size = s.h * s.w, inside = y * s.w + x;
  if (a.logits) {
    const int count = int(q.output_end - q.output);
    for (int64_t i = threadIdx.x; i < t.images * count; i += kThreads) {
      const int64_t b = i / count, row = q.output + i % count;
      a.logits[((t.first + b) * s.outputs + row) * size + inside] = t.outputs()[b * t.plan().pixel + row];
    }
  }
  const auto known = [&](int64_t b, int64_t channel) {
    const int64_t at = ((t.first + b) * s.channels + channel) * size + inside;
    return a.known && a.known[at] ? a.given[at] : int64_t(-1);
  };
  if (head == kCategorical) {
    const int64_t channels = s.groups > 1 ? 1 : s.channels;
    for (int64_t job = int(threadIdx.x) / kLanes; job < t.images * channels; job += kWarps) {
      const int64_t b = job / channels, channel = s.groups > 1 ? g : job % channels;
      int64_t level = known(b, channel);
      const bool drawn = level < 0;
      if (drawn) {
        const float u = a.uniforms ? a.uniforms[((t.first + b) * s.channels + channel) * size + inside] : 0.0f;
        level = draw(t.outputs() + b * t.plan().pixel + channel * s.levels, s.levels, a.temperature, u);
      }
      if (threadIdx.x % kLanes == 0) set_level(t, b, channel, y, x, level, drawn && level < 0);
    }
  } else {
    for (int64_t b = threadIdx.x; b < t.images; b += kThreads) {
      LogisticShape shape{};
      shape.mixtures = a.mixtures;
      shape.levels = double(s.levels);
      shape.data_channels = int(s.channels);
      shape.kind = a.kind;
      const int64_t image = t.first + b;
      const bool own = a.seed_rows > 1;
      const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[own ? image : 0]) : a.seed);
      const PhiloxWords words = philox(uint64_t(own ? inside : image * size + inside), 0, kStreamLogisticMixture, key);
      const float* const out = t.outputs() + b * t.plan().pixel;
      double fixed[3] = {-1, -1, -1}, levels[3] = {};
      bool drawn = false;
      GMK_UNROLL
      for (int c = 0; c < 3; ++c) {
        if (c >= s.channels) break;
        fixed[c] = double(known(b, c));
        drawn = drawn || fixed[c] < 0;
      }
      const bool bad = logistic_draw(
          shape, logistic_rows(shape), a.temperature, words, [&](int64_t i) { return double(out[i]); }, fixed, levels);
      GMK_UNROLL
      for (int c = 0; c < 3; ++c) {
        if (c >= s.channels) break;
        set_level(t, b, c, y, x, int64_t(levels[c]), bad && drawn && fixed[c] < 0);
      }
    }
  }
  __syncthreads();
}

template <int head>
__global__ void __launch_bounds__(kThreads, 1) pixelcnn_sample_kernel(Launch launch) {
  GMK_DYN_SHARED(shared);
  const PixelCnn& a = launch.a;
  const PixelCnnPlan& plan = launch.plan;
  for (int64_t first = blockIdx.x * launch.slice; first < a.size.n; first += gridDim.x * launch.slice) {
    const int64_t images = a.size.n - first < launch.slice ? a.size.n - first : launch.slice;
    float* const links = a.workspace + a.size.n * plan.state;
    float* const pixel =
        launch.shared ? reinterpret_cast<float*>(shared) : links + a.size.n * plan.link_row + first * launch.scratch;
    const Block t{launch,
                  first,
                  images,
                  a.workspace + first * plan.state,
                  links + first * plan.link_row,
                  pixel,
                  pixel + images * plan.pixel};
    for (int64_t y = a.y0; y < a.y1; ++y) {
      make_row(t, y);
      for (int64_t x = 0; x < a.size.w; ++x)
        for (int g = 0; g < a.size.groups; ++g) {
          make_pixel(t, y, x, g);
          draw_levels<head>(t, y, x, g);
        }
    }
  }
}

template <int head>
Status launch_on(Launch launch, void* stream) {
  const int64_t n = launch.a.size.n, bytes = launch.scratch * int64_t(sizeof(float));
  launch.shared = bytes <= kPixelCnnShared;
  launch.slice = (n + kManyBlocks - 1) / kManyBlocks;
  if (launch.slice > kMostImages) launch.slice = kMostImages;
  if (launch.shared) {
    const int64_t most = GMK_COMPILED_FOR((pixelcnn_sample_kernel<head>)) < 80 ? kPixelCnnShared : 96 << 10;
    if (launch.slice > most / bytes) launch.slice = most / bytes;
  }
  const unsigned grid = grid_for((n + launch.slice - 1) / launch.slice, 1);
  return GMK_LAUNCH((pixelcnn_sample_kernel<head>), grid, kThreads, launch.shared ? size_t(launch.slice * bytes) : 0,
                    stream, launch);
}

}  // namespace

Status pixelcnn_sample_cuda(const PixelCnn& a, int device, void* stream) {
  const PixelCnnSizes& s = a.size;
  if (s.n <= 0 || a.y0 >= a.y1 || s.w <= 0) return kOk;
  if (s.lanes != kLanes || s.words != 1) return "the weights are packed for another kernel";
  const DeviceGuard guard(device);
  Launch launch{};
  launch.a = a;
  launch.plan = pixelcnn_plan(s);
  launch.scratch = pixelcnn_scratch_cuda(s, launch.plan);
  return a.head == kCategorical ? launch_on<kCategorical>(launch, stream)
                                : launch_on<kMixtureOfLogistics>(launch, stream);
}

}  // namespace gmk

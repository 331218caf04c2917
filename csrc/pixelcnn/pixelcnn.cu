// A block draws a slice of images from their first row to their last, and waits for no other block. What a pixel needs is in shared
// memory, what a row needs behind the L2. Bound with few images: the reading of the weights of a pixel, one map after the other.
#include "cuda/prims.cuh"
#include "likelihood/logistic_sample.h"
#include "pixelcnn/map.cuh"

namespace gmk {
namespace {

constexpr int kMostImages = 16;   // of a block
constexpr int kManyBlocks = 132;  // before a block takes a second image

struct Launch {
  PixelCnn a;
  PixelCnnPlan plan;
  int64_t slice;    // images of a block
  int64_t scratch;  // floats of the pixel pass of an image
  bool shared;      // in shared memory, else behind the workspace
};

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

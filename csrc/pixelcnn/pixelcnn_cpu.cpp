// A thread draws a slice of images from their first row to their last, and meets no other thread, unless there are more of them than
// images: then several share the rows of one in the vertical stack, and the first of them draws its pixels. Bound: multiply-adds
// with several images a thread, with one the reading of the weights of each pixel (L2).
#include "pixelcnn/pixelcnn.h"

#include <omp.h>

#include "core/scratch.h"
#include "likelihood/logistic_sample.h"
#include "pixelcnn/pairs.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kSlice = 24;  // images that pass a panel of weights together, at most

// The first level whose cumulative softmax(logits / temperature) exceeds u; -1: a logit is NaN or +inf, or all are -inf.
int64_t draw(const float* logits, int64_t levels, double temperature, const float* u, float* weight, double* sum) {
  const vfloat lowest = splat(-INFINITY);
  vfloat top = lowest;
  vint nan{};
  for (int64_t i = 0; i < levels; i += kLanes) {
    const int64_t count = levels - i;
    vfloat q = lowest;
    if (count >= kLanes) {
      q = load(logits + i);
    } else {
      memcpy(&q, logits + i, size_t(count) * sizeof(float));
    }
    top = vmax(q, top);
    nan |= q != q;
  }
  float most = top[0];
  for (int l = 1; l < kLanes; ++l) most = top[l] > most ? top[l] : most;
  if (any(nan) || !(most - most == 0)) return -1;
  int64_t level = 0;
  if (temperature == 0) {
    while (logits[level] < most) ++level;
    return level;
  }
  const float t = temperature < 1e-37 ? 1e-37f : temperature > 1e37 ? 1e37f : float(temperature);  // neither 0 nor inf
  for (int64_t i = 0; i < levels; i += kLanes)  // past the last: numbers that nobody reads
    store(weight + i, vexp_nonpositive((load(logits + i) - splat(most)) / splat(t)));
  double total = 0;
  for (int64_t i = 0; i < levels; ++i) sum[i] = total += double(weight[i]);
  const double limit = double(*u) * total;
  int64_t last = levels - 1;
  while (level < last) {  // sums ascend: halve
    const int64_t middle = (level + last) / 2;
    if (sum[middle] > limit) {
      last = middle;
    } else {
      level = middle + 1;
    }
  }
  return level;
}

struct Slice {
  const PixelCnn& a;
  const PixelCnnPlan& plan;
  int64_t first, images;  // of the batch
  float *link, *pixel;    // scratch: [images][plan.link_row], [images][plan.pixel]
  float* weight;          // of levels
  double* sum;            // of levels
  float* pairs;           // scratch of this thread

  float* state() const { return a.workspace + first * plan.state; }
  float* vertical(int64_t l) const {  // v_l: first row of the ring, first column reached
    return state() + plan.vertical + l * plan.rows * plan.pitch;
  }
  const float* layer(int64_t l) const { return a.weights + (l ? plan.layer[0] + (l - 1) * plan.layer[1] : 0); }
  // In the scratch of the pixel pass.
  int64_t ring_size() const { return (a.size.kernel / 2 + 1) * a.size.features; }
  float* h(int64_t l) const { return pixel + l * ring_size(); }
  float* gated(int64_t l) const { return pixel + a.size.layers * ring_size() + l * a.size.features; }
  float* top() const { return gated(a.size.layers); }
  float* hidden() const { return top() + a.size.features; }
  float* outputs() const { return hidden() + a.size.hidden; }
  const float* out_bias() const { return a.biases + a.size.layers * (a.v_rows + a.h_rows) * 2 * a.size.features; }

  void row(int64_t y, int64_t part, int64_t parts) const;
  void margin() const;
  void features(int64_t y, int64_t x, int g) const;
  void head(int g) const;
  void values(int64_t y, int64_t x, int g) const;
  void set(int64_t b, int64_t channel, int64_t y, int64_t x, int64_t level, bool bad) const;
};

// A row of biases for each image, or one for all.
Field<const float> bias_rows(const float* bias, int64_t l, int64_t rows, int64_t first, int64_t width) {
  return {bias + (l * rows + (rows > 1 ? first : 0)) * width, rows > 1 ? width : 0, 0};
}

// The vertical stack of row y, and what it gives to the horizontal one: the share of one of `parts` threads.
void Slice::row(int64_t y, int64_t part, int64_t parts) const {
  const PixelCnnSizes& s = a.size;
  const int64_t pairs_of_row = ceil_div(s.w, 2), first_pair = pairs_of_row * part / parts;
  const int64_t end_pair = pairs_of_row * (part + 1) / parts, from = 2 * first_pair, end = least(s.w, 2 * end_pair);
  const int64_t C = s.features, c = s.channels, r0 = s.kernel0 / 2, r = s.kernel / 2;
  Run run[kMaxRuns];
  for (int64_t l = 0; l < s.layers; ++l) {
    Map m{};
    m.run = run;
    m.runs = int(l ? plan.rows : r0);
    for (int i = 0; i < m.runs; ++i) {
      run[i] = l ? Run{ring(y - r + i, plan.rows) * plan.pitch, s.kernel * C}
                 : Run{ring(y - r0 + i, plan.image_rows) * plan.image_pitch, s.kernel0 * c};
      m.k += run[i].length;
    }
    const int64_t here = y % plan.rows * plan.pitch + r * C;
    m.in = l ? Field<const float>{vertical(l - 1), plan.state, C} : Field<const float>{state(), plan.state, c};
    m.weights = layer(l);
    m.outputs = C;
    m.gate = true;
    m.add = bias_rows(a.biases, l, a.v_rows, first, 2 * C);
    m.half = C;
    if (l) m.residual = {vertical(l - 1) + here, plan.state, C};
    m.out = {vertical(l) + here, plan.state, C};
    if (l && s.points) {
      m.k = m.runs * C;
      apply_pairs(m, images, first_pair, end_pair, s.w, pairs);
    } else {
      apply(m, images, from, end);
    }

    const Run own{0, C};
    Map to{};
    to.in = {vertical(l) + here, plan.state, C};
    to.run = &own;
    to.runs = 1;
    to.k = C;
    to.weights = layer(l) + plan.link[l > 0];
    to.outputs = 2 * C;
    to.add = bias_rows(a.biases + s.layers * a.v_rows * 2 * C, l, a.h_rows, first, 2 * C);
    to.out = {link + l * s.w * 2 * C, plan.link_row, 2 * C};
    apply(to, images, from, end);
    if (parts > 1) {
#pragma omp barrier
    }
  }
}

// To the left of the first pixel.
void Slice::margin() const {
  for (int64_t b = 0; b < images; ++b)
    memset(pixel + b * plan.pixel, 0, size_t(a.size.layers * ring_size()) * sizeof(float));
}

// The horizontal stack at one pixel, as far as group g has it.
void Slice::features(int64_t y, int64_t x, int g) const {
  const PixelCnnSizes& s = a.size;
  const PixelCnnGroup& q = plan.group[g];
  const int64_t C = s.features, r = s.kernel / 2, slot = x % (r + 1) * C, count = q.feature_end - q.feature;
  if (!count) return;
  Run run[kMaxRuns];
  for (int i = 0; i <= r; ++i) run[i] = Run{ring(x - r + i, r + 1) * C, i < r ? C : q.feature_end};
  const Run left{0, s.kernel0 / 2 * s.channels + g}, own{0, q.feature_end};
  for (int64_t l = 0; l < s.layers; ++l) {
    Map m{};
    m.in = l ? Field<const float>{h(l - 1), plan.pixel, 0}
             : Field<const float>{state() + y % plan.image_rows * plan.image_pitch + x * s.channels, plan.state, 0};
    m.run = l ? run : &left;
    m.runs = int(l ? r + 1 : 1);
    m.k = l ? r * C + q.feature_end : left.length;
    m.weights = layer(l) + q.horizontal[l > 0];
    m.outputs = count;
    m.gate = true;
    m.add = {link + (l * s.w + x) * 2 * C + q.feature, plan.link_row, 0};
    m.half = C;
    m.out = {gated(l) + q.feature, plan.pixel, 0};
    apply(m, images, 0, 1);

    const bool last = l + 1 == s.layers;
    Map to{};
    to.in = {gated(l), plan.pixel, 0};
    to.run = &own;
    to.runs = 1;
    to.k = own.length;
    to.weights = layer(l) + q.out[l > 0];
    to.outputs = count;
    to.add = {out_bias() + l * C + q.feature, 0, 0};
    if (l) to.residual = {h(l - 1) + slot + q.feature, plan.pixel, 0};
    to.relu = last;
    to.out = {(last ? top() : h(l) + slot) + q.feature, plan.pixel, 0};
    apply(to, images, 0, 1);
  }
}

void Slice::head(int g) const {
  const PixelCnnSizes& s = a.size;
  const PixelCnnGroup& q = plan.group[g];
  const float* const bias = out_bias() + s.layers * s.features;
  const Run top_run{0, q.feature_end}, hidden_run{0, q.hidden_end};
  Map m{};
  m.in = {top(), plan.pixel, 0};
  m.run = &top_run;
  m.runs = 1;
  m.k = top_run.length;
  m.weights = a.weights + q.head1;
  m.outputs = q.hidden_end - q.hidden;
  m.add = {bias + q.hidden, 0, 0};
  m.relu = true;
  m.out = {hidden() + q.hidden, plan.pixel, 0};
  apply(m, images, 0, 1);
  m.in.base = hidden();
  m.run = &hidden_run;
  m.k = hidden_run.length;
  m.weights = a.weights + q.head2;
  m.outputs = q.output_end - q.output;
  m.add.base = bias + s.hidden + q.output;
  m.relu = false;
  m.out.base = outputs() + q.output;
  apply(m, images, 0, 1);
}

void Slice::set(int64_t b, int64_t channel, int64_t y, int64_t x, int64_t level, bool bad) const {
  const PixelCnnSizes& s = a.size;
  if (bad) {
    level = 0;
    a.bad[first + b] = 1;
  }
  a.levels[(((first + b) * s.channels + channel) * s.h + y) * s.w + x] = level;
  state()[b * plan.state + y % plan.image_rows * plan.image_pitch + (x + s.kernel0 / 2) * s.channels + channel] =
      a.values[level];
}

// What the outputs of group g draw.
void Slice::values(int64_t y, int64_t x, int g) const {
  const PixelCnnSizes& s = a.size;
  const PixelCnnGroup& q = plan.group[g];
  const int64_t from = s.groups > 1 ? g : 0, to = s.groups > 1 ? g + 1 : s.channels;
  for (int64_t b = 0; b < images; ++b) {
    const int64_t image = first + b, inside = y * s.w + x;
    const float* const out = outputs() + b * plan.pixel;
    if (a.logits)
      for (int64_t i = q.output; i < q.output_end; ++i) a.logits[(image * s.outputs + i) * s.h * s.w + inside] = out[i];
    const auto known = [&](int64_t channel) {
      const int64_t at = (image * s.channels + channel) * s.h * s.w + inside;
      return a.known && a.known[at] ? a.given[at] : -1;
    };
    if (a.head == kCategorical) {
      for (int64_t channel = from; channel < to; ++channel) {
        int64_t level = known(channel);
        const bool drawn = level < 0;
        if (drawn) {
          const float* const u =
              a.uniforms ? a.uniforms + (image * s.channels + channel) * s.h * s.w + inside : nullptr;
          level = draw(out + channel * s.levels, s.levels, a.temperature, u, weight, sum);
        }
        set(b, channel, y, x, level, drawn && level < 0);
      }
      continue;
    }
    LogisticShape shape{};
    shape.mixtures = a.mixtures;
    shape.levels = double(s.levels);
    shape.data_channels = int(s.channels);
    shape.kind = a.kind;
    const bool own = a.seed_rows > 1;
    const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[own ? image : 0]) : a.seed);
    const PhiloxWords words =
        philox(uint64_t(own ? inside : image * s.h * s.w + inside), 0, kStreamLogisticMixture, key);
    double fixed[3] = {-1, -1, -1}, levels[3] = {};
    bool drawn = false;
    for (int64_t channel = 0; channel < s.channels; ++channel) {
      fixed[channel] = double(known(channel));
      drawn = drawn || fixed[channel] < 0;
    }
    const bool bad = logistic_draw(
        shape, logistic_rows(shape), a.temperature, words, [&](int64_t i) { return double(out[i]); }, fixed, levels);
    for (int64_t channel = 0; channel < s.channels; ++channel)
      set(b, channel, y, x, fixed[channel] < 0 ? int64_t(levels[channel]) : int64_t(fixed[channel]),
          bad && drawn && fixed[channel] < 0);
  }
}

Status sample(const PixelCnn& a, int threads) {
  const PixelCnnSizes& s = a.size;
  if (s.n <= 0 || a.y0 >= a.y1 || s.w <= 0) return kOk;
  if (s.lanes != kLanes || s.words != kWords) return "the weights are packed for another instruction set";
  const PixelCnnPlan plan = pixelcnn_plan(s);
  threads = team(s.n * (a.y1 - a.y0) * s.w * plan.weights / 32, threads);
  const int64_t teams = least(threads, s.n), shares = least(threads / teams, ceil_div(s.w, 2 * kTile));
  const int64_t slice = least(kSlice, ceil_div(s.n, teams)), levels = ceil_div(s.levels, 16) * 16;
  const int64_t own = slice * (plan.link_row + plan.pixel) + 3 * levels;
  const int64_t pairs = s.points ? pairs_scratch(ceil_div(s.w, 2), plan.rows * s.features) : 0;
  threads = int(teams * shares);
  const Scratch<float> scratch(teams * own + threads * pairs);
  if (!scratch.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // Fewer threads than asked for: as many teams of one.
    const int64_t all = omp_get_num_threads(), parts = all < threads ? 1 : shares, count = least(teams, all);
    const int64_t me = omp_get_thread_num() / parts, part = omp_get_thread_num() % parts;
    float* const mine = scratch.get() + me * own;
    float* const alone = scratch.get() + teams * own + omp_get_thread_num() * pairs;
    for (int64_t first = s.n * me / count, end = s.n * (me + 1) / count; first < end; first += slice) {
      float* const link = mine + 3 * levels;
      const Slice here{a,     plan,
                       first, least(slice, end - first),
                       link,  link + slice * plan.link_row,
                       mine,  reinterpret_cast<double*>(mine + levels),
                       alone};
      if (part == 0) memset(here.pixel, 0, size_t(here.images * plan.pixel) * sizeof(float));
      for (int64_t y = a.y0; y < a.y1; ++y) {
        if (parts > 1) {
#pragma omp barrier
        }
        here.row(y, part, parts);
        if (part) continue;
        here.margin();
        for (int64_t x = 0; x < s.w; ++x)
          for (int g = 0; g < s.groups; ++g) {
            here.features(y, x, g);
            here.head(g);
            here.values(y, x, g);
          }
      }
    }
  }
  return kOk;
}

}  // namespace

extern const PixelCnnKernels pixelcnn_kernels;
const PixelCnnKernels pixelcnn_kernels = {sample, kLanes, kWords};

}  // namespace GMK_ISA_NS
}  // namespace gmk

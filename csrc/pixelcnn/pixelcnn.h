// A gated PixelCNN that draws images pixel by pixel, each feature computed once. c data channels, C features, layers l = 0 .. L,
// gate(z) = tanh(first half of z) sigmoid(second half), zero padding:
//   v_0 = gate(conv[k0 x k0, rows above](x) + bias_v[0])
//   v_l = v_{l-1} + gate(conv[k x k, rows above and the own row](v_{l-1}) + bias_v[l])
//   a_0 = gate(conv[1 x k0, pixels to the left](x) + link_0 v_0 + bias_h[0])
//   a_l = gate(conv[1 x k, to the left and the own pixel](h_{l-1}) + link_l v_l + bias_h[l])
//   h_l = [h_{l-1} +] out_l a_l + bias_o[l]
//   y   = head2(relu(head1(relu(h_L))))                    C -> E -> outputs
// v and link v are computed a row at a time, when the row starts; the rest pixel by pixel. With c groups, channel i of C is of group
// i * c / C (of E alike, outputs are [c][levels]): at the own pixel, in out and in the head, group g sees groups up to g, and in
// layer 0 the data channels before g. A pixel then takes c passes, each over the outputs of one group.
//
// Every sum is a linear map of runs: stretches of memory, adjacent taps times channels. Its weights are packed
// (ops/pixelcnn.py) as panels of `words` SIMD words of outputs, [panel][k][word][lane], outputs padded with zeros; with a gate a
// panel is `words` / 2 words of tanh outputs and then the sigmoid outputs that belong to them. With `points`, the vertical weights of
// layers l > 0 are so many maps of k = (row, channel), one for each point.
#pragma once
#include "core/error.h"
#include "likelihood/likelihood.h"

namespace gmk {

constexpr int kMaxGroups = 16;  // data channels, at most
constexpr int kMaxKernel = 63;
constexpr int kMaxRuns = kMaxKernel / 2 + 1;
constexpr int kPairPoints = 4;  // products for two pixels, of which each has three taps in a row

enum PixelCnnHead : int { kCategorical = 0, kMixtureOfLogistics = 1 };

struct PixelCnnSizes {
  int64_t n, channels, h, w;         // images
  int64_t levels;                    // values of a data channel
  int64_t features, layers, hidden;  // C, L + 1, E
  int64_t outputs;                   // of the head
  int groups;                        // 1, or `channels`
  int kernel0, kernel;               // odd: of layer 0, of the others
  int lanes, words;                  // of a panel, as the weights are packed
  int points;                        // of a pair of pixels in the vertical stack (pairs.h), or 0: no pairs
};

struct PixelCnn {
  PixelCnnSizes size;
  int64_t* levels;         // out: [n, c, h, w]
  float* logits;           // out: [n, outputs, h, w], what the pixels were drawn from; nullptr: not wanted
  int64_t* bad;            // [n]: set to 1 where a pixel had no distribution; it has level 0 then
  float* workspace;        // caches that live from row to row, zeros at the first
  const float* weights;    // packed
  const float* biases;     // [layers][v_rows][2 C], [layers][h_rows][2 C], [layers][C], [E], [outputs], kSlack numbers
  const float* values;     // [levels]: what the network sees of a level
  const float* uniforms;   // [n, c, h, w] in [0, 1): of the categorical head, but at temperature 0
  const int64_t* given;    // [n, c, h, w], or nullptr
  const uint8_t* known;    // the same shape: 1 where `given` holds, and nothing is drawn
  const int64_t* seeds;    // of the mixture head, as in LogisticMixtureSample
  int64_t seed_rows;       // 1, or n: each image counts its pixels from 0
  uint64_t seed;           // where `seeds` is nullptr
  int64_t v_rows, h_rows;  // of the biases: 1, or n
  int64_t y0, y1;          // rows to draw; those above are drawn
  int64_t mixtures;        // of the mixture head
  double temperature;
  int head;  // PixelCnnHead
  int kind;  // LogisticKind
};

// Biases and caches are read in whole SIMD words: past their end is memory, whatever it holds.
constexpr int64_t kSlack = 64;

struct PixelCnnGroup {
  int64_t feature, feature_end;  // of C
  int64_t hidden, hidden_end;    // of E
  int64_t output, output_end;
  int64_t horizontal[2], out[2];  // weights, from those of layer 0, and of another layer
  int64_t head1, head2;           // weights
};

// Sizes and offsets, in floats.
struct PixelCnnPlan {
  int64_t link[2], layer[2];  // weights: from those of a layer to its link, to the next layer; vertical ones come first
  int64_t weights;            // all
  int64_t image_rows, rows;   // kept of the image, of each vertical layer: as a ring
  int64_t image_pitch, pitch;  // of such a row, with the columns that a kernel reaches beyond the image
  int64_t vertical;            // from an image's caches to those of the vertical layers
  int64_t state;               // all of an image: [image_rows][image_pitch], at `vertical` [layers][rows][pitch]
  int64_t link_row;            // link v + bias of one row of an image: [layers][w][2 C]
  int64_t pixel;  // of the pixel pass of an image: h [layers][k / 2 + 1][C], a [layers][C], relu h, E, outputs
  PixelCnnGroup group[kMaxGroups];
};

GMK_HD int64_t pixelcnn_round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
GMK_HD int64_t pixelcnn_packed(const PixelCnnSizes& s, int64_t k, int64_t outputs, int halves) {
  return k * halves * pixelcnn_round_up(outputs, s.lanes);
}
// The first channel of group g.
GMK_HD int64_t pixelcnn_first(const PixelCnnSizes& s, int g, int64_t channels) {
  return (g * channels + s.groups - 1) / s.groups;
}

// Static: instruction sets must not share it.
[[maybe_unused]] static inline PixelCnnPlan pixelcnn_plan(const PixelCnnSizes& s) {
  PixelCnnPlan p{};
  const int64_t c = s.channels, C = s.features, r0 = s.kernel0 / 2, r = s.kernel / 2;
  for (int g = 0; g < s.groups; ++g) {
    PixelCnnGroup& q = p.group[g];
    q.feature = pixelcnn_first(s, g, C);
    q.feature_end = pixelcnn_first(s, g + 1, C);
    q.hidden = pixelcnn_first(s, g, s.hidden);
    q.hidden_end = pixelcnn_first(s, g + 1, s.hidden);
    q.output = pixelcnn_first(s, g, s.outputs);
    q.output_end = pixelcnn_first(s, g + 1, s.outputs);
  }
  for (int l = 0; l < 2; ++l) {
    int64_t at = pixelcnn_packed(s, l ? (r + 1) * (s.points ? s.points : s.kernel) * C : r0 * s.kernel0 * c, C, 2);
    p.link[l] = at;
    at += pixelcnn_packed(s, C, 2 * C, 1);
    for (int g = 0; g < s.groups; ++g) {
      PixelCnnGroup& q = p.group[g];
      q.horizontal[l] = at;
      at += pixelcnn_packed(s, l ? r * C + q.feature_end : r0 * c + g, q.feature_end - q.feature, 2);
    }
    for (int g = 0; g < s.groups; ++g) {
      PixelCnnGroup& q = p.group[g];
      q.out[l] = at;
      at += pixelcnn_packed(s, q.feature_end, q.feature_end - q.feature, 1);
    }
    p.layer[l] = at;
  }
  p.weights = p.layer[0] + (s.layers - 1) * p.layer[1];
  for (int g = 0; g < s.groups; ++g) {
    PixelCnnGroup& q = p.group[g];
    q.head1 = p.weights;
    q.head2 = q.head1 + pixelcnn_packed(s, q.feature_end, q.hidden_end - q.hidden, 1);
    p.weights = q.head2 + pixelcnn_packed(s, q.hidden_end, q.output_end - q.output, 1);
  }
  p.image_rows = r0 + 1;
  p.rows = r + 1;
  p.image_pitch = (s.w + 2 * r0) * c;
  p.pitch = (s.w + 2 * r) * C;
  p.vertical = pixelcnn_round_up(p.image_rows * p.image_pitch, 16);
  p.state = pixelcnn_round_up(p.vertical + s.layers * p.rows * p.pitch + kSlack, 16);
  p.link_row = pixelcnn_round_up(s.layers * s.w * 2 * C + kSlack, 16);
  p.pixel = pixelcnn_round_up(s.layers * (r + 2) * C + C + s.hidden + s.outputs + kSlack, 16);
  return p;
}

struct PixelCnnKernels {
  Status (*sample)(const PixelCnn&, int threads);
  int lanes, words;  // how it wants its weights
};

// CUDA: weights with one word a panel. A block has kPixelCnnWarps warps; where a map of one pixel has fewer panels, its sums are cut
// into parts, so many for this map whatever the batch. The workspace is followed by `link_row` of each image and, where one image
// does not fit into shared memory, by its `pixel` and its parts.
constexpr int kPixelCnnCudaLanes = 32, kPixelCnnWarps = 16;
constexpr int64_t kPixelCnnShared = 60 << 10;  // bytes that any GPU has
GMK_HD int pixelcnn_parts(int64_t outputs, int64_t k) {
  const int64_t panels = (outputs + kPixelCnnCudaLanes - 1) / kPixelCnnCudaLanes, least = k / 16;
  int64_t parts = panels ? kPixelCnnWarps / panels : 1;
  if (parts > least) parts = least;
  return int(parts > 8 ? 8 : parts > 1 ? parts : 1);
}
// Of the pixel pass of an image.
[[maybe_unused]] static inline int64_t pixelcnn_scratch_cuda(const PixelCnnSizes& s, const PixelCnnPlan& p) {
  int64_t most = 0;
  const auto look = [&](int64_t outputs, int64_t k, int halves) {
    const int64_t parts = pixelcnn_parts(outputs, k), size = parts * halves * pixelcnn_round_up(outputs, 32);
    if (parts > 1 && size > most) most = size;
  };
  for (int g = 0; g < s.groups; ++g) {
    const PixelCnnGroup& q = p.group[g];
    const int64_t features = q.feature_end - q.feature;
    look(features, s.kernel0 / 2 * s.channels + g, 2);
    look(features, s.kernel / 2 * s.features + q.feature_end, 2);
    look(features, q.feature_end, 1);
    look(q.hidden_end - q.hidden, q.feature_end, 1);
    look(q.output_end - q.output, q.hidden_end, 1);
  }
  return p.pixel + pixelcnn_round_up(most, 16);
}
[[maybe_unused]] static inline int64_t pixelcnn_workspace_cuda(const PixelCnnSizes& s) {
  const PixelCnnPlan p = pixelcnn_plan(s);
  const int64_t scratch = pixelcnn_scratch_cuda(s, p);
  return s.n * (p.state + p.link_row + (scratch * int64_t(sizeof(float)) > kPixelCnnShared ? scratch : 0));
}
Status pixelcnn_sample_cuda(const PixelCnn&, int device, void* stream);

}  // namespace gmk

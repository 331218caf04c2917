// Convolution over a list of live taps, "same" padding, stride 1:
//   z[b, o, p] = bias[o] + sum over live taps t, i of weight[o, i, t] x[b, i, p + offset(t)],   x = 0 outside the image
//   offset(t) = ((t / kw - kh / 2) dh, (t % kw - kw / 2) dw)
// and cond[b, o] or cond[b, o, p] added where there is one. A tap that is not in the list is never read and never multiplied.
// What leaves the kernel, f being tanh, or the identity:
//   kPlain         out[b, o, p] = z + residual[b, o, p]                                        c_out channels
//   kGate          out[b, o, p] = f(z[o]) sigmoid(z[o + c_out / 2]) + residual[b, o, p]        c_out / 2 channels
//   kGateGradient  out = d(kGate)/dz * grad, z computed again                                  c_out channels
// The gradient for x is the same convolution of grad with offsets negated and the channels of weight exchanged; the gradient
// for weight is weight[o, i, t] = sum over b, p of grad[b, o, p] x[b, i, p + offset(t)], 0 for every other tap.
#pragma once
#include "core/error.h"
#include "core/dtype.h"

namespace gmk {

constexpr int kMaxTaps = 512;

enum ConvGate : int { kPlain = 0, kGate = 1, kGateGradient = 2 };

struct Taps {
  int kh, kw, dh, dw;       // kernel size, dilation
  int sign;                 // 1, or -1: offsets negated
  int count;                // live taps
  int32_t index[kMaxTaps];  // ky * kw + kx; dx ascends within a row; weights of neighbours in the list may be added up
};
GMK_HD int64_t tap_dy(const Taps& t, int i) { return int64_t(t.sign) * (t.index[i] / t.kw - t.kh / 2) * t.dh; }
GMK_HD int64_t tap_dx(const Taps& t, int i) { return int64_t(t.sign) * (t.index[i] % t.kw - t.kw / 2) * t.dw; }

// Tensors are [b, c, h, w]; nhwc says that one is stored as [b, h, w, c].
struct MaskedConv {
  void* out;
  void* z;               // kGate: also out, what enters the gate, c_out channels in the format of out; or nullptr
  void* workspace;       // packed weight; CUDA: ops/masked_conv.py says how large; CPU: `packed_size`, or nullptr
  const void* x;         // c_in channels
  const void* weight;    // element (o, i, t) at o * weight_out + i * weight_in + t
  const void* bias;      // [c_out], or nullptr
  const void* cond;      // [b, c_out], or where cond_map [b, c_out, h, w], or nullptr
  const void* residual;  // as out, or nullptr; not for kGateGradient
  const void* grad;      // kGateGradient: c_out / 2 channels
  int64_t b, c_in, c_out, h, w;
  int64_t weight_out, weight_in;
  bool x_nhwc, out_nhwc, grad_nhwc, cond_nhwc, residual_nhwc;
  bool cond_map;
  bool identity;  // f
  bool packed;    // CPU: workspace holds weight and bias of an earlier call like this one
  int gate;       // ConvGate
  int dtype;      // of every tensor; sums of the half types are float32
  int64_t workspace_size;
  Taps taps;
};

struct MaskedConvWeight {
  void* weight;      // out: [c_out, c_in, kh, kw]
  void* bias;        // out: [c_out], or nullptr
  void* workspace;   // CUDA: [groups, taps.count * c_in + 1, c_out], float64 or float32; the CPU allocates its own
  const void* grad;  // c_out channels
  const void* x;     // c_in channels
  int64_t b, c_in, c_out, h, w;
  int64_t groups;  // CUDA: parts of the sum over pixels, added in order
  bool grad_nhwc, x_nhwc;
  int dtype;
  Taps taps;
};

struct MaskedConvKernels {
  Status (*forward)(const MaskedConv&, int threads);
  int64_t (*packed_size)(const MaskedConv&, int threads);  // bytes; needs sizes, taps, gate and dtype, no tensor
};
struct MaskedConvWeightKernels {
  Status (*backward_weight)(const MaskedConvWeight&, int threads);
};

Status masked_conv2d_cuda(const MaskedConv&, int device, void* stream);
Status masked_conv2d_backward_weight_cuda(const MaskedConvWeight&, int device, void* stream);

}  // namespace gmk

// The gradient of a gate, from what entered it: z has rows of 2 n numbers, halves a and b, f is tanh or the identity;
//   out[:n] = grad f'(a) sigmoid(b),   out[n:] = grad f(a) sigmoid(b) (1 - sigmoid(b))
// A row is a pixel in [b, h, w, c] (n channels), an image in [b, c, h, w] (n channels times pixels).
#pragma once
#include "core/dtype.h"
#include "core/error.h"

namespace gmk {

struct GateGradient {
  void* out;         // [rows, 2 n]
  const void* grad;  // [rows, n]
  const void* z;     // [rows, 2 n]
  int64_t rows, n;
  bool identity;  // f
  int dtype;      // of every tensor; the half types are computed in float32
};

struct GateKernels {
  Status (*backward)(const GateGradient&, int threads);
};
Status gate_backward_cuda(const GateGradient&, int device, void* stream);

}  // namespace gmk

#include <pybind11/stl.h>

#include <vector>

#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "masked_conv/gate.h"
#include "masked_conv/masked_conv.h"

namespace gmk {

GMK_ISA_TABLES(MaskedConvKernels, masked_conv_kernels)
GMK_ISA_TABLES(MaskedConvWeightKernels, masked_conv_weight_kernels)
GMK_ISA_TABLES(GateKernels, gate_kernels)

using Ints = std::vector<std::int64_t>;

// kernel = (kh, kw, dh, dw)
static Taps taps_of(const Ints& index, const Ints& kernel, bool negated) {
  Taps t{};
  if (kernel.at(0) > 0x7fffffff / kernel.at(1)) throw std::invalid_argument("a kernel of more than 2^31 weights");
  t.kh = int(kernel.at(0));
  t.kw = int(kernel.at(1));
  t.dh = int(kernel.at(2));
  t.dw = int(kernel.at(3));
  t.sign = negated ? -1 : 1;
  t.count = int(index.size());
  if (index.size() > size_t(kMaxTaps)) throw std::invalid_argument("more live taps than a kernel takes");
  for (int i = 0; i < t.count; ++i) {
    const std::int64_t tap = index[size_t(negated ? t.count - 1 - i : i)];
    if (tap < 0 || tap >= std::int64_t(t.kh) * t.kw) throw std::invalid_argument("a tap outside the kernel");
    t.index[i] = std::int32_t(tap);
  }
  return t;
}

// size = (b, c_in, c_out, h, w)
template <class A>
static void set_sizes(A& a, const Ints& size) {
  a.b = size.at(0);
  a.c_in = size.at(1);
  a.c_out = size.at(2);
  a.h = size.at(3);
  a.w = size.at(4);
}

// What decides how a weight is packed.
static MaskedConv sizes_of(const Ints& size, const Ints& taps, const Ints& kernel, bool transposed, int gate,
                           int dtype) {
  MaskedConv a{};
  set_sizes(a, size);
  a.taps = taps_of(taps, kernel, transposed);
  a.gate = gate;
  a.dtype = dtype;
  return a;
}

static MaskedConv masked_conv2d(Address out, Address z, Address workspace, Address x, Address weight, Address bias,
                                Address cond, Address residual, Address grad, const Ints& size, const Ints& taps,
                                const Ints& kernel, bool transposed, const Ints& nhwc, int gate, bool identity,
                                bool cond_map, int dtype, std::int64_t workspace_size, bool packed) {
  MaskedConv a = sizes_of(size, taps, kernel, transposed, gate, dtype);
  const std::int64_t area = std::int64_t(a.taps.kh) * a.taps.kw, pixels = a.b * a.h * a.w;
  a.weight_out = transposed ? area : a.c_in * area;
  a.weight_in = transposed ? a.c_out * area : area;
  const std::int64_t gated = a.c_out / 2;
  a.out = pointer(out, pixels * (gate == kGate ? gated : a.c_out), "out");
  a.z = optional_pointer(z);
  a.workspace = pointer(workspace, workspace_size, "workspace");
  a.workspace_size = workspace_size;
  a.packed = packed;
  a.x = pointer(x, pixels * a.c_in, "x");
  a.weight = pointer(weight, a.c_in * a.c_out * area, "weight");
  a.bias = optional_pointer(bias);
  a.cond = optional_pointer(cond);
  a.residual = optional_pointer(residual);
  a.grad = pointer(grad, gate == kGateGradient ? pixels * gated : 0, "grad");
  a.out_nhwc = nhwc.at(0);
  a.x_nhwc = nhwc.at(1);
  a.grad_nhwc = nhwc.at(2);
  a.cond_nhwc = nhwc.at(3);
  a.residual_nhwc = nhwc.at(4);
  a.cond_map = cond_map;
  a.identity = identity;
  return a;
}

static MaskedConvWeight masked_conv2d_backward_weight(Address weight, Address bias, Address workspace, Address grad,
                                                      Address x, const Ints& size, const Ints& taps, const Ints& kernel,
                                                      std::int64_t groups, const Ints& nhwc, int dtype) {
  MaskedConvWeight a{};
  set_sizes(a, size);
  a.taps = taps_of(taps, kernel, false);
  a.weight = pointer(weight, a.c_in * a.c_out * a.taps.kh * a.taps.kw, "weight");
  a.bias = optional_pointer(bias);
  a.workspace = optional_pointer(workspace);
  a.grad = pointer(grad, a.b * a.c_out * a.h * a.w, "grad");
  a.x = pointer(x, a.b * a.c_in * a.h * a.w, "x");
  a.groups = groups;
  a.grad_nhwc = nhwc.at(0);
  a.x_nhwc = nhwc.at(1);
  a.dtype = dtype;
  return a;
}

static GateGradient gate_backward(Address out, Address grad, Address z, std::int64_t rows, std::int64_t n,
                                  bool identity, int dtype) {
  GateGradient a{};
  a.out = pointer(out, 2 * rows * n, "out");
  a.grad = pointer(grad, rows * n, "grad");
  a.z = pointer(z, 2 * rows * n, "z");
  a.rows = rows;
  a.n = n;
  a.identity = identity;
  a.dtype = dtype;
  return a;
}

#ifndef GMK_SIMT
// Bytes of the packed weight of such a call on the CPU.
static std::int64_t packed_size(const Ints& size, const Ints& taps, const Ints& kernel, bool transposed, int gate,
                                int dtype, int threads) {
  return masked_conv_kernels().packed_size(sizes_of(size, taps, kernel, transposed, gate, dtype), threads);
}
#endif

void bind_masked_conv(py::module_& m) {
  bind_op(m, "masked_conv2d", masked_conv2d, GMK_CPU(masked_conv_kernels().forward), GMK_CUDA(masked_conv2d_cuda));
  bind_op(m, "masked_conv2d_backward_weight", masked_conv2d_backward_weight,
          GMK_CPU(masked_conv_weight_kernels().backward_weight), GMK_CUDA(masked_conv2d_backward_weight_cuda));
#ifndef GMK_SIMT
  m.def("masked_conv2d_packed_size", packed_size);
#endif
  bind_op(m, "gate_backward", gate_backward, GMK_CPU(gate_kernels().backward), GMK_CUDA(gate_backward_cuda));
}

}  // namespace gmk

// One thread an element of grad, neighbours at neighbouring addresses. Bound: memory, three reads and two writes.
#include "cuda/real.cuh"
#include "masked_conv/gate.h"

namespace gmk {
namespace {

// 4 blocks: without a word of them ptxas spills around a division on sm_80.
template <class T>
__global__ void __launch_bounds__(256, 4) gate_backward_kernel(GateGradient a) {
  using R = typename Real<T>::type;
  const T* const grad = static_cast<const T*>(a.grad);
  const T* const z = static_cast<const T*>(a.z);
  T* const out = static_cast<T*>(a.out);
  const int64_t all = a.rows * a.n;
  for (int64_t e = blockIdx.x * int64_t(256) + threadIdx.x; e < all; e += int64_t(gridDim.x) * 256) {
    const int64_t first = e + e / a.n * a.n, second = first + a.n;
    const R one(1), g = Real<T>::from(grad[e]), from = Real<T>::from(z[first]);
    const R s = one / (one + exp(-Real<T>::from(z[second]))), f = a.identity ? from : tanh(from);
    out[first] = Real<T>::to(a.identity ? g * s : g * s * ((one - f) * (one + f)));
    out[second] = Real<T>::to(g * f * (s * (one - s)));
  }
}

template <class T>
Status backward(const GateGradient& a, void* stream) {
  return GMK_LAUNCH((gate_backward_kernel<T>), grid_for(a.rows * a.n, 256), 256, 0, stream, a);
}

}  // namespace

Status gate_backward_cuda(const GateGradient& a, int device, void* stream) {
  if (a.rows <= 0 || a.n <= 0) return kOk;
  const DeviceGuard guard(device);
  return by_dtype(a.dtype, [&](auto type) { return backward<typename decltype(type)::of>(a, stream); });
}

}  // namespace gmk

// Bound: memory in [b, c, h, w] without many rows, two exponentials a number otherwise.
#include "core/arithmetic.h"
#include "core/simd_math.h"
#include "masked_conv/gate.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

// Elements [from, to) of all rows' n.
template <class T>
void piece(const GateGradient& a, int64_t from, int64_t to) {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  constexpr int64_t lanes = simd<real>::n;
  const V one = splat(real(1));
  while (from < to) {
    const int64_t row = from / a.n, first = from % a.n, count = a.n - first < to - from ? a.n - first : to - from;
    const T* const grad = static_cast<const T*>(a.grad) + row * a.n + first;
    const T* const z = static_cast<const T*>(a.z) + row * 2 * a.n + first;
    T* const out = static_cast<T*>(a.out) + row * 2 * a.n + first;
    const auto word = [&](int64_t i, auto... some) {
      const V f = get(z + i, some...), s = vsigmoid(V(get(z + a.n + i, some...))), g = get(grad + i, some...);
      if (a.identity) {
        put(out + i, V(g * s), some...);
        put(out + a.n + i, V(g * f * (s * (one - s))), some...);
      } else {
        const V t = vtanh(f);
        put(out + i, V(g * s * ((one - t) * (one + t))), some...);
        put(out + a.n + i, V(g * t * (s * (one - s))), some...);
      }
    };
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) word(i);
    if (i < count) word(i, count - i);
    from += count;
  }
}

Status backward(const GateGradient& a, int threads) {
  const int64_t all = a.rows * a.n;
  if (all <= 0) return kOk;
  constexpr int64_t kPiece = 8192;
  threads = team(all * 2, threads);
  return by_dtype(a.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < all; from += kPiece)
      piece<typename decltype(type)::of>(a, from, from + kPiece < all ? from + kPiece : all);
    return kOk;
  });
}

}  // namespace

extern const GateKernels gate_kernels;
const GateKernels gate_kernels = {backward};

}  // namespace GMK_ISA_NS
}  // namespace gmk

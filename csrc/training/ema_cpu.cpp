// Bound: memory, two reads and one write of each element. A thread takes one piece of the whole list, so that 600 tensors of
// 200 elements cost as much as one of 120 000. Each element is computed alone: pieces do not change the result.
#include "core/arithmetic.h"
#include "training/ema.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class E, class P>
GMK_INLINE void average(E* ema, const P* value, int64_t n, double decay) {
  using real = typename Arithmetic<E>::real;
  using V = typename simd<real>::v;
  constexpr int64_t lanes = simd<real>::n;
  const bool near = decay > 0.5;
  const V slope = splat(near ? real(1 - decay) : real(-decay));
  const auto word = [&](int64_t i, auto... count) {
    const V e = get(ema + i, count...), v = get(value + i, count...);
    put(ema + i, madd(slope, v - e, near ? e : v), count...);
  };
  const auto copy = [&](int64_t i, auto... count) { put(ema + i, V(get(value + i, count...)), count...); };
  const auto all = [&](const auto& f) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) f(i);
    if (i < n) f(i, n - i);
  };
  if (decay == 0) {
    all(copy);
  } else {
    all(word);
  }
}

template <class E, class P>
GMK_INLINE void average(const EmaPair& p, int64_t from, int64_t n, double decay) {
  average(static_cast<E*>(p.ema) + from, static_cast<const P*>(p.value) + from, n, decay);
}
void average(const EmaPair& p, int64_t from, int64_t n, double decay) {
  switch (p.ema_type) {
    case kFloat64:
      return average<double, double>(p, from, n, decay);
    case kBFloat16:
      return average<bf16, bf16>(p, from, n, decay);
    case kFloat16:
      return average<f16, f16>(p, from, n, decay);
  }
  switch (p.value_type) {
    case kBFloat16:
      return average<float, bf16>(p, from, n, decay);
    case kFloat16:
      return average<float, f16>(p, from, n, decay);
  }
  average<float, float>(p, from, n, decay);
}

Status update(const EmaUpdate& a, int threads) {
  constexpr int64_t kLine = 64;  // pieces begin at multiples: no two threads write one cache line of a tensor
  int64_t total = 0;
  for (int64_t i = 0; i < a.count; ++i) total += a.pairs[i].numel;
  if (total <= 0 || a.decay == 1) return kOk;
  threads = team(total, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int piece = 0; piece < threads; ++piece) {
    const auto cut = [&](int at) {
      return at == threads ? total : (total / threads * at + total % threads * at / threads) / kLine * kLine;
    };
    const int64_t begin = cut(piece), end = cut(piece + 1);
    int64_t start = 0;  // of the pair, in elements of the list
    for (int64_t i = 0; i < a.count && start < end; start += a.pairs[i++].numel) {
      const EmaPair& p = a.pairs[i];
      const int64_t from = begin > start ? begin - start : 0, to = end - start < p.numel ? end - start : p.numel;
      if (from < to) average(p, from, to - from, a.decay);
    }
  }
  return kOk;
}

}  // namespace

extern const EmaKernels ema_kernels;
const EmaKernels ema_kernels = {update};

}  // namespace GMK_ISA_NS
}  // namespace gmk

// Pairs go to the kernel as its argument, so no table is written to device memory and a launch may be captured in a graph.
// One block makes kBlockElements of one pair. Bound: memory, two reads and one write of each element.
#include "cuda/real.cuh"
#include "training/ema.h"

namespace gmk {
namespace {

constexpr int kPairs = 64;  // of a launch: 2.3 KiB of the 4 KiB that arguments may have
constexpr int kThreads = 256, kGroup = 4, kRounds = 8;
constexpr int64_t kBlockElements = kThreads * kGroup * kRounds;

struct EmaLaunch {
  EmaPair pairs[kPairs];
  int64_t end[kPairs];  // blocks of the pairs up to and with this one
  double decay;
  int count;
};

template <class E, class P>
GMK_DEV void average(E* ema, const P* value, int64_t n, double decay) {
  using R = typename Real<E>::type;
  const bool near = decay > 0.5, packed = aligned(ema, kGroup * sizeof(E)) && aligned(value, kGroup * sizeof(P));
  const R slope = near ? R(1 - decay) : R(-decay);
  const auto one = [&](E e, P v) {
    const R from = Real<E>::from(e), to = R(Real<P>::from(v));
    return Real<E>::to(decay == 0 ? to : fma(slope, to - from, near ? from : to));
  };
  for (int64_t i = threadIdx.x * kGroup; i < n; i += kThreads * kGroup) {
    if (packed && i + kGroup <= n && sizeof(E) * kGroup <= 16) {
      constexpr int group = sizeof(E) * kGroup <= 16 ? kGroup : 1;
      Pack<E, group> e = load_pack<E, group>(ema + i);
      const Pack<P, group> v = load_pack<P, group>(value + i);
#pragma unroll
      for (int j = 0; j < group; ++j) e.v[j] = one(e.v[j], v.v[j]);
      store_pack(ema + i, e);
    } else {
      for (int j = 0; j < kGroup && i + j < n; ++j) ema[i + j] = one(ema[i + j], value[i + j]);
    }
  }
}

template <class E, class P>
GMK_DEV void average(const EmaPair& p, int64_t from, int64_t n, double decay) {
  average(static_cast<E*>(p.ema) + from, static_cast<const P*>(p.value) + from, n, decay);
}

__global__ void __launch_bounds__(kThreads) ema_update_kernel(EmaLaunch a) {
  const int64_t block = blockIdx.x;
  int low = 0, high = a.count - 1;  // the first pair that ends behind this block
  while (low < high) {
    const int middle = (low + high) / 2;
    if (a.end[middle] > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const EmaPair& p = a.pairs[low];
  const int64_t first = (block - (low ? a.end[low - 1] : 0)) * kBlockElements, rest = p.numel - first;
  const int64_t n = rest < kBlockElements ? rest : kBlockElements;
  if (p.ema_type == kFloat64) average<double, double>(p, first, n, a.decay);
  if (p.ema_type == kBFloat16) average<bf16, bf16>(p, first, n, a.decay);
  if (p.ema_type == kFloat16) average<f16, f16>(p, first, n, a.decay);
  if (p.ema_type != kFloat32) return;
  if (p.value_type == kFloat32) average<float, float>(p, first, n, a.decay);
  if (p.value_type == kBFloat16) average<float, bf16>(p, first, n, a.decay);
  if (p.value_type == kFloat16) average<float, f16>(p, first, n, a.decay);
}

}  // namespace

Status ema_update_cuda(const EmaUpdate& a, int device, void* stream) {
  if (a.decay == 1) return kOk;
  const DeviceGuard guard(device);
  EmaLaunch launch{};
  launch.decay = a.decay;
  const auto run = [&]() -> Status {
    if (!launch.count) return kOk;
    const unsigned blocks = unsigned(launch.end[launch.count - 1]);
    const Status status = GMK_LAUNCH((ema_update_kernel), blocks, kThreads, 0, stream, launch);
    launch.count = 0;
    return status;
  };
  for (int64_t i = 0; i < a.count; ++i) {
    constexpr int64_t kMost = (int64_t(1) << 30) * kBlockElements;  // of one launch: the grid has 2^31 - 1 blocks
    EmaPair p = a.pairs[i];
    if (p.numel > kMost) return "a tensor of more than 2^43 elements";
    if (p.numel <= 0) continue;
    const int64_t blocks = (p.numel + kBlockElements - 1) / kBlockElements;
    const int64_t before = launch.count ? launch.end[launch.count - 1] : 0;
    if (launch.count == kPairs || before + blocks > (int64_t(1) << 31) - 1) {
      if (const Status status = run()) return status;
    }
    launch.pairs[launch.count] = p;
    launch.end[launch.count] = (launch.count ? launch.end[launch.count - 1] : 0) + blocks;
    ++launch.count;
  }
  return run();
}

}  // namespace gmk

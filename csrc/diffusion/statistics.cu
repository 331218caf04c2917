// One block a sample. A quantile is found digit by digit (11 bits or less): each pass counts, in shared memory, the digits
// of the numbers whose digits before are those already known; integers, so the order of counting does not matter. Bound:
// memory (mostly L2), three passes for float32 and six for float64, and one more where the quantile lies between two numbers.
#include "cuda/groups.cuh"
#include "diffusion/diffusion.h"
#include "diffusion/statistics.h"

namespace gmk {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

GMK_DEV uint32_t bits_of(float x) { return float_bits(x); }
GMK_DEV uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
GMK_DEV float number_of(uint32_t key) { return bits_float(key); }
GMK_DEV double number_of(uint64_t key) {
  double x;
  memcpy(&x, &key, sizeof x);
  return x;
}

// |A x + B m| of one sample, as bits.
template <class T>
struct Magnitude {
  using R = typename Real<T>::type;
  R a, b, guidance;
  const T *x, *m, *u;

  GMK_DEV Magnitude(const StepStatistics& s, int64_t sample, int64_t n) {
    const int64_t row = s.coefficient_rows > 1 ? sample * kCoefficients : 0;
    const auto coefficient = [&](int64_t i) {
      return s.wide ? R(static_cast<const double*>(s.coefficients)[row + i])
                    : R(static_cast<const float*>(s.coefficients)[row + i]);
    };
    a = coefficient(kA);
    b = coefficient(kB);
    guidance = R(s.guidance);
    x = static_cast<const T*>(s.x) + sample * n;
    m = static_cast<const T*>(s.model_output) + sample * n;
    u = s.uncond ? static_cast<const T*>(s.uncond) + sample * n : nullptr;
  }
  GMK_DEV R operator()(int64_t i) const {
    R v = Real<T>::from(m[i]);
    if (u) {
      const R w = Real<T>::from(u[i]);
      v = w + guidance * (v - w);
    }
    const R y = term(a, Real<T>::from(x[i])) + term(b, v);
    return fabs(y);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) quantile_kernel(StepStatistics s) {
  using R = typename Real<T>::type;
  using Key = decltype(bits_of(R()));
  GMK_DYN_SHARED(memory);
  unsigned long long* const counts = reinterpret_cast<unsigned long long*>(memory);
  GMK_SHARED(found, Key[2]);      // the digits known so far; the least number above
  GMK_SHARED(ranks, int64_t[2]);  // numbers below those with these digits, and not above them
  GMK_SHARED(nan, int);
  const int64_t n = s.numel / s.samples;
  const QuantilePlace place = quantile_place(n, s.amount);
  for (int64_t sample = blockIdx.x; sample < s.samples; sample += gridDim.x) {
    const Magnitude<T> magnitude(s, sample, n);
    if (threadIdx.x == 0) {
      found[0] = 0;
      found[1] = ~Key(0);
      ranks[0] = ranks[1] = 0;
      nan = 0;
    }
    int shift = RadixDigits<Key>::kBits;
#pragma unroll 1
    for (int digit = 0; digit < RadixDigits<Key>::kCount; ++digit) {
      const int width = radix_width<Key>(digit), above = shift, bins = 1 << width;
      shift -= width;
      __syncthreads();
      for (int bin = threadIdx.x; bin < bins; bin += kThreads) counts[bin] = 0;
      __syncthreads();
      const Key known = found[0];
      bool bad = false;
      for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        const R y = magnitude(i);
        bad = bad || y != y;
        const Key key = bits_of(y);
        if (digit == 0 || key >> above == known) atomicAdd(&counts[(key >> shift) & Key(bins - 1)], 1ull);
      }
      if (bad) nan = 1;
      __syncthreads();
      if (threadIdx.x == 0) {
        int bin = 0;
        int64_t below = ranks[0];
        while (bin < bins - 1 && below + int64_t(counts[bin]) <= place.below) below += int64_t(counts[bin++]);
        ranks[0] = below;
        ranks[1] = below + int64_t(counts[bin]);
        found[0] = Key(known << width) | Key(bin);
      }
    }
    __syncthreads();
    const Key key = found[0];
    const bool beyond = place.weight > 0 && place.below + 1 >= ranks[1];
    if (beyond) {
      Key least = ~Key(0);
      for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        const Key other = bits_of(magnitude(i));
        if (other > key && other < least) least = other;
      }
      // One at a time in each warp: 64-bit minima in shared memory are not on every GPU.
      for (int o = 16; o; o >>= 1) {
        const Key other = __shfl_xor_sync(kFullWarp, least, o);
        least = other < least ? other : least;
      }
      if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = least;
      __syncthreads();
      if (threadIdx.x == 0)
        for (int w = 0; w < kWarps; ++w) found[1] = Key(counts[w]) < found[1] ? Key(counts[w]) : found[1];
    }
    if (threadIdx.x == 0) {
      const R first = number_of(key), second = beyond ? number_of(found[1]) : first;
      const R q = first == second ? first : first + R(place.weight) * (second - first);
      static_cast<R*>(s.out)[sample] = nan ? R(NAN) : q;
    }
    __syncthreads();
  }
}

// n - 1 times the variance.
GMK_DEV double rest_of(double sum, double squares, int64_t n) {
  const double rest = squares - sum * (sum / double(n));
  return n > 1 ? rest < 0 ? 0 : rest : NAN;
}

template <class T>
__global__ void __launch_bounds__(kThreads) guidance_rescale_kernel(StepStatistics s) {
  using R = typename Real<T>::type;
  GMK_SHARED(parts, double[kWarps]);
  const int64_t n = s.numel / s.samples;
  const R scale = R(s.guidance);
  for (int64_t sample = blockIdx.x; sample < s.samples; sample += gridDim.x) {
    const T* const m = static_cast<const T*>(s.model_output) + sample * n;
    const T* const u = static_cast<const T*>(s.uncond) + sample * n;
    const R m0 = Real<T>::from(m[0]), u0 = Real<T>::from(u[0]), g0 = u0 + scale * (m0 - u0);
    double sum[2] = {}, squares[2] = {};
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const R a = Real<T>::from(m[i]), b = Real<T>::from(u[i]);
      const double by[2] = {double(a - m0), double(b + scale * (a - b) - g0)};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        sum[k] += by[k];
        squares[k] += by[k] * by[k];
      }
    }
    const double before = rest_of(block_sum<kWarps>(sum[0], parts), block_sum<kWarps>(squares[0], parts), n);
    const double after = rest_of(block_sum<kWarps>(sum[1], parts), block_sum<kWarps>(squares[1], parts), n);
    if (threadIdx.x == 0) static_cast<R*>(s.out)[sample] = R(s.amount * sqrt(before / after) + (1 - s.amount));
  }
}

template <class T>
Status launch(const StepStatistics& s, void* stream) {
  const unsigned grid = grid_for(s.samples, 1);
  if (s.statistic == kQuantile) return GMK_LAUNCH((quantile_kernel<T>), grid, kThreads, kRadixBins * 8, stream, s);
  return GMK_LAUNCH((guidance_rescale_kernel<T>), grid, kThreads, 0, stream, s);
}

}  // namespace

Status step_statistics_cuda(const StepStatistics& s, int device, void* stream) {
  if (s.numel <= 0) return kOk;
  const DeviceGuard guard(device);
  return by_dtype(s.dtype, [&](auto type) { return launch<typename decltype(type)::of>(s, stream); });
}

}  // namespace gmk

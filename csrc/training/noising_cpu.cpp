#include "training/noising_run.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

struct Nothing {
  GMK_HD_MEMBER void add(const Nothing&) {}
};

template <class real>
GMK_INLINE NoisingRow<real> row_of(const NoiseSchedule& s, int64_t sample, int target) {
  if constexpr (sizeof(real) == 8)
    if (s.wide) return noising_row<real, double>(s, sample, target);
  return noising_row<real, float>(s, sample, target);
}
// x where c is not 0, else 0. Not kMasked: no c is 0, or all x are finite.
template <bool kMasked, class V>
GMK_INLINE V hidden(V x, V c) {
  using I = decltype(x != x);
  return kMasked ? (V)((I)x & (I)(c != V{})) : x;
}
// The first `count` lanes, the others 0.
template <class V>
GMK_INLINE V first_lanes(V x) {
  return x;
}
template <class V>
GMK_INLINE V first_lanes(V x, int64_t count) {
  V r{};
  for (int64_t l = 0; l < count; ++l) r[l] = x[l];
  return r;
}

// add_noise ------------------------------------------------------------------------------------------------------------

// What a target is made of.
enum Form : int { kNothing, kOfNoise, kOfData, kOfBoth };
inline Form form_of(int target) {
  return target == kNoTarget                      ? kNothing
         : target == kEpsilon || target == kScore ? kOfNoise
         : target == kX0                          ? kOfData
                                                  : kOfBoth;
}

template <class T, Form kForm>
struct AddNoiseOp {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using State = Nothing;
  static constexpr int kColumns = kForm == kNothing ? 2 : 4;
  static constexpr bool kNoise = true;
  T *xt, *target;
  const T* x0;
  const NoiseSchedule* schedule;
  int kind;

  GMK_HD_MEMBER void row(int64_t sample, real* c) const {
    const NoisingRow<real> r = row_of<real>(*schedule, sample, kind);
    c[0] = r.alpha;
    c[1] = r.sigma;
    if (kForm != kNothing) {
      c[2] = r.p;
      c[3] = r.q;
    }
  }
  GMK_HD_MEMBER static bool hides_data(const real* c) { return c[0] == 0 || (kForm == kOfBoth && c[2] == 0); }
  template <bool kMasked, class C, class... Count>
  GMK_HD_MEMBER void word(int64_t at, V z, const C& c, State&, Count... count) const {
    const V x = get(x0 + at, count...), alpha = c(0), sigma = c(1);
    put(xt + at, madd(sigma, hidden<kMasked>(z, sigma), alpha * hidden<kMasked>(x, alpha)), count...);
    V y{};
    if constexpr (kForm == kOfNoise || kForm == kOfBoth) y = c(3) * hidden<kMasked>(z, c(3));
    if constexpr (kForm == kOfData || kForm == kOfBoth) y = madd(c(2), hidden<kMasked>(x, c(2)), y);
    if constexpr (kForm != kNothing) put(target + at, y, count...);
  }
};

template <class T>
Status add_noise_of(const AddNoise& a, int threads) {
  const auto run = [&](auto op) {
    run_noised<T>(op, a.noise, a.numel, a.schedule.samples, threads, [](int64_t, Nothing&) {});
  };
  T *const xt = static_cast<T*>(a.xt), *const target = static_cast<T*>(a.target);
  const T* const x0 = static_cast<const T*>(a.x0);
  switch (target ? form_of(a.target_kind) : kNothing) {
    case kNothing:
      run(AddNoiseOp<T, kNothing>{xt, target, x0, &a.schedule, a.target_kind});
      break;
    case kOfNoise:
      run(AddNoiseOp<T, kOfNoise>{xt, target, x0, &a.schedule, a.target_kind});
      break;
    case kOfData:
      run(AddNoiseOp<T, kOfData>{xt, target, x0, &a.schedule, a.target_kind});
      break;
    case kOfBoth:
      run(AddNoiseOp<T, kOfBoth>{xt, target, x0, &a.schedule, a.target_kind});
      break;
  }
  return kOk;
}

// denoising_loss -------------------------------------------------------------------------------------------------------

template <class real>
struct Sum {
  typename simd<real>::v lanes{};
  double total = 0;
  GMK_HD_MEMBER void add(const Sum& o) { total += double(hsum(o.lanes)); }
};

template <class T, bool kData, bool kGrad>
struct LossOp {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using State = Sum<real>;
  static constexpr int kColumns = 4;
  static constexpr bool kNoise = true;
  T* grad;
  const T *pred, *x0;
  const DenoisingLoss* a;

  GMK_HD_MEMBER void row(int64_t sample, real* c) const {
    const NoisingRow<real> r = row_of<real>(a->schedule, sample, a->target_kind);
    real w = 1;
    if (a->weight_kind == kMinSnr) w = min_snr_weight(r.alpha, r.sigma, real(a->gamma), a->target_kind);
    if (a->weight_kind == kGivenWeight)
      w = a->schedule.wide ? real(static_cast<const double*>(a->weight)[sample])
                           : real(static_cast<const float*>(a->weight)[sample]);
    c[0] = -r.p;
    c[1] = -r.q;
    c[2] = w;
    c[3] = real(2.0 * double(w) / double(a->numel));
  }
  GMK_HD_MEMBER static bool hides_data(const real* c) { return kData && c[0] == 0; }
  template <bool kMasked, class C, class... Count>
  GMK_HD_MEMBER void word(int64_t at, V z, const C& c, State& state, Count... count) const {
    V d = madd(c(1), hidden<kMasked>(z, c(1)), get(pred + at, count...));
    if constexpr (kData) d = madd(c(0), hidden<kMasked>(get(x0 + at, count...), c(0)), d);
    d = first_lanes(d, count...);
    state.lanes = madd(first_lanes(c(2) * d, count...), d, state.lanes);  // lanes behind the last have no c
    if constexpr (kGrad) put(grad + at, c(3) * d, count...);
  }
};

template <class T>
Status denoising_loss_of(const DenoisingLoss& a, int threads) {
  using real = typename Arithmetic<T>::real;
  const int64_t rows = a.noise.seed_rows, size = a.numel / rows, runs = (size + kNoisingPart - 1) / kNoisingPart;
  const auto run = [&](auto op) {
    run_noised<T>(op, a.noise, a.numel, a.schedule.samples, threads,
                  [&](int64_t part, const Sum<real>& sum) { a.partials[part] = sum.total; });
  };
  T* const grad = static_cast<T*>(a.grad);
  const T *const pred = static_cast<const T*>(a.pred), *const x0 = static_cast<const T*>(a.x0);
  if (x0 && grad) run(LossOp<T, true, true>{grad, pred, x0, &a});
  if (x0 && !grad) run(LossOp<T, true, false>{grad, pred, x0, &a});
  if (!x0 && grad) run(LossOp<T, false, true>{grad, pred, x0, &a});
  if (!x0 && !grad) run(LossOp<T, false, false>{grad, pred, x0, &a});
  double total = 0;
  for (int64_t part = 0; part < rows * runs; ++part) total += a.partials[part];
  *static_cast<real*>(a.loss) = real(total / double(a.numel));
  return kOk;
}

// flow_pair ------------------------------------------------------------------------------------------------------------

template <class T, bool kSigma>
struct FlowOp {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using State = Nothing;
  static constexpr int kColumns = 2;
  static constexpr bool kNoise = kSigma;
  T *xt, *u;
  const T *x0, *x1;
  const FlowPair* a;
  V sigma;

  GMK_HD_MEMBER void row(int64_t sample, real* c) const {
    const real t =
        a->wide ? real(static_cast<const double*>(a->t)[sample]) : real(static_cast<const float*>(a->t)[sample]);
    c[0] = real(1) - t;
    c[1] = t;
  }
  GMK_HD_MEMBER static bool hides_data(const real*) { return false; }
  template <bool kMasked, class C, class... Count>
  GMK_HD_MEMBER void word(int64_t at, V z, const C& c, State&, Count... count) const {
    const V from = get(x0 + at, count...), to = get(x1 + at, count...);
    V x = madd(c(1), to, c(0) * from);
    if constexpr (kSigma) x = madd(sigma, z, x);
    put(xt + at, x, count...);
    put(u + at, to - from, count...);
  }
};

template <class T>
Status flow_pair_of(const FlowPair& a, int threads) {
  using real = typename Arithmetic<T>::real;
  const auto run = [&](auto op) { run_noised<T>(op, a.noise, a.numel, a.samples, threads, [](int64_t, Nothing&) {}); };
  T *const xt = static_cast<T*>(a.xt), *const u = static_cast<T*>(a.u);
  const T *const x0 = static_cast<const T*>(a.x0), *const x1 = static_cast<const T*>(a.x1);
  const auto sigma = splat(real(a.sigma));
  if (a.sigma != 0) {
    run(FlowOp<T, true>{xt, u, x0, x1, &a, sigma});
  } else {
    run(FlowOp<T, false>{xt, u, x0, x1, &a, sigma});
  }
  return kOk;
}

// ----------------------------------------------------------------------------------------------------------------------

#define GMK_ENTRY(op, Args)                                                                                \
  Status op(const Args& a, int threads) {                                                                  \
    if (a.numel <= 0) return kOk;                                                                          \
    return by_dtype(a.dtype, [&](auto type) { return op##_of<typename decltype(type)::of>(a, threads); }); \
  }
GMK_ENTRY(add_noise, AddNoise)
GMK_ENTRY(denoising_loss, DenoisingLoss)
GMK_ENTRY(flow_pair, FlowPair)
#undef GMK_ENTRY

}  // namespace

extern const NoisingKernels noising_kernels;
const NoisingKernels noising_kernels = {add_noise, denoising_loss, flow_pair};

}  // namespace GMK_ISA_NS
}  // namespace gmk

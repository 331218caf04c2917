// A job is a run of consecutive elements, kDrawnRun where there is noise, so that it stays in L1, else kRun. Inside, a
// segment is what shares one row of coefficients. What bounds it: memory bandwidth without noise, the normals with it.
#include "diffusion/diffusion.h"

#include "core/philox_simd.h"

namespace gmk { namespace GMK_ISA_NS {
namespace {

constexpr int64_t kRun = 8 * kChunk, kDrawnRun = 4 * kChunk;

// The type of arithmetic of a storage type, and moving a word of it.
template <class T>
struct Arithmetic {
  using real = float;
};
template <>
struct Arithmetic<double> {
  using real = double;
};
template <class T>
GMK_INLINE vfloat get(const T* p) {
  return load_float(p);
}
GMK_INLINE vdouble get(const double* p) { return load(p); }
template <class T>
GMK_INLINE vfloat get(const T* p, int64_t count) {
  return load_float_some(p, count);
}
GMK_INLINE vdouble get(const double* p, int64_t count) { return load_some(p, count); }
template <class T>
GMK_INLINE void put(T* p, vfloat x) {
  store_float(p, x);
}
GMK_INLINE void put(double* p, vdouble x) { store(p, x); }
template <class T>
GMK_INLINE void put(T* p, vfloat x, int64_t count) {
  store_float_some(p, x, count);
}
GMK_INLINE void put(double* p, vdouble x, int64_t count) { store_some(p, x, count); }

// One segment's streams and coefficients, in the order in which the inner loop wants them.
template <class T>
struct Segment {
  using real = typename Arithmetic<T>::real;
  const T *x, *m, *u;
  const T* h[3];  // the live history only
  const real* z;  // scaled noise: sqrt(variance) z
  T *out, *x0;
  real a, b, c0, c1, ch[3], s, guidance, low, high;
  int history;
};

// kMasked: some coefficient is 0, so its stream must be hidden. A third of the arithmetic, hence not always.
template <class T, bool kMasked, bool kGuided, bool kHistory, bool kNoise, bool kX0>
struct Body {
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using I = typename simd<real>::i;
  const Segment<T>& g;
  V a, b, c0, c1, s, guidance, low, high;
  I use_a, use_b, use_c0, use_c1;

  GMK_HD_MEMBER explicit Body(const Segment<T>& g)
      : g(g), a(splat(g.a)), b(splat(g.b)), c0(splat(g.c0)), c1(splat(g.c1)), s(splat(g.s)), guidance(splat(g.guidance)),
        low(g.low - V{}), high(g.high - V{}), use_a((I)(a != V{})), use_b((I)(b != V{})), use_c0((I)(c0 != V{})),
        use_c1((I)(c1 != V{})) {}

  GMK_HD_MEMBER static V hide(V x, I use) { return kMasked ? (V)((I)x & use) : x; }

  struct Result {
    V out, x0;
  };
  template <class... Count>
  GMK_HD_MEMBER Result compute(int64_t i, Count... count) const {
    const V x = get(g.x + i, count...);
    V m = get(g.m + i, count...);
    if (kGuided) {
      const V u = get(g.u + i, count...);
      m = madd(guidance, m - u, u);
    }
    const V x0 = vmin(high, vmax(low, madd(b, hide(m, use_b), a * hide(x, use_a))));  // NaN stays: second operand
    V out = madd(c0, hide(x0, use_c0), c1 * hide(x, use_c1));
    if (kHistory)
      for (int h = 0; h < g.history; ++h) out = madd(splat(g.ch[h]), get(g.h[h] + i, count...), out);
    if (kNoise) out = madd(s, get(g.z + i, count...), out);
    return {out, x0};
  }
  template <class... Count>
  GMK_HD_MEMBER void write(const Result& r, int64_t i, Count... count) const {
    put(g.out + i, r.out, count...);
    if (kX0) put(g.x0 + i, r.x0, count...);
  }
};

// An element is read before it is written, so out and x0 may be any of the inputs. Four words are read before the first
// is written: malloc likes to put the output 64 bytes (modulo 4096) behind an input, where every load would wait for the
// store before it.
template <class T, bool kMasked, bool kGuided, bool kHistory, bool kNoise, bool kX0>
void run_segment(const Segment<T>& g, int64_t n) {
  constexpr int64_t lanes = simd<typename Arithmetic<T>::real>::n;
  using B = Body<T, kMasked, kGuided, kHistory, kNoise, kX0>;
  const B body(g);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    typename B::Result r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) r[j] = body.compute(i + j * lanes);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) body.write(r[j], i + j * lanes);
  }
  for (; i + lanes <= n; i += lanes) body.write(body.compute(i), i);
  if (i < n) body.write(body.compute(i, n - i), i, n - i);
}
template <class T>
using Runner = void (*)(const Segment<T>&, int64_t);
template <class T>
Runner<T> runner(bool masked, bool guided, bool history, bool noise, bool x0) {
#define GMK_RUN2(...) run_segment<T, __VA_ARGS__, false>, run_segment<T, __VA_ARGS__, true>
#define GMK_RUN8(...) \
  GMK_RUN2(__VA_ARGS__, false, false), GMK_RUN2(__VA_ARGS__, false, true), GMK_RUN2(__VA_ARGS__, true, false), \
      GMK_RUN2(__VA_ARGS__, true, true)
  static const Runner<T> all[32] = {GMK_RUN8(false, false), GMK_RUN8(false, true), GMK_RUN8(true, false), GMK_RUN8(true, true)};
#undef GMK_RUN8
#undef GMK_RUN2
  return all[masked * 16 + guided * 8 + history * 4 + noise * 2 + x0];
}

// z[0, n): normals first .. first + n - 1 of a seed; first is a multiple of kChunk, z has room for whole chunks.
GMK_INLINE void draw(float* z, int64_t first, int64_t n, PhiloxAt at) {
  int64_t e = 0;
  for (; n - e > 32; e += kChunk) chunk_normals(z + e, uint64_t((first + e) / 4), at);
  for (; e < n; e += 4) normals_from(philox(uint64_t((first + e) / 4), at.step, at.stream, at.key), z + e);
}
// z sqrt(variance), in whole words: `z` has room for them.
template <class T, class real>
void scale_noise(real* z, const T* variance, int64_t n) {
  constexpr int64_t lanes = simd<real>::n;
  for (int64_t i = 0; variance && i < n; i += lanes) {
    const auto v = i + lanes <= n ? get(variance + i) : get(variance + i, n - i);
    store(z + i, load(z + i) * vsqrt(v));
  }
}

template <class T>
class Step {
 public:
  using real = typename Arithmetic<T>::real;

  explicit Step(const DiffusionStep& a) : a_(a), sample_(a.numel / a.coefficient_rows) {}

  // Elements [first, first + n) of the tensor; for drawn noise, element `count` of its seed's own count is the first.
  void operator()(int64_t first, int64_t n, int64_t count, int64_t seed_row) const {
    alignas(64) real scaled[kDrawnRun];
    alignas(64) float drawn[kDrawnRun];
    bool have_noise = false;
    for (int64_t at = first; at < first + n;) {
      const int64_t row = at / sample_, left = (row + 1) * sample_ - at, rest = first + n - at;
      const int64_t size = left < rest ? left : rest;
      Segment<T> g;
      load_row(g, row);
      g.x = stream(a_.x, at);
      g.m = stream(a_.model_output, at);
      g.u = stream(a_.uncond, at);
      g.out = const_cast<T*>(stream(a_.out, at));
      g.x0 = const_cast<T*>(stream(a_.x0, at));
      g.history = 0;
      for (int h = 0; h < 3; ++h)
        if (a_.history[h] && g.ch[h] != 0) {
          g.h[g.history] = stream(a_.history[h], at);
          g.ch[g.history++] = g.ch[h];
        }
      const bool noise = a_.noise_kind != kNoNoise && g.s != 0;
      if (noise && !have_noise) {
        have_noise = true;
        make_noise(scaled, drawn, first, n, count, seed_row);
      }
      g.z = scaled + (at - first);
      const bool masked = g.a == 0 || g.b == 0 || g.c0 == 0 || g.c1 == 0;
      runner<T>(masked, a_.uncond != nullptr, g.history > 0, noise, a_.x0 != nullptr)(g, size);
      at += size;
    }
  }

 private:
  static const T* stream(const void* p, int64_t at) { return p ? static_cast<const T*>(p) + at : nullptr; }

  void load_row(Segment<T>& g, int64_t row) const {
    const int64_t c = row * kCoefficients;
    g.a = coefficient(c + kA);
    g.b = coefficient(c + kB);
    g.c0 = coefficient(c + kC0);
    g.c1 = coefficient(c + kC1);
    g.ch[0] = coefficient(c + kC2);
    g.ch[1] = coefficient(c + kC3);
    g.ch[2] = coefficient(c + kC4);
    g.s = coefficient(c + kS);
    g.guidance = real(a_.guidance);
    g.low = real(a_.low);
    g.high = real(a_.high);
  }
  real coefficient(int64_t i) const {
    return a_.wide ? real(static_cast<const double*>(a_.coefficients)[i])
                   : real(static_cast<const float*>(a_.coefficients)[i]);
  }

  void make_noise(real* scaled, float* drawn, int64_t first, int64_t n, int64_t count, int64_t seed_row) const {
    const T* const variance = stream(a_.variance, first);
    if (a_.noise_kind == kGivenNoise) {
      const T* const z = stream(a_.noise, first);
      constexpr int64_t lanes = simd<real>::n;
      for (int64_t i = 0; i < n; i += lanes) store(scaled + i, i + lanes <= n ? get(z + i) : get(z + i, n - i));
      scale_noise(scaled, variance, n);
      return;
    }
    const uint64_t seed = a_.seeds ? uint64_t(a_.seeds[seed_row]) : a_.seed;
    float* const z = sizeof(real) == sizeof(float) ? (float*)scaled : drawn;
    draw(z, count, n, PhiloxAt{philox_key(seed), a_.step, kStreamDiffusionStep});
    if (z == drawn)
      for (int64_t i = 0; i < n; ++i) scaled[i] = real(z[i]);
    scale_noise(scaled, variance, n);
  }

  const DiffusionStep& a_;
  const int64_t sample_;  // elements that share a row of coefficients
};

template <class T>
Status run(const DiffusionStep& a, int threads) {
  const Step<T> step(a);
  const int64_t rows = a.noise_kind == kDrawnNoise ? a.seed_rows : 1, size = a.numel / rows;
  const int64_t length = a.noise_kind == kNoNoise ? kRun : kDrawnRun, runs = (size + length - 1) / length;
  threads = team(a.numel, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < rows * runs; ++job) {
    const int64_t row = job / runs, begin = job % runs * length, rest = size - begin;
    step(row * size + begin, rest < length ? rest : length, begin, row);
  }
  return kOk;
}

Status diffusion_step(const DiffusionStep& a, int threads) {
  if (a.numel <= 0) return kOk;
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<bf16>(a, threads);
    case kFloat16: return run<f16>(a, threads);
  }
  return "unknown dtype";
}

}  // namespace

extern const DiffusionKernels diffusion_kernels;
const DiffusionKernels diffusion_kernels = {diffusion_step};

}}  // namespace gmk::GMK_ISA_NS

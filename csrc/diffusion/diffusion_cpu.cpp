// A job is a run of consecutive elements, kDrawnRun where there is noise, so that it stays in L1, else kRun. Inside, a
// segment is what shares one row of coefficients; where samples are small, a word of elements has several (diffusion_few.h).
// What bounds it: memory bandwidth without noise, the normals with it.
#include "diffusion/diffusion_few.h"
#include "diffusion/diffusion_known.h"
#include "diffusion/diffusion_segment.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kRun = 8 * kChunk, kDrawnRun = 4 * kChunk;

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
    if (a_.coefficient_rows > 1 && sample_ < kFewElements && !a_.mask) return few(first, n, count, seed_row);
    alignas(64) real scaled[kDrawnRun];
    alignas(64) float drawn[kDrawnRun];
    alignas(64) real of_known[kDrawnRun];
    bool have_noise = false;
    const bool known_noise = a_.mask && a_.known_noise != 0;
    if (known_noise) draw_real(of_known, drawn, count, n, noise_at(seed_row, kStreamKnown));
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
      const bool masked = g.a == 0 || g.b == 0 || g.c0 == 0 || g.c1 == 0;
      if constexpr (sizeof(real) == sizeof(float))
        if (noise && a_.noise_kind == kDrawnNoise && !a_.variance && !a_.mask && size == n && n % kChunk == 0)
          return run_drawn(g, n, masked, uint64_t(count / 4), noise_at(seed_row, kStreamDiffusionStep));
      if (noise && !have_noise) {
        have_noise = true;
        make_noise(scaled, drawn, first, n, count, seed_row);
      }
      g.z = noise ? scaled + (at - first) : nullptr;
      if (a_.mask) {
        run_known(g, known_at(at, known_noise ? of_known + (at - first) : nullptr), size);
      } else {
        run_unknown(g, size, masked);
      }
      at += size;
    }
  }

 private:
  static const T* stream(const void* p, int64_t at) { return p ? static_cast<const T*>(p) + at : nullptr; }

  // The same for samples of few elements.
  void few(int64_t first, int64_t n, int64_t count, int64_t seed_row) const {
    alignas(64) real scaled[kDrawnRun];
    alignas(64) float drawn[kDrawnRun];
    const int64_t end = first + n;
    bool noise = false;
    if (a_.noise_kind != kNoNoise)
      for (int64_t row = first / sample_; row * sample_ < end; ++row)
        noise = noise || coefficient(row * kCoefficients + kS) != 0;
    if (noise) make_noise(scaled, drawn, first, n, count, seed_row);
    const bool all = noise || a_.history[0] || a_.history[1] || a_.history[2];
    const bool more = all || a_.uncond || a_.x0;
    Columns<real> columns;
    Few<T> g;
    g.guidance = real(a_.guidance);
    g.low = real(a_.low);
    g.high = real(a_.high);
    for (int64_t row = first / sample_, at = first; at < end; row += kFewRows) {
      const int64_t last = (row + kFewRows) * sample_, stop = last < end ? last : end;
      const int64_t rows = (stop - row * sample_ + sample_ - 1) / sample_, from = row * kCoefficients;
      if (a_.wide) {
        columns.fill(static_cast<const double*>(a_.coefficients) + from, rows, all);
      } else {
        columns.fill(static_cast<const float*>(a_.coefficients) + from, rows, all);
      }
      g.x = stream(a_.x, at);
      g.m = stream(a_.model_output, at);
      g.u = stream(a_.uncond, at);
      for (int h = 0; h < 3; ++h) g.h[h] = stream(a_.history[h], at);
      g.z = noise ? scaled + (at - first) : nullptr;
      g.out = const_cast<T*>(stream(a_.out, at));
      g.x0 = const_cast<T*>(stream(a_.x0, at));
      (more ? run_few<true, T> : run_few<false, T>)(g, columns, stop - at, at - row * sample_, sample_);
      at = stop;
    }
  }

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

  Known<T> known_at(int64_t at, const real* z) const {
    return {stream(a_.mask, at),   stream(a_.known, at), z,
            real(a_.known_signal), real(a_.known_noise), a_.known_x0 != 0};
  }
  PhiloxAt noise_at(int64_t seed_row, uint32_t stream) const {
    return PhiloxAt{philox_key(a_.seeds ? uint64_t(a_.seeds[seed_row]) : a_.seed), a_.step, stream};
  }
  // n normals as `real`; `room` has the space of n floats.
  static void draw_real(real* z, float* room, int64_t count, int64_t n, PhiloxAt at) {
    float* const to = sizeof(real) == sizeof(float) ? (float*)z : room;
    draw(to, count, n, at);
    if (to == room)
      for (int64_t i = 0; i < n; ++i) z[i] = real(room[i]);
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
    draw_real(scaled, drawn, count, n, noise_at(seed_row, kStreamDiffusionStep));
    scale_noise(scaled, variance, n);
  }

  const DiffusionStep& a_;
  const int64_t sample_;  // elements that share a row of coefficients
};

template <class T>
Status run(const DiffusionStep* steps, int count, int threads) {
  const DiffusionStep& a = *steps;
  const bool drawn = a.noise_kind == kDrawnNoise || (a.mask && a.known_noise != 0);
  const int64_t rows = drawn ? a.seed_rows : 1, size = a.numel / rows;
  const int64_t length = a.noise_kind == kNoNoise && !drawn ? kRun : kDrawnRun, runs = (size + length - 1) / length;
  threads = team(a.numel, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < rows * runs; ++job) {
    const int64_t row = job / runs, begin = job % runs * length, rest = size - begin;
    for (int k = 0; k < count; ++k) {
      const Step<T> step(steps[k]);
      step(row * size + begin, rest < length ? rest : length, begin, row);
    }
  }
  return kOk;
}

Status diffusion_steps(const DiffusionStep* steps, int count, int threads) {
  DiffusionStep a = *steps;
  if (a.numel <= 0) return kOk;
  if (a.index) {
    const int64_t row = *a.index;
    if (row < 0 || row >= a.index_rows) return "step is not a row of the coefficients";
    a.coefficients = static_cast<const char*>(a.coefficients) + row * kCoefficients * (a.wide ? 8 : 4);
    a.step = uint32_t(row);
    steps = &a;
  }
  return by_dtype(a.dtype, [&](auto type) { return run<typename decltype(type)::of>(steps, count, threads); });
}

}  // namespace

extern const DiffusionKernels diffusion_kernels;
const DiffusionKernels diffusion_kernels = {diffusion_steps};

}  // namespace GMK_ISA_NS
}  // namespace gmk

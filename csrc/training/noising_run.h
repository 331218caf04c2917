// What the ops of noising.h share on the CPU: a job is a run of consecutive elements of one seed, cut where a sample ends,
// with a word of z for each word of elements. An Op has
//   kColumns, row(sample, real[kColumns]): the coefficients of a sample;  kNoise: does it want z at all
//   word<kMasked>(at, z, c, state[, count]): one word (`count` lanes of it), where c(k) is coefficient k of every lane;
//     not kMasked: z is finite, and hides_data(c) is false
//   State: its flush() is called every few words
// Bound: the normals (`kNoise`), else memory.
#pragma once
#include "core/arithmetic.h"
#include "core/few.h"
#include "core/philox_simd.h"
#include "training/noising.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

static_assert(kNoisingPart % kChunk == 0, "drawn in whole chunks");

template <class real>
GMK_INLINE void draw_normals(real* z, int64_t first, int64_t n, PhiloxAt at) {  // z has room for whole chunks
  alignas(64) float made[kChunk];
  int64_t e = 0;
  for (; n - e > 32; e += kChunk) {
    float* const to = sizeof(real) == sizeof(float) ? (float*)(z + e) : made;
    chunk_normals(to, uint64_t((first + e) / 4), at);
    if (to == made)
      for (int i = 0; i < kChunk; ++i) z[e + i] = real(made[i]);
  }
  for (; e < n; e += 4) {
    normals_from(philox(uint64_t((first + e) / 4), at.step, at.stream, at.key), made);
    for (int i = 0; i < 4; ++i) z[e + i] = real(made[i]);
  }
}

template <class T, class Op>
class Noised {
 public:
  using real = typename Arithmetic<T>::real;
  using V = typename simd<real>::v;
  using State = typename Op::State;
  static constexpr int64_t lanes = simd<real>::n;

  Noised(const Op& op, const NoiseSource& noise, int64_t numel, int64_t samples)
      : op_(op), noise_(noise), samples_(samples), sample_(samples > 0 ? numel / samples : 0) {}

  // Elements [first, first + n) of the tensor; element `count` of the seed's own count is the first.
  void operator()(int64_t first, int64_t n, int64_t count, int64_t seed_row, State& state) const {
    alignas(64) real z[kNoisingPart];
    const uint64_t seed = noise_.seeds ? uint64_t(noise_.seeds[seed_row]) : noise_.seed;
    const PhiloxAt at{philox_key(seed), noise_.step, noise_.stream};
    const bool small = samples_ > 1 && sample_ < kFewElements;
    if constexpr (Op::kNoise && sizeof(real) == sizeof(float))
      if (!noise_.given && !small && n % kChunk == 0 && first / sample_ == (first + n - 1) / sample_)
        return drawn(first, n, uint64_t(count / 4), at, state);
    const real* ready = nullptr;
    if (Op::kNoise) {
      if (noise_.given) {
        const T* const p = static_cast<const T*>(noise_.given) + first;
        for (int64_t i = 0; i < n; i += lanes) store(z + i, i + lanes <= n ? get(p + i) : get(p + i, n - i));
      } else {
        draw_normals(z, count, n, at);
      }
      ready = z;
    }
    if (small) return few(first, n, ready, state);
    for (int64_t at = first, end = first + n; at < end;) {
      const int64_t row = at / sample_, stop = (row + 1) * sample_ < end ? (row + 1) * sample_ : end;
      segment(at, stop - at, ready ? ready + (at - first) : nullptr, row, state);
      at = stop;
    }
  }

 private:
  struct Row {  // the same for all lanes
    V c[Op::kColumns];
    GMK_HD_MEMBER V operator()(int k) const { return c[k]; }
  };
  GMK_HD_MEMBER static Row splat_row(const real* values) {
    Row r;
    for (int k = 0; k < Op::kColumns; ++k) r.c[k] = splat(values[k]);
    return r;
  }

  // One sample, its normals used where they are made: the loads hide behind their arithmetic.
  void drawn(int64_t first, int64_t n, uint64_t block, PhiloxAt at, State& state) const {
    if constexpr (kLanes == 4) {  // not tuned: the normals first
      alignas(64) float z[kChunk];
      for (int64_t e = 0; e < n; e += kChunk) {
        chunk_normals(z, block + uint64_t(e / 4), at);
        segment(first + e, kChunk, (const real*)z, first / sample_, state);
      }
    } else {
      real values[Op::kColumns];
      op_.row(first / sample_, values);
      op_.hides_data(values) ? drawn<true>(values, first, n, block, at, state)
                             : drawn<false>(values, first, n, block, at, state);
    }
  }
  template <bool kMasked>
  void drawn(const real* values, int64_t first, int64_t n, uint64_t block, PhiloxAt at, State& state) const {
    const Row row = splat_row(values);
    const Op op = op_;
    for (int64_t e = 0; e < n; e += kChunk) {
      State now;
      each_normals<false>(block + uint64_t(e / 4), at,
                          [&](int64_t i, vfloat z0, vfloat z1) __attribute__((always_inline)) {
                            op.template word<kMasked>(first + e + i, (V)z0, row, now);
                            op.template word<kMasked>(first + e + i + kLanes, (V)z1, row, now);
                          });
      state.add(now);
    }
  }
  void segment(int64_t first, int64_t n, const real* z, int64_t sample, State& state) const {
    real values[Op::kColumns];
    op_.row(sample, values);
    const Row row = splat_row(values);
    const Op op = op_;
    State now;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) op.template word<true>(first + i, z ? load(z + i) : V{}, row, now);
    if (i < n) op.template word<true>(first + i, z ? load_some(z + i, n - i) : V{}, row, now, n - i);
    state.add(now);
  }
  void few(int64_t first, int64_t n, const real* z, State& state) const {
    alignas(64) Column<real> columns[Op::kColumns];
    const Op op = op_;
    for (int64_t row = first / sample_, at = first, end = first + n; at < end; row += kFewRows) {
      const int64_t last = (row + kFewRows) * sample_, stop = last < end ? last : end;
      const int64_t rows = (stop - row * sample_ + sample_ - 1) / sample_;
      for (int64_t r = 0; r < rows; ++r) {
        real values[Op::kColumns];
        op.row(row + r, values);
        for (int k = 0; k < Op::kColumns; ++k) columns[k][r] = values[k];
      }
      State now;
      few_words<real>(stop - at, at - row * sample_, sample_,
                      [&](int64_t i, int64_t r, auto on, auto... count) __attribute__((always_inline)) {
                        const auto c = [&](int k) __attribute__((always_inline)) { return pick(columns[k] + r, on); };
                        const V normal = z ? get(z + (at - first) + i, count...) : V{};
                        op.template word<true>(at + i, normal, c, now, count...);
                      });
      state.add(now);
      at = stop;
    }
  }

  const Op& op_;
  const NoiseSource& noise_;
  const int64_t samples_, sample_;
};

// All elements; part(i) gets the state of the i-th part, always the same elements.
template <class T, class Op, class F>
void run_noised(const Op& op, const NoiseSource& noise, int64_t numel, int64_t samples, int threads, const F& part) {
  const Noised<T, Op> run(op, noise, numel, samples);
  const int64_t rows = Op::kNoise && !noise.given ? noise.seed_rows : 1, size = numel / rows;
  const int64_t runs = (size + kNoisingPart - 1) / kNoisingPart;
  threads = team(numel, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < rows * runs; ++job) {
    const int64_t row = job / runs, begin = job % runs * kNoisingPart, rest = size - begin;
    typename Op::State state;
    run(row * size + begin, rest < kNoisingPart ? rest : kNoisingPart, begin, row, state);
    part(job, state);
  }
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

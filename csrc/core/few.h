// Samples of few elements ([65536, 2]), each with coefficients of its own: a word of elements meets several samples. Their
// coefficients are put into columns, some samples at a time; a word then takes its own by one permutation a column.
#pragma once
#include "core/simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kFewElements = 64;  // of a sample; from here on the words of one sample are worth a loop of their own
constexpr int64_t kFewRows = 128;     // samples whose columns are in L1 at a time

template <class real>
using Column = real[kFewRows + GMK_VECTOR_BYTES / sizeof(real)];  // a word may begin at the last row

// The lanes of a word whose first element is number `phase` of its sample: how many samples on each one is.
GMK_INLINE vint samples_on(int64_t phase, float per_sample, const Column<float>*) {
  vfloat lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = float(l) + 0.5f;  // a half: no quotient is near an integer
  return __builtin_convertvector((lane + splat(float(phase))) * splat(per_sample), vint);
}
GMK_INLINE vlong samples_on(int64_t phase, float per_sample, const Column<double>*) {
  vlong on;
  for (int l = 0; l < simd<double>::n; ++l) on[l] = int64_t((float(phase + l) + 0.5f) * per_sample);
  return on;
}
GMK_INLINE vfloat pick(const float* column, vint at) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(column));
#elif defined(__AVX2__)
  return (vfloat)_mm256_permutevar8x32_ps(_mm256_loadu_ps(column), (__m256i)at);
#else
  vfloat r;
  for (int l = 0; l < kLanes; ++l) r[l] = column[at[l]];
  return r;
#endif
}
GMK_INLINE vdouble pick(const double* column, vlong at) {
  vdouble r;
  for (int l = 0; l < simd<double>::n; ++l) r[l] = column[at[l]];
  return r;
}

// f(i, row, on[, count]) for each word i of n elements, the first of which is number `phase` of sample `row` 0: lane l
// belongs to sample row + on[l].
template <class real, class F>
GMK_INLINE void few_words(int64_t n, int64_t phase, int64_t sample, const F& f) {
  constexpr int64_t lanes = simd<real>::n;
  const float per_sample = 1.0f / float(sample);
  const int64_t rows = lanes / sample, rest = lanes % sample;
  int64_t i = 0, row = 0;
  for (; i + lanes <= n; i += lanes) {
    f(i, row, samples_on(phase, per_sample, (const Column<real>*)nullptr));
    row += rows;
    phase += rest;
    if (phase >= sample) {
      phase -= sample;
      ++row;
    }
  }
  if (i < n) f(i, row, samples_on(phase, per_sample, (const Column<real>*)nullptr), n - i);
}

}  // namespace
}  // namespace GMK_ISA_NS
}  // namespace gmk

// Rows in jobs of kRows: their normals in one run of SIMD Philox, then a forward substitution per row along the rows of P.
// Bound: d normals (0.6 ns each on one AVX-512 thread) and d^2/2 multiply-adds per row.
#include <omp.h>

#include "core/philox_simd.h"
#include "core/scratch.h"
#include "gmm/gmm_sample.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

constexpr int64_t kRows = 256;  // a multiple of kChunk: a job's normals begin with a chunk
static_assert(kRows % kChunk == 0, "normals come in chunks");

// t P = z in place; P upper triangular, what lies below the diagonal is not read.
template <class T>
void solve(T* z, const T* p, int64_t d) {
  for (int64_t i = 0; i < d; ++i) {
    const T t = z[i] / p[i * d + i];
    z[i] = t;
    const T* const row = p + i * d;
    for (int64_t j = i + 1; j < d; ++j) z[j] -= t * row[j];
  }
}

template <class T>
void sample_row(T* out, int64_t* component, T* z, const GmmSample& a, int64_t mixture, uint32_t word) {
  const int64_t d = a.d, c = component_of(a.cdf + mixture * a.cdf_stride, a.k, component_uniform(word));
  *component = c < a.k ? c : -1;
  if (c == a.k) {
    for (int64_t f = 0; f < d; ++f) out[f] = T(NAN);
    return;
  }
  const T* const p = (const T*)a.precisions + mixture * a.precisions_stride;
  const T* const mean = (const T*)a.means + mixture * a.means_stride + c * d;
  switch (a.covariance) {
    case kFull:
    case kTied:
      solve(z, p + (a.covariance == kFull ? c * d * d : 0), d);
      break;
    case kDiag:
      for (int64_t f = 0; f < d; ++f) z[f] /= p[c * d + f];
      break;
    default:
      for (int64_t f = 0; f < d; ++f) z[f] /= p[c];
  }
  for (int64_t f = 0; f < d; ++f) out[f] = mean[f] + z[f];
}

template <class T>
Status sample(const GmmSample& a, int threads) {
  const int64_t runs = a.seeds ? a.seed_rows : 1, rows = a.b * a.n / runs;  // a run counts its rows from 0
  const int64_t jobs = (rows + kRows - 1) / kRows, numbers = kRows * a.d;
  threads = team(a.b * a.n * (a.d + 1) * 4, threads);
  Scratch<float> normals(threads * numbers);
  Scratch<T> solved(threads * a.d);
  if (!normals.ok() || !solved.ok()) return kOutOfMemory;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < runs * jobs; ++job) {
    float* const z = normals.get() + omp_get_thread_num() * numbers;
    T* const t = solved.get() + omp_get_thread_num() * a.d;
    const int64_t run = job / jobs, first = job % jobs * kRows, rest = rows - first,
                  count = rest < kRows ? rest : kRows;
    const PhiloxKey key = philox_key(a.seeds ? uint64_t(a.seeds[run]) : a.seed);
    const PhiloxAt at{key, 0, kStreamGmmNormal};
    for (int64_t e = 0; e < count * a.d; e += kChunk) chunk_normals(z + e, uint64_t(first * a.d + e) / 4, at);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = run * rows + first + r;
      const PhiloxWords words = philox(uint64_t(first + r) / 4, 0, kStreamGmmComponent, key);
      for (int64_t f = 0; f < a.d; ++f) t[f] = T(z[r * a.d + f]);
      sample_row((T*)a.out + row * a.d, a.component + row, t, a, row / a.n, words.w[(first + r) % 4]);
    }
  }
  return kOk;
}

Status gmm_sample(const GmmSample& a, int threads) {
  if (a.b <= 0 || a.n <= 0) return kOk;
  return a.dtype == kFloat64 ? sample<double>(a, threads) : sample<float>(a, threads);
}

}  // namespace

extern const GmmSampleKernels gmm_sample_kernels;
const GmmSampleKernels gmm_sample_kernels = {gmm_sample};

}  // namespace GMK_ISA_NS
}  // namespace gmk

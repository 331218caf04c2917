#include "random/random.h"

#include "core/philox_simd.h"

namespace gmk {
namespace GMK_ISA_NS {
namespace {

template <class T>
void convert(T* out, const float* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(z[i]);
}
template <>
void convert<double>(double* out, const float* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = double(z[i]);
}

template <class T>
void fill_chunk(T* out, int64_t count, uint64_t block, PhiloxAt at, int kind) {
  alignas(64) float z[kChunk];
  float* target = sizeof(T) == 4 && count == kChunk ? (float*)out : z;
  if (kind == kNormal) {
    chunk_normals(target, block, at);
  } else {
    chunk_uniforms(target, block, at);
  }
  if (target == z) convert(out, z, count);
}

// A sample much shorter than a chunk: block by block.
template <class T>
void fill_short(T* out, int64_t count, PhiloxAt at, int kind) {
  for (int64_t e = 0; e < count; e += 4) {
    const PhiloxWords words = philox(uint64_t(e / 4), at.step, at.stream, at.key);
    float z[4];
    if (kind == kNormal) {
      normals_from(words, z);
    } else {
      for (int i = 0; i < 4; ++i) z[i] = uniform_from(words.w[i]);
    }
    convert(out + e, z, count - e < 4 ? count - e : 4);
  }
}

template <class T>
Status fill(const PhiloxFill& a, int threads) {
  T* const out = static_cast<T*>(a.out);
  const bool brief = a.size <= 32;
  const int64_t chunks = brief ? 1 : (a.size + kChunk - 1) / kChunk;
  threads = team(a.samples * a.size, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t job = 0; job < a.samples * chunks; ++job) {
    const int64_t sample = job / chunks, first = job % chunks * kChunk, rest = a.size - first;
    const PhiloxAt at{philox_key(a.seeds ? uint64_t(a.seeds[sample]) : a.seed), a.step, a.stream};
    T* const p = out + sample * a.size + first;
    if (brief) {
      fill_short(p, a.size, at, a.kind);
    } else {
      fill_chunk(p, rest < kChunk ? rest : kChunk, uint64_t(first / 4), at, a.kind);
    }
  }
  return kOk;
}

Status philox_fill(const PhiloxFill& a, int threads) {
  if (a.samples <= 0 || a.size <= 0) return kOk;
  return by_dtype(a.dtype, [&](auto type) { return fill<typename decltype(type)::of>(a, threads); });
}

}  // namespace

extern const RandomKernels random_kernels;
const RandomKernels random_kernels = {philox_fill};

}  // namespace GMK_ISA_NS
}  // namespace gmk

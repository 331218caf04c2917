// What element-wise kernels share. A thread makes a group of a tensor's elements: 16 bytes of each stream, four elements at
// least, which is one Philox block. Groups are counted within each row of seeds, whose noise starts at its own block 0.
#pragma once
#include "core/philox.h"
#include "cuda/real.cuh"

namespace gmk {
namespace {

template <class T>
constexpr int kGroup = sizeof(T) == 2 ? 8 : 4;

struct Groups {
  int64_t rows, size;  // of seeds; elements of a row
  int64_t per_row, total;
  int64_t sample;  // elements of a sample; 0: there is one sample
};
template <class T>
Groups groups_of(int64_t numel, int64_t rows, int64_t samples) {
  const int64_t size = numel / rows, per_row = (size + kGroup<T> - 1) / kGroup<T>;
  return {rows, size, per_row, rows * per_row, samples == 1 ? 0 : numel / samples};
}
// May every full group of these streams be moved by 16-byte accesses? nullptr: absent.
template <class T, size_t n>
bool packed(const Groups& g, const void* const (&streams)[n]) {
  bool yes = g.rows == 1 || g.size % kGroup<T> == 0;
  for (const void* p : streams) yes = yes && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return yes;
}

struct Place {
  int64_t at, block, seed_row;  // the first element of a group, its Philox block in its row
  int64_t first, last;          // the samples of its first and last element
  int count;
};
template <int n>
GMK_DEV Place place_of(const Groups& g, int64_t group) {
  Place p;
  p.seed_row = g.rows == 1 ? 0 : group / g.per_row;
  const int64_t in_row = g.rows == 1 ? group : group % g.per_row, left = g.size - in_row * n;
  p.block = in_row * (n / 4);
  p.at = p.seed_row * g.size + in_row * n;
  p.count = left < n ? int(left) : n;
  p.first = g.sample ? p.at / g.sample : 0;
  p.last = g.sample ? (p.at + p.count - 1) / g.sample : 0;
  return p;
}

// `count` elements of a stream: one 16-byte access where the launcher has seen that it is aligned.
template <class T, bool kPacked, int n>
GMK_DEV void read(const void* stream, int64_t at, int count, typename Real<T>::type (&v)[n]) {
  const T* const p = static_cast<const T*>(stream) + at;
  if (kPacked && count == n) {
    const Pack<T, n> pack = load_pack<T, n>(p);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = Real<T>::from(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = i < count ? Real<T>::from(p[i]) : 0;
  }
}
template <class T, bool kPacked, int n>
GMK_DEV void write(void* stream, int64_t at, int count, const typename Real<T>::type (&v)[n]) {
  T* const p = static_cast<T*>(stream) + at;
  if (kPacked && count == n) {
    Pack<T, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) pack.v[i] = Real<T>::to(v[i]);
    store_pack(p, pack);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) p[i] = Real<T>::to(v[i]);
  }
}

// The normals of a group.
template <int n>
GMK_DEV void draw(const Place& p, const int64_t* seeds, uint64_t seed, uint32_t step, uint32_t stream, float (&z)[n]) {
  const PhiloxKey key = philox_key(seeds ? uint64_t(seeds[p.seed_row]) : seed);
#pragma unroll
  for (int i = 0; i < n; i += 4) normals_from(philox(uint64_t(p.block + i / 4), step, stream, key), z + i);
}

// 0 where c is, whatever x holds.
template <class R>
GMK_DEV R term(R c, R x) {
  return c != R(0) ? c * x : R(0);
}

}  // namespace
}  // namespace gmk

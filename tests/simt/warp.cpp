// Warp operations: all lanes of the mask meet, then one of them computes for all. Here: the meeting, shuffles, votes,
// integer reductions, and the model of mma.sync.
#include "runtime.h"

#include <algorithm>

#include "core/half.h"

namespace gmk_simt {
namespace {

struct Values {  // what lane l brought, if it takes part
  const Fiber* warp;
  template <class T>
  const T& of(int lane) const {
    return *static_cast<const T*>(warp[lane].in);
  }
};

void run_shuffle(unsigned lanes, Fiber* warp) {
  for (int l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    Fiber& me = warp[l];
    const int source = me.detail;
    if (source < 0 || source > 31 || !(lanes >> source & 1)) {
      report("shuffle-source", &me, {pc_offset(me.pc)},
             "lane %d reads lane %d, which does not take part (mask %#x): undefined", l, source, me.mask);
      __builtin_memset(me.out, 0xff, me.bytes);
    } else {
      __builtin_memcpy(me.out, warp[source].in, me.bytes);
    }
  }
}

void run_ballot(unsigned lanes, Fiber* warp) {
  const Values values{warp};
  unsigned result = 0;
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1 && values.of<bool>(l)) result |= 1u << l;
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) *static_cast<unsigned*>(warp[l].out) = result;
}

void run_reduce(unsigned lanes, Fiber* warp) {
  const Values values{warp};
  bool first = true;
  int64_t result = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    const int64_t v = values.of<int64_t>(l);
    if (first)
      result = v;
    else
      result = warp[l].detail == kAdd ? result + v : warp[l].detail == kMin ? std::min(result, v) : std::max(result, v);
    first = false;
  }
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) *static_cast<int64_t*>(warp[l].out) = result;
}

// mma.sync (PTX ISA, "Matrix Fragments"): lane = 4 g + t holds rows g and g + 8 of A and C, column g of B.
struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
float element(int kind, uint32_t word, int half) {
  if (kind == kMmaTf32) return gmk::bits_float(word & 0xffffe000u);  // 10 bits of mantissa; the rest is ignored
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  return kind == kMmaBf16 ? gmk::to_float(gmk::bf16{bits}) : gmk::to_float(gmk::f16{bits});
}
void run_mma(unsigned lanes, Fiber* warp) {
  if (lanes != 0xffffffffu) {
    report("mma-mask", machine.current, {pc_offset(machine.current->pc)}, "mma.sync needs all 32 lanes, got %#x",
           lanes);
    return;
  }
  const Values values{warp};
  const int kind = warp[0].detail;
  const int halves = kind == kMmaTf32 ? 1 : 2, depth = 8 * halves;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaIn& in = values.of<MmaIn>(l);
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < halves; ++h) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][halves * (t + 4 * (i >> 1)) + h] = element(kind, in.a[i], h);
      for (int i = 0; i < 2; ++i) b[halves * (t + 4 * i) + h][g] = element(kind, in.b[i], h);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i >> 1), column = 2 * (l % 4) + (i & 1);
      float sum = values.of<MmaIn>(l).c[i];
      for (int k = 0; k < depth; ++k) sum = __builtin_fmaf(a[row][k], b[k][column], sum);
      static_cast<float*>(warp[l].out)[i] = sum;
    }
  }
}

}  // namespace

void run_warp_op(WarpOp op, unsigned lanes, Fiber* warp) {
  switch (op) {
    case WarpOp::barrier:
      return race_warp_barrier(lanes, warp);
    case WarpOp::shuffle:
      return run_shuffle(lanes, warp);
    case WarpOp::ballot:
      return run_ballot(lanes, warp);
    case WarpOp::reduce:
      return run_reduce(lanes, warp);
    case WarpOp::mma:
      return run_mma(lanes, warp);
  }
}

// Runs the operations of this warp whose lanes have all arrived.
void try_warp(int index) {
  Fiber* const warp = &machine.fibers[size_t(index) * 32];
  const int count = std::min(32, machine.threads - index * 32);
  for (int l = 0; l < count; ++l) {
    Fiber& leader = warp[l];
    if (leader.wait != Wait::warp) continue;
    unsigned lanes = 0;
    bool complete = true, gone = false;
    for (int i = 0; i < 32; ++i) {
      if (!(leader.mask >> i & 1)) continue;
      if (i >= count || warp[i].wait == Wait::done) {
        gone = true;
      } else if (warp[i].wait == Wait::warp && warp[i].mask == leader.mask && warp[i].op == leader.op) {
        lanes |= 1u << i;
      } else {
        complete = false;
      }
    }
    if (!complete) continue;
    if (gone)
      report("warp-mask", &leader, {pc_offset(leader.pc)},
             "mask %#x names lanes that have exited or do not exist (%#x are here)", leader.mask, lanes);
    run_warp_op(leader.op, lanes, warp);
    for (int i = 0; i < count; ++i)
      if (lanes >> i & 1) make_ready(warp[i]);
  }
}

void wait_in_warp(WarpOp op, unsigned mask, int detail, const void* in, void* out, size_t bytes, const void* pc) {
  Fiber* const me = machine.current;
  if (!(mask >> me->lane & 1)) {
    report("warp-mask", me, {pc_offset(pc)}, "lane %d calls a warp operation whose mask %#x does not name it", me->lane,
           mask);
    if (out) __builtin_memset(out, 0xff, bytes);
    return;
  }
  me->op = op;
  me->mask = mask;
  me->detail = detail;
  me->in = in;
  me->out = out;
  me->bytes = bytes;
  me->pc = pc;
  me->wait = Wait::warp;
  try_warp(me->linear / 32);
  to_scheduler();
}

#define GMK_CALLER __builtin_return_address(0)
void warp_barrier(unsigned mask) { wait_in_warp(WarpOp::barrier, mask, 0, nullptr, nullptr, 0, GMK_CALLER); }
void shuffle(unsigned mask, int source, const void* value, void* result, size_t bytes) {
  wait_in_warp(WarpOp::shuffle, mask, source, value, result, bytes, GMK_CALLER);
}
unsigned ballot(unsigned mask, bool value) {
  unsigned result = 0;
  wait_in_warp(WarpOp::ballot, mask, 0, &value, &result, sizeof result, GMK_CALLER);
  return result;
}
int64_t reduce_integers(unsigned mask, int64_t value, Reduction how) {
  int64_t result = 0;
  wait_in_warp(WarpOp::reduce, mask, how, &value, &result, sizeof result, GMK_CALLER);
  return result;
}
static bool tensor_cores = true;
bool has_mma() { return tensor_cores; }
void set_has_mma(bool on) { tensor_cores = on; }
void mma(MmaKind kind, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaIn in;
  __builtin_memcpy(in.a, a, sizeof in.a);
  __builtin_memcpy(in.b, b, sizeof in.b);
  __builtin_memcpy(in.c, c, sizeof in.c);
  float result[4];
  wait_in_warp(WarpOp::mma, 0xffffffffu, kind, &in, result, sizeof result, GMK_CALLER);
  __builtin_memcpy(d, result, sizeof result);
}

}  // namespace gmk_simt

// CUDA: the rows of one small mixture, and where EM starts: k-means, as the CPU has it (gmm_fit_start.h). A block of threads.
#pragma once
#include "gmm/gmm_fit.h"
#include "gmm/gmm_m_step.cuh"
#include "gmm/gmm_plain.cuh"
#include "gmm/gmm_sample.h"

namespace gmk {
namespace {

constexpr int kWarps = kThreads / 32;

struct Mixture {  // means about the shift
  double *weights, *log_weights, *means, *covariances, *precisions;
  int64_t* recovered;
  uint8_t* status;
};
// Where a block's numbers lie. It is in shared memory itself: as many addresses in registers would leave none.
struct Memory {
  double* x;          // [d][n], about the shift; 0 where the weight is 0
  double* weight;     // [n]
  double* row;        // [n]: squared distance to the nearest pick; then the label
  double* r;          // [k][n]: responsibilities times weights
  double* sums;       // [em_numbers]: of gmm_em.h, about 0; of Lloyd, [k][d + 1]
  double* centres;    // [k][d]
  double* constants;  // [k]
  double *ridge, *heads, *shift, *zero, *factors;
  Mixture now, best;

  GMK_DEV void divide(double* at, const GmmFit& a) {
    const int64_t n = a.n, k = a.k, d = a.d, matrices = covariance_numbers(k, d, a.covariance);
    const auto more = [&](int64_t count) {
      double* const p = at;
      at += count;
      return p;
    };
    x = more(n * d);
    weight = more(n);
    row = more(n);
    r = more(k * n);
    sums = more(em_numbers(k, d, a.covariance));
    centres = more(k * d);
    constants = more(k);
    ridge = more(k);
    heads = more(k);
    shift = more(d);
    zero = more(d);
    factors = more(2 * d * d);
    const auto place = [&](Mixture& s) {
      s.weights = more(k);
      s.log_weights = more(k);
      s.means = more(k * d);
      s.covariances = more(matrices);
      s.precisions = more(matrices);
      s.recovered = reinterpret_cast<int64_t*>(more(k));
      s.status = reinterpret_cast<uint8_t*>(more(k));
    };
    place(now);
    place(best);
  }
};

// What the threads of a block tell each other.
struct Common {
  double parts[kThreads];
  int64_t found;
  int odd;
  Memory memory;
  GmmMStep step;
};

// Every method is called by all threads of the block.
struct Starter {
  const GmmFit& a;
  Common& common;
  Memory& m;
  double total;  // weight of all rows

  GMK_DEV Starter(const GmmFit& args, Common& c, double* at) : a(args), common(c), m(c.memory) {
    if (threadIdx.x == 0) m.divide(at, a);
    __syncthreads();
  }

  // The sum of part(row), by one warp: its lanes take every 32nd.
  template <class F>
  GMK_DEV double over_rows(const F& part) const {
    double sum = 0;
#pragma unroll 1  // else the copies of all these loops need more registers than there are
    for (int64_t i = threadIdx.x % 32; i < a.n; i += 32) sum += part(i);
    return warp_sum(sum);
  }

  template <class T>
  GMK_DEV void load(int64_t b) {
    const T* const from = static_cast<const T*>(a.x) + b * a.x_stride;
    const T* const weights = a.sample_weight ? static_cast<const T*>(a.sample_weight) + b * a.weight_stride : nullptr;
    const int64_t n = a.n, d = a.d;
    __syncthreads();
    double own = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) own += m.weight[i] = weights ? double(weights[i]) : 1.0;
    total = block_sum<kWarps>(own, common.parts);
    for (int64_t i = threadIdx.x; i < n * d; i += kThreads)
      m.x[i % d * n + i / d] = m.weight[i / d] != 0 ? double(from[i]) : 0.0;
    __syncthreads();
    for (int64_t f = threadIdx.x / 32; f < d; f += kWarps) {
      const double sum = over_rows([&](int64_t i) { return m.weight[i] * m.x[f * n + i]; });
      if (threadIdx.x % 32 == 0) {
        m.shift[f] = sum / total;
        m.zero[f] = 0;
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n * d; i += kThreads)
      if (m.weight[i % n] != 0) m.x[i] -= m.shift[i / n];
    __syncthreads();
  }

  GMK_DEV double square_to(int64_t i, const double* centre) const {
    double sum = 0;
#pragma unroll 1
    for (int64_t f = 0; f < a.d; ++f) {
      const double t = m.x[f * a.n + i] - centre[f];
      sum += t * t;
    }
    return sum;
  }

  // The first row at which the weights (times `row`) so far exceed u of them all; with nothing to go by, the first row
  // with a weight. A thread has neighbouring rows.
  GMK_DEV int64_t choose(bool by_distance, double u) {
    const int64_t per = (a.n + kThreads - 1) / kThreads, first = threadIdx.x * per;
    const int64_t end = first + per < a.n ? first + per : a.n;
    const auto mass = [&](int64_t i) { return by_distance ? m.weight[i] * m.row[i] : m.weight[i]; };
    double own = 0;
    for (int64_t i = first; i < end; ++i) own += mass(i);
    __syncthreads();
    common.parts[threadIdx.x] = own;
    if (threadIdx.x == 0) common.found = -1;
    __syncthreads();
    double before = 0, all = 0;
#pragma unroll 1
    for (int t = 0; t < kThreads; ++t) {
      if (t == int(threadIdx.x)) before = all;
      all += common.parts[t];
    }
    const double at = u * all;
    if (before <= at && before + own > at) {  // of one thread
      int64_t last = first;                   // rounding may hide the step: then the last row that could be drawn
      double sum = before;
      for (int64_t i = first; i < end && sum <= at; ++i) {
        sum += mass(i);
        if (mass(i) > 0) last = i;
      }
      common.found = last;
    }
    __syncthreads();
    int64_t found = common.found;
    for (int64_t i = 0; found < 0 && i < a.n; ++i)
      if (m.weight[i] > 0) found = i;
    return found < 0 ? 0 : found;
  }
  GMK_DEV void take_centre(int64_t c, int64_t i) {
    __syncthreads();
    for (int64_t f = threadIdx.x; f < a.d; f += kThreads) m.centres[c * a.d + f] = m.x[f * a.n + i];
    __syncthreads();
  }

  // k-means++ as the CPU has it (gmm_fit_start.h). uniform(i): number i of this mixture.
  template <class F>
  GMK_DEV void pick(const F& uniform) {
    take_centre(0, choose(false, uniform(0)));
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) m.row[i] = square_to(i, m.centres);
    for (int64_t c = 1; c < a.k; ++c) {
      double* const centre = m.centres + c * a.d;
      int64_t best_row = 0;
      double least = 0;
      __syncthreads();
      for (int64_t t = 0; t < a.candidates; ++t) {
        const int64_t candidate = choose(true, uniform(1 + (c - 1) * a.candidates + t));
        take_centre(c, candidate);
        double own = 0;
        for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
          const double square = square_to(i, centre);
          own += m.weight[i] * (square < m.row[i] ? square : m.row[i]);
        }
        const double left = block_sum<kWarps>(own, common.parts);
        if (t && !(left < least)) continue;
        least = left;
        best_row = candidate;
      }
      take_centre(c, best_row);
      for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
        const double square = square_to(i, centre);
        if (square < m.row[i]) m.row[i] = square;
      }
    }
  }

  // The nearest centre of every row, of equally near ones the first, to `row`; did any change?
  GMK_DEV bool assign(bool first_time) {
    __syncthreads();
    if (threadIdx.x == 0) common.odd = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      int64_t label = 0;
      double least = square_to(i, m.centres);
      for (int64_t c = 1; c < a.k; ++c) {
        const double square = square_to(i, m.centres + c * a.d);
        if (square < least) {
          least = square;
          label = c;
        }
      }
      if (!first_time && m.row[i] != double(label)) atomicMax(&common.odd, 1);
      m.row[i] = double(label);
    }
    __syncthreads();
    return common.odd != 0;
  }
  GMK_DEV void move_centres() {  // an empty one stays
    const int64_t d = a.d, numbers = a.k * (d + 1);
    for (int64_t e = threadIdx.x / 32; e < numbers; e += kWarps) {
      const int64_t c = e / (d + 1), f = e % (d + 1);
      const double sum = over_rows(
          [&](int64_t i) { return m.row[i] == double(c) ? m.weight[i] * (f < d ? m.x[f * a.n + i] : 1.0) : 0.0; });
      if (threadIdx.x % 32 == 0) m.sums[e] = sum;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < a.k * d; e += kThreads) {
      const double* const own = m.sums + e / d * (d + 1);
      if (own[d] > 0) m.centres[e] = own[e % d] / own[d];
    }
  }
  GMK_DEV void lloyd() {
    assign(true);
    for (int64_t round = 0; round < a.rounds; ++round) {
      move_centres();
      if (!assign(false)) break;
    }
  }
};

}  // namespace
}  // namespace gmk

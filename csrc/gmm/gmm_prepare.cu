// Parameters for the tensor cores, once per call: the layout is in gmm_matrix.cuh. One block is one component.
#include "gmm/gmm_matrix.cuh"

namespace gmk {
namespace {

__global__ void __launch_bounds__(kMatrixThreads) gmm_prepare_kernel(GmmInputs in, float* prepared, int pull) {
  const int d = int(in.d), tiles = (d + 7) / 8, tid = int(threadIdx.x), lane = tid % 32;
  const int64_t per = step_offset(tiles, pull ? 2 * tiles : tiles);
  for (int64_t job = blockIdx.x; job < in.b * in.k; job += gridDim.x) {
    const int64_t c = job % in.k;
    const Parameters<float> p = parameters<float>(in, job / in.k);
    const float* const mean = p.means + c * d;
    const float* const q = p.matrix_of(c);
    float* const out = prepared + job * per;
    double log_det = 0;  // every warp computes it
    bool dead = p.log_weights[c] == -infinity<float>();
    for (int f = lane; f < d; f += 32) {
      const float v = q[f * d + f];
      dead = dead || v == 0.0f;
      log_det += log(fabs(double(v)));
    }
    dead = __any_sync(kFullWarp, dead);
    log_det = warp_sum(log_det);
    const auto value = [&](int row, int column) { return row <= column && column < d ? q[row * d + column] : 0.0f; };
    const auto packed = [&](float a, float b) {
      const Split u = split(a), v = split(b);
      return Pack<float, 4>{{bits_float(u.hi), bits_float(v.hi), bits_float(u.lo), bits_float(v.lo)}};
    };
    bool finite = true;
    for (int i = 0; i < tiles; ++i) {
      float* const header = out + step_offset(tiles, i);
      if (tid < kHeader && tid != 8) {
        const float m = tid < 8 && 8 * i + tid < d ? mean[8 * i + tid] : 0.0f;
        finite = finite && m - m == 0.0f;
        header[tid] = m;
      }
      for (int e = tid; e < (tiles - i) * 32; e += kMatrixThreads) {
        const int g = lane / 4, t = lane % 4, column = 8 * (i + e / 32) + g;
        const float a = value(8 * i + t, column), b = value(8 * i + t + 4, column);
        finite = finite && a - a == 0.0f && b - b == 0.0f;
        store_pack(header + kHeader + 4 * e, packed(a, b));
      }
    }
    // The columns of a fragment of y lie in the lanes in the order 0 2 4 6 1 3 5 7: so do the rows here, and y needs no
    // shuffle on its way from one product to the next.
    for (int j = 0; pull && j < tiles; ++j)
      for (int e = tid; e < (j + 1) * 32; e += kMatrixThreads) {
        const int row = 8 * (e / 32) + lane / 4, column = 8 * j + 2 * (lane % 4);
        store_pack(out + step_offset(tiles, tiles + j) + 4 * e, packed(value(row, column), value(row, column + 1)));
      }
    const bool wrong = __syncthreads_or(!finite);
    const double own = double(p.log_weights[c]) - 0.91893853320467274178 * d + log_det;
    const float constant = dead ? -infinity<float>() : wrong ? bits_float(0x7fc00000u) : float(own);
    for (int i = tid; i < tiles; i += kMatrixThreads) out[step_offset(tiles, i) + 8] = constant;
  }
}

}  // namespace

bool gmm_has_tensor_cores() { return GMK_COMPILED_FOR((gmm_prepare_kernel)) >= 80; }

Status gmm_prepare(const GmmInputs& in, float* prepared, bool pull, void* stream) {
  return GMK_LAUNCH((gmm_prepare_kernel), grid_for(in.b * in.k, 1), kMatrixThreads, 0, stream, in, prepared, int(pull));
}

}  // namespace gmk

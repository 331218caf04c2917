// The kernels of tests/simt/bugs.cu, without their bugs, for a GPU: what cuda/prims.cuh does there must be what it does in
// the emulator (test_primitives.py). A C function, so that one nvcc command builds it and ctypes calls it.
#include "bugs.cu"

extern "C" const char* gmk_primitive(float* out, unsigned* state, float* x, int64_t n, const char* name, bool variant) {
  gmk::Bug a{out, state, x, nullptr, n, name, variant};
  if (const gmk::Status status = gmk::bug_cuda(a, 0, nullptr)) return status;
  const cudaError_t error = cudaDeviceSynchronize();
  return error ? cudaGetErrorString(error) : nullptr;
}

// What `doctor` asks: versions and devices. Nothing here runs at import.
#include <cuda_runtime.h>

#include "core/error.h"

namespace gmk {

Status cuda_probe(int* runtime, int* driver, int* devices) {
  cudaError_t error = cudaRuntimeGetVersion(runtime);
  if (!error) error = cudaDriverGetVersion(driver);
  if (!error) error = cudaGetDeviceCount(devices);
  return error ? cudaGetErrorString(error) : kOk;
}

}  // namespace gmk

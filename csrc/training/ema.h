// The exponential moving average of weights: ema = decay ema + (1 - decay) value, over many tensors in one pass.
//   as torch's lerp: ema + (1 - decay) (value - ema) where 1 - decay < 1/2, value - decay (value - ema) else
// so that an average of equal numbers stays that number. decay = 0 copies, decay = 1 changes nothing, whatever the tensors
// hold. Computed in float32, float64 averages in float64.
#pragma once
#include "core/dtype.h"
#include "core/error.h"

namespace gmk {

struct EmaPair {
  void* ema;          // [numel], of ema_type
  const void* value;  // [numel], of value_type
  int64_t numel;
  int ema_type, value_type;  // DType: equal, or a float32 average of half values
};

struct EmaUpdate {
  const EmaPair* pairs;  // [count]; no two averages overlap
  int64_t count;
  double decay;  // in [0, 1]
};

GMK_HD bool ema_types(int ema, int value) {
  return ema == value || (ema == kFloat32 && (value == kBFloat16 || value == kFloat16));
}

struct EmaKernels {
  Status (*update)(const EmaUpdate&, int threads);
};

Status ema_update_cuda(const EmaUpdate&, int device, void* stream);

}  // namespace gmk

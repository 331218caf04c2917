// CPU only: mixtures of a few rows each (gmm_few_cpu.cpp).
#pragma once
#include "core/simd.h"
#include "gmm/gmm.h"

namespace gmk {
namespace GMK_ISA_NS {

extern bool gmm_few(const GmmInputs& in, bool backward);  // so few rows, and so small, that the two below are for them
extern Status gmm_few_log_prob(const GmmLogProb& a, int threads);
extern Status gmm_few_log_prob_backward(const GmmLogProbBackward& a, int threads);

}  // namespace GMK_ISA_NS
}  // namespace gmk

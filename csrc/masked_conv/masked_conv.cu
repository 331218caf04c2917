#include "masked_conv/masked_conv.h"
namespace gmk {
Status masked_conv2d_cuda(const MaskedConv&, int, void*) { return kOk; }
Status masked_conv2d_backward_weight_cuda(const MaskedConvWeight&, int, void*) { return kOk; }
}

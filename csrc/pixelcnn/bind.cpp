#include <pybind11/stl.h>

#include <vector>

#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "pixelcnn/pixelcnn.h"

namespace gmk {

#ifndef GMK_SIMT
GMK_ISA_TABLES(PixelCnnKernels, pixelcnn_kernels)
#endif

using Ints = std::vector<std::int64_t>;

// size = (n, c, h, w, levels, C, L + 1, E, outputs, groups, k0, k, lanes, words, points)
static PixelCnnSizes sizes_of(const Ints& size) {
  PixelCnnSizes s{};
  s.n = size.at(0);
  s.channels = size.at(1);
  s.h = size.at(2);
  s.w = size.at(3);
  s.levels = size.at(4);
  s.features = size.at(5);
  s.layers = size.at(6);
  s.hidden = size.at(7);
  s.outputs = size.at(8);
  s.groups = int(size.at(9));
  s.kernel0 = int(size.at(10));
  s.kernel = int(size.at(11));
  s.lanes = int(size.at(12));
  s.words = int(size.at(13));
  s.points = int(size.at(14));
  const bool kernels = s.kernel0 % 2 == 1 && s.kernel % 2 == 1 && s.kernel0 <= kMaxKernel && s.kernel <= kMaxKernel;
  if (!kernels || s.groups < 1 || s.groups > kMaxGroups || s.layers < 1 || s.lanes < 1 ||
      (s.points && (s.points != kPairPoints || s.kernel != 3)))
    throw std::invalid_argument("sizes that no kernel takes");
  return s;
}

// `bad` and `workspace` are read too: they come twice.
static PixelCnn pixelcnn_sample(Address levels, Address logits, Address bad, Address workspace, Address, Address,
                                Address weights, Address biases, Address values, Address uniforms, Address given,
                                Address known, Address seeds, const Ints& size, const Ints& rows, const Ints& numbers,
                                std::int64_t seed_rows, std::uint64_t seed, std::int64_t mixtures, double temperature,
                                int head, int kind) {
  PixelCnn a{};
  a.size = sizes_of(size);
  const PixelCnnSizes& s = a.size;
  const PixelCnnPlan plan = pixelcnn_plan(s);
  if (numbers.at(0) != plan.weights || numbers.at(1) < s.n * plan.state)
    throw std::invalid_argument("weights or workspace have another size than the kernel's");
  a.levels = pointer<std::int64_t>(levels, s.n, "levels");
  a.logits = optional_pointer<float>(logits);
  a.bad = pointer<std::int64_t>(bad, s.n, "bad");
  a.workspace = pointer<float>(workspace, numbers.at(1), "workspace");
  a.weights = pointer<const float>(weights, plan.weights, "weights");
  a.biases = pointer<const float>(biases, s.n, "biases");
  a.values = pointer<const float>(values, s.levels, "values");
  a.uniforms = optional_pointer<const float>(uniforms);
  a.given = optional_pointer<const std::int64_t>(given);
  a.known = optional_pointer<const std::uint8_t>(known);
  a.seeds = optional_pointer<const std::int64_t>(seeds);
  a.v_rows = rows.at(0);
  a.h_rows = rows.at(1);
  a.y0 = rows.at(2);
  a.y1 = rows.at(3);
  a.seed_rows = seed_rows;
  a.seed = seed;
  a.mixtures = mixtures;
  a.temperature = temperature;
  a.head = head;
  a.kind = kind;
  return a;
}

void bind_pixelcnn(py::module_& m) {
  bind_op(m, "pixelcnn_sample", pixelcnn_sample, GMK_CPU(pixelcnn_kernels().sample), GMK_CUDA(pixelcnn_sample_cuda));
#ifndef GMK_SIMT
  // (lanes, words, points) as the weights are packed; and how many floats those and the workspace have.
  m.def("pixelcnn_panel", [](bool cuda, int kernel, std::int64_t w) {
    const PixelCnnKernels& kernels = pixelcnn_kernels();
    const int points = !cuda && kernel == 3 && w >= 8 ? kPairPoints : 0;
    return py::make_tuple(cuda ? kPixelCnnCudaLanes : kernels.lanes, cuda ? 1 : kernels.words, points);
  });
  m.def("pixelcnn_memory", [](const Ints& size, bool cuda) {
    const PixelCnnSizes s = sizes_of(size);
    const PixelCnnPlan plan = pixelcnn_plan(s);
    return py::make_tuple(plan.weights, cuda ? pixelcnn_workspace_cuda(s) : s.n * plan.state);
  });
#endif
}

}  // namespace gmk

#include "core/dispatch.h"
#include "core/plain_tensor.h"
#include "core/tensor_args.h"

#include <omp.h>

namespace gmk {

void bind_random(py::module_&);
void bind_diffusion(py::module_&);
void bind_training(py::module_&);
void bind_ema(py::module_&);
void bind_gmm(py::module_&);
void bind_gmm_em(py::module_&);
void bind_kmeans(py::module_&);
void bind_gmm_fit(py::module_&);
void bind_masked_conv(py::module_&);
void bind_likelihood(py::module_&);
void bind_pixelcnn(py::module_&);

#ifdef GMK_WITH_CUDA
Status cuda_probe(int* runtime, int* driver, int* devices);  // cuda/probe.cu
#endif

}  // namespace gmk

PYBIND11_MODULE(_C, m) {
  using namespace gmk;
  bind_random(m);
  bind_diffusion(m);
  bind_training(m);
  bind_ema(m);
  bind_gmm(m);
  bind_gmm_em(m);
  bind_kmeans(m);
  bind_gmm_fit(m);
  bind_masked_conv(m);
  bind_likelihood(m);
  bind_pixelcnn(m);

  m.def("adopt_torch", adopt_torch);
  m.def("adopt_threads", adopt_threads);
  m.def("isa", [] { return isa_name(isa_current()); });
  m.def("isas", [] {
    py::list names;
    for (int isa = 0; isa < kIsaCount; ++isa)
      if (isa_available(isa)) names.append(isa_name(isa));
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    if (!isa_set(name.c_str())) throw py::value_error("no instruction set " + name + " here");
  });
  m.def("openmp_threads", [](int threads) {  // the team that OpenMP really gives
    int team = 0;
#pragma omp parallel num_threads(threads)
#pragma omp single
    team = omp_get_num_threads();
    return team;
  });
  m.attr("compiler") = __VERSION__;
#ifdef GMK_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("cuda_archs") = GMK_CUDA_ARCHS;
  m.def("cuda_probe", [] {
    int runtime = 0, driver = 0, devices = 0;
    const Status status = cuda_probe(&runtime, &driver, &devices);
    return py::make_tuple(runtime, driver, devices, status ? py::object(py::str(status)) : py::object(py::none()));
  });
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_missing") = GMK_CUDA_MISSING;  // why: `doctor` repeats it
#endif
}

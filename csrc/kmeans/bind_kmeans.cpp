#include "core/dispatch.h"
#include "core/tensor_args.h"
#include "kmeans/kmeans.h"

namespace gmk {

GMK_ISA_TABLES(KmeansKernels, kmeans_kernels)
GMK_ISA_TABLES(KmeansStartKernels, kmeans_start_kernels)

static KmeansInputs kmeans_inputs(Address x, Address sample_weight, py::tuple strides, int64_t b, int64_t n, int64_t k,
                                  int64_t d, int dtype) {
  KmeansInputs in{};
  in.x = pointer(x, b * n * d, "x");
  in.sample_weight = optional_pointer(sample_weight);
  in.x_stride = strides[0].cast<int64_t>();
  in.weight_stride = strides[1].cast<int64_t>();
  in.b = b;
  in.n = n;
  in.k = k;
  in.d = d;
  in.dtype = dtype;
  return in;
}

static KmeansLloyd kmeans(Address centers, Address labels, Address inertia, Address n_iter, Address slab_sums,
                          Address grouped, Address state, Address x, Address init, Address sample_weight, int64_t slabs,
                          py::tuple strides, int64_t b, int64_t n, int64_t k, int64_t d, int dtype, int64_t max_iter,
                          double tol) {
  KmeansLloyd a{};
  a.slab_sums = pointer<double>(slab_sums, slabs * b, "slab_sums");
  a.grouped = pointer(grouped, slabs * b * d, "grouped");
  a.state = pointer<KmeansState>(state, slabs, "state");
  a.slabs = slabs;
  a.centers = pointer(centers, b * k * d, "centers");
  a.labels = pointer<int32_t>(labels, b * n, "labels");
  a.inertia = pointer<double>(inertia, b, "inertia");
  a.n_iter = pointer<int64_t>(n_iter, b, "n_iter");
  a.init = pointer(init, b * k * d, "init");
  a.init_stride = strides[2].cast<int64_t>();
  a.max_iter = max_iter;
  a.tol = tol;
  a.in = kmeans_inputs(x, sample_weight, strides, b, n, k, d, dtype);
  return a;
}

static KmeansPlusPlus kmeans_plus_plus(Address centers, Address indices, Address closest, Address left,
                                       Address candidates, Address x, Address uniforms, Address sample_weight,
                                       py::tuple strides, int64_t b, int64_t n, int64_t k, int64_t d, int dtype,
                                       int64_t trials) {
  KmeansPlusPlus a{};
  a.closest = optional_pointer(closest);
  a.left = optional_pointer<double>(left);
  a.candidates = optional_pointer<int64_t>(candidates);
  a.centers = pointer(centers, b * k * d, "centers");
  a.indices = pointer<int64_t>(indices, b * k, "indices");
  a.uniforms = pointer<double>(uniforms, b * (1 + (k - 1) * trials), "uniforms");
  a.uniforms_stride = strides[2].cast<int64_t>();
  a.trials = trials;
  a.in = kmeans_inputs(x, sample_weight, strides, b, n, k, d, dtype);
  return a;
}

void bind_kmeans(py::module_& m) {
  bind_op(m, "kmeans", kmeans, GMK_CPU(kmeans_kernels().lloyd), GMK_CUDA(kmeans_cuda));
  bind_op(m, "kmeans_plus_plus", kmeans_plus_plus, GMK_CPU(kmeans_start_kernels().plus_plus),
          GMK_CUDA(kmeans_plus_plus_cuda));
}

}  // namespace gmk

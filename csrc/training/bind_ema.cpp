// ema_update takes lists of tensors, so its bindings are written out: the general ones by addresses, as every kernel has,
// and the fast route that reads the tensors itself (core/plain_tensor.h).
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "core/dispatch.h"
#include "core/plain_tensor.h"
#include "core/tensor_args.h"
#include "training/ema.h"
#include "training/known_lists.h"

namespace gmk {

#ifndef GMK_SIMT
GMK_ISA_TABLES(EmaKernels, ema_kernels)
#endif

namespace {

// (addresses of the averages as outputs, as inputs, addresses of the values, element counts, ema dtypes, value dtypes, decay,
// ...): outputs that are read too come twice, as everywhere.
struct EmaArguments {
  std::vector<EmaPair> pairs;
  EmaUpdate update;

  explicit EmaArguments(const py::args& args, size_t own) {
    if (args.size() < 4 + own) throw py::type_error("ema_update: too few arguments");
    const size_t lists = args.size() - 4 - own;
    const auto numels = args[lists].cast<std::vector<int64_t>>();
    const auto ema_types = args[lists + 1].cast<std::vector<int>>(), types = args[lists + 2].cast<std::vector<int>>();
    const size_t n = numels.size();
    if (lists != 3 * n || ema_types.size() != n || types.size() != n)
      throw py::type_error("ema_update: lists of unequal length");
    for (size_t i = 0; i < n; ++i) {
      if (!gmk::ema_types(ema_types[i], types[i])) throw py::type_error("ema_update: no kernel for these dtypes");
      pairs.push_back({pointer(args[i].cast<Address>(), numels[i], "ema"),
                       pointer<const void>(args[2 * n + i].cast<Address>(), numels[i], "values"), numels[i],
                       ema_types[i], types[i]});
    }
    update = {pairs.data(), int64_t(n), args[lists + 3].cast<double>()};
  }
};

Status run_on(const EmaUpdate& a, int device, int threads, Address stream) {
#ifndef GMK_SIMT
  if (device == kCpuDevice) return ema_kernels().update(a, threads);
#endif
#if defined(GMK_WITH_CUDA) || defined(GMK_SIMT)
  return ema_update_cuda(a, device, reinterpret_cast<void*>(stream));
#else
  (void)a, (void)device, (void)threads, (void)stream;
  return "no kernel for this device";
#endif
}
void run(const EmaUpdate& a, int device, int threads, Address stream) {
  Status status;
  {
    py::gil_scoped_release release;
    status = run_on(a, device, threads, stream);
  }
  raise_if(status, "ema_update");
}

// Do two of the averages share memory, or one of them part of a value that is not its own?
bool overlap(const std::vector<EmaPair>& pairs, const std::vector<PlainTensor>& values,
             const std::vector<char*>& ends) {
  std::vector<size_t> order;
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (pairs[i].numel > 0) order.push_back(i);
  }
  const auto begin = [&](size_t i) { return static_cast<char*>(pairs[i].ema); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return begin(a) < begin(b); });
  for (size_t i = 1; i < order.size(); ++i)
    if (ends[order[i - 1]] > begin(order[i])) return true;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const PlainTensor& v = values[i];
    if (v.numel <= 0) continue;
    // the first average that ends behind the beginning of the value
    auto at = std::partition_point(order.begin(), order.end(), [&](size_t j) { return ends[j] <= v.data; });
    for (; at != order.end() && begin(*at) < v.data + v.bytes; ++at)
      if (*at != i || begin(i) != v.data || ends[i] != v.data + v.bytes) return true;
  }
  return false;
}

// Updates all of `ema` and returns True; or does nothing and returns False, where any tensor is not plain, has another shape
// or device than its partner, or overlaps another: the general route then does it, or says what is wrong.
// stream_of(device) -> the address of torch's current stream.
bool ema_update_plain(const py::tuple& ema, const py::tuple& values, double decay, const py::function& stream_of) {
#if defined(GMK_WITH_CUDA)
  constexpr bool kCuda = true;
#else
  constexpr bool kCuda = false;
#endif
  static KnownLists& lists = *new KnownLists;  // never destroyed: at exit Python is gone before
  const size_t n = ema.size();
  if (n == 0 || values.size() != n) return false;
  PyObject* const* const averages = PySequence_Fast_ITEMS(ema.ptr());
  PyObject* const* const weights = PySequence_Fast_ITEMS(values.ptr());
  std::vector<EmaPair> pairs(n);
  std::vector<PlainTensor> sources(n);
  std::vector<char*> ends(n);
  int64_t total = 0;
  int device = kCpuDevice;
  for (size_t i = 0; i < n; ++i) {
    PlainTensor e;
    PlainTensor& v = sources[i];
    if (!contiguous(averages[i], &e, kCuda) || !contiguous(weights[i], &v, kCuda)) return false;
    if (i == 0) device = e.device;
    if (e.device != device || v.device != device || e.dtype < 0 || !ema_types(e.dtype, v.dtype) || e.ndim != v.ndim ||
        !std::equal(e.shape, e.shape + e.ndim, v.shape))
      return false;
    pairs[i] = {e.data, v.data, e.numel, e.dtype, v.dtype};
    ends[i] = e.data + e.bytes;
    total += e.numel;
  }
  // An object is negated for life, unless `.data =` gave it the same memory negated: that is an imaginary part, which begins
  // at an odd element.
  const Known known = lists.look_up(pairs, averages, weights);
  const auto may_be_negated = [&](PyObject* t, const void* data) {
    return (known != Known::kObjects || reinterpret_cast<Address>(data) % 16 != 0) && negated(t);
  };
  for (size_t i = 0; i < n; ++i)
    if (may_be_negated(averages[i], pairs[i].ema) || may_be_negated(weights[i], pairs[i].value)) return false;
  if (known == Known::kNo && overlap(pairs, sources, ends)) return false;
  if (known != Known::kObjects) lists.remember(pairs, averages, weights);
  const EmaUpdate a{pairs.data(), int64_t(n), decay};
  int threads = 1;
  Address stream = 0;
  if (device != kCpuDevice) {
    stream = stream_of(device).cast<Address>();
  } else if (total >= 16384) {
    threads = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch_pieces().threads)).cast<int>();
  }
  run(a, device, threads, stream);
  return true;
}

}  // namespace

void bind_ema(py::module_& m) {
#ifndef GMK_SIMT
  m.def("ema_update_cpu", [](const py::args& args) {
    const EmaArguments a(args, 1);
    run(a.update, kCpuDevice, args[args.size() - 1].cast<int>(), 0);
  });
  m.def("ema_update_plain", ema_update_plain);
#else
  (void)ema_update_plain;
#endif
#if defined(GMK_WITH_CUDA) || defined(GMK_SIMT)
  m.def("ema_update_cuda", [](const py::args& args) {
    const EmaArguments a(args, 2);
    run(a.update, args[args.size() - 2].cast<int>(), 0, args[args.size() - 1].cast<Address>());
  });
#endif
}

}  // namespace gmk

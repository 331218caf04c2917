// Bindings only: what a torch.Tensor is, asked of torch itself in some 20 ns, where attributes cost 50 to 400 ns each.
//
// torch from 2.10 on carries DLPack's C exchange API (`torch.Tensor.__dlpack_c_exchange_api__`), a table of C functions
// that is stable across versions: no torch header and no linking. Without it `plain()` is false for every tensor and the
// caller takes its general route, which also has the error messages: a fast route answers or stands aside.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/dtype.h"

namespace gmk {

// The parts of dlpack.h (version 1.3) that are used here, by its names.
struct DLTensor {
  void* data;
  struct {
    int32_t device_type, device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  void* current_work_stream;
};

// What Python hands over once (gmkernels._call): borrowed for ever.
struct TorchPieces {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* threads = nullptr;   // () -> int
  PyObject* written = nullptr;   // (tuple of tensors) -> None: their versions grow
  PyCFunction is_neg = nullptr;  // the method's own C function: 56 ns, where a call by name takes 70
  getter requires_grad = nullptr;
  void* of_requires_grad = nullptr;  // what that getter is to be called with
  int (*describe)(void*, DLTensor*) = nullptr;
};
inline TorchPieces& torch_pieces() {
  static TorchPieces pieces;
  return pieces;
}

struct PlainTensor {
  char* data;
  int64_t numel, bytes;
  int ndim;
  const int64_t* shape;                          // torch's own, valid while the tensor lives
  int dtype;                                     // DType, or -1 - DLPack's type code (int64: kInt64)
  int device;                                    // kCpuDevice, or the number of a GPU
  bool operator==(const PlainTensor& o) const {  // dtype and shape
    if (dtype != o.dtype || ndim != o.ndim) return false;
    for (int d = 0; d < ndim; ++d)
      if (shape[d] != o.shape[d]) return false;
    return true;
  }
  bool overlaps(const PlainTensor& o) const { return data < o.data + o.bytes && o.data < data + bytes; }
};
constexpr int kInt64 = -1;
constexpr int kCpuDevice = -1;

// `plain` but for gradients and negation, which a tensor that was just made has not.
inline bool contiguous(PyObject* t, PlainTensor* out, bool cuda = false) {
  const TorchPieces& torch = torch_pieces();
  if (!torch.describe || (Py_TYPE(t) != torch.tensor && Py_TYPE(t) != torch.parameter)) return false;
  DLTensor d;
  if (torch.describe(t, &d) != 0) {  // sparse, nested, meta and others have no such description
    PyErr_Clear();
    return false;
  }
  constexpr int kCpu = 1, kCuda = 2;  // kDLCPU, kDLCUDA
  if ((d.device.device_type != kCpu && !(cuda && d.device.device_type == kCuda)) || d.dtype.lanes != 1) return false;
  out->device = d.device.device_type == kCpu ? kCpuDevice : d.device.device_id;
  switch (d.dtype.code * 256 + d.dtype.bits) {  // kDLInt 0, kDLFloat 2, kDLBfloat 4
    case 64:
      out->dtype = kInt64;
      break;
    case 2 * 256 + 32:
      out->dtype = kFloat32;
      break;
    case 2 * 256 + 64:
      out->dtype = kFloat64;
      break;
    case 2 * 256 + 16:
      out->dtype = kFloat16;
      break;
    case 4 * 256 + 16:
      out->dtype = kBFloat16;
      break;
    default:
      return false;
  }
  int64_t numel = 1;
  for (int i = d.ndim - 1; i >= 0; --i) {
    if (d.strides && d.shape[i] != 1 && d.strides[i] != numel && numel != 0) return false;
    numel *= d.shape[i];
  }
  if (numel > 0 && !d.data) return false;
  out->data = static_cast<char*>(d.data) + d.byte_offset;
  out->numel = numel;
  out->bytes = numel * (d.dtype.bits / 8);
  out->ndim = d.ndim;
  out->shape = d.shape;
  return true;
}

inline bool truth(PyObject* value) {  // steals the reference; an error counts as yes
  const bool yes = value != Py_False;
  if (!value) PyErr_Clear();
  Py_XDECREF(value);
  return yes;
}
inline bool negated(PyObject* t) { return truth(torch_pieces().is_neg(t, nullptr)); }  // t: `contiguous`

// Is `t` a torch.Tensor or Parameter itself, on the CPU (or, where `cuda`, on a GPU), contiguous, with memory, without a lazy
// negation and (where `grad` says that gradients are recorded) not part of a graph? Never raises.
inline bool plain(PyObject* t, bool grad, PlainTensor* out, bool cuda = false) {
  if (!contiguous(t, out, cuda)) return false;
  const TorchPieces& torch = torch_pieces();
  return !(grad && truth(torch.requires_grad(t, torch.of_requires_grad))) && !negated(t);
}

// _C.adopt_threads(() -> int): how many threads a fast route takes.
inline void adopt_threads(pybind11::object threads) { torch_pieces().threads = threads.release().ptr(); }
// _C.adopt_torch(torch.Tensor, torch.nn.Parameter, torch.empty_like, threads, written) -> are fast routes open?
inline bool adopt_torch(pybind11::object tensor, pybind11::object parameter, pybind11::object empty_like,
                        pybind11::object threads, pybind11::object written) {
  namespace py = pybind11;
  TorchPieces& torch = torch_pieces();
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  PyObject* const capsule = py::object(tensor.attr("__dlpack_c_exchange_api__")).release().ptr();
  const auto* const api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) {
    PyErr_Clear();
    return false;
  }
  if (api->version.major != 1 || !api->dltensor_from_py_object_no_sync) return false;
  PyObject* const is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  if (Py_TYPE(is_neg) != &PyMethodDescr_Type) return false;
  const PyMethodDef* const method = reinterpret_cast<PyMethodDescrObject*>(is_neg)->d_method;
  if (method->ml_flags != METH_NOARGS) return false;
  PyObject* const requires_grad = py::object(tensor.attr("requires_grad")).release().ptr();
  if (Py_TYPE(requires_grad) != &PyGetSetDescr_Type) return false;
  const PyGetSetDef* const property = reinterpret_cast<PyGetSetDescrObject*>(requires_grad)->d_getset;
  torch.requires_grad = property->get;
  torch.of_requires_grad = property->closure;
  torch.is_neg = method->ml_meth;
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  torch.empty_like = empty_like.release().ptr();
  adopt_threads(threads);
  torch.written = written.release().ptr();
  torch.describe = api->dltensor_from_py_object_no_sync;
  return true;
}

}  // namespace gmk

// Bindings only: the lists that ema_update_ found good last. They come again step after step, and to ask a tensor whether it
// is lazily negated takes longer than to update it.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "training/ema.h"

namespace gmk {

enum class Known { kNo, kAddresses, kObjects };

// Under the GIL, and no member runs Python code while it holds an iterator: is_neg, an allocation and the end of an object
// can each let another thread or a finalizer in, which may come here.
class KnownLists {
 public:
  // kAddresses: a good list had these addresses, counts and dtypes. kObjects: it was even of these objects, all alive since.
  Known look_up(const std::vector<EmaPair>& pairs, PyObject* const* ema, PyObject* const* values) const {
    const size_t i = find(pairs);
    if (i == kLists) return Known::kNo;
    const std::vector<pybind11::object>& refs = lists_[i].refs;
    if (refs.empty()) return Known::kAddresses;
    for (size_t k = 0; k < pairs.size(); ++k)
      if (target(refs[2 * k].ptr()) != ema[k] || target(refs[2 * k + 1].ptr()) != values[k]) return Known::kAddresses;
    return Known::kObjects;
  }

  // After a look-up that was not kObjects. Objects are referred to once they come again, and where they are other ones each
  // time (`[p.data for p in ...]`) ever more seldom: many references at once set off the garbage collector, milliseconds.
  void remember(const std::vector<EmaPair>& pairs, PyObject* const* ema, PyObject* const* values) {
    const size_t i = find(pairs);
    if (i == kLists) {
      List list{pairs, {}, 0};
      std::swap(list, lists_[oldest_++ % kLists]);
      return;
    }
    const uint64_t times = ++lists_[i].times;
    if ((times & (times - 1)) != 0) return;
    std::vector<pybind11::object> refs = references(pairs.size(), ema, values);
    const size_t j = find(pairs);
    if (j < kLists) std::swap(refs, lists_[j].refs);
  }

 private:
  // Parameters and buffers of two networks: more lists by turns than these, and none is known when it comes again.
  static constexpr size_t kLists = 4;

  struct List {
    std::vector<EmaPair> pairs;
    std::vector<pybind11::object> refs;  // weak, so that an id is never met again in another object; or none
    uint64_t times = 0;                  // met, with objects that were not known
  };

  size_t find(const std::vector<EmaPair>& pairs) const {
    size_t i = 0;
    while (i < kLists && !std::equal(pairs.begin(), pairs.end(), lists_[i].pairs.begin(), lists_[i].pairs.end(), same))
      ++i;
    return i;
  }
  static bool same(const EmaPair& a, const EmaPair& b) {
    return a.ema == b.ema && a.value == b.value && a.numel == b.numel && a.ema_type == b.ema_type &&
           a.value_type == b.value_type;
  }

  static PyObject* target(PyObject* ref) {  // to be compared only
#if PY_VERSION_HEX >= 0x030d0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(ref, &object) < 0) PyErr_Clear();
    Py_XDECREF(object);
    return object;
#else
    return PyWeakref_GET_OBJECT(ref);
#endif
  }

  static std::vector<pybind11::object> references(size_t n, PyObject* const* ema, PyObject* const* values) {
    std::vector<pybind11::object> refs;
    if (modules_swap()) return refs;
    refs.reserve(2 * n);
    for (size_t k = 0; k < 2 * n; ++k) {
      refs.push_back(
          pybind11::reinterpret_steal<pybind11::object>(PyWeakref_NewRef(k % 2 ? values[k / 2] : ema[k / 2], nullptr)));
      if (!refs.back()) {
        PyErr_Clear();
        return {};
      }
    }
    return refs;
  }
  // torch.utils.swap_tensors refuses tensors that have weak references. Modules call it where this flag is set.
  static bool modules_swap() {
    using pybind11::object, pybind11::reinterpret_steal;
    const object module = reinterpret_steal<object>(PyImport_ImportModule("torch.__future__"));
    const object flag = reinterpret_steal<object>(
        module ? PyObject_CallMethod(module.ptr(), "get_swap_module_params_on_conversion", nullptr) : nullptr);
    if (!flag) PyErr_Clear();
    return flag.ptr() != Py_False;
  }

  List lists_[kLists];
  size_t oldest_ = 0;
};

}  // namespace gmk

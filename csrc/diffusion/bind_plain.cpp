// The fast route of ops.diffusion_step: plain contiguous CPU tensors without a gradient, in about a third of the time of
// the general route. It answers, or returns None (and has done nothing) for everything it does not know: the general
// route (bind.cpp, ops/diffusion.py) then does the work or says what is wrong.
#include <cmath>

#include "core/plain_tensor.h"
#include "core/tensor_args.h"
#include "diffusion/diffusion.h"

namespace gmk {

Status diffusion_steps_cpu(const DiffusionStep*, int count, int threads);  // bind.cpp

namespace {

bool number(PyObject* o, double* value) {
  if (PyFloat_CheckExact(o)) {
    *value = PyFloat_AS_DOUBLE(o);
    return true;
  }
  if (!PyLong_CheckExact(o)) return false;
  *value = PyLong_AsDouble(o);
  if (*value == -1 && PyErr_Occurred()) PyErr_Clear();  // too large
  return std::isfinite(*value);
}

struct Owned {  // a Python reference that is dropped at the end
  PyObject* p = nullptr;
  ~Owned() { Py_XDECREF(p); }
};

class PlainStep {
 public:
  // diffusion_step_plain(x, model_output, coefficients, uncond, guidance_scale, history, variance, clip, noise, seed,
  //                      step, return_x0, out, x0_out, grad)
  explicit PlainStep(PyObject* const* args) : args_(args), grad_(args[14] == Py_True) {}
  PlainStep(PyObject* const* args, const PlainStep& before)
      : PlainStep(args) {  // its out and x0 are x and model_output
    x_ = before.made_[0];
    m_ = before.made_[1];
  }

  bool known() { return inputs() && outputs(); }
  const DiffusionStep& step() const { return a_; }
  PyObject* out() const { return out_; }
  PyObject* x0() const { return x0_; }
  // Autograd must notice that the tensors which it may have saved, those that were given, have changed.
  bool tell() const {
    PyObject *const out = args_[12], *const x0 = args_[13];
    if (out == Py_None && x0 == Py_None) return true;
    const Py_ssize_t both = out != Py_None && x0 != Py_None;
    const Owned given{PyTuple_Pack(1 + both, out != Py_None ? out : x0, x0)};
    const Owned done{given.p ? PyObject_CallOneArg(torch_pieces().written, given.p) : nullptr};
    return done.p;
  }
  bool reads_part_of(const PlainStep& o) const { return !apart(o.made_[0]) || !apart(o.made_[1]); }

 private:
  bool like_x(PyObject* o, const void** p, PlainTensor t = {}) {  // None: absent
    if (o == Py_None) return true;
    if (!t.data && (!plain(o, grad_, &t) || !(t == x_))) return false;
    add(o, t);
    *p = t.data;
    return true;
  }

  void add(PyObject* o, const PlainTensor& t) {
    objects_[count_] = o;
    inputs_[count_++] = t;
  }

  bool inputs() {
    if (!x_.data && (!plain(args_[0], grad_, &x_) || x_.dtype < 0)) return false;
    a_.dtype = x_.dtype;
    a_.numel = x_.numel;
    a_.x = x_.data;
    add(args_[0], x_);
    const int64_t samples = x_.ndim ? x_.shape[0] : 0;

    PlainTensor c;
    if (!plain(args_[2], grad_, &c) || c.ndim < 1 || c.ndim > 2 || c.shape[c.ndim - 1] != kCoefficients) return false;
    if (c.ndim == 2 && (samples == 0 || c.shape[0] != samples)) return false;
    if (c.dtype != kFloat32 && !(c.dtype == kFloat64 && x_.dtype == kFloat64)) return false;
    a_.coefficients = c.data;
    a_.coefficient_rows = c.ndim == 2 ? samples : 1;
    a_.wide = c.dtype == kFloat64;
    small_[small_count_++] = c;

    PyObject* const history = args_[5];
    if (!PyTuple_CheckExact(history) || PyTuple_GET_SIZE(history) > 3) return false;
    for (Py_ssize_t h = 0; h < PyTuple_GET_SIZE(history); ++h)
      if (!like_x(PyTuple_GET_ITEM(history, h), &a_.history[h])) return false;
    if (args_[1] == Py_None || !like_x(args_[1], &a_.model_output, m_) || !like_x(args_[3], &a_.uncond) ||
        !like_x(args_[6], &a_.variance) || !number(args_[4], &a_.guidance))
      return false;

    a_.low = -INFINITY;
    a_.high = INFINITY;
    if (args_[7] != Py_None) {
      if (!number(args_[7], &a_.high) || !(a_.high > 0)) return false;
      a_.low = -a_.high;
    }
    return noise(samples);
  }

  bool noise(int64_t samples) {
    const long long step = PyLong_CheckExact(args_[10]) ? PyLong_AsLongLong(args_[10]) : -1;
    if (step < 0 || step > UINT32_MAX) {
      PyErr_Clear();
      return false;
    }
    a_.step = uint32_t(step);
    a_.seed_rows = 1;
    if (args_[8] == Py_False) return args_[9] == Py_None || PyLong_CheckExact(args_[9]);
    if (args_[8] != Py_True) {
      a_.noise_kind = kGivenNoise;
      return args_[8] != Py_None && args_[9] == Py_None && like_x(args_[8], &a_.noise);
    }
    a_.noise_kind = kDrawnNoise;
    if (PyLong_CheckExact(args_[9])) {
      int overflow = 0;
      const long long seed = PyLong_AsLongLongAndOverflow(args_[9], &overflow);
      a_.seed = overflow > 0 ? PyLong_AsUnsignedLongLong(args_[9]) : uint64_t(seed);
      if (overflow < 0 || PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
      return true;
    }
    PlainTensor seeds;
    if (!plain(args_[9], false, &seeds) || seeds.dtype != kInt64 || seeds.ndim > 1) return false;
    if (seeds.ndim == 1 && (samples == 0 || seeds.shape[0] != samples)) return false;
    a_.seeds = reinterpret_cast<const int64_t*>(seeds.data);
    a_.seed_rows = seeds.ndim == 1 ? samples : 1;
    small_[small_count_++] = seeds;
    return true;
  }

  // Given outputs may be an input, element by element; every other overlap is refused by the general route.
  bool given(PyObject* o, PlainTensor* t) {
    return (known_input(o, t) || (plain(o, grad_, t) && *t == x_)) && apart(*t);
  }
  bool known_input(PyObject* o, PlainTensor* t) const {  // in place: asked already
    for (int i = 0; i < count_; ++i)
      if (objects_[i] == o) {
        *t = inputs_[i];
        return true;
      }
    return false;
  }
  bool apart(const PlainTensor& t) const {
    for (int i = 0; i < count_; ++i)
      if (t.overlaps(inputs_[i]) && t.data != inputs_[i].data) return false;
    for (int i = 0; i < small_count_; ++i)
      if (t.overlaps(small_[i])) return false;
    return true;
  }
  bool fresh(Owned* owner, PyObject** o, PlainTensor* t) {
    owner->p = PyObject_CallOneArg(torch_pieces().empty_like, args_[0]);
    *o = owner->p;
    return owner->p && contiguous(owner->p, t) && *t == x_;
  }
  bool outputs() {
    PlainTensor &out = made_[0], &x0 = made_[1];
    out_ = args_[12];
    x0_ = args_[13];
    const bool want_x0 = x0_ != Py_None || args_[11] == Py_True;
    if (args_[11] != Py_True && args_[11] != Py_False) return false;
    if (out_ != Py_None && !given(out_, &out)) return false;
    if (x0_ != Py_None && !given(x0_, &x0)) return false;
    if (out_ != Py_None && x0_ != Py_None && out.overlaps(x0)) return false;
    if (out_ == Py_None && !fresh(&new_out_, &out_, &out)) return false;
    if (want_x0 && x0_ == Py_None && !fresh(&new_x0_, &x0_, &x0)) return false;
    a_.out = out.data;
    a_.x0 = want_x0 ? x0.data : nullptr;
    return true;
  }

  PyObject* const* args_;
  const bool grad_;
  DiffusionStep a_{};
  PlainTensor x_{}, m_{}, made_[2]{};
  PlainTensor inputs_[8], small_[2];
  PyObject* objects_[8];
  int count_ = 0, small_count_ = 0;
  PyObject *out_ = nullptr, *x0_ = nullptr;
  Owned new_out_, new_x0_;
};

bool run(const DiffusionStep* steps, int number) {
  constexpr int64_t kSmall = 8192;  // below: neither threads nor other Python threads are worth waking
  Status status;
  if (steps->numel < kSmall) {
    status = diffusion_steps_cpu(steps, number, 1);
  } else {
    Owned threads{PyObject_CallNoArgs(torch_pieces().threads)};
    const long count = threads.p ? PyLong_AsLong(threads.p) : -1;
    if (count < 0) return false;
    Py_BEGIN_ALLOW_THREADS status = diffusion_steps_cpu(steps, number, int(count));
    Py_END_ALLOW_THREADS
  }
  if (status) PyErr_Format(PyExc_RuntimeError, "diffusion_step: %s", status);
  return !status;
}
PyObject* stand_aside() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* diffusion_step_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 15) {
    PyErr_SetString(PyExc_TypeError, "diffusion_step_plain takes 15 arguments");
    return nullptr;
  }
  PlainStep step(args);
  if (!step.known()) return stand_aside();
  if (!run(&step.step(), 1) || !step.tell()) return nullptr;
  if (args[11] != Py_True) return Py_NewRef(step.out());
  return PyTuple_Pack(2, step.out(), step.x0());
}

// diffusion_two_steps_plain(x, model_output, coefficients, history, coefficients of the second step, its history, out,
//                           x0_out, grad) -> (its out, out, x0) or None. The second step has out for its x and x0 for its
// model_output. `out` and `x0_out` are of the first step.
PyObject* diffusion_two_steps_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) {
    PyErr_SetString(PyExc_TypeError, "diffusion_two_steps_plain takes 9 arguments");
    return nullptr;
  }
  static PyObject* const one = PyFloat_FromDouble(1.0);
  static PyObject* const zero = PyLong_FromLong(0);
  PyObject* const none = Py_None;
  PyObject* const first[] = {args[0],  args[1], args[2], none,    one,     args[3], none,   none,
                             Py_False, none,    zero,    Py_True, args[6], args[7], args[8]};
  PlainStep a(first);
  if (!a.known()) return stand_aside();
  PyObject* const second[] = {a.out(),  a.x0(), args[4], none,     one,  args[5], none,   none,
                              Py_False, none,   zero,    Py_False, none, none,    args[8]};
  PlainStep b(second, a);
  if (!b.known() || b.reads_part_of(a)) return stand_aside();
  const DiffusionStep steps[] = {a.step(), b.step()};
  return run(steps, 2) && a.tell() ? PyTuple_Pack(3, b.out(), a.out(), a.x0()) : nullptr;
}

// same_floats(tensor, ...) -> are all plain tensors of one floating dtype and one shape? A False may be wrong.
PyObject* same_floats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  PlainTensor first{}, t{};
  for (Py_ssize_t i = 0; i < count; ++i) {
    PlainTensor* const to = i ? &t : &first;
    if (!plain(args[i], false, to, true) || to->dtype < 0 || (i && !(t == first))) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyCFunction fast(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(f));
}

}  // namespace

PyMethodDef* diffusion_plain_methods() {
  static PyMethodDef methods[] = {
      {"diffusion_step_plain", fast(diffusion_step_plain), METH_FASTCALL, nullptr},
      {"diffusion_two_steps_plain", fast(diffusion_two_steps_plain), METH_FASTCALL, nullptr},
      {"same_floats", fast(same_floats), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  return methods;
}

}  // namespace gmk

#include "bindings/_C/vmap.h"

#include <ATen/ops/movedim.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "batching/chunks.h"
#include "batching/random_rows.h"
#include "batching/sparse_results.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::python {
namespace {

int64_t to_int(PyObject* number) {
  const auto value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred() != nullptr) throw_python_error();
  return value;
}

// d in [0, rank), or nothing if it is out of range.
std::optional<int64_t> wrap_dim(int64_t dim, int64_t rank) {
  if (dim < -rank || dim >= rank) return std::nullopt;
  return dim < 0 ? dim + rank : dim;
}

// A dim of a tree: the entry of `dims` for each child, where dims is an int or None for all of
// them, or a container like the tree's. Calls f(dims of child, child); an empty result of f, or
// dims that do not fit, give an empty result.
template <class F>
py::object map_with_dims(PyObject* dims, PyObject* tree, F&& f) {
  if (dims == Py_None || PyLong_CheckExact(dims)) {
    return map_children(tree, [&](PyObject* child) { return f(dims, child); });
  }
  if (Py_TYPE(dims) != Py_TYPE(tree) || PyObject_Size(dims) != PyObject_Size(tree)) return {};
  if (PyDict_CheckExact(tree)) {
    py::object result = checked(PyDict_New());
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(tree, &position, &key, &value)) {
      PyObject* dim = PyDict_GetItemWithError(dims, key);
      if (dim == nullptr) {
        PyErr_Clear();
        return {};
      }
      const py::object mapped = f(dim, value);
      if (!mapped) return {};
      if (PyDict_SetItem(result.ptr(), key, mapped.ptr()) != 0) throw_python_error();
    }
    return result;
  }
  return map_children(tree, [&, i = Py_ssize_t{0}](PyObject* child) mutable {
    return f(PySequence_Fast_GET_ITEM(dims, i++), child);
  });
}

// The same without a result.
template <class F>
bool all_with_dims(PyObject* dims, PyObject* tree, F&& f) {
  if (PyLong_CheckExact(dims)) {
    return all_children(tree, [&](PyObject* child) { return f(dims, child); });
  }
  if (Py_TYPE(dims) != Py_TYPE(tree) || PyObject_Size(dims) != PyObject_Size(tree)) return false;
  if (PyDict_CheckExact(tree)) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(tree, &position, &key, &value)) {
      PyObject* dim = PyDict_GetItemWithError(dims, key);
      if (dim == nullptr) PyErr_Clear();
      if (dim == nullptr || !f(dim, value)) return false;
    }
    return true;
  }
  return all_children(tree, [&, i = Py_ssize_t{0}](PyObject* child) mutable {
    return f(PySequence_Fast_GET_ITEM(dims, i++), child);
  });
}

// Checks the arguments against in_dims and finds the batch size.
class Scan {
 public:
  explicit Scan(PyObject* axis_size) : size_(axis_size == Py_None ? -1 : to_int(axis_size)) {}

  // covers: `dims` is an int that stands for a whole container, which may hold values without dims
  // too.
  bool operator()(PyObject* dims, PyObject* object, bool covers = false) {
    if (dims == Py_None) return true;
    if (THPVariable_CheckExact(object)) return tensor(dims, tensor_of(object));
    if (is_plain_container(object)) {
      return all_with_dims(
          dims, object,
          [&, covers = PyLong_CheckExact(dims) != 0](PyObject* child_dims, PyObject* child) {
            return (*this)(child_dims, child, covers);
          });
    }
    if (is_plain_scalar(object)) return covers;
    return THPVariable_Check(object) && tensor(dims, tensor_of(object));
  }

  // -1 when nothing is mapped.
  int64_t size() const { return size_; }

 private:
  bool tensor(PyObject* dims, const at::Tensor& t) {
    if (!PyLong_CheckExact(dims) || t.is_nested() || t.is_quantized()) return false;
    const auto dim = wrap_dim(to_int(dims), t.dim());
    if (!dim) return false;
    const int64_t size = t.size(*dim);
    if (size_ < 0) size_ = size;
    return size == size_;
  }

  int64_t size_;
};

// The arguments as tensors of `level`; to be called on what Scan accepted.
class Lift {
 public:
  explicit Lift(const LevelPtr& level) : level_(level) {}

  py::object operator()(PyObject* dims, PyObject* object) const {
    if (dims == Py_None) return borrow(object);
    if (is_tensor(object)) {
      const at::Tensor& t = tensor_of(object);
      check_alive(t);
      return wrap(lift_alias(t, wrap_dim(to_int(dims), t.dim()), level_));
    }
    if (is_plain_container(object)) return map_with_dims(dims, object, *this);
    return borrow(object);
  }

 private:
  const LevelPtr& level_;
};

// An entry of out_dims: an int or None.
std::optional<int64_t> to_optional_int(PyObject* number) {
  if (number == Py_None) return std::nullopt;
  return to_int(number);
}

// Why an output does not suit its out_dim.
enum class Misfit { kNone, kBatched, kOutOfRange };

struct Output {
  at::Tensor value;
  Misfit misfit = Misfit::kNone;
};

// What vmap returns for an output of f. out_dim nullopt: the value that all examples share.
Output lower_output(const at::Tensor& t, std::optional<int64_t> out_dim, const Level& level) {
  Lowered lowered = lower(t, level);
  if (!out_dim) {
    if (lowered.bdim) return {{}, Misfit::kBatched};
    return {std::move(lowered.value)};
  }
  const auto dim = wrap_dim(*out_dim, t.dim() + 1);
  if (!dim) return {{}, Misfit::kOutOfRange};
  if (!lowered.bdim) {
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes.insert(sizes.begin() + *dim, level.size());
    return {lowered.value.unsqueeze(*dim).expand(sizes)};
  }
  if (*lowered.bdim != *dim) {
    return {as_marked(at::movedim(lowered.value, *lowered.bdim, *dim), t, *dim)};
  }
  return {as_marked(std::move(lowered.value), t, *dim)};
}

// The output of f with its tensors lowered; empty when it is not as simple as that.
class Lower {
 public:
  explicit Lower(const Level& level) : level_(level) {}

  py::object operator()(PyObject* dims, PyObject* object) const {
    if (THPVariable_CheckExact(object)) {
      if (dims != Py_None && !PyLong_CheckExact(dims)) return {};
      if (tensor_of(object).is_nested()) return {};
      const Output output = lower_output(tensor_of(object), to_optional_int(dims), level_);
      return output.misfit == Misfit::kNone ? wrap(output.value) : py::object();
    }
    if (is_plain_container(object)) return map_with_dims(dims, object, *this);
    return {};
  }

 private:
  const Level& level_;
};

// (leaves, dims, unflatten, fail): see NOTE [the two paths of a transform].
py::object finish_leaves(const py::object& finished, const Level& level) {
  PyObject *leaves, *dims, *unflatten, *fail;
  if (PyArg_ParseTuple(finished.ptr(), "O!O!OO", &PyList_Type, &leaves, &PyList_Type, &dims,
                       &unflatten, &fail) == 0) {
    throw_python_error();
  }
  const Py_ssize_t count = PyList_GET_SIZE(leaves);
  py::object lowered = checked(PyList_New(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Output output = lower_output(tensor_of(PyList_GET_ITEM(leaves, i)),
                                       to_optional_int(PyList_GET_ITEM(dims, i)), level);
    if (output.misfit != Misfit::kNone) {
      checked(PyObject_CallFunction(fail, "nO", i,
                                    output.misfit == Misfit::kBatched ? Py_True : Py_False));
    }
    PyList_SET_ITEM(lowered.ptr(), i, wrap(output.value).release().ptr());
  }
  return checked(PyObject_CallOneArg(unflatten, lowered.ptr()));
}

Level::Options options(int64_t size, PyObject* randomness) {
  return {.kind = LevelKind::kVmap,
          .size = size,
          .randomness = static_cast<Randomness>(to_int(randomness))};
}

bool scan_arguments(PyObject* in_dims, PyObject* arguments, Scan& scan) {
  return (PyLong_CheckExact(in_dims) || PyTuple_CheckExact(in_dims) || in_dims == Py_None) &&
         scan(in_dims, arguments);
}

}  // namespace

PyObject* vmap_call(PyObject* /*self*/, PyObject* const* args, Py_ssize_t /*count*/) {
  return guarded([&]() -> py::object {
    PyObject *func = args[0], *in_dims = args[1], *out_dims = args[2], *finish = args[5];
    PyObject *arguments = args[6], *chunk_size = args[7];
    Scan scan(args[4]);
    if (!scan_arguments(in_dims, arguments, scan) || scan.size() < 0) return not_implemented();
    if (chunk_size != Py_None && scan.size() > to_int(chunk_size)) return not_implemented();
    const LevelScope scope(options(scan.size(), args[3]));
    const Lift lift_argument(scope.level());
    const py::object lifted = map_with_dims(in_dims, arguments, lift_argument);
    const py::object output = checked(PyObject_Vectorcall(func, PySequence_Fast_ITEMS(lifted.ptr()),
                                                          PyTuple_GET_SIZE(lifted.ptr()), nullptr));
    py::object result = Lower(*scope.level())(out_dims, output.ptr());
    if (C10_LIKELY(static_cast<bool>(result))) return result;
    return finish_leaves(checked(PyObject_CallOneArg(finish, output.ptr())), *scope.level());
  });
}

PyObject* vmap_leaves(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> py::object {
    PyObject *call = args[0], *leaves = args[3], *dims = args[4];
    const LevelScope scope(count > 5 ? py::cast<const Chunks&>(py::handle(args[5])).level()
                                     : options(to_int(args[1]), args[2]));
    const Lift lift_leaf(scope.level());
    const py::object lifted = map_children(leaves, [&, i = Py_ssize_t{0}](PyObject* leaf) mutable {
      return lift_leaf(PyList_GET_ITEM(dims, i++), leaf);
    });
    return finish_leaves(checked(PyObject_CallOneArg(call, lifted.ptr())), *scope.level());
  });
}

namespace {

// torchlift::Chunks for Python.
std::unique_ptr<Chunks> make_chunks(int64_t size, int randomness, std::optional<int64_t> chunk_size,
                                    std::optional<int64_t> memory_budget, py::handle like) {
  const c10::Device device = is_tensor(like.ptr()) ? tensor_of(like.ptr()).device() : c10::kCPU;
  return std::make_unique<Chunks>(Chunks::Options{.randomness = static_cast<Randomness>(randomness),
                                                  .chunk_size = chunk_size,
                                                  .memory_budget = memory_budget},
                                  size, device);
}

void end_chunk(Chunks& chunks, const py::list& leaves, const py::list& dims) {
  std::vector<at::Tensor> tensors;
  std::vector<std::optional<int64_t>> places;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const at::Tensor& leaf = tensor_of(PyList_GET_ITEM(leaves.ptr(), static_cast<Py_ssize_t>(i)));
    std::optional<int64_t> dim =
        to_optional_int(PyList_GET_ITEM(dims.ptr(), static_cast<Py_ssize_t>(i)));
    if (dim.has_value() && *dim < 0) *dim += leaf.dim();
    tensors.push_back(leaf);
    places.push_back(dim);
  }
  chunks.end(std::move(tensors), places);
}

py::list join_chunks(Chunks& chunks) {
  py::list result;
  for (const at::Tensor& leaf : chunks.join()) result.append(wrap(leaf));
  return result;
}

py::object last_memory_report() {
  const std::optional<MemoryReport>& r = memory_report();
  if (!r.has_value()) return py::none();
  return py::make_tuple(r->examples, r->chunks, r->chunk_size, r->budget, r->peak_bytes,
                        r->result_bytes);
}

// `with row:` in Python; may be entered once at a time.
class RowContext {
 public:
  RowContext(std::shared_ptr<RandomRows> rows, int64_t row) : rows_(std::move(rows)), row_(row) {}
  void enter() { scope_.emplace(*rows_, row_); }
  void exit() { scope_.reset(); }

 private:
  std::shared_ptr<RandomRows> rows_;
  int64_t row_;
  std::optional<RandomRows::Row> scope_;
};

template <class F>
auto with_errors(F&& f) {
  py::object result = guarded_object([&]() -> py::object {
    f();
    return py::none();
  });
  return result;
}

}  // namespace

void define_chunks(py::module_& m) {
  py::class_<Chunks>(m, "Chunks")
      .def(py::init([](int64_t size, int randomness, std::optional<int64_t> chunk_size,
                       std::optional<int64_t> memory_budget, py::handle like) {
        std::unique_ptr<Chunks> chunks;
        with_errors(
            [&] { chunks = make_chunks(size, randomness, chunk_size, memory_budget, like); });
        return chunks;
      }))
      .def("next", &Chunks::next)
      .def("start", &Chunks::start)
      .def("length", &Chunks::length)
      .def("end",
           [](Chunks& chunks, const py::list& leaves, const py::list& dims) {
             with_errors([&] { end_chunk(chunks, leaves, dims); });
           })
      .def("join", &join_chunks)
      .def("close", &Chunks::close);
  m.def("memory_report", &last_memory_report);
  py::class_<RandomRows, std::shared_ptr<RandomRows>>(m, "RandomRows").def(py::init<>());
  py::class_<RowContext>(m, "RandomRow")
      .def(py::init<std::shared_ptr<RandomRows>, int64_t>())
      .def("__enter__", [](RowContext& self) { with_errors([&] { self.enter(); }); })
      .def("__exit__", [](RowContext& self, const py::args&) { self.exit(); });
}

}  // namespace torchlift::python

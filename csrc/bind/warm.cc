// The warm call: tensors that have been met before are known at a glance, and what needs nothing but tensors is
// launched without the other arguments of `attend`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <new>
#include <string_view>
#include <unordered_map>

#include "bind.h"
#include "gradients.h"
#include "tensors.h"

namespace attnkit::cpu {
namespace {

namespace py = pybind11;

// What Python keeps for a text and three tensors [batch, heads, length, head_dim] of the CPU, by their shapes and
// dtypes. Of how many keys there are only the bucket counts, the next power of two.
class Seen {
 public:
  // Tensors are those of exactly these types: a subclass might want to see the call.
  Seen(py::object tensor, py::object parameter, size_t most)
      : tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        most_(most),
        is_neg_(py::getattr(tensor_, "is_neg", py::none())) {}

  // None where nothing is kept, and for tensors that are more than their memory (lazy views, those of transforms).
  // Of `others` nothing but that is asked.
  py::object find(py::handle text, py::handle q, py::handle k, py::handle v, const py::args& others) const {
    Key key;
    if (!look(text, {q, k, v}, key) || !plain(others)) return py::none();
    const auto found = kept_.find(key);
    return found == kept_.end() ? py::none() : found->second.second;
  }

  void keep(py::object text, py::handle q, py::handle k, py::handle v, py::object what) {
    Key key;
    if (!look(text, {q, k, v}, key)) return;
    if (kept_.size() >= most_) kept_.clear();
    kept_.insert_or_assign(key, std::pair(std::move(text), std::move(what)));
  }

  // Whether tensors are dense memory of the CPU and nothing else. Of some that are, it is not known: empty ones.
  bool plain(const py::tuple& tensors) const {
    dlpack::Tensor read;
    return std::all_of(tensors.begin(), tensors.end(), [&](py::handle t) { return is_plain(t.ptr(), read); });
  }

 private:
  struct Key {
    Key() { std::memset(this, 0, sizeof *this); }  // the gaps too
    bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
    std::string_view bytes() const { return {reinterpret_cast<const char*>(this), sizeof *this}; }

    PyObject* text;  // the same object: one that is equal is looked up in Python
    int64_t size[3][4];
    uint8_t code[3], bits[3];
  };
  struct Hash {
    size_t operator()(const Key& key) const { return std::hash<std::string_view>()(key.bytes()); }
  };

  bool look(py::handle text, const std::array<py::handle, 3>& tensors, Key& key) const {
    key.text = text.ptr();
    for (size_t i = 0; i < 3; ++i) {
      dlpack::Tensor read;
      if (!is_plain(tensors[i].ptr(), read) || read.ndim != 4) return false;
      std::copy_n(read.shape, 4, key.size[i]);
      key.code[i] = read.code;
      key.bits[i] = read.bits;
    }
    if (key.size[1][2] != key.size[2][2] || key.size[1][2] <= 0) return false;
    key.size[1][2] = key.size[2][2] = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(key.size[1][2])));
    return true;
  }

  // What transforms wrap has no memory that DLPack could read. A view that only says that it is negated has.
  bool is_plain(PyObject* t, dlpack::Tensor& read) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
    if (type != tensor_.ptr() && type != parameter_.ptr()) return false;
    const dlpack::ExchangeApi* api = dlpack::exchange_api(t);
    if (api != nullptr && api->read(t, &read) == 0) {
      if (read.device_type != dlpack::kCpu || read.data == nullptr || read.lanes != 1) return false;
      const auto negated = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), t));
      if (negated.ptr() == Py_False) return true;
    }
    PyErr_Clear();
    return false;
  }

  const py::object tensor_, parameter_;
  const size_t most_;
  const py::object is_neg_;
  std::unordered_map<Key, std::pair<py::object, py::object>, Hash> kept_;
};

// `attend` of a program that needs nothing but tensors.
class Launch {
 public:
  Launch(const Program& program, float scale, int tile_q, int tile_kv, int split_kv)
      : program_(program), scale_(scale), config_(config_of(1, tile_q, tile_kv, split_kv)) {
    need(!program.carries, "a program that carries");
  }

  std::pair<int, int> run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Maybe& lse,
                          int threads) const try {
    const Config config = config_of(threads, config_.tile_q, config_.tile_kv, config_.split_kv);
    Request r;
    Status status = r.fill(program_, q, k, v, o, lse, scale_, {}, {}, {}, {}, {});
    if (status.fault == Fault::none && !r.empty) {
      py::gil_scoped_release release;
      status = attend(program_, r.problem, config);
    }
    return {static_cast<int>(status.fault), status.value};
  } catch (const std::bad_alloc&) {
    return {static_cast<int>(Fault::no_memory), -1};
  }

 private:
  const Program& program_;
  const float scale_;
  const Config config_;  // but for the threads
};

}  // namespace

void bind_warm(py::module_& m) {
  py::class_<Seen>(m, "Seen")
      .def(py::init<py::object, py::object, size_t>(), py::arg("tensor"), py::arg("parameter"), py::arg("most"))
      .def("find", &Seen::find)
      .def("keep", &Seen::keep)
      .def("plain", &Seen::plain);
  py::class_<Launch>(m, "Launch")
      .def(py::init<const Program&, float, int, int, int>(), py::keep_alive<1, 2>())
      .def("run", &Launch::run);
}

}  // namespace attnkit::cpu

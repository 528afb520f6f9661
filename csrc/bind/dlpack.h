// Tensors of other libraries, read where they lie without a call into Python: the part of DLPack's C exchange API that
// this needs (https://dmlc.github.io/dlpack; laid out as in version 1, which later minor versions only extend).
#pragma once
#include <Python.h>

#include <cstdint>

namespace attnkit::dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;  // of an element
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

// Functions of the library, of which one is called here.
struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void *allocate, *to_managed, *from_managed;
  int (*read)(void* object, Tensor* out);  // a view for as long as the object lives; 0, or -1 with a Python error set
  void* current_stream;
};

// What the type of `object` offers, or null. Asked with the GIL held; the last answer is kept, and its type with it.
inline const ExchangeApi* exchange_api(PyObject* object) {
  static PyTypeObject* s_type = nullptr;
  static const ExchangeApi* s_api = nullptr;
  PyTypeObject* type = Py_TYPE(object);
  if (type == s_type) return s_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const void* found = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_XDECREF(capsule);
  PyErr_Clear();
  const auto* api = static_cast<const ExchangeApi*>(found);
  if (api == nullptr || api->header.major != kMajorVersion || api->read == nullptr) return nullptr;
  Py_INCREF(type);
  Py_XDECREF(s_type);
  s_type = type;
  return s_api = api;
}

}  // namespace attnkit::dlpack

// The functions of tokenprune/order.h for Python: numbers as their bits, keys as integers.
#include "tokenprune/order.h"

#include <pybind11/pybind11.h>

#include <string>

#include "tokenprune/device.cuh"

namespace py = pybind11;
using namespace tokenprune;

namespace {

template <class T>
T number(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);  // the machine is little-endian
  return value;
}

template <class Key, class T>
void bind_format(py::module_& m, const std::string& name) {
  m.def(("order_key_" + name).c_str(), [](uint64_t bits) {
    const T stored = number<T>(bits);
    if constexpr (sizeof(T) == 8)
      return order_key(stored);
    else
      return order_key_of<Key>(stored, to_float(stored));
  });
  m.def(("reversed_key_" + name).c_str(), [](Key key) { return reversed_key<T>(key); });
}

}  // namespace

void bind_order(py::module_& m) {
  using Pair = Ranked<uint64_t, int64_t>;
  bind_format<uint16_t, __half>(m, "float16");
  bind_format<uint16_t, __nv_bfloat16>(m, "bfloat16");
  bind_format<uint32_t, float>(m, "float32");
  bind_format<uint64_t, double>(m, "float64");
  m.def("masked_order_key", [](float value, bool valid) { return order_key(value, valid); });
  m.def("value_of_key", &value_of_key);
  m.def("nonnegative_value_of_key", &nonnegative_value_of_key);
  m.def("pack_ranked", &pack_ranked);
  m.def("index_of_packed", &index_of_packed);
  m.def("is_better", [](uint64_t key, int64_t index, uint64_t than_key, int64_t than_index) {
    return Pair{key, index} < Pair{than_key, than_index};
  });
}

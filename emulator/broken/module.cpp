// The kernels of this folder for Python: pointers come as addresses, statuses go as CUDA's names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "broken/kernels.h"
#include "tokenprune/device.cuh"

namespace py = pybind11;
namespace emulator = tokenprune::emulator;

namespace {

using Size = std::array<unsigned, 3>;

dim3 dim(const Size& s) { return {s[0], s[1], s[2]}; }

// cudaLaunchKernelEx itself: launch() makes no empty grids.
std::string launch_raw(const Size& grid, const Size& block, size_t shared, unsigned cluster, bool cooperative) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim(grid);
  config.blockDim = dim(block);
  config.dynamicSmemBytes = shared;
  config.attrs = attributes;
  config.numAttrs = 2;
  void (*const nothing)(int) = [](int) {};
  const cudaError_t status = cudaLaunchKernelEx(&config, nothing, 0);
  emulator::finish_launches();
  return cudaGetErrorName(status);
}

template <class From, class To, class F>
void convert(uintptr_t in, uintptr_t out, size_t count, F f) {
  for (size_t i = 0; i < count; ++i) reinterpret_cast<To*>(out)[i] = f(reinterpret_cast<const From*>(in)[i]);
}

template <class T>
void bind_conversions(py::module_& m, const char* to_float_name, const char* from_float_name) {
  m.def(to_float_name, [](uintptr_t in, uintptr_t out, size_t n) {
    convert<T, float>(in, out, n, [](T x) { return tokenprune::to_float(x); });
  });
  m.def(from_float_name, [](uintptr_t in, uintptr_t out, size_t n) {
    convert<float, T>(in, out, n, [](float x) { return tokenprune::from_float<T>(x); });
  });
}

}  // namespace

PYBIND11_MODULE(_broken, m) {
  py::enum_<emulator::Schedule>(m, "Schedule", py::module_local())
      .value("forward", emulator::Schedule::kForward)
      .value("reversed", emulator::Schedule::kReversed)
      .value("shuffled", emulator::Schedule::kShuffled);
  py::enum_<emulator::MmaRounding>(m, "MmaRounding", py::module_local())
      .value("truncate", emulator::MmaRounding::kTruncate)
      .value("nearest", emulator::MmaRounding::kNearest);
  py::class_<emulator::Settings>(m, "Settings", py::module_local())
      .def_readwrite("schedule", &emulator::Settings::schedule)
      .def_readwrite("seed", &emulator::Settings::seed)
      .def_readwrite("sm_count", &emulator::Settings::sm_count)
      .def_readwrite("cooperative", &emulator::Settings::cooperative)
      .def_readwrite("shared_per_block", &emulator::Settings::shared_per_block)
      .def_readwrite("architecture", &emulator::Settings::architecture)
      .def_readwrite("largest_cluster", &emulator::Settings::largest_cluster)
      .def_readwrite("mma_rounding", &emulator::Settings::mma_rounding)
      .def_readwrite("mma_extra_bits", &emulator::Settings::mma_extra_bits)
      .def_readwrite("mma_group", &emulator::Settings::mma_group)
      .def("reset", [](emulator::Settings& s) { s = emulator::Settings(); });
  m.def("settings", &emulator::settings, py::return_value_policy::reference);
  m.def("run", [](const std::string& name, int64_t blocks, const Size& block, size_t shared, unsigned cluster,
                  bool cooperative, uintptr_t in, uintptr_t out, int variant) {
    const Arguments arguments{reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), variant};
    return std::string(cudaGetErrorName(run_kernel(name, blocks, dim(block), shared, cluster, cooperative, arguments)));
  });
  m.def("run_dependent", [](unsigned followers, uintptr_t in, uintptr_t out, int variant) {
    const Arguments arguments{reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), variant};
    return std::string(cudaGetErrorName(run_dependent(followers, arguments)));
  });
  m.def("launch_raw", launch_raw);
  m.def("kernel_names", kernel_names);
  m.def("outside_a_kernel", [] { return tokenprune::dynamic_shared() != nullptr; });
  bind_conversions<__half>(m, "half_to_float", "float_to_half");
  bind_conversions<__nv_bfloat16>(m, "bfloat16_to_float", "float_to_bfloat16");
}

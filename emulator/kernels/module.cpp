// The Python side of the emulator: the ops as torch.ops.tokenprune_emulated (on CPU tensors, through the real CUDA
// bindings and launchers), and the settings and the launch log through pybind11.
#include <cuda_runtime.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator/log.h"
#include "generated/ops.h"
#include "tokenprune/overrides.h"

STABLE_TORCH_LIBRARY(tokenprune_emulated, m) { tokenprune::define_ops(m); }

namespace py = pybind11;
namespace emulator = tokenprune::emulator;

void bind_planners(py::module_& m);  // planners.cpp
void bind_order(py::module_& m);     // order.cpp

PYBIND11_MODULE(_emulator, m) {
  py::enum_<emulator::Schedule>(m, "Schedule")
      .value("forward", emulator::Schedule::kForward)
      .value("reversed", emulator::Schedule::kReversed)
      .value("shuffled", emulator::Schedule::kShuffled);
  py::enum_<emulator::MmaRounding>(m, "MmaRounding")
      .value("truncate", emulator::MmaRounding::kTruncate)
      .value("nearest", emulator::MmaRounding::kNearest);
  py::class_<emulator::Settings>(m, "Settings")
      .def_readwrite("schedule", &emulator::Settings::schedule)
      .def_readwrite("seed", &emulator::Settings::seed)
      .def_readwrite("sm_count", &emulator::Settings::sm_count)
      .def_readwrite("shared_per_block", &emulator::Settings::shared_per_block)
      .def_readwrite("architecture", &emulator::Settings::architecture)
      .def_readwrite("largest_cluster", &emulator::Settings::largest_cluster)
      .def_readwrite("cooperative", &emulator::Settings::cooperative)
      .def_readwrite("mma_rounding", &emulator::Settings::mma_rounding)
      .def_readwrite("mma_extra_bits", &emulator::Settings::mma_extra_bits)
      .def_readwrite("mma_group", &emulator::Settings::mma_group)
      .def_readwrite("fail_launch", &emulator::Settings::fail_launch)
      .def_readwrite("fail_status", &emulator::Settings::fail_status)
      .def_readwrite("before_launch", &emulator::Settings::before_launch)
      .def("reset", [](emulator::Settings& s) { s = emulator::Settings(); });
  m.def("settings", &emulator::settings, py::return_value_policy::reference);
  // The launches since the last call: dicts of kernel, grid, block, cluster, shared, cooperative.
  m.def("take_launches", [] {
    py::list launches;
    for (const emulator::LaunchRecord& l : emulator::launch_log()) {
      py::dict entry;
      entry["kernel"] = l.kernel;
      entry["grid"] = py::make_tuple(l.grid.x, l.grid.y, l.grid.z);
      entry["block"] = py::make_tuple(l.block.x, l.block.y, l.block.z);
      entry["cluster"] = l.cluster;
      entry["shared"] = l.shared;
      entry["dependent"] = l.dependent;
      entry["cooperative"] = l.cooperative;
      launches.append(entry);
    }
    emulator::launch_log().clear();
    return launches;
  });
  // How often a device or kernel property was asked for or set since the last call.
  m.def("take_queries", [] { return emulator::query_count().exchange(0); });
  // What TOKENPRUNE_PLAN would be in a fresh process, and the names it knows.
  m.def("set_plan",
        [](const std::string& text) { tokenprune::plan_overrides() = tokenprune::PlanOverrides::parse(text); });
  m.attr("PLANNED") = py::cast(tokenprune::kPlannedNames);
  bind_planners(m);
  bind_order(m);
}

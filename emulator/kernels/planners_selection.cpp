// The planners of the selection ops, for property tests.
#include <pybind11/pybind11.h>

#include "tokenprune/selection_grouped.h"

namespace py = pybind11;
using namespace tokenprune;

void bind_selection_planner(py::module_& m) {
  py::class_<SelectPlan>(m, "SelectPlan")
      .def_readonly("cluster", &SelectPlan::cluster)
      .def_readonly("threads", &SelectPlan::threads)
      .def_readonly("keys_in_shared", &SelectPlan::keys_in_shared)
      .def_readonly("shared", &SelectPlan::shared);
  py::enum_<GroupedMemory>(m, "GroupedMemory")
      .value("all", GroupedMemory::kAll)
      .value("tables", GroupedMemory::kTables)
      .value("none", GroupedMemory::kNone);
  py::class_<GroupedPlan>(m, "GroupedPlan")
      .def_readonly("cluster", &GroupedPlan::cluster)
      .def_readonly("threads", &GroupedPlan::threads)
      .def_readonly("digit", &GroupedPlan::digit)
      .def_readonly("memory", &GroupedPlan::memory)
      .def_readonly("shared", &GroupedPlan::shared)
      .def_property_readonly("workspace_bytes", &GroupedPlan::workspace_bytes);
  m.def("plan_grouped", &plan_grouped);
  m.def("plan_select", &plan_select);
  m.def("plan_mask", &plan_mask);
  m.def("plan_entropy_threads", &plan_entropy_threads);
  m.attr("SELECT_STATIC_SHARED") = kSelectStaticShared;
}

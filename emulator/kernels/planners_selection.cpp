// The planners of the selection ops, for property tests.
#include <pybind11/pybind11.h>

#include "tokenprune/selection.h"

namespace py = pybind11;
using namespace tokenprune;

void bind_selection_planner(py::module_& m) {
  py::class_<SelectPlan>(m, "SelectPlan")
      .def_readonly("cluster", &SelectPlan::cluster)
      .def_readonly("threads", &SelectPlan::threads)
      .def_readonly("keys_in_shared", &SelectPlan::keys_in_shared)
      .def_readonly("shared", &SelectPlan::shared);
  m.def("plan_select", &plan_select);
  m.def("plan_mask", &plan_mask);
  m.def("plan_entropy_threads", &plan_entropy_threads);
  m.attr("SELECT_STATIC_SHARED") = kSelectStaticShared;
}

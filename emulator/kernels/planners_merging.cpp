// The planner of merge_tokens.
#include <pybind11/pybind11.h>

#include "tokenprune/merging.h"

namespace py = pybind11;
using tokenprune::AssignPlan;

void bind_merging_planner(py::module_& m) {
  py::class_<AssignPlan>(m, "AssignPlan")
      .def_readonly("norm_blocks", &AssignPlan::norm_blocks)
      .def_readonly("tiles", &AssignPlan::tiles)
      .def_readonly("parts", &AssignPlan::parts);
  m.def("plan_assign", &tokenprune::plan_assign);
  m.def("mean_slices", &tokenprune::mean_slices);
}

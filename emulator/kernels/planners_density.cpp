// The planner of density_peaks, and the limit behind which products are made strip by strip.
#include <pybind11/pybind11.h>

#include "tokenprune/density.h"

namespace py = pybind11;
using tokenprune::DensityPlan;

void bind_density_planner(py::module_& m) {
  py::class_<DensityPlan>(m, "DensityPlan")
      .def_readonly("samples", &DensityPlan::samples)
      .def_readonly("rows", &DensityPlan::rows)
      .def_readonly("strips", &DensityPlan::strips)
      .def_readonly("parts", &DensityPlan::parts)
      .def_property_readonly("floats", &DensityPlan::floats);
  m.def("plan_density", &tokenprune::plan_density);
  m.attr("DENSITY_BYTE_LIMIT") = tokenprune::density_byte_limit;
  m.def("set_density_byte_limit", [](int64_t bytes) { tokenprune::density_byte_limit = bytes; });
}

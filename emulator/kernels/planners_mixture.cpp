// The planner of select_mixture.
#include <pybind11/pybind11.h>

#include "tokenprune/mixture.h"

namespace py = pybind11;
using tokenprune::MixturePlan;

void bind_mixture_planner(py::module_& m) {
  py::class_<MixturePlan>(m, "MixturePlan")
      .def_readonly("threads", &MixturePlan::threads)
      .def_readonly("sorted", &MixturePlan::sorted)
      .def_readonly("summed", &MixturePlan::summed)
      .def_readonly("lists_in_shared", &MixturePlan::lists_in_shared)
      .def_readonly("keys_in_shared", &MixturePlan::keys_in_shared)
      .def_property_readonly("list_bytes", &MixturePlan::list_bytes)
      .def("bytes", &MixturePlan::bytes)
      .def("workspace_bytes", &MixturePlan::workspace_bytes);
  m.def("plan_mixture", &tokenprune::plan_mixture);
  m.attr("MIXTURE_STATIC_SHARED") = int(tokenprune::kMixtureStaticShared);
}

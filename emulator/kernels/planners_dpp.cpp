// The planner of dpp_sample for tests.
#include <pybind11/pybind11.h>

#include "tokenprune/dpp.h"

namespace py = pybind11;
using namespace tokenprune;

namespace {

DppPlan plan(int64_t batch, int64_t n, int64_t channels, int64_t k, const DeviceLimits& limits) {
  DppProblem p{};
  p.batch = batch;
  p.n = n;
  p.channels = channels;
  p.k = k;
  return plan_dpp(p, limits);
}

}  // namespace

void bind_dpp_planner(py::module_& m) {
  py::class_<DppPlan>(m, "DppPlan")
      .def_readonly("matrix", &DppPlan::matrix)
      .def_readonly("samples", &DppPlan::samples)
      .def_readonly("cluster", &DppPlan::cluster)
      .def_readonly("share", &DppPlan::share)
      .def_readonly("pitch", &DppPlan::pitch)
      .def_readonly("block", &DppPlan::block)
      .def_readonly("shared", &DppPlan::shared)
      .def_readonly("shared_rows", &DppPlan::shared_rows)
      .def_readonly("groups", &DppPlan::groups)
      .def_readonly("group_blocks", &DppPlan::group_blocks)
      .def_readonly("factor_floats", &DppPlan::factor_floats)
      .def_property_readonly("floats", &DppPlan::floats)
      .def_property_readonly("words", &DppPlan::words);
  m.def("plan_dpp", &plan);
}

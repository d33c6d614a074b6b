// The planner of coverage_sample, and its limit, for tests.
#include <pybind11/pybind11.h>

#include "tokenprune/coverage.h"

namespace py = pybind11;
using namespace tokenprune;

namespace {

CoveragePlan plan(int64_t batch, int64_t rows, int64_t n, int64_t k, const DeviceLimits& limits) {
  CoverageProblem p{};
  p.batch = batch;
  p.rows = rows;
  p.n = n;
  p.k = k;
  return plan_coverage(p, limits);
}

}  // namespace

void bind_coverage_planner(py::module_& m) {
  py::class_<CoveragePlan>(m, "CoveragePlan")
      .def_readonly("samples", &CoveragePlan::samples)
      .def_readonly("cluster", &CoveragePlan::cluster)
      .def_readonly("block", &CoveragePlan::block)
      .def_readonly("per_warp", &CoveragePlan::per_warp)
      .def_readonly("width", &CoveragePlan::width)
      .def_readonly("shared", &CoveragePlan::shared)
      .def_readonly("state_floats", &CoveragePlan::state_floats)
      .def_readonly("column_floats", &CoveragePlan::column_floats)
      .def_property_readonly("floats", &CoveragePlan::floats);
  m.def("plan_coverage", &plan);
  m.def("set_coverage_limit", [](int64_t bytes) { coverage_byte_limit = bytes; });
  m.attr("COVERAGE_BYTE_LIMIT") = coverage_byte_limit;
}

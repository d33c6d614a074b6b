// The launch planners for Python, so that property tests can ask them about any shape and device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tokenprune/limits.h"

namespace py = pybind11;

void bind_attention_rows_planner(py::module_& m);  // planners_attention_rows.cpp
void bind_compaction_planner(py::module_& m);
void bind_selection_planner(py::module_& m);
void bind_repulsion_planner(py::module_& m);
void bind_mixture_planner(py::module_& m);
void bind_density_planner(py::module_& m);
void bind_merging_planner(py::module_& m);
void bind_similarity_planner(py::module_& m);
void bind_attention_columns_planner(py::module_& m);
void bind_nms_planner(py::module_& m);
void bind_dpp_planner(py::module_& m);
void bind_coverage_planner(py::module_& m);

void bind_planners(py::module_& m) {
  py::class_<tokenprune::DeviceLimits>(m, "DeviceLimits")
      .def(py::init<>())
      .def_readwrite("sm_count", &tokenprune::DeviceLimits::sm_count)
      .def_readwrite("shared_per_block", &tokenprune::DeviceLimits::shared_per_block)
      .def_readwrite("architecture", &tokenprune::DeviceLimits::architecture)
      .def_readwrite("cooperative", &tokenprune::DeviceLimits::cooperative)
      .def_readwrite("clusters", &tokenprune::DeviceLimits::clusters);
  bind_attention_rows_planner(m);
  bind_compaction_planner(m);
  bind_selection_planner(m);
  bind_repulsion_planner(m);
  bind_mixture_planner(m);
  bind_density_planner(m);
  bind_merging_planner(m);
  bind_similarity_planner(m);
  bind_attention_columns_planner(m);
  bind_nms_planner(m);
  bind_dpp_planner(m);
  bind_coverage_planner(m);
}

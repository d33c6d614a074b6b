// The planner of the attention row pass for Python.
#include <pybind11/pybind11.h>

#include "tokenprune/attention.h"

namespace py = pybind11;

void bind_attention_rows_planner(py::module_& m) {
  using Plan = tokenprune::AttentionRowPlan;
  py::class_<Plan>(m, "AttentionRowPlan")
      .def_readonly("row_tiles", &Plan::row_tiles)
      .def_readonly("split_tiles", &Plan::split_tiles)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("thin", &Plan::thin)
      .def_readonly("resident", &Plan::resident)
      .def_readonly("shared", &Plan::shared)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("workspace", &Plan::workspace)
      .def("launches", &Plan::launches);
  m.def("plan_attention_rows", &tokenprune::plan_attention_rows, py::arg("batch"), py::arg("key_heads"),
        py::arg("group_rows"), py::arg("keys"), py::arg("dim"), py::arg("element_size"), py::arg("limits"));
  m.attr("tile_vectors") = tokenprune::kTileVectors;
  m.attr("thin_rows") = tokenprune::kThinRows;
}

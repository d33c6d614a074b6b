// The planner of the attention column pass, for property tests.
#include <pybind11/pybind11.h>

#include "tokenprune/attention_columns.h"

namespace py = pybind11;
using namespace tokenprune;

void bind_attention_columns_planner(py::module_& m) {
  py::class_<ColumnPlan>(m, "ColumnPlan")
      .def_readonly("key_tiles", &ColumnPlan::key_tiles)
      .def_readonly("head_ranges", &ColumnPlan::head_ranges)
      .def_readonly("row_parts", &ColumnPlan::row_parts)
      .def_readonly("rows_per_part", &ColumnPlan::rows_per_part)
      .def_readonly("cluster", &ColumnPlan::cluster)
      .def_readonly("teams", &ColumnPlan::teams)
      .def_readonly("resident", &ColumnPlan::resident)
      .def_readonly("items", &ColumnPlan::items)
      .def_readonly("blocks", &ColumnPlan::blocks)
      .def_readonly("ring", &ColumnPlan::ring)
      .def_readonly("shared", &ColumnPlan::shared)
      .def("launches", &ColumnPlan::launches)
      .def("partial_elements", &ColumnPlan::partial_elements);
  m.def(
      "plan_attention_columns",
      [](int64_t batch, int64_t query_heads, int64_t key_heads, int64_t rows, int64_t dim, int64_t columns,
         int element_size, bool per_head, bool every_row, bool last_only, bool one_launch, const DeviceLimits& limits) {
        return plan_attention_columns({batch, query_heads, key_heads, rows, dim, columns, element_size, per_head,
                                       every_row, last_only, one_launch},
                                      limits);
      },
      py::arg("batch"), py::arg("query_heads"), py::arg("key_heads"), py::arg("rows"), py::arg("dim"),
      py::arg("columns"), py::arg("element_size"), py::arg("per_head"), py::arg("every_row"), py::arg("last_only"),
      py::arg("one_launch"), py::arg("limits"));
  m.attr("column_tile") = kTileVectors;
  m.attr("column_team_threads") = kTileThreads;
  m.attr("column_static_shared") = kColumnStaticBytes;
}

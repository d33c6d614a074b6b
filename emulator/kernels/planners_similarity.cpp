// The planners of the similarity ops.
#include <pybind11/pybind11.h>

#include "tokenprune/similarity.h"
#include "tokenprune/similarity_paired.h"

namespace py = pybind11;
using tokenprune::PairedPlan;
using tokenprune::SimilarityPlan;

void bind_similarity_planner(py::module_& m) {
  py::class_<SimilarityPlan>(m, "SimilarityPlan")
      .def_readonly("tiles", &SimilarityPlan::tiles)
      .def_readonly("rows_per_warp", &SimilarityPlan::rows_per_warp)
      .def_readonly("cluster", &SimilarityPlan::cluster)
      .def_readonly("teams", &SimilarityPlan::teams)
      .def_readonly("blocks", &SimilarityPlan::blocks)
      .def_readonly("groups", &SimilarityPlan::groups)
      .def_readonly("rows_per_group", &SimilarityPlan::rows_per_group)
      .def_readonly("combine", &SimilarityPlan::combine)
      .def_property_readonly("workspace", &SimilarityPlan::workspace);
  m.def("plan_similarity", &tokenprune::plan_similarity);
  py::class_<PairedPlan>(m, "PairedPlan")
      .def_readonly("warps", &PairedPlan::warps)
      .def_readonly("blocks", &PairedPlan::blocks);
  m.def("plan_paired", &tokenprune::plan_paired);
}

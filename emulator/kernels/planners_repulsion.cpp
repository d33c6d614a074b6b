// The planner of repulsion_sample, and the limits of its two algorithms, for tests.
#include <pybind11/pybind11.h>

#include "tokenprune/repulsion.h"

namespace py = pybind11;
using namespace tokenprune;

namespace {

const float some = 0;

RepulsionPlan plan(int64_t batch, int64_t n, int64_t channels, int64_t axes, int64_t k, int64_t n_seeds, int first,
                   bool energy, bool sum, const DeviceLimits& limits) {
  RepulsionProblem p{};
  p.batch = batch;
  p.n = n;
  p.channels = channels;
  p.positions = axes > 0 ? &some : nullptr;
  p.axes = axes;
  p.k = k;
  p.n_seeds = n_seeds;
  p.first = static_cast<FirstPick>(first);
  p.potential = Potential::kRiesz;
  p.sum = sum;
  p.energy = energy ? &some : nullptr;
  return plan_repulsion(p, limits);
}

}  // namespace

void bind_repulsion_planner(py::module_& m) {
  py::enum_<RepulsionAlgorithm>(m, "RepulsionAlgorithm")
      .value("matrix", RepulsionAlgorithm::kMatrix)
      .value("points", RepulsionAlgorithm::kPoints)
      .value("rounds", RepulsionAlgorithm::kRounds);
  py::class_<RepulsionPlan>(m, "RepulsionPlan")
      .def_readonly("algorithm", &RepulsionPlan::algorithm)
      .def_readonly("start", &RepulsionPlan::start)
      .def_readonly("samples", &RepulsionPlan::samples)
      .def_readonly("tile", &RepulsionPlan::tile)
      .def_readonly("parts", &RepulsionPlan::parts)
      .def_readonly("greedy_block", &RepulsionPlan::greedy_block)
      .def_readonly("greedy_shared", &RepulsionPlan::greedy_shared)
      .def_readonly("fields", &RepulsionPlan::fields)
      .def_readonly("cluster", &RepulsionPlan::cluster)
      .def_readonly("share", &RepulsionPlan::share)
      .def_readonly("groups", &RepulsionPlan::groups)
      .def_readonly("group_blocks", &RepulsionPlan::group_blocks)
      .def_readonly("rounds", &RepulsionPlan::rounds)
      .def_property_readonly("floats", &RepulsionPlan::floats)
      .def_property_readonly("words", &RepulsionPlan::words);
  m.def("plan_repulsion", &plan);
  m.def("set_repulsion_limits", [](int64_t tokens, int64_t bytes, int64_t fields, int64_t rounds) {
    gram_token_limit = tokens;
    gram_byte_limit = bytes;
    point_field_limit = fields;
    round_limit = rounds;
  });
  m.attr("GRAM_TOKEN_LIMIT") = gram_token_limit;
  m.attr("GRAM_BYTE_LIMIT") = gram_byte_limit;
  m.attr("POINT_FIELD_LIMIT") = point_field_limit;
  m.attr("ROUND_LIMIT") = round_limit;
}

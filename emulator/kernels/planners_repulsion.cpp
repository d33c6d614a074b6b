// The planner of repulsion_sample, and the limits of its two algorithms, for tests.
#include <pybind11/pybind11.h>

#include "tokenprune/repulsion.h"

namespace py = pybind11;
using namespace tokenprune;

namespace {

const float no_energy = 0;

RepulsionPlan plan(int64_t batch, int64_t n, int64_t channels, int64_t k, int64_t n_seeds, int first, bool energy,
                   bool sum, const DeviceLimits& limits) {
  RepulsionProblem p{};
  p.batch = batch;
  p.n = n;
  p.channels = channels;
  p.k = k;
  p.n_seeds = n_seeds;
  p.first = static_cast<FirstPick>(first);
  p.sum = sum;
  p.energy = energy ? &no_energy : nullptr;
  return plan_repulsion(p, limits);
}

}  // namespace

void bind_repulsion_planner(py::module_& m) {
  py::class_<RepulsionPlan>(m, "RepulsionPlan")
      .def_readonly("gram", &RepulsionPlan::gram)
      .def_readonly("start", &RepulsionPlan::start)
      .def_readonly("samples", &RepulsionPlan::samples)
      .def_readonly("tile", &RepulsionPlan::tile)
      .def_readonly("greedy_block", &RepulsionPlan::greedy_block)
      .def_readonly("greedy_shared", &RepulsionPlan::greedy_shared)
      .def_readonly("rounds", &RepulsionPlan::rounds)
      .def_property_readonly("floats", &RepulsionPlan::floats)
      .def_property_readonly("words", &RepulsionPlan::words);
  m.def("plan_repulsion", &plan);
  m.def("set_repulsion_limits", [](int64_t tokens, int64_t bytes, int64_t rounds) {
    gram_token_limit = tokens;
    gram_byte_limit = bytes;
    round_limit = rounds;
  });
  m.attr("GRAM_TOKEN_LIMIT") = gram_token_limit;
  m.attr("GRAM_BYTE_LIMIT") = gram_byte_limit;
  m.attr("ROUND_LIMIT") = round_limit;
}

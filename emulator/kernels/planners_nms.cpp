// The planner of spatial_semantic_nms, and its launcher on addresses: plans that only huge inputs get, on small ones.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tokenprune/nms.h"

namespace py = pybind11;
using namespace tokenprune;

namespace {

// Contiguous inputs, all of one type.
struct Inputs {
  int type;  // a FloatType
  uintptr_t scores, features, positions, groups, mask;
  int64_t batch, n, dim, k;
};
struct Outputs {
  uintptr_t workspace, indices, selected, counts;
};

cudaError_t run(const Inputs& in, const NmsSuppression& by, const NmsPlan& plan, const Outputs& out) {
  const auto type = static_cast<FloatType>(in.type);
  const auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  const NmsProblem problem{{at(in.scores), type, in.n, 1},
                           {at(in.positions), type, 2 * in.n, 2},
                           at(in.features),
                           in.n * in.dim,
                           in.dim,
                           reinterpret_cast<const int64_t*>(in.groups),
                           in.n,
                           reinterpret_cast<const uint8_t*>(in.mask),
                           in.n,
                           in.batch,
                           in.n,
                           in.dim,
                           in.k,
                           by,
                           reinterpret_cast<void*>(out.workspace),
                           reinterpret_cast<int64_t*>(out.indices),
                           reinterpret_cast<float*>(out.selected),
                           reinterpret_cast<int64_t*>(out.counts)};
  CallStream stream{nullptr, emulator::settings().architecture >= 90};
  switch (type) {
    case FloatType::kFloat16:
      return launch_spatial_semantic_nms<__half>(problem, plan, stream);
    case FloatType::kBfloat16:
      return launch_spatial_semantic_nms<__nv_bfloat16>(problem, plan, stream);
    default:
      return launch_spatial_semantic_nms<float>(problem, plan, stream);
  }
}

}  // namespace

void bind_nms_planner(py::module_& m) {
  py::class_<Inputs>(m, "NmsInputs")
      .def(py::init<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>());
  py::class_<Outputs>(m, "NmsOutputs").def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t>());
  py::class_<NmsSuppression>(m, "NmsSuppression").def(py::init(&nms_suppression));
  py::class_<NmsPlan>(m, "NmsPlan")
      .def_readwrite("steps", &NmsPlan::steps)
      .def_readwrite("weight_blocks", &NmsPlan::weight_blocks)
      .def_readwrite("capacity", &NmsPlan::capacity)
      .def_readwrite("splits", &NmsPlan::splits)
      .def_readwrite("split_columns", &NmsPlan::split_columns)
      .def_readwrite("prepare_blocks", &NmsPlan::prepare_blocks)
      .def_readwrite("list_blocks", &NmsPlan::list_blocks)
      .def_readwrite("cluster", &NmsPlan::cluster)
      .def_readwrite("owned", &NmsPlan::owned)
      .def_readwrite("select_threads", &NmsPlan::select_threads)
      .def_readwrite("keys_in_shared", &NmsPlan::keys_in_shared)
      .def_readwrite("shared", &NmsPlan::shared)
      .def_readwrite("workspace", &NmsPlan::workspace);
  m.def("plan_nms", &plan_nms);
  m.def("run_nms", [](const Inputs& in, const NmsSuppression& by, const NmsPlan& plan, const Outputs& out) {
    const cudaError_t status = run(in, by, plan, out);
    emulator::finish_launches();
    return static_cast<int>(status);
  });
  m.def("largest_square_within", &largest_square_within);
  m.attr("NMS_ROW_TILE") = kNmsRowTile;
  m.attr("NMS_COLUMN_TILE") = kNmsColumnTile;
  m.attr("NMS_ALWAYS_LIST_BYTES") = kNmsAlwaysListBytes;
  m.attr("NMS_FEATURE_CAPACITY") = kNmsFeatureCapacity;
  m.attr("NMS_SELECT_STATIC") = kNmsSelectStatic;
}

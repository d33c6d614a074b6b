// The planner of gather_compact on addresses: for property tests, and to run its tables with other limits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tokenprune/compaction.h"

namespace py = pybind11;
using namespace tokenprune;

namespace {

struct Input {
  uintptr_t from, to;
  std::vector<int64_t> sizes, strides;
  int64_t element, dim, batch_dim;
};

std::vector<CompactTable> plan(const std::vector<Input>& inputs, uintptr_t indices,
                               const std::vector<int64_t>& index_strides, int64_t kept, const DeviceLimits& limits,
                               int64_t max_vectors) {
  CompactPlanner planner({reinterpret_cast<const int64_t*>(indices), index_strides[0], index_strides[1], kept},
                         max_vectors);
  for (const Input& in : inputs)
    planner.add(reinterpret_cast<const void*>(in.from), reinterpret_cast<void*>(in.to), in.sizes, in.strides,
                in.element, in.dim, in.batch_dim);
  return planner.tables(limits);
}

py::dict describe(const CompactTable& table) {
  py::list groups, loops, tensors;
  for (int g = 0; g < table.groups; ++g) {
    const CompactGroup& group = table.group[g];
    py::dict entry;
    entry["vectors"] = group.vectors;
    entry["width"] = group.width;
    entry["row"] = group.row.value;
    entry["first_block"] = group.first_block;
    entry["blocks"] = group.blocks.value;
    entry["first_loop"] = group.first_loop;
    entry["loops"] = group.loops;
    entry["first_tensor"] = group.first_tensor;
    groups.append(entry);
  }
  for (const CompactStep& loop : table.loop) loops.append(loop.size.value);
  for (const CompactPointers& t : table.tensor) tensors.append(reinterpret_cast<uintptr_t>(t.to));
  py::dict result;
  result["blocks"] = table.blocks;
  result["vectors_per_block"] = table.vectors_per_block;
  result["groups"] = groups;
  result["loops"] = loops;
  result["outputs"] = tensors;
  return result;
}

}  // namespace

void bind_compaction_planner(py::module_& m) {
  py::class_<Input>(m, "CompactInput")
      .def(py::init<uintptr_t, uintptr_t, std::vector<int64_t>, std::vector<int64_t>, int64_t, int64_t, int64_t>());
  m.def("plan_compact", [](const std::vector<Input>& inputs, uintptr_t indices, const std::vector<int64_t>& strides,
                           int64_t kept, const DeviceLimits& limits, int64_t max_vectors) {
    py::list tables;
    for (const CompactTable& table : plan(inputs, indices, strides, kept, limits, max_vectors))
      tables.append(describe(table));
    return tables;
  });
  m.def("run_compact", [](const std::vector<Input>& inputs, uintptr_t indices, const std::vector<int64_t>& strides,
                          int64_t kept, const DeviceLimits& limits, int64_t max_vectors) {
    // Pieces of a few vectors are hundreds of launches: too many to wait for each other.
    CallStream stream{nullptr, false};
    const cudaError_t status = launch_gather_compact(plan(inputs, indices, strides, kept, limits, max_vectors), stream);
    emulator::finish_launches();
    return static_cast<int>(status);
  });
  m.def("divide", [](uint32_t n, uint32_t by) { return divide(n, make_divisor(by)); });
  m.attr("COMPACT_GROUPS") = int(CompactTable::kGroups);
  m.attr("COMPACT_TENSORS") = int(CompactTable::kTensors);
  m.attr("COMPACT_LOOPS") = int(CompactTable::kLoops);
  m.attr("COMPACT_VECTORS") = kCompactVectors;
}

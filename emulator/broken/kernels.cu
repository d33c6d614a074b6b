#include "broken/kernels.h"

#include <map>
#include <stdexcept>

#include "broken/barriers.cuh"
#include "broken/launches.cuh"
#include "broken/memory.cuh"
#include "broken/twins.cuh"

namespace {

using Kernel = void (*)(Arguments);

const std::map<std::string, Kernel>& kernels() {
  using namespace broken;
  static const std::map<std::string, Kernel> all{
      {"reduce_twice", reduce_twice},
      {"library_reductions", library_reductions},
      {"half_at_a_barrier", half_at_a_barrier},
      {"half_at_a_cluster_barrier", half_at_a_cluster_barrier},
      {"sum_over_grid", sum_over_grid},
      {"lanes_in_different_collectives", lanes_in_different_collectives},
      {"lanes_with_different_masks", lanes_with_different_masks},
      {"mask_without_its_lane", mask_without_its_lane},
      {"shuffle_from_outside", shuffle_from_outside},
      {"ends_in_a_collective", ends_in_a_collective},
      {"one_thread_throws", one_thread_throws},
      {"read_dynamic", read_dynamic},
      {"write_dynamic", write_dynamic},
      {"read_static", read_static},
      {"write_static", write_static},
      {"read_global", read_global},
      {"write_global", write_global},
      {"read_vector", read_vector},
      {"copies", copies},
      {"copy_misaligned", copy_misaligned},
      {"copy_from_null", copy_from_null},
      {"copy_without_wait", copy_without_wait},
      {"cluster_neighbours", cluster_neighbours},
      {"cluster_misuse", cluster_misuse},
      {"cluster_access_too_late", cluster_access_too_late},
      {"multiply_half", multiply<__half>},
      {"multiply_bfloat16", multiply<__nv_bfloat16>},
      {"load_matrices", load_matrices},
      {"shuffles", shuffles},
      {"votes", votes},
  };
  return all;
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& entry : kernels()) names.push_back(entry.first);
  return names;
}

cudaError_t run_kernel(const std::string& name, int64_t blocks, dim3 block, size_t shared, unsigned cluster,
                       bool cooperative, const Arguments& arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("no kernel is named " + name);
  tokenprune::CallStream stream{nullptr, false};
  const cudaError_t status =
      tokenprune::launch({blocks, block, shared, stream, cluster, cooperative}, found->second, arguments);
  tokenprune::emulator::finish_launches();
  return status;
}

cudaError_t run_dependent(unsigned followers, const Arguments& arguments) {
  tokenprune::CallStream stream{nullptr, true};
  const tokenprune::Launch where{1, tokenprune::kWarp, 0, stream};
  cudaError_t status = tokenprune::launch(where, broken::lead, arguments);
  for (unsigned i = 0; i < followers && status == cudaSuccess; ++i)
    status = tokenprune::launch(where, broken::follow, arguments);
  tokenprune::emulator::finish_launches();
  return status;
}

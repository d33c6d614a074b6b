// repulsion_sample for many tokens of few channels and coordinates: a block, or a cluster of blocks, has all tokens of a
// sample in shared memory and makes all its picks in one launch, a step at a time (greedy.cuh).
//
// A token is `fields` floats: features, coordinates, inverse norm. Block r of the cluster owns tokens [r * share,
// (r + 1) * share): their fields are in its shared memory, [fields, share], and the rest in registers (OwnTokens). The
// block that has the best candidate of a step has already sent its fields to all others when they learn of it. A step is
// one barrier of the block and one of the cluster, and `fields` multiply-adds for every token.
//
// grid: samples * cluster; block: up to 1024 threads; shared: point_shared(). Reads fields * n floats.
#pragma once

#include "tokenprune/repulsion_seeds.cuh"
#include "tokenprune/repulsion_start.cuh"

namespace tokenprune {

// The rule of a block that owns the tokens [first, end), a thread every blockDim-th.
template <ObjectiveKind kind>
struct PointsRule {
  const RepulsionObjective<kind> objective;
  const float* const energies;  // of the sample, or null
  const int first, end, channels, fields, share;
  const float* const own;  // [fields, share]
  float* const states;     // [share]
  float* const sent;       // [2, kMaxCluster, fields]: the candidates of all blocks, two sets in turn
  int64_t* const indices;
  unsigned available = 0;  // a bit for each of the thread's tokens
  Candidate mine = kNoCandidate;

  // f(e, i) for every token i of the thread, the e-th.
  template <class F>
  __device__ __forceinline__ void for_own(F&& f) const {
#pragma unroll 1
    for (int e = 0, i = first + static_cast<int>(threadIdx.x); i < end; ++e, i += blockDim.x) f(e, i);
  }

  __device__ __forceinline__ uint32_t key(int i) const {
    return objective.key(states[i - first], energies == nullptr ? 0 : energies[i]);
  }

  // Offers come in the order of the tokens, so that equals leave the one with the lower index.
  __device__ __forceinline__ void offer(int i, uint32_t value) {
    if (value > mine.key) mine = {value, static_cast<uint32_t>(i)};
  }

  // Sends the fields of the block's candidate to the whole cluster.
  __device__ __forceinline__ void publish(Candidate candidate, unsigned set) const {
    if (candidate.key == kNoKey) return;
    const int local = static_cast<int>(candidate.index) - first;
    for (unsigned rank = warp_id(); rank < cluster_size(); rank += blockDim.x / kWarp) {
      float* target = cluster_shared(sent, rank) + (set * kMaxCluster + cluster_rank()) * fields;
      for (int f = lane_id(); f < fields; f += kWarp) target[f] = own[f * share + local];
    }
  }

  // Applies j, whose fields are `step` floats apart, to the available tokens, of which it is none from now on.
  __device__ __forceinline__ void apply(int j, const float* point, int step) {
    const int norm = fields - 1;
    mine = kNoCandidate;
    for_own([&](int e, int i) {
      if (i == j) available &= ~(1u << e);
      if (!(available >> e & 1)) return;
      const float* here = own + i - first;
      float dot = 0;
#pragma unroll 4
      for (int c = 0; c < channels; ++c) dot = __fmaf_rn(here[c * share], point[c * step], dot);
      const float cosine = cosine_of(dot, here[norm * share], point[norm * step]);
      states[i - first] = objective.updated(states[i - first], cosine, [&] {
        return squared_distance(here + channels * share, share, point + channels * step, step, norm - channels);
      });
      offer(i, key(i));
    });
  }

  __device__ __forceinline__ Candidate best() const { return mine; }
  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    const int j = static_cast<int>(pick.index);
    if (cluster_rank() == 0 && threadIdx.x == 0) indices[slot] = j;
    if (cluster_size() == 1)
      apply(j, own + j, share);
    else
      apply(j, sent + (slot % 2 * kMaxCluster + j / share) * fields, 1);
  }
};

template <ObjectiveKind kind>
__global__ void __launch_bounds__(1024, 1)
    points_kernel(const RepulsionProblem p, const RepulsionWorkspace w, int share) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  TOKENPRUNE_SHARED(uint32_t[kPointMostTokens / 32], seeds);
  wait_for_launch_before();
  const int64_t sample = blockIdx.x / cluster_size();
  const int n = static_cast<int>(p.n), fields = w.fields;
  const int first = min(static_cast<int>(cluster_rank()) * share, n), end = min(first + share, n);
  const float* points = w.points + sample * n * fields;
  float *own = reinterpret_cast<float*>(dynamic_shared()), *states = own + fields * share;
  PointsRule<kind> rule{RepulsionObjective<kind>(p),
                        p.energy == nullptr ? nullptr : p.energy + sample * n,
                        first,
                        end,
                        static_cast<int>(p.channels),
                        fields,
                        share,
                        own,
                        states,
                        states + share,
                        p.indices + sample * p.k};
  for (int q = threadIdx.x; q < fields * (end - first); q += blockDim.x)
    own[q % fields * share + q / fields] = points[int64_t(first) * fields + q];
  if (cluster_size() > 1) cluster_sync();  // all blocks are there: their shared memory can be written
  const bool seeded = mark_seeds(p.seeds + sample * p.n_seeds, p.n_seeds, n, seeds);
  const uint32_t* first_keys = w.key + sample * n;
  rule.for_own([&](int e, int i) {
    states[i - first] = rule.objective.initial_state();
    if (first_keys[i] != kNoKey && !is_seed(seeds, i)) rule.available |= 1u << e;
  });
  for_seeds(seeds, n, [&](int seed) { rule.apply(seed, points + int64_t(seed) * fields, 1); });
  if (!seeded)
    rule.for_own([&](int e, int i) {
      if (rule.available >> e & 1) rule.offer(i, first_keys[i]);
    });
  const int64_t picked =
      greedy_select(rule, slots, p.k, [&](Candidate best, unsigned set) { rule.publish(best, set); });
  if (cluster_rank() == 0 && threadIdx.x == 0) p.counts[sample] = picked;
}

inline cudaError_t launch_points(const RepulsionProblem& p, const RepulsionPlan& plan, const RepulsionWorkspace& w,
                                 CallStream& stream) {
  return dispatch_objective(p, [&](auto kind) {
    return launch({p.batch * plan.cluster, dim3(plan.greedy_block), static_cast<size_t>(plan.greedy_shared), stream,
                   static_cast<unsigned>(plan.cluster)},
                  points_kernel<decltype(kind)::value>, p, w, plan.share);
  });
}

}  // namespace tokenprune

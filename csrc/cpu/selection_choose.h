// Choosing the best candidates of one sample in linear time, and listing them in ascending order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/half.h"
#include "parallel.h"
#include "tensor.h"
#include "tokenprune/order.h"

namespace tokenprune {

template <class Key>
struct Workspace {
  explicit Workspace(int64_t n) : keys(new Key[n]), scratch(new Key[n]), chosen(new uint8_t[n]) {}
  std::unique_ptr<Key[]> keys, scratch;
  std::unique_ptr<uint8_t[]> chosen;
};

// f(sample, workspace) for every sample. Workspaces, made from n and `sizes`, are made here: one for each piece of the batch
// that can run at the same time, and not one for each sample.
template <class Space, class F, class... Sizes>
void over_samples(int64_t batch, int64_t n, const F& f, Sizes... sizes) {
  constexpr int64_t kWorthAThread = 32768;  // elements; below this, waking a thread costs more than it saves
  const int64_t threads = batch > 1 && batch * n > kWorthAThread ? torch::stable::get_num_threads() : 1;
  const int64_t pieces = std::min(batch, threads);
  std::vector<Space> spaces;
  spaces.reserve(pieces);
  for (int64_t p = 0; p < pieces; ++p) spaces.emplace_back(n, sizes...);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t b = batch * p / pieces; b < batch * (p + 1) / pieces; ++b) f(b, spaces[p]);
  });
}

// The candidates above `key` and the first `ties` of those equal to it are the best ones.
template <class Key>
struct Threshold {
  Key key;
  int64_t ties;
};

// The threshold of the `count` best of `size` candidates, 1 <= count <= size, keys not kNoKey. Each round spreads the
// range that the keys really take over the bins of a histogram and goes on with the keys of one bin; scores of one
// sample lie in a narrow range, so that the second round usually is the last.
template <class Key>
Threshold<Key> threshold_of_best(const Key* keys, int64_t size, int64_t count, Key* scratch) {
  constexpr int kBinBits = 9;
  while (true) {
    Key low = ~Key(0), high = 0;
    for (int64_t i = 0; i < size; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    if (low == high) return {high, count};
    int shift = 0;
    while (((high - low) >> shift) >> kBinBits) ++shift;
    int64_t bins[1 << kBinBits] = {};
    for (int64_t i = 0; i < size; ++i) ++bins[(keys[i] - low) >> shift];
    Key bin = (high - low) >> shift;
    for (; count > bins[bin]; --bin) count -= bins[bin];
    // The whole bin: no further round, and no ties to search for.
    if (count == bins[bin]) return {static_cast<Key>(low + (bin << shift) - 1), 0};
    if (shift == 0) return {static_cast<Key>(low + bin), count};
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key key = keys[i];  // read before the write: from the second round on, keys and scratch are the same
      scratch[kept] = key;
      kept += ((key - low) >> shift) == bin;
    }
    keys = scratch;
    size = kept;
  }
}

// Adds the `count` best candidates (or all, if there are fewer) to `chosen`.
template <class Key>
void choose_best(const Key* keys, int64_t n, int64_t count, Key* scratch, uint8_t* chosen) {
  if (count <= 0) return;
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i) candidates += keys[i] != kNoKey;
  if (count >= candidates) {
    for (int64_t i = 0; i < n; ++i) chosen[i] |= keys[i] != kNoKey;
    return;
  }
  const Key* from = keys;
  if (candidates < n) {
    int64_t kept = 0;
    for (int64_t i = 0; kept < candidates; ++i) {
      scratch[kept] = keys[i];
      kept += keys[i] != kNoKey;
    }
    from = scratch;
  }
  Threshold<Key> threshold = threshold_of_best(from, candidates, count, scratch);
  for (int64_t i = 0; i < n; ++i) chosen[i] |= keys[i] > threshold.key;
  for (int64_t i = 0; threshold.ties > 0; ++i) {
    if (keys[i] != threshold.key) continue;
    chosen[i] = 1;
    --threshold.ties;
  }
}

// Writes the first `capacity` marked indices, then -1, and returns how many there are.
inline int64_t list_ascending(const uint8_t* marked, int64_t n, int64_t capacity, int64_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < capacity; ++i) {
    out[found] = i;  // overwritten by the next index unless this one counts: no branch to mispredict
    found += marked[i] != 0;
  }
  std::fill(out + found, out + capacity, int64_t(-1));
  return found;
}

// An optional bool mask [B, N] as rows of bytes; no mask is all True.
struct MaskRows {
  explicit MaskRows(const OptionalTensor& mask) : present(mask.has_value()) {
    if (!present) return;
    held = with_contiguous_rows(*mask);
    data = mask_bytes(*held);
    stride = held->stride(0);
  }
  // Element i of the result is nonzero where token i of the sample counts, or the result is null: all count.
  const uint8_t* row(int64_t sample) const { return present ? data + sample * stride : nullptr; }

  bool present;
  OptionalTensor held;
  const uint8_t* data = nullptr;
  int64_t stride = 0;
};

}  // namespace tokenprune

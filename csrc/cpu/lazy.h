// Lazy greedy selection. What a candidate is worth only falls as tokens are selected, so that its value over the first
// few of them is an upper bound. A heap keeps the bounds; candidates at its top are brought up to date until one that
// is up to date stays there: that one is the best of all, ties included, because the order of the heap is the order of
// candidates. Most candidates are never compared with most of the selected tokens.
#pragma once

#include <limits>
#include <vector>

#include "cpu/unit_rows.h"
#include "tokenprune/order.h"

namespace tokenprune {

template <class A>
using Key = decltype(order_key(A()));
// Sorts as the order of candidates: the lesser rank is the better candidate.
template <class A>
using Rank = Ranked<Key<A>, int64_t>;

// Behind every candidate.
template <class A>
Rank<A> worst_rank() {
  return {kNoKey, std::numeric_limits<int64_t>::max()};
}

// The order of the heap, whose top is the best candidate.
template <class Rank>
bool worse(const Rank& a, const Rank& b) {
  return b < a;
}

constexpr int64_t kSpread = 4;  // tokens in a group have seen numbers of selected tokens that differ by this at most

// f(tokens, count) for pieces of the tokens, which are sorted by how many of the `last` selected ones they have seen: on
// several threads when that pays, and one comparison costs `work` multiply-adds.
template <class F>
void in_pieces(Team& team, std::vector<int64_t>& tokens, const std::vector<int64_t>& seen, int64_t last, int64_t work,
               const F& f) {
  constexpr int64_t kCounted = 12;
  std::sort(tokens.begin(), tokens.end(),
            [&](int64_t a, int64_t b) { return seen[a] != seen[b] ? seen[a] < seen[b] : a < b; });
  const int64_t count = tokens.size(), pieces = (count + kMaxPairRows - 1) / kMaxPairRows;
  int64_t total = 0;
  for (const int64_t i : tokens) total += std::min(last - seen[i], kCounted) * work;
  team.parallel_for(pieces, total >= 2 * kParallelWork ? 1 : pieces, [&](int64_t begin, int64_t end) {
    f(tokens.data() + begin * kMaxPairRows, std::min(end * kMaxPairRows, count) - begin * kMaxPairRows);
  });
}

// The same for groups of at most kMaxPairRows tokens that have seen about as many.
template <class F>
void in_groups(Team& team, std::vector<int64_t>& tokens, const std::vector<int64_t>& seen, int64_t last, int64_t work,
               const F& f) {
  in_pieces(team, tokens, seen, last, work, [&](const int64_t* piece, int64_t count) {
    for (int64_t at = 0; at < count;) {
      int64_t next = at + 1;
      while (next < count && next < at + kMaxPairRows && seen[piece[next]] <= seen[piece[at]] + kSpread) ++next;
      f(piece + at, next - at);
      at = next;
    }
  });
}

// Takes the best token out of a heap that is not empty. fresh(i): is token i up to date? bring_up(tokens, limit) brings
// tokens up to date, but may leave those that it finds worse than `limit`; rank_of(i) is the rank of what is known
// of token i.
template <class Rank, class Fresh, class BringUp, class RankOf>
int64_t pop_best(std::vector<Rank>& heap, std::vector<int64_t>& batch, const Fresh& fresh, const BringUp& bring_up,
                 const RankOf& rank_of) {
  constexpr int64_t kSmallBatch = 4, kLargeBatch = 64;
  Rank limit{kNoKey, std::numeric_limits<int64_t>::max()};  // the best candidate that is up to date
  for (int64_t size = kSmallBatch; !fresh(heap.front().index); size = std::min(2 * size, kLargeBatch)) {
    batch.clear();
    while (!heap.empty() && static_cast<int64_t>(batch.size()) < size && heap.front() < limit) {
      const int64_t i = heap.front().index;
      if (fresh(i)) {
        limit = heap.front();
        break;
      }
      batch.push_back(i);
      std::pop_heap(heap.begin(), heap.end(), worse<Rank>);
      heap.pop_back();
    }
    bring_up(batch, limit);
    for (const int64_t i : batch) {
      heap.push_back(rank_of(i));
      if (fresh(i)) limit = std::min(limit, heap.back());
      std::push_heap(heap.begin(), heap.end(), worse<Rank>);
    }
  }
  const int64_t best = heap.front().index;
  std::pop_heap(heap.begin(), heap.end(), worse<Rank>);
  heap.pop_back();
  return best;
}

}  // namespace tokenprune

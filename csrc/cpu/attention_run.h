// One call of an attention op: its memory, its work items and the order in which their results are combined.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "args/attention.h"
#include "cpu/attention_plan.h"
#include "dispatch.h"
#include "parallel.h"
#include "tokenprune/math.h"

namespace tokenprune {

// One allocation, cut into arrays that start on cache lines.
class Workspace {
 public:
  template <class A>
  int64_t reserve(int64_t count) {
    const int64_t offset = size_;
    size_ += round_up(count * static_cast<int64_t>(sizeof(A)), 64);
    return offset;
  }
  void allocate() {
    if (size_ == 0) return;
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
    if (!memory_) throw OutOfMemory("cannot allocate " + std::to_string(size_) + " bytes of working memory");
  }
  template <class A>
  A* at(int64_t offset) const {
    return reinterpret_cast<A*>(memory_.get() + offset);
  }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

struct AttentionCall {
  Tensor query, key;                                                  // contiguous last dimension
  OptionalTensor key_indices, query_mask, key_mask, query_positions;  // likewise
  OptionalTensor lse_in;                                              // contiguous, in the arithmetic type
  std::optional<Tensor> scores, lse, entropy;                         // outputs, contiguous
  double scale;
  bool causal, cosine;
  AttentionReductions reductions;
};

template <class T>
class AttentionRun {
  using A = Wide<T>;

 public:
  AttentionRun(const AttentionCall& call, const AttentionShape& shape)
      : call_(call), shape_(shape), kernels_(attention_kernels<T>()), plan_(plan_attention(shape, kernels_.width)) {
    const int64_t width = kernels_.width, total = plan_.rows * group(), chunks = ceil_div(keys(), kAttentionChunk);
    padded_rows_ = round_up(plan_.rows, width);
    kinds_ = static_cast<int64_t>(call.reductions.rows.size());
    every_row_ = call.reductions.every_row();
    indices_ = call.key_indices ? call.key_indices->template const_data_ptr<int64_t>() : nullptr;
    index_stride_ = indices_ ? call.key_indices->stride(0) : 0;
    columns_ = call.key_indices ? call.key_indices->size(1) : keys();
    out_heads_ = shape.per_head ? shape.query_heads : 1;
    // What all threads share.
    norms_ = shared_.reserve<A>(call.cosine ? shape.batch * shape.key_heads * keys() : 0);
    gathered_ = shared_.reserve<A>(
        plan_.combine_later ? shape.batch * plan_.blocks * plan_.splits * plan_.gathered + width : 0);
    groups_ = plan_.combine_later ? 1 : plan_.groups;
    partial_in_place_ = shape.scores && groups_ == 1 && !call.key_indices;
    partial_ = shared_.reserve<A>(
        shape.scores && !partial_in_place_ && !every_row_ ? shape.batch * groups_ * kinds_ * out_heads_ * keys() : 0);
    valid_ = shared_.reserve<A>(shape.scores ? shape.batch * plan_.blocks * padded_rows_ : 0);
    counts_ = shared_.reserve<int64_t>(2 * shape.batch);
    // What each thread has for itself.
    const int64_t block = std::min<int64_t>(shape.dim, 256);  // of dimensions, simd/dot.h
    const int64_t query_size = plan_.few ? total * round_up(shape.dim, width) : plan_.stride * shape.dim;
    Workspace own;
    own_.query = own.reserve<A>(query_size);
    own_.key = own.reserve<A>(plan_.few ? 0 : std::max<int64_t>(4, std::min(keys(), kAttentionChunk)) * block);
    const int64_t kept = plan_.few ? total : shape.scores ? keys() : std::min(keys(), kAttentionChunk);
    own_.logits = own.reserve<A>(kept * plan_.stride + width);
    own_.factors = own.reserve<A>(plan_.few ? total : chunks * plan_.stride + width);
    own_.sums = own.reserve<A>(plan_.few ? 0 : 2 * chunks * plan_.stride);
    own_.gathered = own.reserve<A>(shape.scores && !plan_.combine_later ? plan_.gathered + width : 0);
    own_.positions = own.reserve<int64_t>(call.causal ? plan_.rows : 0);
    // Few enough threads that their scratch memory stays bounded, whatever the machine.
    constexpr int64_t kOwnBytes = 24 << 20;
    const int64_t items = shape.batch * plan_.groups * plan_.splits;
    slots_ = items == 1 ? 1 : std::min<int64_t>(items, torch::stable::get_num_threads());
    slots_ = std::max<int64_t>(1, std::min(slots_, kOwnBytes / own.size()));
    own_size_ = own.size();
    own_begin_ = shared_.reserve<char>(slots_ * own_size_);
    shared_.allocate();
  }

  void run() {
    if (shape_.scores) read_query_mask();
    if (call_.cosine) compute_norms();
    std::atomic<int64_t> next{0};
    const int64_t items = shape_.batch * plan_.groups * plan_.splits;
    parallel_for(slots_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run_item(item, slot);
    });
    if (!shape_.scores) return;
    if (plan_.combine_later) combine();
    if (!every_row_) write_scores();
  }

 private:
  int64_t keys() const { return shape_.keys; }
  int64_t scored() const { return every_row_ ? columns_ : keys(); }  // keys are reduced, columns written
  int64_t group() const { return shape_.query_heads / shape_.key_heads; }
  int64_t blocks_per_group() const { return ceil_div(plan_.blocks, plan_.groups); }
  A* partial(int64_t sample, int64_t part) const {
    A* base = partial_in_place_ ? static_cast<A*>(call_.scores->mutable_data_ptr()) : shared_.at<A>(partial_);
    return base + (sample * groups_ + part) * kinds_ * out_heads_ * keys();
  }

  void read_query_mask() {
    int64_t* counts = shared_.at<int64_t>(counts_);
    const uint8_t* mask = mask_bytes(call_.query_mask);
    const int64_t stride = mask ? call_.query_mask->stride(0) : 0;
    for (int64_t b = 0; b < shape_.batch; ++b) {
      A* valid = shared_.at<A>(valid_) + b * plan_.blocks * padded_rows_;
      int64_t count = 0, last = -1;
      for (int64_t block = 0; block < plan_.blocks; ++block)
        for (int64_t r = 0; r < padded_rows_; ++r) {
          const int64_t row = block * plan_.rows + r;
          const bool on = r < plan_.rows && row < shape_.rows && (mask == nullptr || mask[b * stride + row]);
          valid[block * padded_rows_ + r] = on;
          count += on;
          if (on) last = row;
        }
      counts[2 * b] = count;
      counts[2 * b + 1] = last;
    }
  }

  void compute_norms() {
    constexpr int64_t kPiece = 64;
    const int64_t pieces = ceil_div(keys(), kPiece), heads = shape_.key_heads;
    const T* key = static_cast<const T*>(call_.key.const_data_ptr());
    const int64_t grain = 1 + (1 << 18) / (kPiece * shape_.dim);
    parallel_for(shape_.batch * heads * pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / pieces, first = i % pieces * kPiece, n = std::min(kPiece, keys() - first);
        const T* rows = key + head / heads * call_.key.stride(0) + head % heads * call_.key.stride(1);
        const int64_t stride = call_.key.stride(2);
        kernels_.norms(rows + first * stride, stride, n, shape_.dim, shared_.at<A>(norms_) + head * keys() + first);
      }
    });
  }

  AttentionReduce<A> reduction(int64_t sample, int64_t block) const {
    const HeadReduction heads = call_.reductions.heads;
    const int64_t last = shared_.at<int64_t>(counts_)[2 * sample + 1] - block * plan_.rows;
    AttentionReduce<A> reduce{};
    reduce.stride = plan_.few ? plan_.stride : padded_rows_;
    reduce.parts = 1;
    reduce.max_heads = heads == HeadReduction::kMax;
    reduce.head_divisor = heads == HeadReduction::kMean ? A(shape_.query_heads) : A(1);
    reduce.rows = std::min(plan_.rows, shape_.rows - block * plan_.rows);
    reduce.row_valid = shared_.at<A>(valid_) + (sample * plan_.blocks + block) * padded_rows_;
    reduce.last = last < plan_.rows ? last : -1;
    reduce.kinds = reinterpret_cast<const int*>(call_.reductions.rows.data());
    reduce.n_kinds = kinds_;
    reduce.kind_stride = out_heads_ * keys();
    return reduce;
  }

  // Reduces the rows of a block for the keys [begin, end) or, with query_reduction none, writes them at these columns.
  void score_rows(AttentionReduce<A>& rows, int64_t sample, int64_t part, int64_t block, int64_t head, int64_t begin,
                  int64_t end) const {
    if (every_row_) return write_rows(rows, sample, block, head, begin, end);
    rows.out = partial(sample, part) + head * keys();
    (plan_.few ? kernels_.reduce_few : kernels_.reduce_lanes)(rows, begin, end);
  }

  void write_rows(const AttentionReduce<A>& rows, int64_t sample, int64_t block, int64_t head, int64_t begin,
                  int64_t end) const {
    const int64_t key_stride = plan_.few ? 1 : rows.stride, row_stride = plan_.few ? rows.stride : 1;
    const int64_t line = (sample * out_heads_ + head) * shape_.rows + block * plan_.rows;
    A* out = static_cast<A*>(call_.scores->mutable_data_ptr()) + line * columns_;
    constexpr int64_t kPiece = 16;  // columns: whether rows or keys are neighbours, the first-level cache holds them
    for (int64_t first = begin; first < end; first += kPiece)
      for (int64_t row = 0; row < rows.rows; ++row)
        for (int64_t column = first; column < std::min(first + kPiece, end); ++column) {
          const int64_t key = key_of(sample, column);
          A value = 0;
          if (key >= 0 && rows.row_valid[row] != 0) {
            const A* from = rows.from + key * key_stride + row * row_stride;
            value = from[0];
            for (int64_t part = 1; part < rows.parts; ++part) {
              const A more = from[part * rows.part_stride];
              value = rows.max_heads ? nan_max(value, more) : value + more;
            }
            value /= rows.head_divisor;
          }
          out[row * columns_ + column] = value;
        }
  }

  int64_t key_of(int64_t sample, int64_t column) const {
    return indices_ == nullptr ? column : indices_[sample * index_stride_ + column];
  }

  void run_item(int64_t item, int64_t slot) const {
    char* own = shared_.at<char>(own_begin_) + slot * own_size_;
    const auto array = [&](int64_t offset) { return reinterpret_cast<A*>(own + offset); };
    const int64_t split = item % plan_.splits, part = item / plan_.splits % plan_.groups;
    const int64_t sample = item / plan_.splits / plan_.groups;
    const int64_t first_head = split * shape_.key_heads / plan_.splits;
    const int64_t end_head = (split + 1) * shape_.key_heads / plan_.splits;
    const int64_t first_block = part * plan_.blocks / plan_.groups,
                  end_block = (part + 1) * plan_.blocks / plan_.groups;
    const AttentionSpace<A> space{array(own_.query), array(own_.key), array(own_.logits), array(own_.factors),
                                  array(own_.sums),  plan_.stride,    shape_.scores};
    for (int64_t block = first_block; block < end_block; ++block) {
      A* gathered = plan_.combine_later ? gathered_of(sample, block, split) : array(own_.gathered);
      AttentionHead<T> head = head_of(sample, block, reinterpret_cast<int64_t*>(own + own_.positions));
      AttentionSpace<A> sized = space;
      if (!plan_.few) sized.lanes = round_up(group() * head.rows, kernels_.width);
      AttentionReduce<A> reduce{};
      if (shape_.scores) reduce = reduction(sample, block);
      reduce.from = gathered;
      reduce.first = block == first_block;
      for (int64_t h = first_head; h < end_head; ++h) {
        point_to_head(head, sample, block, h);
        (plan_.few ? kernels_.softmax_few : kernels_.softmax_lanes)(head, sized);
        if (!shape_.scores) continue;
        AttentionGather<A> gather{head.rows,        keys(),          0,        group(),
                                  reduce.max_heads, h == first_head, gathered, reduce.stride};
        const auto gather_rows = plan_.few ? kernels_.gather_few : kernels_.gather_lanes;
        if (!shape_.per_head) {
          gather_rows(gather, sized);
          continue;
        }
        for (int64_t q = 0; q < group(); ++q) {
          gather.head_begin = q;
          gather.head_end = q + 1;
          gather.first = true;
          gather_rows(gather, sized);
          score_rows(reduce, sample, part, block, h * group() + q, 0, scored());
        }
      }
      if (!shape_.scores || shape_.per_head || plan_.combine_later) continue;
      score_rows(reduce, sample, part, block, 0, 0, scored());
    }
  }

  A* gathered_of(int64_t sample, int64_t block, int64_t split) const {
    return shared_.at<A>(gathered_) + ((sample * plan_.blocks + block) * plan_.splits + split) * plan_.gathered;
  }

  // Everything about the rows of a block that does not depend on the head.
  AttentionHead<T> head_of(int64_t sample, int64_t block, int64_t* positions) const {
    AttentionHead<T> head{};
    const int64_t first = block * plan_.rows;
    head.query_head_stride = call_.query.stride(1);
    head.query_row_stride = call_.query.stride(2);
    head.key_stride = call_.key.stride(2);
    head.group = group();
    head.rows = std::min(plan_.rows, shape_.rows - first);
    head.keys = keys();
    head.dim = shape_.dim;
    head.scale = static_cast<A>(call_.scale);
    if (call_.key_mask) head.key_mask = mask_bytes(*call_.key_mask) + sample * call_.key_mask->stride(0);
    if (call_.causal) {
      const int64_t* given =
          call_.query_positions ? call_.query_positions->template const_data_ptr<int64_t>() : nullptr;
      const int64_t stride = given ? call_.query_positions->stride(0) : 0;
      for (int64_t r = 0; r < head.rows; ++r) {
        const int64_t position = given ? given[sample * stride + first + r] : keys() - shape_.rows + first + r;
        positions[r] = std::clamp<int64_t>(position, -1, keys());
      }
      head.positions = positions;
    }
    head.stat_stride = shape_.rows;
    return head;
  }

  void point_to_head(AttentionHead<T>& head, int64_t sample, int64_t block, int64_t key_head) const {
    const int64_t first = block * plan_.rows, query_head = key_head * group();
    head.query = static_cast<const T*>(call_.query.const_data_ptr()) + sample * call_.query.stride(0) +
                 query_head * head.query_head_stride + first * head.query_row_stride;
    head.key = static_cast<const T*>(call_.key.const_data_ptr()) + sample * call_.key.stride(0) +
               key_head * call_.key.stride(1);
    if (call_.cosine) head.key_norms = shared_.at<A>(norms_) + (sample * shape_.key_heads + key_head) * keys();
    const int64_t stat = (sample * shape_.query_heads + query_head) * shape_.rows + first;
    if (call_.lse_in) {
      head.lse_in = static_cast<const A*>(call_.lse_in->const_data_ptr()) + stat;
    } else {
      head.lse = static_cast<A*>(call_.lse->mutable_data_ptr()) + stat;
      head.entropy = static_cast<A*>(call_.entropy->mutable_data_ptr()) + stat;
    }
  }

  // Second phase: combines the heads that several work items gathered, in order, then reduces or writes the rows.
  void combine() const {
    const int64_t piece = 8 * kernels_.width, pieces = ceil_div(scored(), piece);
    const int64_t grain = 1 + (1 << 16) / (piece * plan_.splits * shape_.rows);
    parallel_for(shape_.batch * pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / pieces, first = i % pieces * piece;
        for (int64_t block = 0; block < plan_.blocks; ++block) {
          AttentionReduce<A> reduce = reduction(sample, block);
          reduce.from = gathered_of(sample, block, 0);
          reduce.parts = plan_.splits;
          reduce.part_stride = plan_.gathered;
          reduce.first = block == 0;
          score_rows(reduce, sample, 0, block, 0, first, std::min(first + piece, scored()));
        }
      }
    });
  }

  // Last phase: combines the partial scores of the row groups in order, and writes the wanted columns.
  void write_scores() const {
    const bool any_mean =
        std::count(call_.reductions.rows.begin(), call_.reductions.rows.end(), QueryReduction::kMean) > 0;
    if (partial_in_place_ && !any_mean) return;
    const int64_t lines = kinds_ * out_heads_, next = lines * keys();
    A* out = static_cast<A*>(call_.scores->mutable_data_ptr());
    parallel_for(shape_.batch * lines * columns_, 1 + 65536 / groups_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % columns_, line = i / columns_ % lines, sample = i / columns_ / lines;
        const int64_t key = key_of(sample, column);
        if (key < 0) {
          out[i] = 0;
          continue;
        }
        const A* from = partial(sample, 0) + line * keys() + key;
        const QueryReduction kind = call_.reductions.rows[line / out_heads_];
        A value = from[0];
        for (int64_t g = 1; g < groups_; ++g)
          value = kind == QueryReduction::kMax ? nan_max(value, from[g * next]) : value + from[g * next];
        if (kind == QueryReduction::kMean)
          value /= static_cast<A>(std::max<int64_t>(1, shared_.at<int64_t>(counts_)[2 * sample]));
        out[i] = value;
      }
    });
  }

  struct Own {
    int64_t query, key, logits, factors, sums, gathered, positions;
  };
  const AttentionCall& call_;
  const AttentionShape shape_;
  const AttentionKernels<T>& kernels_;
  const AttentionPlan plan_;
  Workspace shared_;
  Own own_;
  int64_t padded_rows_, kinds_, columns_, out_heads_, groups_, slots_, own_size_;
  int64_t norms_, gathered_, partial_, valid_, counts_, own_begin_;
  const int64_t* indices_;
  int64_t index_stride_;
  bool partial_in_place_, every_row_;
};

}  // namespace tokenprune

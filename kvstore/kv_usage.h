#pragma once
// What a store holds, layer by layer, as sums that are kept up while it works: a report then costs
// a few operations for each layer, however many sequences there are.
//
// Whoever changes a head's cache takes it out before and puts it back after; tokens of sequences
// are counted apart, because they change with every step. Owned by KvStore. Thread-safety: none.

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvstore/head_cache.h"
#include "kvstore/plan/kv_kind.h"

namespace spindle::kvstore {

// What is in a store at a moment; its size depends on the number of layers alone.
struct KvUse {
  struct Layer {
    std::uint64_t used_bytes = 0;  // as KvStats::layer_used_bytes
    // Mean over the KV heads, rounded; logical tokens are those of all sequences.
    std::int64_t retained_tokens = 0;
    int plan_kind = -1;  // that most of the bytes are under; -1: nothing is held
  };
  std::vector<Layer> layers;
  std::int64_t logical_tokens = 0;
  std::uint64_t layer_full_bytes = 0;  // those in one layer, uncompressed in 16 bit
  FormBytes form_bytes = {};           // add up to the used bytes of the layers
};

class KvUsage {
 public:
  KvUsage(int n_layers, int n_heads)
      : n_heads_(n_heads), layers_(static_cast<std::size_t>(n_layers)) {}

  void add(std::size_t layer, const HeadCache& cache, std::uint64_t tail_bytes) {
    count(layer, cache, tail_bytes, 1);
  }
  void remove(std::size_t layer, const HeadCache& cache, std::uint64_t tail_bytes) {
    count(layer, cache, tail_bytes, -1);
  }
  // The tail of a head that is in has grown by so much, and nothing else of it has changed.
  void add_tail(std::size_t layer, const HeadCache& cache, std::uint64_t n_bytes);
  void add_tokens(std::int64_t n_tokens) { n_tokens_ += n_tokens; }

  std::uint64_t used_bytes(std::size_t layer) const { return layers_[layer].used_bytes; }
  // layer_full_bytes is left to the store.
  KvUse report() const;
  bool operator==(const KvUsage&) const = default;

 private:
  struct Layer {
    std::uint64_t used_bytes = 0;
    // Over all heads: tokens in blocks less the positions before the tail. With n_heads * n_tokens_
    // it is what the heads retain.
    std::int64_t before_tail = 0;
    std::array<std::uint64_t, kPlanKinds> kind_bytes = {};
    bool operator==(const Layer&) const = default;
  };

  void count(std::size_t layer, const HeadCache& cache, std::uint64_t tail_bytes, int sign);

  int n_heads_ = 0;
  std::vector<Layer> layers_;
  FormBytes form_bytes_ = {};
  std::int64_t n_tokens_ = 0;
};

}  // namespace spindle::kvstore

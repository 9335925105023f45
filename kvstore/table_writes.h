#pragma once
// Many small writes to tables in device memory in one launch.

#include <cstdint>

namespace spindle {
class CudaContext;
}

namespace spindle::kvstore {

// words[first_word, first_word + n_words) go to `target`.
struct TableWrite {
  std::uint32_t* target = nullptr;
  std::uint32_t first_word = 0;
  std::uint32_t n_words = 0;
};

// All pointers are device memory. No two writes touch the same word.
void write_tables(const CudaContext& context, const TableWrite* writes, int n_writes,
                  const std::uint32_t* words);

}  // namespace spindle::kvstore

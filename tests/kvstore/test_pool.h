#pragma once
// A page pool over memory of the host that tests can read and write.

#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "kvstore/host_memory.h"
#include "kvstore/page_pool.h"

namespace spindle::kvstore::testing {

class TestPool {
 public:
  TestPool(std::uint64_t n_bytes, std::uint64_t page_bytes) {
    auto memory = HostMemory::create(n_bytes);
    EXPECT_TRUE(memory.ok()) << memory.status().to_string();
    memory_ = std::move(*memory);
    auto pool = PagePool::create(memory_->base(), n_bytes, page_bytes);
    EXPECT_TRUE(pool.ok()) << pool.status().to_string();
    pool_ = std::move(*pool);
  }
  PagePool& operator*() const { return *pool_; }
  PagePool* operator->() const { return pool_.get(); }

 private:
  std::unique_ptr<HostMemory> memory_;
  std::unique_ptr<PagePool> pool_;
};

}  // namespace spindle::kvstore::testing

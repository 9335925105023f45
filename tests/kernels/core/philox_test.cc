#include "kernels/core/philox.h"

#include <gtest/gtest.h>

namespace spindle {
namespace {

// The published known-answer vectors of Philox4x32-10.
static_assert(philox4x32_10({0, 0, 0, 0}, {0, 0}) ==
              PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                            {0xffffffff, 0xffffffff}) ==
              PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                            {0xa4093822, 0x299f31d0}) ==
              PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

TEST(Philox, KnownAnswersAtRunTime) {
  volatile std::uint32_t zero = 0;
  EXPECT_EQ(philox4x32_10({zero, 0, 0, 0}, {0, 0}),
            (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

TEST(Philox, UniformIsInTheHalfOpenInterval) {
  EXPECT_EQ(philox_uniform({0, 0, 0, 0}), 0.0);
  EXPECT_EQ(philox_uniform({0x80000000, 0, 0, 0}), 0.5);
  EXPECT_LT(philox_uniform({0xffffffff, 0xffffffff, 0, 0}), 1.0);
  EXPECT_GT(philox_uniform({0xffffffff, 0xffffffff, 0, 0}), 1.0 - 1e-15);
}

}  // namespace
}  // namespace spindle

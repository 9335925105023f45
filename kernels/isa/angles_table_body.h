// Instruction sets without wide permutations take the angles of listed positions from the table.
// Included inside an anonymous namespace by per-ISA translation units, before block_body.h.

constexpr std::int64_t kMaxListedSpan = 0;
constexpr int kTurnGroups = 1;

template <bool kSums>
void compose_angles(const AttentionRope& /*rope*/, const std::int32_t* /*steps*/, float* /*first*/,
                    float* /*second*/) {
  __builtin_unreachable();
}

inline std::uint32_t group_steps(const std::byte* /*positions*/, bool /*wide*/, int /*first*/,
                                 int /*end*/, std::int64_t /*last_position*/,
                                 std::int32_t* /*steps*/, std::int64_t* /*bases*/) {
  __builtin_unreachable();
}

inline V near_angles(const float* /*row*/, const std::int32_t* /*steps*/) {
  __builtin_unreachable();
}

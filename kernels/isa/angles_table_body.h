// Instruction sets without wide permutations take the angles of listed positions from the table.
// Included inside an anonymous namespace by per-ISA translation units, before block_body.h.

constexpr std::int64_t kMaxListedSpan = 0;

template <bool kSums>
void compose_angles(const AttentionRope& /*rope*/, const std::int32_t* /*steps*/, float* /*first*/,
                    float* /*second*/) {
  __builtin_unreachable();
}

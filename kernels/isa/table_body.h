// The table of one instruction set. Included inside an anonymous namespace by the per-ISA
// translation units, after everything else.

constexpr KernelTable make_table(const char* name) {
  return {
      .name = name,
      .rms_norm = rms_norm_row,
      .add = add_row,
      .swiglu = swiglu_row,
      .rope = rope_head,
      .max = max_of,
      .exp_shifted = exp_shifted_row,
      .sum_exp = sum_exp_row,
      .linear = linear_range,
      .attention = attention_tile,
  };
}

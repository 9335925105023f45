// The table of one instruction set. Included inside an anonymous namespace by the per-ISA
// translation units, after everything else.

constexpr KernelTable make_table(const char* name) {
  return {
      .name = name,
      .rms_norm = rms_norm_row,
      .add = add_row,
      .swiglu = swiglu_row,
      .rope = rope_head,
      .widen = widen_values,
      .max = max_of,
      .exp_shifted = exp_shifted_row,
      .sum_exp = sum_exp_row,
      .dot = dot_of,
      .sum_abs = sum_abs_row,
      .sum = sum_row,
      .scale = scale_row,
      .add_scaled = add_scaled_row,
      .max_into = max_into_row,
      .pooled_max_into = pooled_max_into_row,
      .linear = linear_range,
      .attention = attention_tile,
      .attention_logits = attention_logits_tile,
  };
}

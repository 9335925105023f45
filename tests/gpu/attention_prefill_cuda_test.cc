// attention_prefill against `attention` on the CPU, over caches of the same rounded values.

#include <algorithm>
#include <limits>
#include <memory>

#include "kernels/attention.h"
#include "kernels/core/cpu_context.h"
#include "kernels/cuda/prefill_kernels.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

using testing::DeviceVector;

constexpr int kTokens = kKvPageTokens;
constexpr std::uint16_t kNan = 0xffff;  // of both 16-bit types
constexpr std::int64_t kQPadding = 8;   // columns between rows
constexpr std::int64_t kOutPadding = 16;

std::uint16_t narrow(float value, DType dtype) {
  return dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
}

struct Block {
  int first = 0;
  int end = kTokens;
};

// The cache of one kv head of one sequence, as pages of both layouts.
struct HeadPlan {
  std::vector<Block> blocks;
  int tail_origin = 0;
  int tail_first = 0;
};

struct SequencePlan {
  int n_queries = 0;
  int n_context = 0;
  std::vector<HeadPlan> heads;  // empty: no blocks, the tail from 0 on
};

struct Case {
  AttentionShape shape;
  DType dtype = DType::kF16;
  std::vector<SequencePlan> sequences;
  float q_scale = 1.0F;
  int n_layers = 1;
  int layer = 0;
};

// Pages of 16-bit elements that the CPU and the device hold in their own orders.
struct CpuPage {
  std::vector<std::uint16_t> storage;  // aligned to 64 bytes inside
  std::size_t begin = 0;
  explicit CpuPage(std::size_t n) : storage(n + 32, 0) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage.data());
    begin = (64 - address % 64) % 64 / 2;
  }
  std::uint16_t* data() { return storage.data() + begin; }
};

class Caches {
 public:
  Caches(const Case& c, std::mt19937& random) : case_(c), random_(random) {
    const std::size_t n_heads = c.sequences.size() * kv_heads();
    for (const SequencePlan& s : c.sequences) {
      CHECK(s.heads.empty() || s.heads.size() == kv_heads());
    }
    cpu_heads_.resize(n_heads);
    for (std::size_t i = 0; i < n_heads; ++i) build_head(i);
  }

  const KvHeadPages* cpu_heads(std::size_t sequence) const {
    return cpu_heads_.data() + sequence * kv_heads();
  }

  // Copies everything to the device; pages get random places with unused ones between them.
  void upload(const CudaContext& gpu) {
    const std::size_t page = page_elements();
    std::vector<std::uint32_t> place(tail_pages_.size());
    for (std::size_t i = 0; i < place.size(); ++i) place[i] = static_cast<std::uint32_t>(2 * i + 1);
    std::shuffle(place.begin(), place.end(), random_);
    std::vector<std::uint16_t> pool((2 * place.size() + 1) * page, kNan);
    for (std::size_t i = 0; i < place.size(); ++i) {
      std::copy(tail_pages_[i].begin(), tail_pages_[i].end(), pool.begin() + place[i] * page);
    }
    std::vector<std::uint32_t> table;
    for (const std::int64_t i : tail_table_) {
      table.push_back(i < 0 ? kNoPlace : place[static_cast<std::size_t>(i)]);
    }
    pool_ = std::make_unique<DeviceVector<std::uint16_t>>(gpu, pool);
    expanded_ = std::make_unique<DeviceVector<std::uint16_t>>(gpu, expanded_pages_);
    first_page_ = std::make_unique<DeviceVector<std::int64_t>>(gpu, first_expanded_);
    table_ = std::make_unique<DeviceVector<std::uint32_t>>(gpu, table);
    blocks_ = std::make_unique<DeviceVector<DeviceKvBlock>>(gpu, block_table_);
    std::vector<DeviceKvHead> heads(case_.sequences.size() *
                                    static_cast<std::size_t>(case_.n_layers) * kv_heads());
    std::vector<DeviceSequence> sequences;
    std::size_t table_at = 0;
    std::size_t block_at = 0;
    for (std::size_t i = 0; i < cpu_heads_.size(); ++i) {
      const std::size_t sequence = i / kv_heads();
      DeviceKvHead& head = heads[(sequence * static_cast<std::size_t>(case_.n_layers) +
                                  static_cast<std::size_t>(case_.layer)) *
                                     kv_heads() +
                                 i % kv_heads()];
      const HeadPlan plan = head_plan(i);
      head.pages = table_->data() + table_at;
      head.blocks = blocks_->data() + block_at;
      head.n_blocks = static_cast<std::int32_t>(plan.blocks.size());
      head.tail_origin = plan.tail_origin;
      head.tail_first = plan.tail_first;
      table_at += n_tail_pages(i);
      block_at += plan.blocks.size();
    }
    heads_ = std::make_unique<DeviceVector<DeviceKvHead>>(gpu, heads);
    std::int32_t query_begin = 1;  // row 0 belongs to nobody
    for (std::size_t i = 0; i < case_.sequences.size(); ++i) {
      DeviceSequence sequence;
      sequence.query_begin = query_begin;
      sequence.n_queries = case_.sequences[i].n_queries;
      sequence.n_context = case_.sequences[i].n_context;
      sequence.heads = heads_->data() + i * static_cast<std::size_t>(case_.n_layers) * kv_heads();
      sequences.push_back(sequence);
      query_begin += sequence.n_queries + 1;  // and so do rows between sequences
    }
    sequences_ = std::make_unique<DeviceVector<DeviceSequence>>(gpu, sequences);
  }
  const DeviceSequence* sequences() const { return sequences_->data(); }
  DeviceKvPool pool() const {
    return {reinterpret_cast<std::byte*>(pool_->data()),
            {case_.shape.head_dim, kTokens, case_.dtype}};
  }
  DeviceExpandedBlocks expanded() const {
    if (expanded_pages_.empty()) return {};
    return {reinterpret_cast<std::byte*>(expanded_->data()), first_page_->data()};
  }

 private:
  std::size_t kv_heads() const { return static_cast<std::size_t>(case_.shape.n_kv_heads); }
  std::size_t dim() const { return static_cast<std::size_t>(case_.shape.head_dim); }
  std::size_t page_elements() const { return 2 * dim() * kTokens; }
  HeadPlan head_plan(std::size_t i) const {
    const SequencePlan& sequence = case_.sequences[i / kv_heads()];
    return sequence.heads.empty() ? HeadPlan{} : sequence.heads[i % kv_heads()];
  }
  std::size_t n_tail_pages(std::size_t i) const {
    const int n = case_.sequences[i / kv_heads()].n_context - head_plan(i).tail_origin;
    return static_cast<std::size_t>((std::max(n, 0) + kTokens - 1) / kTokens);
  }

  // Visible tokens [first, end) get random values; others 0 on the CPU and `hidden` on the device.
  void build_page(int first, int end, std::uint16_t hidden, CpuPage& cpu,
                  std::vector<std::uint16_t>& device) {
    const std::size_t d = dim();
    device.assign(page_elements(), hidden);
    for (int token = first; token < end; ++token) {
      const auto t = static_cast<std::size_t>(token);
      for (std::size_t c = 0; c < d; ++c) {
        const std::uint16_t k = narrow(normal_(random_), case_.dtype);
        const std::uint16_t v = narrow(normal_(random_), case_.dtype);
        cpu.data()[c * kTokens + t] = k;
        cpu.data()[d * kTokens + t * d + c] = v;
        device[(c / 32 * kTokens + t) * 32 + c % 32] = k;
        device[d * kTokens + c * kTokens + t] = v;
      }
    }
  }

  void build_head(std::size_t index) {
    const HeadPlan plan = head_plan(index);
    const int n_context = case_.sequences[index / kv_heads()].n_context;
    std::vector<KvBlock>& blocks = cpu_blocks_.emplace_back();
    std::vector<const std::byte*>& pages = cpu_tables_.emplace_back();
    first_expanded_.push_back(static_cast<std::int64_t>(expanded_pages_.size() / page_elements()));
    std::vector<std::uint16_t> device;
    for (const Block& block : plan.blocks) {
      CpuPage& cpu = *cpu_pages_.emplace_back(std::make_unique<CpuPage>(page_elements()));
      build_page(block.first, block.end, 0, cpu, device);
      expanded_pages_.insert(expanded_pages_.end(), device.begin(), device.end());
      KvBlock b;
      b.first = static_cast<std::uint8_t>(block.first);
      b.end = static_cast<std::uint8_t>(block.end);
      b.k.codes = reinterpret_cast<const std::byte*>(cpu.data());
      b.v.codes = reinterpret_cast<const std::byte*>(cpu.data() + dim() * kTokens);
      blocks.push_back(b);
      DeviceKvBlock on_device;
      on_device.first = b.first;
      on_device.end = b.end;
      block_table_.push_back(on_device);
    }
    for (std::size_t i = 0; i < n_tail_pages(index); ++i) {
      const int origin = plan.tail_origin + static_cast<int>(i) * kTokens;
      const int first = std::clamp(plan.tail_first - origin, 0, kTokens);
      const int end = std::clamp(n_context - origin, first, kTokens);
      CpuPage& cpu = *cpu_pages_.emplace_back(std::make_unique<CpuPage>(page_elements()));
      pages.push_back(reinterpret_cast<const std::byte*>(cpu.data()));
      if (first == kTokens) {
        tail_table_.push_back(-1);  // a hidden page need not exist
        continue;
      }
      build_page(first, end, kNan, cpu, device);
      tail_table_.push_back(static_cast<std::int64_t>(tail_pages_.size()));
      tail_pages_.push_back(device);
    }
    KvHeadPages& head = cpu_heads_[index];
    head.pages = pages.data();
    head.tail_origin = plan.tail_origin;
    head.tail_first = plan.tail_first;
    head.blocks = blocks.data();
    head.n_blocks = static_cast<std::int64_t>(blocks.size());
    head.context = &context_;
  }

  const Case& case_;
  std::mt19937& random_;
  std::normal_distribution<float> normal_{0.0F, 1.0F};
  KvHeadContext context_;
  std::vector<std::unique_ptr<CpuPage>> cpu_pages_;
  std::vector<std::vector<KvBlock>> cpu_blocks_;
  std::vector<std::vector<const std::byte*>> cpu_tables_;
  std::vector<KvHeadPages> cpu_heads_;
  std::vector<std::vector<std::uint16_t>> tail_pages_;
  std::vector<std::int64_t> tail_table_;
  std::vector<std::uint16_t> expanded_pages_;
  std::vector<std::int64_t> first_expanded_;
  std::vector<DeviceKvBlock> block_table_;
  std::unique_ptr<DeviceVector<std::uint16_t>> pool_;
  std::unique_ptr<DeviceVector<std::uint16_t>> expanded_;
  std::unique_ptr<DeviceVector<std::int64_t>> first_page_;
  std::unique_ptr<DeviceVector<std::uint32_t>> table_;
  std::unique_ptr<DeviceVector<DeviceKvBlock>> blocks_;
  std::unique_ptr<DeviceVector<DeviceKvHead>> heads_;
  std::unique_ptr<DeviceVector<DeviceSequence>> sequences_;
};

struct Variant {
  PrefillKernel kernel;
  DType dtype;
  int head_dim;
};

class AttentionPrefillTest : public testing::GpuTest,
                             public ::testing::WithParamInterface<Variant> {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    if (GetParam().kernel == PrefillKernel::kWgmma &&
        best_prefill_kernel(gpu()) != PrefillKernel::kWgmma) {
      GTEST_SKIP() << gpu().device_name() << " has no wgmma";
    }
  }

  Case make_case(int n_kv_heads, int group) const {
    Case c;
    c.shape = {n_kv_heads * group, n_kv_heads, GetParam().head_dim};
    c.dtype = GetParam().dtype;
    return c;
  }

  void expect_as_on_the_cpu(const Case& c) {
    Caches caches(c, random());
    const std::int64_t width = std::int64_t{c.shape.n_heads} * c.shape.head_dim;
    std::vector<AttentionSequence> sequences;
    std::vector<std::int32_t> n_queries;
    std::int64_t n_rows = 1;
    for (std::size_t i = 0; i < c.sequences.size(); ++i) {
      const SequencePlan& s = c.sequences[i];
      sequences.push_back({n_rows, s.n_queries, s.n_context, caches.cpu_heads(i)});
      n_queries.push_back(s.n_queries);
      n_rows += s.n_queries + 1;
    }
    // Values that are the same in both types, so that the product with bf16 pages reads no others.
    std::vector<float> q = normal(static_cast<std::size_t>(n_rows * width), c.q_scale);
    for (float& x : q) {
      x = f16_to_f32(f32_to_f16(bf16_to_f32(f32_to_bf16(x))));
      if (std::fabs(x) < 0x1p-16F) x = 0;
    }
    const std::int64_t q_stride = width + kQPadding;
    std::vector<F16> q_rows(static_cast<std::size_t>(n_rows * q_stride), F16{kNan});
    for (std::int64_t r = 0; r < n_rows; ++r) {
      for (std::int64_t i = 0; i < width; ++i) {
        q_rows[static_cast<std::size_t>(r * q_stride + i)].bits =
            f32_to_f16(q[static_cast<std::size_t>(r * width + i)]);
      }
    }
    const float scale = 1.0F / std::sqrt(static_cast<float>(c.shape.head_dim));
    std::vector<float> expected(static_cast<std::size_t>(n_rows * width), 0.0F);
    attention(*cpu_, {q.data(), n_rows, width}, sequences, c.shape,
              {c.shape.head_dim, kTokens, c.dtype}, scale, {expected.data(), n_rows, width});

    caches.upload(gpu());
    const DeviceVector<F16> device_q = upload(q_rows);
    const std::int64_t out_stride = width + kOutPadding;
    const DeviceVector<Bf16> device_out =
        device<Bf16>(static_cast<std::size_t>(n_rows * out_stride));
    attention_prefill_with(GetParam().kernel, gpu(), {device_q.data(), n_rows, width, q_stride},
                           n_queries, caches.sequences(), c.layer, c.shape, caches.pool(), scale,
                           caches.expanded(), {device_out.data(), n_rows, width, out_stride});
    const std::vector<Bf16> out = device_out.to_host();

    std::vector<bool> written(static_cast<std::size_t>(n_rows), false);
    for (const AttentionSequence& s : sequences) {
      for (std::int64_t j = 0; j < s.n_queries; ++j) {
        written[static_cast<std::size_t>(s.query_begin + j)] = true;
      }
    }
    // The weights are rounded to the page's type (half a unit of 2^-10 or 2^-7, values are up to
    // about 4, and their errors average out), the output to bf16 (half a unit of 2^-7).
    const float absolute = c.dtype == DType::kF16 ? 2e-3F : 8e-3F;
    std::vector<float> actual_rows;
    std::vector<float> expected_rows;
    for (std::int64_t r = 0; r < n_rows; ++r) {
      const bool ours = written[static_cast<std::size_t>(r)];
      for (std::int64_t i = 0; i < out_stride; ++i) {
        const std::uint16_t bits = out[static_cast<std::size_t>(r * out_stride + i)].bits;
        if (i >= width || !ours) {
          ASSERT_EQ(bits, 0xabab) << "row " << r << " column " << i << " is not ours to write";
          continue;
        }
        actual_rows.push_back(bf16_to_f32(bits));
        expected_rows.push_back(expected[static_cast<std::size_t>(r * width + i)]);
      }
    }
    testing::expect_close(actual_rows, expected_rows, absolute, 0x1p-7F);
    if (HasFatalFailure() || actual_rows.empty()) return;
    // Rounding to bf16 alone is 1.1e-3 in the mean, of bf16 weights about as much again.
    EXPECT_LT(testing::relative_error(actual_rows, expected_rows), 4e-3);
  }

  SequencePlan random_sequence(int max_queries, int max_before) {
    SequencePlan s;
    s.n_queries = uniform_int(1, max_queries);
    s.n_context = s.n_queries + uniform_int(0, max_before);
    return s;
  }
  // Blocks, and a tail that begins anywhere before the queries.
  SequencePlan random_compressed(int n_kv_heads, int max_queries, int max_before, int max_blocks) {
    SequencePlan s = random_sequence(max_queries, max_before);
    const int before = s.n_context - s.n_queries;
    for (int h = 0; h < n_kv_heads; ++h) {
      HeadPlan head;
      const int n_blocks = uniform_int(0, max_blocks);
      for (int i = 0; i < n_blocks; ++i) {
        Block block;
        if (uniform_int(0, 1) == 1) {
          block.first = uniform_int(0, kTokens - 1);
          block.end = uniform_int(block.first + 1, kTokens);
        }
        head.blocks.push_back(block);
      }
      head.tail_origin = uniform_int(0, before);
      head.tail_first = uniform_int(head.tail_origin, before);
      s.heads.push_back(head);
    }
    return s;
  }

 private:
  std::unique_ptr<CpuContext> cpu_ = std::move(CpuContext::create({.n_threads = 8})).value();
};

TEST_P(AttentionPrefillTest, OneTokenIsItsOwnValue) {
  Case c = make_case(1, 1);
  c.sequences = {{1, 1, {}}};
  expect_as_on_the_cpu(c);
}

TEST_P(AttentionPrefillTest, WholePromptsOfManyLengths) {
  for (const int group : {1, 2, 4, 8}) {
    SCOPED_TRACE("group " + std::to_string(group));
    Case c = make_case(2, group);
    for (const int n : {1, 2, 15, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300}) {
      c.sequences.push_back({n, n, {}});
    }
    expect_as_on_the_cpu(c);
  }
}

TEST_P(AttentionPrefillTest, GroupsThatDoNotFillATile) {
  for (const int group : {3, 5, 7, 16, 24}) {
    SCOPED_TRACE("group " + std::to_string(group));
    Case c = make_case(1, group);
    for (int i = 0; i < 4; ++i) c.sequences.push_back(random_sequence(100, 100));
    expect_as_on_the_cpu(c);
  }
}

TEST_P(AttentionPrefillTest, ChunksAfterPrefixes) {
  for (const int group : {1, 4}) {
    SCOPED_TRACE("group " + std::to_string(group));
    Case c = make_case(3, group);
    for (int i = 0; i < 8; ++i) c.sequences.push_back(random_sequence(300, 700));
    expect_as_on_the_cpu(c);
  }
}

TEST_P(AttentionPrefillTest, TailsThatBeginInsideAPage) {
  Case c = make_case(2, 4);
  for (const int before : {1, 31, 32, 33, 70, 200}) {
    for (const int origin : {0, 1, 32, 45}) {
      if (origin > before) continue;
      SequencePlan s{40, before + 40, {}};
      s.heads.push_back({{}, origin, before});
      s.heads.push_back({{}, 0, (origin + before) / 2});
      c.sequences.push_back(s);
    }
  }
  expect_as_on_the_cpu(c);
}

TEST_P(AttentionPrefillTest, BlocksBeforeTheTail) {
  for (const int group : {1, 2, 4, 8}) {
    SCOPED_TRACE("group " + std::to_string(group));
    Case c = make_case(2, group);
    for (int i = 0; i < 6; ++i) c.sequences.push_back(random_compressed(2, 150, 300, 9));
    // One visible token a block, and no tail before the chunk.
    SequencePlan single{3, 50, {}};
    single.heads.push_back({std::vector<Block>(7, Block{5, 6}), 47, 47});
    single.heads.push_back({std::vector<Block>(1, Block{31, 32}), 40, 47});
    c.sequences.push_back(single);
    expect_as_on_the_cpu(c);
  }
}

TEST_P(AttentionPrefillTest, AShortQuestionOverALongContext) {
  for (const int n_context : {600, 1500, 6000}) {
    SCOPED_TRACE("context " + std::to_string(n_context));
    Case c = make_case(2, 4);
    c.sequences = {{20, n_context, {}}, random_compressed(2, 20, 500, 150)};
    expect_as_on_the_cpu(c);
  }
}

TEST_P(AttentionPrefillTest, ManySequencesTakeSeveralLaunches) {
  Case c = make_case(1, 2);
  for (int i = 0; i < 900; ++i) {
    SequencePlan s = random_sequence(3, 60);
    if (i % 7 == 3) s = {0, 0, {}};
    c.sequences.push_back(s);
  }
  expect_as_on_the_cpu(c);
}

TEST_P(AttentionPrefillTest, AnotherLayersTables) {
  Case c = make_case(2, 2);
  c.n_layers = 3;
  c.layer = 1;
  for (int i = 0; i < 3; ++i) c.sequences.push_back(random_compressed(2, 80, 90, 4));
  expect_as_on_the_cpu(c);
}

TEST_P(AttentionPrefillTest, LargeScoresDoNotOverflow) {
  Case c = make_case(2, 4);
  c.q_scale = 30.0F;
  for (int i = 0; i < 4; ++i) c.sequences.push_back(random_compressed(2, 100, 300, 5));
  expect_as_on_the_cpu(c);
}

TEST_P(AttentionPrefillTest, NothingToDo) {
  Case c = make_case(2, 4);
  expect_as_on_the_cpu(c);
  c.sequences = {{0, 0, {}}, {0, 0, {}}};
  expect_as_on_the_cpu(c);
}

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const PrefillKernel kernel : {PrefillKernel::kMma, PrefillKernel::kWgmma}) {
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      for (const int head_dim : {64, 128}) all.push_back({kernel, dtype, head_dim});
    }
  }
  return all;
}

std::string variant_name(const ::testing::TestParamInfo<Variant>& variant) {
  const Variant& v = variant.param;
  return std::string(v.kernel == PrefillKernel::kMma ? "mma" : "wgmma") + "_" +
         std::string(dtype_name(v.dtype)) + "_" + std::to_string(v.head_dim);
}

INSTANTIATE_TEST_SUITE_P(Variants, AttentionPrefillTest, ::testing::ValuesIn(variants()),
                         variant_name);

}  // namespace
}  // namespace spindle::kernels

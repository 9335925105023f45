#include "kernels/codebook.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

// The similarities are products of the `linear` kernel, one fma chain over the dimensions each, so
// they depend neither on blocks nor on threads and cos(a, b) is cos(b, a) to the bit.
constexpr std::int64_t kRowBlock = 64;  // rows of one product, and bits of one word of the graph
// Rows of one product with entries, when there are rows enough for all threads: whole micro-tiles
// of every instruction set, which share one widening of the entries.
constexpr std::int64_t kMatchRows = 192;
constexpr std::int64_t kColumnBlock = 512;
constexpr std::int64_t kMaxEntries = 65536;
// Multiply-adds worth a second thread, about 10 us.
constexpr std::int64_t kMinWorkPerThread = 1 << 18;
constexpr float kMaxHalf = 65504.0F;

std::int64_t blocks_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Vectors as columns of panels, [n / 32][dim][32]: the second operand of a product. Columns
// [first, n) become rows [first, n) of `rows`.
template <typename Element>
void extend_panels(const Element* rows, std::int64_t first, std::int64_t n, std::int64_t dim,
                   std::vector<Element>& panels) {
  panels.resize(static_cast<std::size_t>(blocks_of(n, kPanelColumns) * kPanelColumns * dim));
  for (; first < n; ++first) {
    Element* column = panels.data() + first / kPanelColumns * kPanelColumns * dim;
    column += first % kPanelColumns;
    const Element* row = rows + first * dim;
    for (std::int64_t k = 0; k < dim; ++k) column[k * kPanelColumns] = row[k];
  }
}

// Memory of one thread: products [n_rows][n_columns], then what `linear` needs.
struct ProductScratch {
  float* products;
  float* linear;
};

ProductScratch product_scratch(const CpuContext& context, int thread, std::int64_t n_rows,
                               std::int64_t n_columns, std::int64_t dim) {
  const auto n_products = static_cast<std::size_t>(n_rows * n_columns);
  const std::size_t n_floats = n_products + linear_scratch_floats(n_rows, dim);
  auto* memory = reinterpret_cast<float*>(context.scratch(thread, n_floats * sizeof(float)));
  return {memory, memory + n_products};
}

// A 64 x 64 bit matrix, in place.
void transpose_bits(std::uint64_t* rows) {
  std::uint64_t mask = 0x00000000ffffffffULL;
  for (unsigned j = 32; j != 0; j >>= 1, mask ^= mask << j) {
    for (unsigned k = 0; k < 64; k = ((k | j) + 1) & ~j) {
      const std::uint64_t swap = ((rows[k] >> j) ^ rows[k | j]) & mask;
      rows[k] ^= swap << j;
      rows[k | j] ^= swap;
    }
  }
}

// Bit j: values[j] > theta, for n <= 64 values.
std::uint64_t bits_above(const float* values, std::int64_t n, float theta) {
  std::uint8_t flags[64] = {};
  if (n == 64) {
    for (int j = 0; j < 64; ++j) flags[j] = values[j] > theta ? 1 : 0;
  } else {
    for (std::int64_t j = 0; j < n; ++j) flags[j] = values[j] > theta ? 1 : 0;
  }
  std::uint64_t bits = 0;
  for (unsigned j = 0; j < 8; ++j) {
    std::uint64_t eight;
    std::memcpy(&eight, flags + 8 * j, sizeof(eight));
    bits |= ((eight * 0x0102040810204080ULL) >> 56) << (8 * j);
  }
  return bits;
}

template <typename Visit>
void for_each_bit(std::span<const std::uint64_t> words, Visit&& visit) {
  for (std::size_t w = 0; w < words.size(); ++w) {
    for (std::uint64_t left = words[w]; left != 0; left &= left - 1) {
      visit(w * 64 + static_cast<std::size_t>(std::countr_zero(left)));
    }
  }
}

// Without an instruction for it, which not every host of the portable build has: sums of bytes.
std::int32_t count_bits(std::span<const std::uint64_t> words) {
  std::uint64_t count = 0;
  for (std::uint64_t word : words) {
    word -= (word >> 1) & 0x5555555555555555ULL;
    word = (word & 0x3333333333333333ULL) + ((word >> 2) & 0x3333333333333333ULL);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
    count += (word * 0x0101010101010101ULL) >> 56;
  }
  return static_cast<std::int32_t>(count);
}

// Which rows of a tile are similar: a symmetric bit matrix, diagonal 1.
class SimilarityGraph {
 public:
  // `columns` are the n rows as panels.
  void build(const CpuContext& context, const float* columns, const float* rows, std::int64_t n,
             std::int64_t dim, float theta) {
    n_ = n;
    n_words_ = blocks_of(n_, kRowBlock);
    words_.assign(static_cast<std::size_t>(n_words_ * kRowBlock * n_words_), 0);
    // Products of block i are computed for the columns from block i on; blocks i and n - 1 - i
    // together are the same work for every i.
    const std::int64_t n_pairs = (n_words_ + 1) / 2;
    context.parallel_for(n_pairs, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
      const ProductScratch scratch =
          product_scratch(context, thread, kRowBlock, n_words_ * kRowBlock, dim);
      for (std::int64_t i = begin; i < end; ++i) {
        add_block(context, columns, rows, dim, theta, i, scratch);
        if (n_words_ - 1 - i != i) {
          add_block(context, columns, rows, dim, theta, n_words_ - 1 - i, scratch);
        }
      }
    });
  }
  std::int64_t size() const { return n_; }
  std::span<const std::uint64_t> row(std::size_t index) const {
    const auto n_words = static_cast<std::size_t>(n_words_);
    return std::span(words_).subspan(index * n_words, n_words);
  }

 private:
  void add_block(const CpuContext& context, const float* columns, const float* rows,
                 std::int64_t dim, float theta, std::int64_t block, const ProductScratch& scratch) {
    const std::int64_t first = block * kRowBlock;
    const std::int64_t n_rows = std::min(kRowBlock, n_ - first);
    const std::int64_t n_columns = n_ - first;
    LinearJob job{};
    job.panels = columns + first * dim;
    job.format = ElementFormat::kF32;
    job.panel_depth = dim;
    job.n_in = dim;
    job.n_out = n_columns;
    job.x = rows + first * dim;
    job.x_stride = dim;
    job.n_rows = n_rows;
    job.y = scratch.products;
    job.y_stride = n_words_ * kRowBlock;
    kernels_for(context).linear(job, 0, n_rows, 0, blocks_of(n_columns, kPanelColumns),
                                scratch.linear);
    for (std::int64_t other = block; other < n_words_; ++other) {
      const std::int64_t column = (other - block) * kRowBlock;
      const std::int64_t width = std::min(kRowBlock, n_columns - column);
      std::uint64_t bits[kRowBlock] = {};
      for (std::int64_t r = 0; r < n_rows; ++r) {
        bits[r] = bits_above(job.y + r * job.y_stride + column, width, theta);
        if (other == block) bits[r] |= std::uint64_t{1} << r;
      }
      for (std::int64_t r = 0; r < n_rows; ++r) word(first + r, other) = bits[r];
      if (other == block) continue;
      transpose_bits(bits);
      for (std::int64_t r = 0; r < width; ++r) word(other * kRowBlock + r, block) = bits[r];
    }
  }
  std::uint64_t& word(std::int64_t row, std::int64_t index) {
    return words_[static_cast<std::size_t>(row * n_words_ + index)];
  }

  std::int64_t n_ = 0;
  std::int64_t n_words_ = 0;
  std::vector<std::uint64_t> words_;
};

// Picks the uncovered node with most uncovered neighbours, itself included, until none is left.
class GreedyCover {
 public:
  explicit GreedyCover(const SimilarityGraph& graph) : graph_(graph) {
    const auto n = static_cast<std::size_t>(graph.size());
    degree_.resize(n);
    uncovered_.resize((n + 63) / 64);
    for (std::size_t i = 0; i < n; ++i) {
      degree_[i] = count_bits(graph.row(i));
      uncovered_[i / 64] |= std::uint64_t{1} << (i % 64);
    }
  }

  // Calls add(node), which answers false to stop, then assign(covered node) for each that it
  // covers.
  template <typename Add, typename Assign>
  bool run(Add&& add, Assign&& assign) {
    std::vector<std::uint64_t> covered(uncovered_.size());
    while (true) {
      std::int32_t best = 0;
      for (const std::int32_t degree : degree_) best = degree > best ? degree : best;
      if (best == 0) return true;
      if (best == 1) return finish(add, assign);
      const auto node = static_cast<std::size_t>(std::find(degree_.begin(), degree_.end(), best) -
                                                 degree_.begin());
      if (!add(node)) return false;
      for (std::size_t w = 0; w < covered.size(); ++w) {
        covered[w] = graph_.row(node)[w] & uncovered_[w];
        uncovered_[w] ^= covered[w];
      }
      for_each_bit(covered, [&](std::size_t i) {
        assign(i);
        degree_[i] = 0;
        // No neighbour that is covered counts any more.
        const std::span<const std::uint64_t> neighbours = graph_.row(i);
        for (std::size_t w = 0; w < neighbours.size(); ++w) {
          for (std::uint64_t left = neighbours[w] & uncovered_[w]; left != 0; left &= left - 1) {
            --degree_[w * 64 + static_cast<std::size_t>(std::countr_zero(left))];
          }
        }
      });
    }
  }

 private:
  // The rest are alone, so that their order is that of their positions.
  template <typename Add, typename Assign>
  bool finish(Add&& add, Assign&& assign) {
    bool complete = true;
    for_each_bit(uncovered_, [&](std::size_t i) {
      complete = complete && add(i);
      if (complete) assign(i);
    });
    return complete;
  }

  const SimilarityGraph& graph_;
  std::vector<std::int32_t> degree_;  // uncovered neighbours; 0 once covered
  std::vector<std::uint64_t> uncovered_;
};

class Matcher {
 public:
  Matcher(const CpuContext& context, Codebook& book, float theta, std::int64_t max_entries)
      : context_(context),
        book_(book),
        dim_(book.head_dim),
        theta_(theta),
        max_entries_(max_entries) {}

  // False when the book is full; it may then hold entries of this tile.
  bool match_tile(ConstRows x, std::int64_t first_row, CodebookRefs& refs) {
    normalise(x, refs.magnitude.data() + first_row);
    std::uint16_t* entry = refs.entry.data() + first_row;
    match_entries(x.n_rows, entry);
    const auto n_rest = static_cast<std::int64_t>(rest_.size());
    extend_panels(units_.data(), 0, n_rest, dim_, tile_panels_);
    graph_.build(context_, tile_panels_.data(), units_.data(), n_rest, dim_, theta_);
    GreedyCover cover(graph_);
    return cover.run(
        [&](std::size_t node) {
          return add_entry(units_.data() + static_cast<std::int64_t>(node) * dim_,
                           book_.n_rows_seen + first_row + rest_[node]);
        },
        [&](std::size_t node) {
          entry[rest_[node]] = static_cast<std::uint16_t>(book_.n_entries() - 1);
        });
  }

 private:
  static constexpr std::int64_t kRowsAtOnce = 8;
  static constexpr std::int64_t kDividedAtOnce = 16;

  // units_ = rows of length 1, or 0 where a row has no direction.
  void normalise(ConstRows x, std::uint16_t* magnitude) {
    units_.resize(static_cast<std::size_t>(x.n_rows * dim_));
    for (std::int64_t i = 0; i < x.n_rows; i += kRowsAtOnce) {
      const std::int64_t n = std::min(kRowsAtOnce, x.n_rows - i);
      double square[kRowsAtOnce];
      squared_norms(x.rows(i, n), square);
      for (std::int64_t r = 0; r < n; ++r) {
        const auto norm = static_cast<float>(std::sqrt(square[r]));
        magnitude[i + r] = f32_to_f16(std::min(norm, kMaxHalf));
        float* unit = units_.data() + (i + r) * dim_;
        if (norm > 0.0F && std::isfinite(norm)) {
          divide(x.row(i + r), norm, unit);
        } else {
          std::fill_n(unit, dim_, 0.0F);
        }
      }
    }
  }
  // One sum over k ascending for each row; those of several rows do not wait for each other.
  void squared_norms(ConstRows x, double* square) const {
    std::fill_n(square, kRowsAtOnce, 0.0);
    if (x.n_rows == kRowsAtOnce) {
      for (std::int64_t k = 0; k < dim_; ++k) {
        for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
          square[r] += double{x.row(r)[k]} * double{x.row(r)[k]};
        }
      }
      return;
    }
    for (std::int64_t r = 0; r < x.n_rows; ++r) {
      for (std::int64_t k = 0; k < dim_; ++k) {
        square[r] += double{x.row(r)[k]} * double{x.row(r)[k]};
      }
    }
  }
  void divide(const float* row, float norm, float* unit) const {
    std::int64_t k = 0;
    for (; k + kDividedAtOnce <= dim_; k += kDividedAtOnce) {
      for (std::int64_t j = 0; j < kDividedAtOnce; ++j) unit[k + j] = row[k + j] / norm;
    }
    for (; k < dim_; ++k) unit[k] = row[k] / norm;
  }

  // Refers rows to the nearest entry of earlier tiles; the others stay in units_, listed in rest_.
  void match_entries(std::int64_t n_rows, std::uint16_t* entry) {
    const std::int64_t n_entries = book_.n_entries();
    extend_panels(book_.entries.data(), book_.n_in_panels, n_entries, dim_, book_.panels);
    book_.n_in_panels = n_entries;
    matched_.assign(static_cast<std::size_t>(n_rows), 0);
    if (n_entries > 0) {
      const std::int64_t per_thread = n_rows / context_.n_threads();
      const std::int64_t block =
          std::clamp(per_thread / kRowBlock * kRowBlock, kRowBlock, kMatchRows);
      const std::int64_t grain = kMinWorkPerThread / (block * n_entries * dim_) + 1;
      context_.parallel_for(blocks_of(n_rows, block), grain,
                            [&](std::int64_t begin, std::int64_t end, int thread) {
                              for (std::int64_t i = begin; i < end; ++i) {
                                const std::int64_t first = i * block;
                                match_block(first, std::min(block, n_rows - first), thread, entry);
                              }
                            });
    }
    rest_.clear();
    for (std::int64_t i = 0; i < n_rows; ++i) {
      if (matched_[static_cast<std::size_t>(i)] != 0) continue;
      std::copy_n(units_.data() + i * dim_, dim_,
                  units_.data() + static_cast<std::int64_t>(rest_.size()) * dim_);
      rest_.push_back(i);
    }
  }

  // The n <= kMatchRows rows from first_row on.
  void match_block(std::int64_t first_row, std::int64_t n, int thread, std::uint16_t* entry) {
    const KernelTable& kernels = kernels_for(context_);
    const ProductScratch scratch = product_scratch(context_, thread, n, kColumnBlock, dim_);
    float best[kMatchRows];
    std::fill_n(best, n, theta_);
    for (std::int64_t column = 0; column < book_.n_in_panels; column += kColumnBlock) {
      const std::int64_t width = std::min(kColumnBlock, book_.n_in_panels - column);
      LinearJob job{};
      job.panels = book_.panels.data() + column * dim_;
      job.format = ElementFormat::kF16;
      job.panel_depth = dim_;
      job.n_in = dim_;
      job.n_out = width;
      job.x = units_.data() + first_row * dim_;
      job.x_stride = dim_;
      job.n_rows = n;
      job.y = scratch.products;
      job.y_stride = kColumnBlock;
      kernels.linear(job, 0, n, 0, blocks_of(width, kPanelColumns), scratch.linear);
      for (std::int64_t r = 0; r < n; ++r) {
        const float* cos = job.y + r * kColumnBlock;
        const float highest = kernels.max(cos, width);
        if (!(highest > best[r])) continue;
        best[r] = highest;
        entry[first_row + r] =
            static_cast<std::uint16_t>(column + (std::find(cos, cos + width, highest) - cos));
        matched_[static_cast<std::size_t>(first_row + r)] = 1;
      }
    }
  }

  bool add_entry(const float* unit, std::int64_t row) {
    if (book_.n_entries() >= max_entries_) return false;
    for (std::int64_t k = 0; k < dim_; ++k) book_.entries.push_back(f32_to_f16(unit[k]));
    book_.entry_rows.push_back(static_cast<std::int32_t>(row));
    return true;
  }

  const CpuContext& context_;
  Codebook& book_;
  std::int64_t dim_;
  float theta_;
  std::int64_t max_entries_;
  std::vector<float> tile_panels_;
  SimilarityGraph graph_;
  std::vector<float> units_;
  std::vector<std::uint8_t> matched_;
  std::vector<std::int64_t> rest_;  // rows of the tile that no earlier entry matched, ascending
};

}  // namespace

void Codebook::undo_to(std::int64_t n, std::int64_t n_rows) {
  CHECK(n >= 0 && n <= n_entries() && n_rows <= n_rows_seen, "what the book was earlier");
  // Entries that came from elsewhere have no rows.
  const auto n_undone = static_cast<std::size_t>(n_entries() - n);
  entry_rows.resize(entry_rows.size() - std::min(n_undone, entry_rows.size()));
  entries.resize(static_cast<std::size_t>(n * head_dim));
  n_in_panels = std::min(n_in_panels, n);
  n_rows_seen = n_rows;
}

CodebookMatch codebook_match(const CpuContext& context, Codebook& book, ConstRows x, float theta,
                             std::int64_t max_entries) {
  CHECK(x.width > 0 && (book.head_dim == 0 || book.head_dim == x.width), "codebook width");
  CHECK(max_entries >= 0 && max_entries <= kMaxEntries, "refs are 16 bits");
  const int old_dim = book.head_dim;
  const std::int64_t old_entries = book.n_entries();
  book.head_dim = static_cast<int>(x.width);

  CodebookMatch match;
  match.refs.entry.resize(static_cast<std::size_t>(x.n_rows));
  match.refs.magnitude.resize(static_cast<std::size_t>(x.n_rows));
  Matcher matcher(context, book, theta, max_entries);
  for (std::int64_t row = 0; row < x.n_rows && match.complete; row += kCodebookTileTokens) {
    const std::int64_t n = std::min(kCodebookTileTokens, x.n_rows - row);
    match.complete = matcher.match_tile(x.rows(row, n), row, match.refs);
  }
  if (match.complete) {
    book.n_rows_seen += x.n_rows;
  } else {
    book.undo_to(old_entries, book.n_rows_seen);
    book.head_dim = old_dim;
    match.refs = {};
  }
  return match;
}

void codebook_decode(const Codebook& book, const CodebookRefs& refs, Rows out) {
  CHECK(out.width == book.head_dim && static_cast<std::size_t>(out.n_rows) == refs.entry.size() &&
            refs.entry.size() == refs.magnitude.size(),
        "codebook_decode shapes");
  for (std::int64_t i = 0; i < out.n_rows; ++i) {
    const auto index = static_cast<std::size_t>(i);
    CHECK(refs.entry[index] < book.n_entries(), "an entry that the book does not have");
    const std::uint16_t* unit = book.entries.data() + refs.entry[index] * out.width;
    const float magnitude = f16_to_f32(refs.magnitude[index]);
    float* row = out.row(i);
    for (std::int64_t k = 0; k < out.width; ++k) row[k] = f16_to_f32(unit[k]) * magnitude;
  }
}

}  // namespace spindle::kernels

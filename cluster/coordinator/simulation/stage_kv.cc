#include "cluster/coordinator/simulation/stage_kv.h"

#include <algorithm>
#include <string>

namespace spindle::coordinator::simulation {
namespace {

using kvstore::HeadPlan;
using kvstore::KvMode;
constexpr std::int64_t kBlock = 32;  // tokens that are encoded together

bool is_raw(const HeadPlan& plan) { return plan.codec == kernels::KvCodec{}; }
bool is_token(const HeadPlan& plan) { return plan.codec.k == kernels::KvFormat::kToken; }

// Whether tokens go on leaving the tail between the boundaries of a prompt.
bool rolls(const HeadPlan& plan) { return !is_raw(plan) || plan.mode == KvMode::kStream; }

HeadPlan plan_of(const control::HeadPlan& plan) {
  return {.mode = static_cast<KvMode>(plan.mode()),
          .selector = static_cast<kvstore::KvSelector>(plan.selector()),
          .codec = {static_cast<kernels::KvFormat>(plan.k_format()),
                    static_cast<kernels::KvFormat>(plan.v_format())},
          .fallback = static_cast<kernels::KvFormat>(plan.fallback()),
          .n_keep = plan.n_keep(),
          .window = plan.window()};
}

Status no_sequence(std::uint64_t sequence) {
  return invalid_argument("sequence " + std::to_string(sequence) + " is not open");
}

std::int64_t as_bytes(std::uint64_t bytes) { return static_cast<std::int64_t>(bytes); }

}  // namespace

std::int64_t StageKv::n_pages(std::uint64_t sequence) const {
  const Sequence* found = sequences_.find(sequence);
  return found == nullptr ? 0 : found->n_pages;
}

std::int64_t StageKv::length(std::uint64_t sequence) const {
  const Sequence* found = sequences_.find(sequence);
  return found == nullptr ? 0 : found->n_tokens;
}

std::int64_t StageKv::tail_begin(std::uint64_t sequence) const {
  auto* const found = sequences_.find(sequence);
  if (found == nullptr) return 0;
  std::int64_t begin = found->n_tokens;
  for (const Head& head : found->heads) begin = std::min(begin, head.tail_origin);
  return begin;
}

Status StageKv::take(Sequence& sequence, std::vector<PageNumber>& pages) {
  if (sequence.n_reserved == 0) return resource_exhausted("a sequence ran out of its reservation");
  --sequence.n_reserved;
  ++sequence.n_pages;
  pages.push_back(book_.take());
  return ok_status();
}

// What a sequence lets go of it may take again, if it was its own.
void StageKv::give_back(Sequence& sequence, PageNumber page) {
  --sequence.n_pages;
  if (!book_.release(page)) return;
  if (book_.reserve(1).ok()) ++sequence.n_reserved;
}

Status StageKv::open(std::uint64_t sequence, std::int64_t max_tokens, std::int64_t reserve_pages,
                     std::int64_t granted_tokens) {
  if (sequences_.find(sequence) != nullptr || max_tokens < 1 || reserve_pages < 0 ||
      granted_tokens < 0 || granted_tokens > max_tokens) {
    return invalid_argument("sequence " + std::to_string(sequence) + " cannot be opened");
  }
  if (Status status = book_.reserve(reserve_pages); !status.ok()) return status;
  Sequence& opened = sequences_.open(sequence);
  opened.max_tokens = max_tokens;
  opened.granted_tokens = granted_tokens > 0 ? granted_tokens : max_tokens;
  opened.n_reserved = reserve_pages;
  opened.heads.resize(static_cast<std::size_t>(n_tables()));
  return ok_status();
}

Status StageKv::grow(const control::GrowSequence& order, std::int64_t more_pages,
                     control::GrownSequence& report) {
  auto* const found = sequences_.find(order.sequence());
  if (found == nullptr) return no_sequence(order.sequence());
  Sequence& grown = *found;
  if (order.granted_tokens() < grown.granted_tokens || order.granted_tokens() > grown.max_tokens ||
      more_pages < 0) {
    return invalid_argument("sequence " + std::to_string(order.sequence()) + " cannot grow from " +
                            std::to_string(grown.granted_tokens) + " to " +
                            std::to_string(order.granted_tokens()) + " tokens");
  }
  grown.granted_tokens = order.granted_tokens();
  control::Compress boundary;  // of generated tokens: nothing of the prompt is left
  boundary.set_sinks(order.sinks());
  boundary.set_recent(order.recent());
  const std::int64_t wanted =
      std::min(grown.n_reserved + more_pages, future_pages(grown, boundary));
  if (wanted > grown.n_reserved) {
    if (Status status = book_.reserve(wanted - grown.n_reserved); !status.ok()) {
      return status.with_context("growing sequence " + std::to_string(order.sequence()));
    }
    grown.n_reserved = wanted;
  }
  report.set_sequence(order.sequence());
  report.set_used_pages(grown.n_pages);
  report.set_reserved_pages(grown.n_reserved);
  return ok_status();
}

Status StageKv::fork(std::uint64_t parent, std::uint64_t child, std::int64_t n_tokens,
                     std::int64_t max_tokens, std::int64_t reserve_pages) {
  auto* const found = sequences_.find(parent);
  if (found == nullptr) return no_sequence(parent);
  const Sequence& from = *found;
  if (n_tokens < from.compressed_at || n_tokens > from.n_tokens) {
    return invalid_argument("a fork at token " + std::to_string(n_tokens) + " of " +
                            std::to_string(from.n_tokens) + ", compressed up to " +
                            std::to_string(from.compressed_at));
  }
  if (Status status = open(child, max_tokens, reserve_pages); !status.ok()) return status;
  Sequence& forked = *sequences_.find(child);
  forked.n_tokens = n_tokens;
  forked.compressed_at = from.compressed_at;
  forked.shared = from.shared;
  forked.shared.insert(forked.shared.end(), from.packed.begin(), from.packed.end());
  for (const PageNumber page : forked.shared) book_.share(page);
  forked.n_pages = static_cast<std::int64_t>(forked.shared.size());
  for (std::size_t i = 0; i < forked.heads.size(); ++i) {
    const Head& source = from.heads[i];
    Head& head = forked.heads[i];
    head = source;
    const std::int64_t n_tail = n_tokens - source.tail_origin;
    head.tail.resize(static_cast<std::size_t>(n_tail / config_.shape.page_tokens));
    for (const PageNumber page : head.tail) book_.share(page);
    forked.n_pages += static_cast<std::int64_t>(head.tail.size());
    if (n_tail % config_.shape.page_tokens == 0) continue;
    if (Status status = take(forked, head.tail); !status.ok()) return status;
  }
  forked.covered = covered_tokens(forked);
  return ok_status();
}

Status StageKv::extend(std::uint64_t sequence, std::int64_t n_tokens, std::int64_t& n_pages) {
  auto* const found = sequences_.find(sequence);
  if (found == nullptr) return no_sequence(sequence);
  Sequence& extended = *found;
  if (extended.n_tokens + n_tokens > extended.granted_tokens) {
    return invalid_argument("sequence " + std::to_string(sequence) + " has " +
                            std::to_string(extended.n_tokens) + " tokens and runs " +
                            std::to_string(n_tokens) + ", at most " +
                            std::to_string(extended.granted_tokens) + " were granted");
  }
  extended.n_tokens += n_tokens;
  if (extended.n_tokens <= extended.covered) {
    n_pages += extended.n_pages;
    return ok_status();
  }
  for (Head& head : extended.heads) {
    const std::int64_t needed = pages_for(extended.n_tokens - head.tail_origin);
    while (static_cast<std::int64_t>(head.tail.size()) < needed) {
      if (Status status = take(extended, head.tail); !status.ok()) {
        return status.with_context("sequence " + std::to_string(sequence));
      }
    }
  }
  extended.covered = covered_tokens(extended);
  n_pages += extended.n_pages;
  return ok_status();
}

std::int64_t StageKv::covered_tokens(const Sequence& sequence) const {
  std::int64_t covered = sequence.max_tokens;
  for (const Head& head : sequence.heads) {
    const auto n_pages = static_cast<std::int64_t>(head.tail.size());
    covered = std::min(covered, head.tail_origin + n_pages * config_.shape.page_tokens);
  }
  return covered;
}

StageKv::Move StageKv::move_head(const Head& head, const HeadPlan& plan, const Sequence& sequence,
                                 const control::Compress& order) const {
  const kvstore::KvModel& model = config_.model;
  const std::int64_t n = sequence.n_tokens;
  Move move{head.tail_origin, head.n_body, head.body_bytes};
  std::int64_t begin = head.tail_origin;
  if (is_token(plan)) {
    begin = n;
  } else if (!is_raw(plan) || (plan.mode == KvMode::kEvict && order.selects())) {
    begin = n - kvstore::tail_length(order.recent(), n);
  } else if (plan.mode == KvMode::kStream && n > order.sinks() + plan.window + 1) {
    begin = n - plan.window;
  }
  const std::int64_t n_over = std::max<std::int64_t>(begin - head.tail_origin, 0);
  const std::int64_t n_left = begin == n ? n_over : n_over / kBlock * kBlock;
  if (n_left == 0) return move;
  move.tail_origin += n_left;
  const bool is_first = head.n_body == 0;
  const std::int64_t n_sinks =
      is_first ? std::min<std::int64_t>(order.sinks(), n_left) : std::int64_t{0};
  std::int64_t n_kept = n_left;
  if (plan.mode == KvMode::kEvict && order.selects()) {
    const std::int64_t window = n - kvstore::kObservationWindow;
    const std::int64_t first = head.tail_origin + n_sinks;
    const std::int64_t n_candidates =
        std::max<std::int64_t>(std::min(move.tail_origin, window) - first, 0);
    const std::int64_t n_in_window =
        std::max<std::int64_t>(move.tail_origin - std::max(window, first), 0);
    // The query heads of SpindleKV agree on none, at worst.
    const int n_chosen =
        plan.selector == kvstore::KvSelector::kSpindleKv ? model.n_heads / model.n_kv_heads : 1;
    n_kept = n_sinks + std::min(plan.n_keep * n_chosen, n_candidates) + n_in_window;
  }
  if (plan.mode == KvMode::kStream) {
    const std::int64_t n_tail = n - move.tail_origin;
    const std::int64_t most =
        order.sinks() + (is_raw(plan) ? 0 : std::max<std::int64_t>(plan.window - n_tail, 0));
    move.n_body = std::min(head.n_body + n_left, most);
    move.body_bytes = as_bytes(kvstore::head_body_bytes(plan, model, order.sinks(), move.n_body));
    return move;
  }
  move.n_body += n_kept;
  move.body_bytes +=
      as_bytes(is_first ? kvstore::head_body_bytes(plan, model, order.sinks(), n_kept)
                        : kvstore::head_block_bytes(plan, model, n_kept));
  return move;
}

// As many pages as the sequence's own compressed bytes need.
Status StageKv::pack(Sequence& sequence) {
  const auto page_bytes = as_bytes(config_.shape.page_bytes());
  const std::int64_t needed = (sequence.packed_bytes + page_bytes - 1) / page_bytes;
  while (static_cast<std::int64_t>(sequence.packed.size()) > needed) {
    give_back(sequence, sequence.packed.back());
    sequence.packed.pop_back();
  }
  while (static_cast<std::int64_t>(sequence.packed.size()) < needed) {
    if (Status status = take(sequence, sequence.packed); !status.ok()) return status;
  }
  return ok_status();
}

// Pages of the tail that the head may still take, as kv_store_bytes.cc projects them.
std::int64_t StageKv::future_tail(const Sequence& sequence, const Head& head,
                                  const control::Compress& order) const {
  const HeadPlan& plan = head.plan;
  const std::int64_t left = sequence.granted_tokens - sequence.n_tokens;
  const std::int64_t tail = sequence.n_tokens - head.tail_origin;
  const auto n_held = static_cast<std::int64_t>(head.tail.size());
  const bool selects_again = plan.mode == KvMode::kEvict && order.boundaries_left() > 0;
  if (!rolls(plan) && !selects_again) return pages_for(tail + left) - n_held;
  std::int64_t longest = tail + left;
  if (rolls(plan)) {
    std::int64_t behind = kBlock - 1;
    if (is_raw(plan)) {
      behind += order.sinks() + plan.window + 1;
    } else if (!is_token(plan)) {
      behind += order.recent();
    }
    longest = std::min(longest, std::max<std::int64_t>(tail + order.prompt_left(), behind) +
                                    kvstore::kGeneratedBoundary);
  }
  const std::int64_t drawn = pages_for(tail + order.prompt_left()) - n_held;
  const std::int64_t n_own =
      order.forks() ? 0
                    : std::count_if(head.tail.begin(), head.tail.end(), [this](PageNumber page) {
                        return book_.references(page) == 1;
                      });
  return pages_for(longest) - n_own + (order.forks() ? drawn : 0);
}

// Bytes that may yet be packed: of everything that can leave the tail.
std::int64_t StageKv::future_bytes(const Sequence& sequence, const Head& head,
                                   const control::Compress& order) const {
  const HeadPlan& plan = head.plan;
  const bool selects_again = plan.mode == KvMode::kEvict && order.boundaries_left() > 0;
  if (!rolls(plan) && !selects_again) return 0;
  const kvstore::KvModel& model = config_.model;
  std::int64_t bytes = 0;
  if (head.n_body == 0) {
    bytes += as_bytes(kvstore::head_body_bytes(plan, model, order.sinks(), order.sinks()));
  }
  if (is_raw(plan) && !selects_again) return bytes;  // a window: only its sinks are packed
  const std::int64_t n_left = std::max<std::int64_t>(sequence.granted_tokens - head.tail_origin, 0);
  return bytes + as_bytes(kvstore::head_block_bytes(plan, model, n_left)) +
         (order.boundaries_left() + 1) * as_bytes(kvstore::head_block_bytes(plan, model, kBlock));
}

std::int64_t StageKv::future_pages(const Sequence& sequence, const control::Compress& order) const {
  std::int64_t n_pages = 0;
  std::int64_t bytes = 0;
  for (const Head& head : sequence.heads) {
    n_pages += future_tail(sequence, head, order);
    bytes += future_bytes(sequence, head, order);
  }
  const auto page_bytes = as_bytes(config_.shape.page_bytes());
  if (bytes > 0) n_pages += (bytes + page_bytes - 1) / page_bytes + kvstore::kPackingPages;
  return n_pages;
}

Status StageKv::compress(const control::Compress& order, control::CompressedSequence& report) {
  auto* const found = sequences_.find(order.sequence());
  if (found == nullptr) return no_sequence(order.sequence());
  Sequence& sequence = *found;
  if (sequence.n_tokens != order.n_tokens()) {
    return invalid_argument("a boundary at " + std::to_string(order.n_tokens()) + " of sequence " +
                            std::to_string(order.sequence()) + ", which holds " +
                            std::to_string(sequence.n_tokens));
  }
  const int first = config_.first_layer * config_.shape.n_kv_heads;
  if (!order.heads().empty() && order.heads_size() < first + n_tables()) {
    return invalid_argument("a plan of " + std::to_string(order.heads_size()) + " heads");
  }
  bool is_uncompressed = true;
  for (int i = 0; i < n_tables(); ++i) {
    Head& head = sequence.heads[static_cast<std::size_t>(i)];
    if (!order.heads().empty()) head.plan = plan_of(order.heads(first + i));
    is_uncompressed = is_uncompressed && head.plan == HeadPlan{};
    const Move move = move_head(head, head.plan, sequence, order);
    const auto n_freed = std::min(
        static_cast<std::size_t>(pages_for(move.tail_origin - head.tail_origin)), head.tail.size());
    for (std::size_t p = 0; p < n_freed; ++p) give_back(sequence, head.tail[p]);
    head.tail.erase(head.tail.begin(), head.tail.begin() + static_cast<std::ptrdiff_t>(n_freed));
    sequence.packed_bytes =
        std::max<std::int64_t>(sequence.packed_bytes + move.body_bytes - head.body_bytes, 0);
    head.tail_origin = move.tail_origin;
    head.n_body = move.n_body;
    head.body_bytes = move.body_bytes;
  }
  if (Status status = pack(sequence); !status.ok()) {
    return status.with_context("compressing sequence " + std::to_string(order.sequence()));
  }
  sequence.covered = covered_tokens(sequence);
  if (!is_uncompressed) sequence.compressed_at = order.n_tokens();
  // What is still uncompressed may be under any plan after the next boundary.
  if (!is_uncompressed || order.boundaries_left() == 0) {
    const std::int64_t unneeded =
        std::max<std::int64_t>(sequence.n_reserved - future_pages(sequence, order), 0);
    book_.unreserve(unneeded);
    sequence.n_reserved -= unneeded;
  }
  report.set_sequence(order.sequence());
  report.set_n_tokens(order.n_tokens());
  report.set_full_bytes(kvstore::full_bytes(config_.shape, config_.n_layers, sequence.n_tokens));
  report.set_used_pages(sequence.n_pages);
  report.set_reserved_pages(sequence.n_reserved);
  return ok_status();
}

Status StageKv::free(std::uint64_t sequence, control::FreedSequence& report) {
  auto* const found = sequences_.find(sequence);
  if (found == nullptr) return no_sequence(sequence);
  const Sequence& freed = *found;
  const std::uint64_t page_bytes = config_.shape.page_bytes();
  report.set_sequence(sequence);
  report.set_full_bytes(kvstore::full_bytes(config_.shape, config_.n_layers, freed.n_tokens));
  report.set_kept_bytes(static_cast<std::uint64_t>(freed.n_pages) * page_bytes);
  for (int layer = 0; layer < config_.n_layers; ++layer) {
    std::uint64_t bytes = 0;
    for (int h = 0; h < config_.shape.n_kv_heads; ++h) {
      const Head& head =
          freed.heads[static_cast<std::size_t>(layer * config_.shape.n_kv_heads + h)];
      bytes += head.tail.size() * page_bytes + static_cast<std::uint64_t>(head.body_bytes);
    }
    report.add_layer_kept_bytes(bytes);
  }
  for (const Head& head : freed.heads) {
    for (const PageNumber page : head.tail) book_.release(page);
  }
  for (const PageNumber page : freed.shared) book_.release(page);
  for (const PageNumber page : freed.packed) book_.release(page);
  book_.unreserve(freed.n_reserved);
  sequences_.close(sequence);
  return ok_status();
}

Status StageKv::leak_page() {
  if (Status status = book_.reserve(1); !status.ok()) return status;
  book_.take();
  return ok_status();
}

Status StageKv::check() const {
  std::vector<std::uint32_t> references(book_.all_references().size());
  std::int64_t n_reserved = 0;
  const auto count = [&](const std::vector<PageNumber>& pages) {
    for (const PageNumber page : pages) ++references[page];
  };
  std::string wrong;
  sequences_.for_each([&](std::uint64_t id, const Sequence& sequence) {
    n_reserved += sequence.n_reserved;
    count(sequence.shared);
    count(sequence.packed);
    std::size_t n_pages = sequence.shared.size() + sequence.packed.size();
    for (const Head& head : sequence.heads) {
      count(head.tail);
      n_pages += head.tail.size();
      if (static_cast<std::int64_t>(head.tail.size()) !=
          pages_for(sequence.n_tokens - head.tail_origin)) {
        wrong = "sequence " + std::to_string(id) + " has a tail of " +
                std::to_string(sequence.n_tokens - head.tail_origin) + " tokens in " +
                std::to_string(head.tail.size()) + " pages";
      }
    }
    if (static_cast<std::int64_t>(n_pages) != sequence.n_pages) {
      wrong = "sequence " + std::to_string(id) + " counts " + std::to_string(sequence.n_pages) +
              " pages and has " + std::to_string(n_pages);
    }
  });
  if (!wrong.empty()) return internal_error(wrong);
  if (references != book_.all_references()) {
    return internal_error("the sequences' pages are not those that are taken");
  }
  const std::int64_t n_used =
      std::count_if(references.begin(), references.end(), [](std::uint32_t n) { return n > 0; });
  if (n_used != book_.n_used() || n_reserved != book_.n_reserved() ||
      n_used + n_reserved > book_.n_pages()) {
    return internal_error("the sequences hold " + std::to_string(n_used) + " pages and " +
                          std::to_string(n_reserved) + " reserved ones, the book has " +
                          std::to_string(book_.n_used()) + " and " +
                          std::to_string(book_.n_reserved()) + " of " +
                          std::to_string(book_.n_pages()));
  }
  return ok_status();
}

}  // namespace spindle::coordinator::simulation

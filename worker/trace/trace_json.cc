#include "worker/trace/trace_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/json.hpp>
#include <iterator>
#include <limits>
#include <utility>

namespace spindle::worker {
namespace json = boost::json;

namespace {

constexpr std::size_t kPieceBytes = 64 * 1024;

enum Thread : int { kCompute = 1, kTransfer, kCompression, kBubble, kScheduler };
constexpr std::array<const char*, 6> kThreadNames = {
    "", "compute", "transfer", "compression", "bubble", "scheduler"};

struct KindInfo {
  Thread thread;
  const char* name;
};

KindInfo info_of(TraceKind kind) {
  switch (kind) {
    case TraceKind::kIdle:
      return {kBubble, "no step"};
    case TraceKind::kAwaitBudget:
      return {kBubble, "wait for KV budget"};
    case TraceKind::kAwaitStage:
      return {kBubble, "wait for activations"};
    case TraceKind::kAwaitRoom:
      return {kBubble, "wait for room"};
    case TraceKind::kPrepare:
      return {kCompute, "sequences"};
    case TraceKind::kCompress:
      return {kCompression, "compress"};
    case TraceKind::kReceive:
      return {kTransfer, "receive"};
    case TraceKind::kForward:
      return {kCompute, "forward"};
    case TraceKind::kSample:
      return {kCompute, "sample"};
    case TraceKind::kSend:
      return {kTransfer, "send"};
    case TraceKind::kScore:
      return {kCompression, "score"};
    case TraceKind::kReport:
      return {kTransfer, "report"};
    case TraceKind::kPlan:
      return {kScheduler, "plan"};
    case TraceKind::kPreempt:
      return {kScheduler, "preempt"};
    case TraceKind::kBudgetMove:
      return {kScheduler, "KV budget"};
    case TraceKind::kRequests:
    case TraceKind::kKvUsed:
      return {kScheduler, "counter"};
  }
  return {kScheduler, ""};
}

bool is_moment(TraceKind kind) {
  return kind == TraceKind::kPlan || kind == TraceKind::kPreempt || kind == TraceKind::kBudgetMove;
}

// Microseconds with all nanoseconds: what does not overlap here does not overlap in the file.
std::string micros(std::int64_t ns) { return fmt::format("{}.{:03}", ns / 1000, ns % 1000); }

std::string tokens_text(const TraceRecord& record) {
  std::string text;
  if (record.a > 0) text += fmt::format(" {} prefill", record.a);
  if (record.b > 0) text += fmt::format("{} {} decode", record.a > 0 ? " +" : "", record.b);
  return text;
}

std::string tokens_args(const TraceRecord& record) {
  return fmt::format(R"(,"prefill_tokens":{},"decode_tokens":{})", record.a, record.b);
}

struct Words {
  std::string name;
  std::string args;  // begins with a comma, unless empty
};

Words words_of(const TraceRecord& record, int micro_batches) {
  const auto micro_batch = record.step % static_cast<std::uint64_t>(std::max(micro_batches, 1));
  Words words;
  words.name = info_of(record.kind).name;
  if (record.step > 0) {
    words.name += fmt::format(" {}", record.step);
    words.args = fmt::format(R"(,"step":{},"micro_batch":{})", record.step, micro_batch);
  }
  switch (record.kind) {
    case TraceKind::kForward:
      words.name += fmt::format(" mb {}:{}", micro_batch, tokens_text(record));
      words.args += tokens_args(record);
      break;
    case TraceKind::kSample:
      words.args += tokens_args(record);
      break;
    case TraceKind::kPlan:
      words.name += fmt::format(" mb {}:{}", micro_batch, tokens_text(record));
      words.args += tokens_args(record) + fmt::format(R"(,"runs":{})", record.c);
      break;
    case TraceKind::kSend:
    case TraceKind::kReceive:
      words.args += fmt::format(R"(,"bytes":{})", record.c);
      break;
    case TraceKind::kReport:
      words.args += fmt::format(R"(,"busy_us":{},"compress_us":{},"bubble_us":{})", record.a,
                                record.b, record.c);
      break;
    case TraceKind::kPrepare:
    case TraceKind::kCompress:
    case TraceKind::kScore:
      words.args += fmt::format(R"(,"sequences":{})", record.a);
      break;
    case TraceKind::kPreempt:
      words.args += fmt::format(R"(,"requests":{})", record.a);
      break;
    case TraceKind::kBudgetMove:
      words.name += fmt::format(" of stage {}", record.a);
      words.args +=
          fmt::format(R"(,"stage":{},"from_ratio":{:.6f},"to_ratio":{:.6f})", record.a,
                      static_cast<double>(record.b) * 1e-6, static_cast<double>(record.c) * 1e-6);
      break;
    default:
      break;
  }
  if (!words.args.empty()) words.args.erase(0, 1);
  return words;
}

json::object rank_object(const RankTrace& rank, std::int64_t zero_ns) {
  const auto us = [](std::int64_t ns) { return static_cast<double>(ns) * 1e-3; };
  return {{"rank", rank.rank},
          {"device", rank.device},
          {"first_layer", rank.first_layer},
          {"n_layers", rank.n_layers},
          {"begin_us", us(rank.clock.to_rank0(rank.begin_ns) - zero_ns)},
          {"end_us", us(rank.clock.to_rank0(rank.end_ns) - zero_ns)},
          {"events", rank.records.size()},
          {"dropped_events", rank.n_dropped},
          {"clock_offset_us", us(rank.clock.begin.offset_ns)},
          {"clock_drift_us", us(rank.clock.end.offset_ns - rank.clock.begin.offset_ns)},
          {"clock_error_us", us(rank.clock.error_ns())}};
}

void append_name(std::string& out, const char* what, int rank, int thread, std::string_view name) {
  fmt::format_to(std::back_inserter(out),
                 R"({{"ph":"M","name":"{}","pid":{},"tid":{},"args":{{"name":{}}}}},)"
                 "\n",
                 what, rank, thread, json::serialize(json::string(name)));
}

}  // namespace

TraceWriter::TraceWriter(Trace trace) : trace_(std::move(trace)) {
  zero_ns_ = std::numeric_limits<std::int64_t>::max();
  for (RankTrace& rank : trace_.ranks) {
    zero_ns_ = std::min(zero_ns_, rank.clock.to_rank0(rank.begin_ns));
    // Slices are recorded when they end, so that those of different threads are not in order.
    std::stable_sort(
        rank.records.begin(), rank.records.end(),
        [](const TraceRecord& a, const TraceRecord& b) { return a.begin_ns < b.begin_ns; });
  }
  if (trace_.ranks.empty()) zero_ns_ = 0;
  busy_until_.assign(kThreadNames.size(), 0);
}

void TraceWriter::append_head(std::string& out) const {
  json::array ranks;
  std::int64_t error_ns = 0;
  std::uint64_t n_dropped = 0;
  for (const RankTrace& rank : trace_.ranks) {
    ranks.push_back(rank_object(rank, zero_ns_));
    error_ns = std::max(error_ns, rank.clock.error_ns());
    n_dropped += rank.n_dropped;
  }
  const json::object other{
      {"model", trace_.model},
      {"server_version", trace_.server_version},
      {"micro_batches", trace_.micro_batches},
      {"clock", "rank 0's; of other ranks by round trips, each off by at most clock_error_us"},
      {"clock_error_us", static_cast<double>(error_ns) * 1e-3},
      {"dropped_events", n_dropped},
      {"times",
       "slices are the stage thread's own; on a GPU it runs ahead of the device, so that forward "
       "and "
       "send are what it took to enqueue them; busy_us, compress_us and bubble_us of a report are "
       "the "
       "stage's own clock since its last report, on a GPU by the device's events"},
      {"ranks", std::move(ranks)}};
  out += "{\"displayTimeUnit\":\"ms\",\"otherData\":" + json::serialize(other) +
         ",\"traceEvents\":[\n";
  for (const RankTrace& rank : trace_.ranks) {
    append_name(out, "process_name", rank.rank, 0,
                fmt::format("rank {}: layers {}-{}, {}", rank.rank, rank.first_layer,
                            rank.first_layer + rank.n_layers - 1, rank.device));
    const int last = rank.rank == 0 ? kScheduler : kBubble;
    for (int thread = kCompute; thread <= last; ++thread) {
      append_name(out, "thread_name", rank.rank, thread,
                  kThreadNames[static_cast<std::size_t>(thread)]);
    }
  }
}

void TraceWriter::append(const RankTrace& rank, const TraceRecord& record, std::string& out) {
  const KindInfo kind = info_of(record.kind);
  // Of rank 0 as well, so that rounding of a fit never makes two slices overlap.
  std::int64_t begin = rank.clock.to_rank0(record.begin_ns) - zero_ns_;
  std::int64_t end = rank.clock.to_rank0(record.begin_ns + record.duration_ns) - zero_ns_;
  std::int64_t& busy_until = busy_until_[static_cast<std::size_t>(kind.thread)];
  begin = std::max({begin, busy_until, std::int64_t{0}});
  end = std::max(end, begin);
  busy_until = end;
  if (record.kind == TraceKind::kRequests || record.kind == TraceKind::kKvUsed) {
    const bool requests = record.kind == TraceKind::kRequests;
    out += fmt::format(R"({{"ph":"C","name":"{}","pid":{},"ts":{},"args":{{{}}}}},)"
                       "\n",
                       requests ? "requests" : "KV used", rank.rank, micros(begin),
                       requests ? fmt::format(R"("running":{},"waiting":{})", record.a, record.b)
                                : fmt::format(R"("bytes":{})", record.a));
    return;
  }
  const Words words = words_of(record, trace_.micro_batches);
  if (is_moment(record.kind)) {
    out += fmt::format(
        R"({{"ph":"i","s":"p","name":"{}","pid":{},"tid":{},"ts":{},"args":{{{}}}}},)"
        "\n",
        words.name, rank.rank, static_cast<int>(kind.thread), micros(begin), words.args);
    return;
  }
  out += fmt::format(
      R"({{"ph":"X","name":"{}","cat":"{}","pid":{},"tid":{},"ts":{},"dur":{},"args":{{{}}}}},)"
      "\n",
      words.name, kThreadNames[static_cast<std::size_t>(kind.thread)], rank.rank,
      static_cast<int>(kind.thread), micros(begin), micros(end - begin), words.args);
}

// Ends the list, which a comma must not, with an event that says when the recording was over.
void TraceWriter::append_tail(std::string& out) const {
  std::int64_t end = 0;
  for (const RankTrace& rank : trace_.ranks) {
    end = std::max(end, rank.clock.to_rank0(rank.end_ns) - zero_ns_);
  }
  out +=
      fmt::format(R"({{"ph":"i","s":"g","name":"end of the recording","pid":0,"tid":{},"ts":{}}})"
                  "\n]}}\n",
                  static_cast<int>(kScheduler), micros(end));
}

bool TraceWriter::next(std::string& piece) {
  piece.clear();
  if (tail_written_) return false;
  if (!head_written_) {
    append_head(piece);
    head_written_ = true;
  }
  while (rank_ < trace_.ranks.size() && piece.size() < kPieceBytes) {
    const RankTrace& rank = trace_.ranks[rank_];
    if (record_ < rank.records.size()) {
      append(rank, rank.records[record_++], piece);
      continue;
    }
    ++rank_;
    record_ = 0;
    busy_until_.assign(kThreadNames.size(), 0);
  }
  if (piece.size() < kPieceBytes) {
    append_tail(piece);
    tail_written_ = true;
  }
  return true;
}

std::string trace_json(Trace trace) {
  TraceWriter writer(std::move(trace));
  std::string all;
  for (std::string piece; writer.next(piece);) all += piece;
  return all;
}

}  // namespace spindle::worker

#include "worker/trace/trace_messages.h"

#include <cstdint>
#include <string>

namespace spindle::worker {

void encode(std::span<const TraceRecord> records, control::OrderReply& reply) {
  reply.mutable_records()->Reserve(static_cast<int>(records.size()));
  std::int64_t before = 0;
  for (const TraceRecord& record : records) {
    control::TraceRecord& out = *reply.add_records();
    out.set_kind(static_cast<std::int32_t>(record.kind));
    out.set_step(record.step);
    out.set_begin_ns(record.begin_ns - before);
    out.set_duration_ns(static_cast<std::uint64_t>(record.duration_ns));
    out.set_a(record.a);
    out.set_b(record.b);
    out.set_c(record.c);
    before = record.begin_ns;
  }
}

Result<std::vector<TraceRecord>> decode_records(const control::OrderReply& reply,
                                                std::size_t max_records) {
  if (static_cast<std::size_t>(reply.records_size()) > max_records) {
    return internal_error("a reply of " + std::to_string(reply.records_size()) + " records");
  }
  std::vector<TraceRecord> records;
  records.reserve(static_cast<std::size_t>(reply.records_size()));
  std::int64_t before = 0;
  for (const control::TraceRecord& in : reply.records()) {
    TraceRecord record;
    if (in.kind() < 0 || in.kind() >= kTraceKinds) {
      return internal_error("a record of kind " + std::to_string(in.kind()));
    }
    record.kind = static_cast<TraceKind>(in.kind());
    record.step = in.step();
    record.begin_ns = before + in.begin_ns();
    record.duration_ns = static_cast<std::int64_t>(in.duration_ns());
    if (record.duration_ns < 0) return internal_error("a record of a negative duration");
    record.a = in.a();
    record.b = in.b();
    record.c = in.c();
    before = record.begin_ns;
    records.push_back(record);
  }
  return records;
}

}  // namespace spindle::worker

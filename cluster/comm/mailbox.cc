#include "cluster/comm/mailbox.h"

#include <algorithm>
#include <utility>

namespace spindle::comm {

Mailbox::Mailbox(int n_sources, std::size_t max_bytes_per_source)
    : max_bytes_per_source_(max_bytes_per_source), writers_(static_cast<std::size_t>(n_sources)) {}

std::deque<Message>::iterator Mailbox::find(int source) {
  if (source == kAnySource) return messages_.begin();
  return std::find_if(messages_.begin(), messages_.end(),
                      [source](const Message& m) { return m.source == source; });
}

void Mailbox::discard_all() {
  messages_.clear();
  for (Writer& writer : writers_) writer.waiting_bytes = 0;
}

Status Mailbox::push(int source, std::string bytes, Deadline deadline) {
  const std::size_t n_bytes = bytes.size();
  std::unique_lock lock(mutex_);
  Writer& writer = writers_.at(static_cast<std::size_t>(source));
  const bool ready = changed_.wait_until(lock, deadline.at(), [&] {
    return !writer.ended.ok() || writer.waiting_bytes == 0 ||
           writer.waiting_bytes + n_bytes <= max_bytes_per_source_;
  });
  if (!writer.ended.ok()) return writer.ended;
  if (!ready) {
    return deadline_exceeded("the receiver left " + std::to_string(writer.waiting_bytes) +
                             " bytes of earlier messages untouched");
  }
  if (!reading_ended_.ok()) return {};
  writer.waiting_bytes += n_bytes;
  messages_.push_back({source, std::move(bytes)});
  changed_.notify_all();
  return {};
}

Result<std::optional<Message>> Mailbox::pop(int source, Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto ready = [&] { return !reading_ended_.ok() || find(source) != messages_.end(); };
  // A poll, whose deadline has passed, costs no system call.
  if (!ready() && !deadline.passed()) changed_.wait_until(lock, deadline.at(), ready);
  if (!reading_ended_.ok()) return reading_ended_;
  const auto found = find(source);
  if (found == messages_.end()) return std::optional<Message>();
  std::optional<Message> message(std::move(*found));
  messages_.erase(found);
  writers_.at(static_cast<std::size_t>(message->source)).waiting_bytes -= message->bytes.size();
  changed_.notify_all();
  return message;
}

void Mailbox::close(Status reason) {
  const std::lock_guard lock(mutex_);
  for (Writer& writer : writers_) {
    if (writer.ended.ok()) writer.ended = reason;
  }
  if (reading_ended_.ok()) reading_ended_ = std::move(reason);
  discard_all();
  changed_.notify_all();
}

void Mailbox::end_reading(Status reason) {
  const std::lock_guard lock(mutex_);
  if (reading_ended_.ok()) reading_ended_ = std::move(reason);
  discard_all();
  changed_.notify_all();
}

void Mailbox::end_writing(int source, Status reason) {
  const std::lock_guard lock(mutex_);
  Writer& writer = writers_.at(static_cast<std::size_t>(source));
  if (writer.ended.ok()) writer.ended = std::move(reason);
  changed_.notify_all();
}

}  // namespace spindle::comm

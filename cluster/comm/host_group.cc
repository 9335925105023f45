#include "cluster/comm/host_group.h"

#include <cstring>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::comm {
namespace {

struct CollectiveHeader {
  std::uint32_t op;
  std::uint32_t root;
  std::uint64_t sequence;
};
static_assert(sizeof(CollectiveHeader) == kCollectiveHeaderBytes);

std::string describe_collective(std::string_view header) {
  CollectiveHeader fields;
  std::memcpy(&fields, header.data(), sizeof fields);
  const std::string number = " number " + std::to_string(fields.sequence);
  switch (fields.op) {
    case 1:
      return "broadcast" + number + " from rank " + std::to_string(fields.root);
    case 2:
      return "all_gather" + number;
    case 3:
      return "barrier" + number;
    default:
      return "an unknown collective";
  }
}

std::string source_name(int source) {
  return source == kAnySource ? std::string("any rank") : "rank " + std::to_string(source);
}

Status too_many_bytes(std::size_t n_bytes) {
  return too_large("a control message of " + std::to_string(n_bytes) + " bytes; the limit is " +
                   std::to_string(kMaxMessageBytes));
}

}  // namespace

HostGroup::HostGroup(int rank, int size, std::uint32_t epoch)
    : rank_(rank), size_(size), epoch_(epoch) {
  CHECK(size >= 1 && rank >= 0 && rank < size, "rank outside its group");
}

Status HostGroup::check_peer(int peer, std::string_view role) const {
  if (peer >= 0 && peer < size_) return {};
  return invalid_argument(std::string(role) + " rank " + std::to_string(peer) +
                          " is not in a group of " + std::to_string(size_));
}

Status HostGroup::send(int dest, Channel channel, std::string_view bytes, Deadline deadline) {
  if (Status s = check_peer(dest, "destination"); !s.ok()) return s;
  if (bytes.size() > kMaxMessageBytes) return too_many_bytes(bytes.size());
  return send_frame(dest, channel,
                    encode_frame({.channel = channel, .epoch = epoch_, .source = rank_}, {}, bytes),
                    deadline);
}

Status HostGroup::send(int dest, Channel channel, std::span<const std::byte> bytes,
                       Deadline deadline) {
  return send(dest, channel,
              std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()),
              deadline);
}

Result<std::optional<Message>> HostGroup::try_recv(int source, Channel channel) {
  if (source != kAnySource) {
    if (Status s = check_peer(source, "source"); !s.ok()) return s;
  }
  auto frame = recv_frame(source, channel, Deadline(Deadline::Clock::time_point::min()));
  if (!frame.ok() || !frame->has_value()) return frame;
  Message& message = **frame;
  Status decoded =
      decode_frame({.channel = channel, .epoch = epoch_, .source = message.source}, message.bytes);
  if (!decoded.ok()) return decoded;
  return frame;
}

Result<Message> HostGroup::recv(int source, Channel channel, Deadline deadline) {
  if (source != kAnySource) {
    if (Status s = check_peer(source, "source"); !s.ok()) return s;
  }
  auto frame = recv_frame(source, channel, deadline);
  if (!frame.ok()) return frame.status();
  if (!frame->has_value()) {
    return deadline_exceeded("rank " + std::to_string(rank_) + " got no " +
                             std::string(channel_name(channel)) + " message from " +
                             source_name(source) + " in time");
  }
  Message message = std::move(**frame);
  Status decoded =
      decode_frame({.channel = channel, .epoch = epoch_, .source = message.source}, message.bytes);
  if (!decoded.ok()) return decoded;
  return message;
}

std::string HostGroup::collective_header(Collective op, int root) const {
  const CollectiveHeader fields{.op = static_cast<std::uint32_t>(op),
                                .root = static_cast<std::uint32_t>(root),
                                .sequence = collective_sequence_};
  std::string header(sizeof fields, '\0');
  std::memcpy(header.data(), &fields, sizeof fields);
  return header;
}

Status HostGroup::send_collective(int dest, const std::string& header, std::string_view bytes,
                                  Deadline deadline) {
  constexpr Channel kChannel = Channel::kCollective;
  return send_frame(
      dest, kChannel,
      encode_frame({.channel = kChannel, .epoch = epoch_, .source = rank_}, header, bytes),
      deadline);
}

Result<std::string> HostGroup::recv_collective(int source, const std::string& header,
                                               Deadline deadline) {
  Result<Message> message = recv(source, Channel::kCollective, deadline);
  if (!message.ok()) return message.status().with_context(describe_collective(header));
  std::string& bytes = message->bytes;
  if (bytes.size() < kCollectiveHeaderBytes) {
    return internal_error(describe_collective(header) + ": rank " + std::to_string(source) +
                          " sent no collective message");
  }
  if (bytes.compare(0, kCollectiveHeaderBytes, header) != 0) {
    return internal_error("ranks are out of step: rank " + std::to_string(rank_) + " is in " +
                          describe_collective(header) + ", rank " + std::to_string(source) +
                          " in " + describe_collective(bytes));
  }
  bytes.erase(0, kCollectiveHeaderBytes);
  return std::move(bytes);
}

Status HostGroup::broadcast(std::string& bytes, int root, Deadline deadline) {
  if (Status s = check_peer(root, "root"); !s.ok()) return s;
  if (rank_ == root && bytes.size() > kMaxMessageBytes) return too_many_bytes(bytes.size());
  ++collective_sequence_;
  const std::string header = collective_header(Collective::kBroadcast, root);
  if (rank_ != root) {
    Result<std::string> got = recv_collective(root, header, deadline);
    if (!got.ok()) return got.status();
    bytes = std::move(*got);
    return {};
  }
  for (int dest = 0; dest < size_; ++dest) {
    if (dest == rank_) continue;
    if (Status s = send_collective(dest, header, bytes, deadline); !s.ok()) {
      return s.with_context(describe_collective(header));
    }
  }
  return {};
}

Result<std::vector<std::string>> HostGroup::gather_from_all(Collective op, std::string_view bytes,
                                                            Deadline deadline) {
  if (bytes.size() > kMaxMessageBytes) return too_many_bytes(bytes.size());
  ++collective_sequence_;
  const std::string header = collective_header(op, 0);
  for (int step = 1; step < size_; ++step) {
    const int dest = (rank_ + step) % size_;
    if (Status s = send_collective(dest, header, bytes, deadline); !s.ok()) {
      return s.with_context(describe_collective(header));
    }
  }
  std::vector<std::string> all(static_cast<std::size_t>(size_));
  for (int source = 0; source < size_; ++source) {
    std::string& slot = all[static_cast<std::size_t>(source)];
    if (source == rank_) {
      slot.assign(bytes);
      continue;
    }
    Result<std::string> got = recv_collective(source, header, deadline);
    if (!got.ok()) return got.status();
    slot = std::move(*got);
  }
  return all;
}

Result<std::vector<std::string>> HostGroup::all_gather(std::string_view bytes, Deadline deadline) {
  return gather_from_all(Collective::kAllGather, bytes, deadline);
}

Status HostGroup::barrier(Deadline deadline) {
  return gather_from_all(Collective::kBarrier, {}, deadline).status();
}

}  // namespace spindle::comm

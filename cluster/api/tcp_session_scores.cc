#include "cluster/api/tcp_session.h"
// Scores of prompts: larger than what may be buffered, so they wait until the writer takes them.

#include <algorithm>
#include <iterator>
#include <utility>

namespace spindle::api {
namespace {

// Small enough that other requests' frames do not wait long behind one.
constexpr std::size_t kScoresFrameBytes = std::size_t{256} << 10U;
// Of all requests of a connection. One request alone may have half as much (KvBounds).
constexpr std::size_t kMaxWaitingScoreBytes = std::size_t{128} << 20U;
constexpr std::int64_t kRetryMs = 1000;

template <typename Scores>
std::size_t total_bytes(const Scores& scores) {
  std::size_t n_bytes = 0;
  for (const engine::PromptScore& score : scores) {
    n_bytes += score_bytes(score);
  }
  return n_bytes;
}

}  // namespace

std::size_t TcpSession::buffered_bytes() const {
  const std::size_t writing = writing_.size() - writing_scores_;  // scores are at the end
  std::size_t n_bytes = pending_.size() + writing - std::min(written_, writing);
  for (const std::uint64_t id : score_order_) {
    n_bytes += requests_.at(id).behind_scores.size();
  }
  return n_bytes;
}

void TcpSession::on_scores(std::uint64_t id, std::vector<engine::PromptScore>&& scores) {
  const auto it = requests_.find(id);
  if (it == requests_.end() || it->second.cancelled || scores.empty()) {
    return;
  }
  std::size_t waiting = total_bytes(scores);
  for (const std::uint64_t other : score_order_) {
    waiting += total_bytes(requests_.at(other).scores);
  }
  if (waiting > kMaxWaitingScoreBytes) {
    cancel_request(id, ApiError{resource_exhausted("the scores were not read fast enough: " +
                                                   std::to_string(waiting) + " bytes were waiting"),
                                "", kRetryMs});
    return;
  }
  OpenRequest& request = it->second;
  if (request.scores.empty()) {
    score_order_.push_back(id);
  }
  std::move(scores.begin(), scores.end(), std::back_inserter(request.scores));
  output_ready_.cancel();
}

void TcpSession::write_scores() {
  if (score_order_.empty()) {
    return;
  }
  const std::uint64_t id = score_order_.front();
  OpenRequest& request = requests_.at(id);
  v1::Frame frame;
  frame.set_id(id);
  move_scores(request.scores, std::min(kScoresFrameBytes, max_frame_bytes_ / 2),
              *frame.mutable_scores());
  const std::size_t before = writing_.size();
  if (!append_frame(frame, max_frame_bytes_, writing_).ok()) {
    send_too_large(id);
    return;
  }
  writing_scores_ = writing_.size() - before;
  score_order_.pop_front();
  if (!request.scores.empty()) {
    score_order_.push_back(id);
    return;
  }
  pending_ += request.behind_scores;
  request.behind_scores.clear();
  if (request.ended) {
    requests_.erase(id);
    update_read_deadlines(false);
  }
}

void TcpSession::forget(std::uint64_t id) {
  requests_.erase(id);
  std::erase(score_order_, id);
}

}  // namespace spindle::api

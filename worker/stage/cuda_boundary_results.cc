// What a boundary on a GPU answers: the summary for the plan, and the selection by it.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "kernels/core/check.h"
#include "worker/stage/cuda_boundary_scorer.h"

namespace spindle::worker {
namespace {

using kvstore::KvSelector;

// Histogram entries of a head that come with the first copy; more take another.
constexpr std::int64_t kLikelyEntries = 2048;

// Numbers before a histogram's entries: their count, then first entry and size of each row.
std::size_t histogram_header(std::size_t n_rows) { return (1 + 2 * n_rows + 1) / 2 * 2; }

std::size_t histogram_bytes(std::size_t n_rows, std::size_t n_entries) {
  return histogram_header(n_rows) * sizeof(std::uint32_t) +
         n_entries * sizeof(kernels::DeviceHistogramEntry);
}

kernels::ScoreHistogram sum_of(std::span<const kernels::ScoreHistogram> histograms) {
  std::map<std::uint16_t, std::uint32_t> counts;
  for (const kernels::ScoreHistogram& histogram : histograms) {
    for (std::size_t i = 0; i < histogram.bin.size(); ++i) {
      counts[histogram.bin[i]] += histogram.count[i];
    }
  }
  kernels::ScoreHistogram sum;
  for (const auto& [bin, count] : counts) {
    sum.bin.push_back(bin);
    sum.count.push_back(count);
  }
  return sum;
}

}  // namespace

// Through page-locked memory, so that copies run at the bus's speed.
void CudaBoundaryScorer::read_back(void* target, const void* source, std::size_t n_bytes) {
  for (std::size_t done = 0; done < n_bytes; done += kStagingBytes) {
    const std::size_t n = std::min(n_bytes - done, kStagingBytes);
    context_.to_host(staging_.data(), static_cast<const std::byte*>(source) + done, n);
    context_.synchronize();
    std::memcpy(static_cast<std::byte*>(target) + done, staging_.data(), n);
  }
}

void CudaBoundaryScorer::summarize(const Sequence& sequence, BoundarySummary& summary) {
  const kvstore::BoundaryNeeds& needs = sequence.windows.needs().boundary;
  std::vector<float> lazy;
  const bool has_lazy = sequence.windows.has_queries() && needs.selector != KvSelector::kKeyDiff;
  if (needs.lazy_mass) {
    lazy.resize(static_cast<std::size_t>(n_layers_) * static_cast<std::size_t>(shape_.n_heads));
    if (has_lazy) read_back(lazy.data(), at<float>(layout_.lazy), lazy.size() * sizeof(float));
    for (std::size_t i = 0; i < lazy.size(); i += static_cast<std::size_t>(shape_.n_heads)) {
      double sum = 0;
      for (int h = 0; h < shape_.n_heads; ++h) {
        sum += static_cast<double>(lazy[i + static_cast<std::size_t>(h)]);
      }
      summary.lazy_mass.push_back(sum / shape_.n_heads);
    }
  }
  if (needs.histograms) summary.histograms = histograms(sequence);
}

std::vector<kernels::ScoreHistogram> CudaBoundaryScorer::histograms(const Sequence& sequence) {
  if (!sequence.has_scores()) {
    return std::vector<kernels::ScoreHistogram>(static_cast<std::size_t>(n_tables()));
  }
  std::vector<kernels::DeviceSelect> rows;
  for (std::int64_t r = 0; r < n_tables() * sequence.rows_per_head; ++r) {
    kernels::DeviceSelect row;
    row.scores = scores_of(sequence, r);
    row.n = static_cast<std::int32_t>(
        sequence.heads[static_cast<std::size_t>(r / sequence.rows_per_head)].candidates.size());
    rows.push_back(row);
  }
  std::vector<kernels::ScoreHistogram> of_rows(rows.size());
  if (sequence.scores_at.has_value()) {
    // As many rows at a time as the probabilities' place can take at worst; usually all.
    for (std::size_t first = 0; first < rows.size();) {
      std::size_t entries = 0;
      std::size_t end = first;
      for (; end < rows.size(); ++end) {
        const auto more =
            static_cast<std::size_t>(std::min(rows[end].n, kernels::kScoreHistogramBins));
        if (end > first && histogram_bytes(end + 1 - first, entries + more) > layout_.p_bytes)
          break;
        entries += more;
      }
      read_histograms(std::span(rows).subspan(first, end - first), entries,
                      std::span(of_rows).subspan(first, end - first));
      first = end;
    }
  } else {
    for (std::size_t r = 0; r < rows.size(); ++r) {
      of_rows[r] = kernels::score_histogram({rows[r].scores, static_cast<std::size_t>(rows[r].n)});
    }
  }
  if (sequence.rows_per_head == 1) return of_rows;
  std::vector<kernels::ScoreHistogram> of_heads;
  const auto per_head = static_cast<std::size_t>(sequence.rows_per_head);
  for (std::size_t r = 0; r < of_rows.size(); r += per_head) {
    of_heads.push_back(sum_of(std::span(of_rows).subspan(r, per_head)));
  }
  return of_heads;
}

void CudaBoundaryScorer::read_histograms(std::span<const kernels::DeviceSelect> rows,
                                         std::size_t worst_entries,
                                         std::span<kernels::ScoreHistogram> histograms) {
  const std::size_t n = rows.size();
  auto* device_rows = at<kernels::DeviceSelect>(layout_.tables);
  context_.to_device(device_rows, rows.data(), rows.size_bytes());
  // One array: the number of entries, begins, sizes, entries.
  const std::size_t header = histogram_header(n);
  auto* numbers = at<std::uint32_t>(layout_.p);
  kernels::DeviceHistograms out;
  out.n_entries = numbers;
  out.begin = numbers + 1;
  out.size = out.begin + n;
  out.entries = reinterpret_cast<kernels::DeviceHistogramEntry*>(numbers + header);
  out.capacity = static_cast<std::int64_t>(worst_entries);
  kernels::score_histogram(context_, device_rows, static_cast<int>(n), out);

  const std::size_t likely = std::min(worst_entries, n * static_cast<std::size_t>(kLikelyEntries));
  std::vector<std::uint32_t> read(header + 2 * likely);
  read_back(read.data(), numbers, read.size() * sizeof(std::uint32_t));
  const std::size_t n_entries = read[0];
  if (n_entries > likely) {
    read.resize(header + 2 * n_entries);
    read_back(read.data() + header + 2 * likely, numbers + header + 2 * likely,
              2 * (n_entries - likely) * sizeof(std::uint32_t));
  }
  for (std::size_t r = 0; r < n; ++r) {
    const std::size_t begin = read[1 + r];
    const std::size_t size = read[1 + n + r];
    for (std::size_t i = begin; i < begin + size; ++i) {
      histograms[r].bin.push_back(static_cast<std::uint16_t>(read[header + 2 * i]));
      histograms[r].count.push_back(read[header + 2 * i + 1]);
    }
  }
}

// ---- Selection.

std::vector<std::vector<std::int32_t>> CudaBoundaryScorer::select(
    kvstore::SequenceId id, const kvstore::KvStore& store, int recent,
    std::span<const kvstore::HeadPlan> heads) {
  std::vector<std::vector<std::int32_t>> kept(heads.size());
  const auto found = sequences_.find(id);
  if (found == sequences_.end() || !found->second.has_scores()) return kept;
  Sequence& sequence = found->second;
  // One row for each list that is ranked.
  std::vector<kernels::DeviceSelect> rows;
  std::vector<std::size_t> table_of_row;
  for (std::size_t table = 0; table < heads.size() && table < sequence.heads.size(); ++table) {
    const kvstore::HeadPlan& plan = heads[table];
    if (plan.mode != kvstore::KvMode::kEvict) continue;
    const PositionRange candidates = sequence.heads[table].candidates;
    const auto n_kv_heads = static_cast<std::size_t>(shape_.n_kv_heads);
    const std::int64_t n =
        n_selectable(store.head_cache(id, static_cast<int>(table / n_kv_heads),
                                      static_cast<int>(table % n_kv_heads)),
                     recent, store.length(id), candidates.begin, candidates.size());
    const std::int64_t n_rows =
        plan.selector == KvSelector::kSpindleKv ? sequence.rows_per_head : 1;
    for (std::int64_t g = 0; g < n_rows; ++g) {
      kernels::DeviceSelect row;
      row.scores =
          scores_of(sequence, static_cast<std::int64_t>(table) * sequence.rows_per_head + g);
      row.n = static_cast<std::int32_t>(n);
      row.k = static_cast<std::int32_t>(std::clamp<std::int64_t>(plan.n_keep, 0, n));
      row.add = static_cast<std::int32_t>(candidates.begin);
      rows.push_back(row);
      table_of_row.push_back(table);
    }
  }
  std::vector<std::vector<std::int32_t>> lists(rows.size());
  if (sequence.scores_at.has_value()) {
    select_on_device(rows, lists);
  } else {
    for (std::size_t r = 0; r < rows.size(); ++r) {
      lists[r] =
          kernels::select_top_k({rows[r].scores, static_cast<std::size_t>(rows[r].n)}, rows[r].k);
      for (std::int32_t& position : lists[r]) position += rows[r].add;
    }
  }
  // A KV head keeps the union of its query heads' lists.
  for (std::size_t r = 0; r < rows.size(); ++r) {
    std::vector<std::int32_t>& all = kept[table_of_row[r]];
    if (all.empty()) {
      all = std::move(lists[r]);
      continue;
    }
    std::vector<std::int32_t> merged;
    std::set_union(all.begin(), all.end(), lists[r].begin(), lists[r].end(),
                   std::back_inserter(merged));
    all = std::move(merged);
  }
  drop_scores(sequence);
  return kept;
}

void CudaBoundaryScorer::select_on_device(std::span<kernels::DeviceSelect> rows,
                                          std::span<std::vector<std::int32_t>> kept) {
  const std::size_t room = layout_.p_bytes / sizeof(std::int32_t);
  auto* positions = at<std::int32_t>(layout_.p);
  auto* device_rows = at<kernels::DeviceSelect>(layout_.tables);
  for (std::size_t first = 0; first < rows.size();) {
    std::size_t n_kept = 0;
    std::size_t end = first;
    for (; end < rows.size() && n_kept + static_cast<std::size_t>(rows[end].k) <= room; ++end) {
      rows[end].kept = positions + n_kept;
      n_kept += static_cast<std::size_t>(rows[end].k);
    }
    CHECK(end > first, "one list fits the scratch");
    const auto batch = rows.subspan(first, end - first);
    context_.to_device(device_rows, batch.data(), batch.size_bytes());
    kernels::select_top_k(context_, device_rows, static_cast<int>(batch.size()));
    std::vector<std::int32_t> read(n_kept);
    read_back(read.data(), positions, n_kept * sizeof(std::int32_t));
    auto from = read.begin();
    for (std::size_t r = first; r < end; ++r) {
      kept[r].assign(from, from + rows[r].k);
      from += rows[r].k;
    }
    first = end;
  }
}

std::vector<float> CudaBoundaryScorer::head_scores(kvstore::SequenceId id, int layer,
                                                   int kv_head) const {
  const Sequence& sequence = sequences_.at(id);
  std::vector<float> scores;
  if (!sequence.has_scores()) return scores;
  const std::int64_t table = std::int64_t{layer} * shape_.n_kv_heads + kv_head;
  const std::int64_t n = sequence.heads[static_cast<std::size_t>(table)].candidates.size();
  for (std::int64_t g = 0; g < sequence.rows_per_head; ++g) {
    const float* from = scores_of(sequence, table * sequence.rows_per_head + g);
    std::vector<float> row(static_cast<std::size_t>(n));
    if (sequence.scores_at.has_value()) {
      context_.to_host(row.data(), from, row.size() * sizeof(float));
      context_.synchronize();
    } else {
      std::copy_n(from, n, row.begin());
    }
    scores.insert(scores.end(), row.begin(), row.end());
  }
  return scores;
}

}  // namespace spindle::worker

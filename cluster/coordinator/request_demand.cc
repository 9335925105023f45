#include "cluster/coordinator/request_demand.h"

namespace spindle::coordinator {
namespace {

using kvstore::kGeneratedBoundary;

// Of a stage's pages, what may be kept free for the growth of those that run.
constexpr std::int64_t kHeadroomPart = 8;

}  // namespace

KvDemand request_demand(const RequestTokens& request) {
  KvDemand demand;
  // Output that is computed anew takes what it took as output: by the bound of a longer prompt, a
  // request that was preempted might not fit alone.
  demand.prompt_tokens = request.n_before_output;
  demand.max_tokens = request.granted;
  demand.n_choices = request.n_choices;
  demand.n_boundaries = request.n_boundaries;
  // Short prompts are never compressed.
  demand.compresses = request.continues_compressed ||
                      request.last_boundary > request.sinks + kvstore::kUncompressedTokens;
  demand.cached_tokens = request.n_cached;
  demand.tail_begin = request.inherited_tail_begin;
  demand.tail_tokens = request.last_boundary > 0
                           ? std::max(request.recent, request.inherited_recent) +
                                 request.n_before_output - request.last_boundary
                           : request.n_before_output - request.inherited_tail_begin;
  return demand;
}

std::int64_t headroom_pages(const kvstore::KvShape& shape, const StageCapacity& stage,
                            std::int64_t tokens_ahead) {
  if (tokens_ahead == 0) return 0;
  const KvDemand compressed{.compresses = true};
  const std::int64_t one =
      kvstore::grow_pages(shape, stage.n_layers, compressed, 0,
                          std::min<std::int64_t>(tokens_ahead, kGeneratedBoundary));
  return std::min(std::max(kvstore::stage_pages(shape, stage.n_layers, tokens_ahead), one),
                  stage.n_pages / kHeadroomPart);
}

}  // namespace spindle::coordinator

#include "ops/cli/bench_load.h"

#include <algorithm>
#include <boost/json.hpp>
#include <cmath>
#include <random>
#include <utility>

namespace spindle::cli {
namespace {

namespace json = boost::json;

// Generators of their own, so that more prompts of one kind do not change another.
enum class Stream : std::uint64_t { kPrefix = 1, kLengths, kTokens, kPlaces, kArrivals };

std::mt19937_64 generator(std::uint64_t seed, Stream stream) {
  std::seed_seq sequence{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                         static_cast<std::uint32_t>(stream)};
  return std::mt19937_64(sequence);
}

std::vector<std::int32_t> random_tokens(std::mt19937_64& random, std::int32_t n,
                                        std::int32_t vocab_size) {
  std::uniform_int_distribution<std::int32_t> id(0, vocab_size - 1);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
  for (std::int32_t& token : tokens) token = id(random);
  return tokens;
}

std::int32_t random_length(std::mt19937_64& random, std::int32_t n, double range_ratio) {
  const auto low = static_cast<std::int32_t>(std::floor(n * (1 - range_ratio)));
  const auto high = static_cast<std::int32_t>(std::ceil(n * (1 + range_ratio)));
  return std::max(1, std::uniform_int_distribution<std::int32_t>(low, high)(random));
}

Status line_error(std::size_t line, const std::string& what) {
  return invalid_argument("line " + std::to_string(line) + ": " + what);
}

Result<BenchPrompt> parse_line(std::string_view text, std::size_t line,
                               std::int32_t output_tokens) {
  boost::system::error_code error;
  const json::value value = json::parse({text.data(), text.size()}, error);
  if (error) return line_error(line, "not JSON: " + error.message());
  const json::object* object = value.if_object();
  const json::value* prompt = object == nullptr ? nullptr : object->if_contains("prompt");
  if (prompt == nullptr || !prompt->is_string() || prompt->get_string().empty()) {
    return line_error(line, "no \"prompt\" with text");
  }
  BenchPrompt out;
  out.text = prompt->get_string().c_str();
  out.output_tokens = output_tokens;
  if (const json::value* length = object->if_contains("output_len")) {
    out.output_tokens = length->to_number<std::int32_t>(error);
    if (error || out.output_tokens < 1) {
      return line_error(line, "\"output_len\" is not a positive whole number");
    }
  }
  return out;
}

// The first place from `at` on where a character begins.
std::size_t character_at(std::string_view text, std::size_t at) {
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0U) == 0x80U) ++at;
  return at;
}

double rate_of(const Arrivals& arrivals, std::size_t i, std::size_t n) {
  const double at = n < 2 ? 0 : static_cast<double>(i) / static_cast<double>(n - 1);
  switch (arrivals.ramp) {
    case Arrivals::Ramp::kLinear:
      return arrivals.ramp_start + (arrivals.ramp_end - arrivals.ramp_start) * at;
    case Arrivals::Ramp::kExponential:
      return arrivals.ramp_start * std::pow(arrivals.ramp_end / arrivals.ramp_start, at);
    case Arrivals::Ramp::kNone:
      break;
  }
  return arrivals.rate;
}

}  // namespace

std::vector<BenchPrompt> random_prompts(const RandomDataset& dataset, std::size_t n,
                                        std::int32_t vocab_size, std::uint64_t seed) {
  auto prefix_random = generator(seed, Stream::kPrefix);
  auto lengths = generator(seed, Stream::kLengths);
  auto tokens = generator(seed, Stream::kTokens);
  const std::vector<std::int32_t> prefix =
      random_tokens(prefix_random, dataset.prefix_tokens, vocab_size);
  std::vector<BenchPrompt> prompts(n);
  for (BenchPrompt& prompt : prompts) {
    const std::int32_t length = random_length(lengths, dataset.input_tokens, dataset.range_ratio);
    prompt.output_tokens = random_length(lengths, dataset.output_tokens, dataset.range_ratio);
    prompt.tokens = prefix;
    const std::vector<std::int32_t> own = random_tokens(tokens, length, vocab_size);
    prompt.tokens.insert(prompt.tokens.end(), own.begin(), own.end());
  }
  return prompts;
}

Result<std::vector<BenchPrompt>> custom_prompts(std::string_view json_lines, std::size_t n,
                                                std::int32_t output_tokens) {
  std::vector<BenchPrompt> lines;
  for (std::size_t line = 1; !json_lines.empty() && lines.size() < n; ++line) {
    const std::size_t end = std::min(json_lines.find('\n'), json_lines.size());
    const std::string_view text = json_lines.substr(0, end);
    json_lines.remove_prefix(std::min(end + 1, json_lines.size()));
    if (text.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    Result<BenchPrompt> prompt = parse_line(text, line, output_tokens);
    if (!prompt.ok()) return prompt.status();
    lines.push_back(*std::move(prompt));
  }
  if (lines.empty()) return invalid_argument("the dataset has no prompts");
  std::vector<BenchPrompt> prompts;
  prompts.reserve(n);
  for (std::size_t i = 0; i < n; ++i) prompts.push_back(lines[i % lines.size()]);
  return prompts;
}

Result<std::vector<BenchPrompt>> document_prompts(std::string_view text, std::size_t n,
                                                  std::size_t n_bytes, std::int32_t output_tokens,
                                                  std::uint64_t seed) {
  if (n_bytes == 0 || text.size() < n_bytes) {
    return invalid_argument("the document has " + std::to_string(text.size()) +
                            " bytes, a prompt is to have " + std::to_string(n_bytes));
  }
  auto places = generator(seed, Stream::kPlaces);
  std::uniform_int_distribution<std::size_t> place(0, text.size() - 1);
  std::vector<BenchPrompt> prompts(n);
  for (BenchPrompt& prompt : prompts) {
    const std::size_t begin = character_at(text, place(places));
    const std::size_t end = begin + n_bytes;
    prompt.output_tokens = output_tokens;
    prompt.text = text.substr(begin, character_at(text, std::min(end, text.size())) - begin);
    if (end > text.size()) {
      prompt.text += text.substr(0, character_at(text, end - text.size()));
    }
  }
  return prompts;
}

std::vector<double> arrival_times(const Arrivals& arrivals, std::size_t n, std::uint64_t seed) {
  auto random = generator(seed, Stream::kArrivals);
  std::vector<double> times(n, 0.0);
  for (std::size_t i = 1; i < n; ++i) {
    const double rate = rate_of(arrivals, i, n);
    double gap = 0;
    if (std::isfinite(rate)) {
      gap = std::gamma_distribution<double>(arrivals.burstiness,
                                            1 / (rate * arrivals.burstiness))(random);
    }
    times[i] = times[i - 1] + gap;
  }
  return times;
}

}  // namespace spindle::cli

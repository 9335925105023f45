// text_oracle_driver: lets a script in another language compare its tokenizer or template engine
// with ours. Reads one JSON request for each line of stdin, answers with one JSON line.
//
//   {"op": "render", "template": "...", "context": {...}, "now": 1700000000}  -> {"text": "..."}
//   {"op": "tokenizer", "model": "folder"} or {"op": "tokenizer", "json": {...}}  -> {}
//   {"op": "encode", "text": "...", "add_special_tokens": false}  -> {"ids": [...]}
//   {"op": "decode", "ids": [...], "skip_special": false}  -> {"text": "..."}
//
// A failed request is answered with {"error": "..."}.

#include <boost/json.hpp>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "cluster/text/chat_template.h"
#include "cluster/text/tokenizer.h"

namespace spindle::text {
namespace {

boost::json::object failure(const Status& status) { return {{"error", status.to_string()}}; }

class Driver {
 public:
  boost::json::object answer(const boost::json::object& request) {
    const auto& op = request.at("op").as_string();
    if (op == "render") return render(request);
    if (op == "tokenizer") return load(request);
    if (op == "encode") return encode(request);
    if (op == "decode") return decode(request);
    return {{"error", "unknown op"}};
  }

 private:
  static boost::json::object render(const boost::json::object& request) {
    const auto parsed = ChatTemplate::parse(std::string(request.at("template").as_string()));
    if (!parsed.ok()) return failure(parsed.status());
    RenderOptions options;
    if (const auto* now = request.if_contains("now")) options.now = now->to_number<std::time_t>();
    const auto text = parsed->render(request.at("context").as_object(), options);
    if (!text.ok()) return failure(text.status());
    return {{"text", *text}};
  }

  boost::json::object load(const boost::json::object& request) {
    const auto* json = request.if_contains("json");
    auto tokenizer = json != nullptr
                         ? Tokenizer::from_json(boost::json::serialize(*json))
                         : Tokenizer::load(std::string(request.at("model").as_string()));
    if (!tokenizer.ok()) return failure(tokenizer.status());
    tokenizer_ = *std::move(tokenizer);
    return {};
  }

  boost::json::object encode(const boost::json::object& request) const {
    EncodeOptions options;
    options.add_special_tokens = request.at("add_special_tokens").as_bool();
    const auto ids = tokenizer_->encode(std::string(request.at("text").as_string()), options);
    if (!ids.ok()) return failure(ids.status());
    return {{"ids", boost::json::value_from(*ids)}};
  }

  boost::json::object decode(const boost::json::object& request) const {
    const auto ids = boost::json::value_to<std::vector<std::int32_t>>(request.at("ids"));
    return {{"text", tokenizer_->decode(ids, request.at("skip_special").as_bool())}};
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

}  // namespace
}  // namespace spindle::text

int main() {
  spindle::text::Driver driver;
  std::string line;
  while (std::getline(std::cin, line)) {
    try {
      std::cout << driver.answer(boost::json::parse(line).as_object()) << std::endl;
    } catch (const std::exception& error) {  // a malformed request
      std::cout << boost::json::object{{"error", error.what()}} << std::endl;
    }
  }
}

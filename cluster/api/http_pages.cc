#include "cluster/api/http_pages.h"

#include <openssl/evp.h>

#include <array>
#include <cstddef>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::api {
namespace {

constexpr std::string_view kContentSecurityPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
// As much of the digest as a tag needs.
constexpr std::size_t kTagBytes = 12;

std::string tag_of(std::string_view body) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  CHECK(EVP_Digest(body.data(), body.size(), digest.data(), &length, EVP_sha256(), nullptr) == 1,
        "no SHA-256");
  static constexpr std::string_view kHex = "0123456789abcdef";
  std::string tag = "\"";
  for (std::size_t i = 0; i < kTagBytes; ++i) {
    tag += kHex[digest.at(i) >> 4];
    tag += kHex[digest.at(i) & 0xF];
  }
  return tag + '"';
}

std::string_view trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

}  // namespace

bool matches_tag(std::string_view if_none_match, std::string_view tag) {
  while (!if_none_match.empty()) {
    const std::size_t comma = if_none_match.find(',');
    std::string_view item = trimmed(if_none_match.substr(0, comma));
    if (item == "*") return true;
    if (item.starts_with("W/")) item.remove_prefix(2);
    if (item == tag) return true;
    if (comma == std::string_view::npos) break;
    if_none_match.remove_prefix(comma + 1);
  }
  return false;
}

HttpPages::HttpPages(Map pages) : pages_(std::move(pages)) {
  for (const auto& [path, page] : pages_) tags_.emplace(path, tag_of(page.body));
}

std::string_view HttpPages::find(std::string_view path) const {
  const auto found = pages_.find(path);
  return found == pages_.end() ? std::string_view() : std::string_view(found->first);
}

HttpResponse HttpPages::respond(std::string_view path, std::string_view if_none_match) const {
  const auto found = pages_.find(path);
  if (found == pages_.end()) return http_error_response(404, "no page", "not_found");
  const HttpPage& page = found->second;
  HttpResponse response{.content_type = page.content_type};
  if (!page.redirect.empty()) {
    response.status = 308;
    response.headers.emplace_back("Location", page.redirect);
    return response;
  }
  const std::string& tag = tags_.find(path)->second;
  if (matches_tag(if_none_match, tag)) {
    response.status = 304;
  } else {
    response.body = page.body;
  }
  response.headers = {{"ETag", tag},
                      {"Cache-Control", "no-cache"},
                      {"Content-Security-Policy", std::string(kContentSecurityPolicy)},
                      {"X-Content-Type-Options", "nosniff"},
                      {"X-Frame-Options", "DENY"},
                      {"Referrer-Policy", "no-referrer"}};
  return response;
}

}  // namespace spindle::api

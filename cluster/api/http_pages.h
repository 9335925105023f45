#pragma once
// Fixed documents that the server gives to browsers: the dashboard.

#include <map>
#include <string>
#include <string_view>

#include "cluster/api/http_message.h"

namespace spindle::api {

struct HttpPage {
  std::string content_type;
  std::string body = {};
  // When not empty: the page is elsewhere, at this address relative to its path.
  std::string redirect = {};
};

// Answers with what a browser needs to keep the page to itself: a content security policy that
// allows this server's own files and nothing inline, no sniffing of types, no framing, and a tag by
// which an unchanged page is not sent again.
//
// Thread-safety: immutable after construction.
class HttpPages {
 public:
  using Map = std::map<std::string, HttpPage, std::less<>>;  // by path

  explicit HttpPages(Map pages);

  // The path as the server holds it, or "" when there is no such page. Valid as long as this.
  std::string_view find(std::string_view path) const;
  // 200, 304 when `if_none_match` names this version, 308, or 404.
  HttpResponse respond(std::string_view path, std::string_view if_none_match) const;

 private:
  Map pages_;
  std::map<std::string, std::string, std::less<>> tags_;  // by path, with quotes
};

// Whether an If-None-Match header names `tag` ("..." with its quotes) or everything.
bool matches_tag(std::string_view if_none_match, std::string_view tag);

}  // namespace spindle::api

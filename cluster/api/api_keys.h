#pragma once
// The API keys a server accepts.

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace spindle::api {

// Holds SHA-256 digests only. Comparison takes the same time whichever key matches or how much of
// one does, because digests of equal length are compared in constant time and all keys are tried.
//
// Thread-safety: immutable after construction.
class ApiKeys {
 public:
  ApiKeys() = default;
  // Empty keys are ignored: an empty line in a configuration must not open the server.
  explicit ApiKeys(std::span<const std::string> keys);

  // Whether a key is asked for at all.
  bool required() const { return !digests_.empty(); }
  // True when no key is required or `key` is one of them.
  bool accepts(std::string_view key) const;
  // The same for the value of an Authorization header; the scheme must be Bearer.
  bool accepts_authorization(std::string_view header) const;

  // Tells the sessions of different keys apart: a part of the key's digest, never 0. 0 for everyone
  // when no key is required.
  std::uint64_t owner_of(std::string_view key) const;
  // The same for the value of an Authorization header that was accepted.
  std::uint64_t owner_of_authorization(std::string_view header) const;

 private:
  using Digest = std::array<unsigned char, 32>;
  static Digest digest_of(std::string_view key);

  std::vector<Digest> digests_;
};

}  // namespace spindle::api

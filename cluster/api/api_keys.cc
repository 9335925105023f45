#include "cluster/api/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <optional>

namespace spindle::api {
namespace {

// The key in the value of an Authorization header, if its scheme is Bearer.
std::optional<std::string_view> bearer_key(std::string_view header) {
  static constexpr std::string_view kScheme = "bearer ";
  if (header.size() <= kScheme.size()) return std::nullopt;
  const bool bearer =
      std::equal(kScheme.begin(), kScheme.end(), header.begin(), [](char expected, char got) {
        return expected == static_cast<char>(std::tolower(static_cast<unsigned char>(got)));
      });
  if (!bearer) return std::nullopt;
  header.remove_prefix(kScheme.size());
  while (!header.empty() && header.front() == ' ') header.remove_prefix(1);
  while (!header.empty() && header.back() == ' ') header.remove_suffix(1);
  return header;
}

}  // namespace

ApiKeys::ApiKeys(std::span<const std::string> keys) {
  for (const std::string& key : keys) {
    if (!key.empty()) digests_.push_back(digest_of(key));
  }
}

ApiKeys::Digest ApiKeys::digest_of(std::string_view key) {
  Digest digest{};
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), digest.data());
  return digest;
}

bool ApiKeys::accepts(std::string_view key) const {
  if (!required()) return true;
  const Digest digest = digest_of(key);
  bool found = false;
  for (const Digest& known : digests_) {
    found |= CRYPTO_memcmp(known.data(), digest.data(), digest.size()) == 0;
  }
  return found;
}

bool ApiKeys::accepts_authorization(std::string_view header) const {
  if (!required()) return true;
  const std::optional<std::string_view> key = bearer_key(header);
  return key && accepts(*key);
}

std::uint64_t ApiKeys::owner_of(std::string_view key) const {
  if (!required()) return 0;
  const Digest digest = digest_of(key);
  std::uint64_t owner = 0;
  std::memcpy(&owner, digest.data(), sizeof owner);
  return owner == 0 ? 1 : owner;
}

std::uint64_t ApiKeys::owner_of_authorization(std::string_view header) const {
  return owner_of(bearer_key(header).value_or(std::string_view()));
}

}  // namespace spindle::api

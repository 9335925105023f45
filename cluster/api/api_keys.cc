#include "cluster/api/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cctype>

namespace spindle::api {

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
  static constexpr std::string_view kScheme = "bearer ";
  if (header.size() <= kScheme.size()) return false;
  const bool bearer =
      std::equal(kScheme.begin(), kScheme.end(), header.begin(), [](char expected, char got) {
        return expected == static_cast<char>(std::tolower(static_cast<unsigned char>(got)));
      });
  if (!bearer) return false;
  header.remove_prefix(kScheme.size());
  while (!header.empty() && header.front() == ' ') header.remove_prefix(1);
  while (!header.empty() && header.back() == ' ') header.remove_suffix(1);
  return accepts(header);
}

}  // namespace spindle::api

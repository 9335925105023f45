// The real HTTP server over scripted tokens, for clients in other languages. Prints its port, and
// runs until standard input closes: api_fake_server [PORT] [API_KEY]
#include <charconv>
#include <cstdio>
#include <iostream>
#include <string>
#include <string_view>

#include "tests/cluster/api/api_test_server.h"

int main(int argc, char** argv) {
  spindle::api::ApiTestOptions options;
  options.max_model_len = 4096;
  // Slow enough for a client to abort in mid-stream.
  options.token_delay = std::chrono::milliseconds(1);
  if (argc > 1) {
    const std::string_view port = argv[1];
    const auto end = std::from_chars(port.data(), port.data() + port.size(), options.port);
    if (end.ec != std::errc()) {
      std::cerr << "usage: api_fake_server [PORT] [API_KEY]\n";
      return 2;
    }
  }
  if (argc > 2) options.api_keys = {argv[2]};
  spindle::api::ApiTestServer server(options);
  std::cout << "port " << server.port() << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
  }
  return 0;
}

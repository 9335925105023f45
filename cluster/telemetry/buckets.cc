#include "cluster/telemetry/buckets.h"

namespace spindle::telemetry {

Buckets first_token_buckets() {
  return {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
          1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
}

Buckets inter_token_buckets() {
  return {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
}

Buckets request_buckets() {
  return {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
          30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
}

Buckets token_count_buckets(std::int64_t max_model_len) {
  const std::int64_t most = max_model_len > 0 ? max_model_len : 500'000;
  Buckets buckets;
  for (std::int64_t decade = 1; decade <= most; decade *= 10) {
    for (const std::int64_t digit : {1, 2, 5}) {
      if (digit * decade <= most) buckets.push_back(static_cast<double>(digit * decade));
    }
  }
  return buckets;
}

Buckets choice_buckets() { return {1, 2, 5, 10, 20}; }

Buckets http_duration_buckets() {
  return {.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300};
}

Buckets http_size_buckets() {
  return {256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216};
}

}  // namespace spindle::telemetry

#include "cluster/text/jinja/arguments.h"

#include <algorithm>

namespace spindle::text::jinja {

Arguments Arguments::after(std::size_t n) const {
  Arguments rest;
  rest.positional.assign(
      positional.begin() + static_cast<std::ptrdiff_t>(std::min(n, positional.size())),
      positional.end());
  rest.keywords = keywords;
  return rest;
}

}  // namespace spindle::text::jinja

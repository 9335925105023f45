#include "kernels/core/build_info.h"

#include "kernels/core/build_commit.h"  // generated; cmake/SpindleVersion.cmake

namespace spindle {

BuildInfo build_info() {
  BuildInfo build;
  build.version = SPINDLE_VERSION;
  build.commit = kBuildCommit;
  build.has_cuda = SPINDLE_BUILT_WITH_CUDA != 0;
  return build;
}

std::string version_text(std::string_view program, const BuildInfo& build,
                         std::uint32_t protocol_major, std::uint32_t protocol_minor) {
  std::string text(program);
  text += ' ';
  text += build.version;
  if (!build.commit.empty()) {
    text += "\ncommit ";
    text += build.commit;
  }
  text += build.has_cuda ? "\nCUDA yes" : "\nCUDA no";
  text += "\nprotocol " + std::to_string(protocol_major) + "." + std::to_string(protocol_minor);
  text += '\n';
  return text;
}

}  // namespace spindle

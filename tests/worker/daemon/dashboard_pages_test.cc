#include "worker/daemon/dashboard_pages.h"
#include "tests/source_dir.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>

namespace spindle::worker {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;

const fs::path kSource = fs::path(source_dir()) / "ops" / "dashboard";

std::string text_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// "/dashboard/view/../logic/a.js" is "/dashboard/logic/a.js".
std::string resolved(const std::string& from, const std::string& relative) {
  return (fs::path(from).parent_path() / relative).lexically_normal().string();
}

std::set<std::string> matches(const std::string& text, const char* pattern) {
  std::set<std::string> found;
  const std::regex regex(pattern);
  for (std::sregex_iterator it(text.begin(), text.end(), regex), end; it != end; ++it) {
    found.insert((*it)[1].str());
  }
  return found;
}

TEST(DashboardPages, AreTheFilesOfTheSourceByteForByte) {
  const api::HttpPages::Map pages = dashboard_pages();
  EXPECT_EQ(pages.at("/dashboard").body, text_of(kSource / "index.html"));
  std::size_t n_files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(kSource)) {
    const std::string name = fs::relative(entry.path(), kSource).string();
    const std::string extension = entry.path().extension().string();
    const bool shown = extension == ".js" || extension == ".css" || extension == ".svg";
    if (name.starts_with("node_modules") || !entry.is_regular_file() || !shown) continue;
    ++n_files;
    const auto page = pages.find("/dashboard/" + name);
    ASSERT_NE(page, pages.end()) << name;
    EXPECT_EQ(page->second.body, text_of(entry.path())) << name;
  }
  EXPECT_GT(n_files, 20u);
}

TEST(DashboardPages, HaveEverythingThatTheyLoad) {
  const api::HttpPages::Map pages = dashboard_pages();
  for (const std::string& link :
       matches(pages.at("/dashboard").body, R"re((?:src|href)="([^"#]+)")re")) {
    EXPECT_TRUE(pages.contains(resolved("/dashboard", link))) << link;
  }
  for (const auto& [path, page] : pages) {
    if (!page.content_type.starts_with("text/javascript") || path.find("uplot") != path.npos)
      continue;
    for (const std::string& link : matches(page.body, R"re(from '(\.[^']+)')re")) {
      EXPECT_TRUE(pages.contains(resolved(path, link))) << path << " loads " << link;
    }
  }
}

TEST(DashboardPages, KeepToThePolicyTheyAreServedWith) {
  for (const auto& [path, page] : dashboard_pages()) {
    if (path.find("uplot") != path.npos) continue;
    SCOPED_TRACE(path);
    // Nothing from elsewhere, nothing inline, no text that becomes HTML.
    for (const std::string& address : matches(page.body, R"re((https?://[^"'\s]*))re")) {
      EXPECT_EQ(address, "http://www.w3.org/2000/svg");
    }
    EXPECT_THAT(page.body, Not(HasSubstr("innerHTML")));
    EXPECT_THAT(page.body, Not(HasSubstr("insertAdjacentHTML")));
    EXPECT_THAT(page.body, Not(HasSubstr(" style=\"")));
    EXPECT_THAT(page.body, Not(HasSubstr("<style")));
    EXPECT_EQ(matches(page.body, R"re((\son[a-z]+="))re").size(), 0u);
  }
}

TEST(DashboardPages, SendTheFolderToThePage) {
  const api::HttpPages pages(dashboard_pages());
  EXPECT_EQ(pages.respond("/dashboard/", "").status, 308);
  EXPECT_EQ(pages.respond("/dashboard", "").status, 200);
}

}  // namespace
}  // namespace spindle::worker

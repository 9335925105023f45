# Writes the C++ file that holds the dashboard's pages, so that the daemon needs no files at run time:
#
#   cmake -D OUTPUT=FILE.cc -D "PAGES=path|file;..." -P EmbedPages.cmake
#
# Bytes become escapes, so that nothing in a page can mean anything to the compiler.
cmake_policy(VERSION 3.25)

set(type_html "text/html; charset=utf-8")
set(type_js "text/javascript; charset=utf-8")
set(type_css "text/css; charset=utf-8")
set(type_svg "image/svg+xml")

set(text "// Made from ops/dashboard by cmake/EmbedPages.cmake.\n")
string(APPEND text "#include \"worker/daemon/dashboard_pages.h\"\n\n#include <string>\n\n")
string(APPEND text "namespace spindle::worker {\n\napi::HttpPages::Map dashboard_pages() {\n")
string(APPEND text "  api::HttpPages::Map pages;\n")
foreach(page IN LISTS PAGES)
  string(REPLACE "|" ";" parts "${page}")
  list(GET parts 0 path)
  list(GET parts 1 file)
  string(REGEX REPLACE ".*\\." "" extension "${file}")
  file(READ "${file}" hex HEX)
  string(LENGTH "${hex}" digits)
  math(EXPR size "${digits} / 2")
  string(REGEX REPLACE "(..)" "\\\\x\\1" escaped "${hex}")
  string(APPEND text "  pages[\"${path}\"] = {.content_type = \"${type_${extension}}\", .body = std::string(\"${escaped}\", ${size})};\n")
endforeach()
# Links in the page are relative to a path without a slash at its end.
string(APPEND text "  pages[\"/dashboard/\"] = {.content_type = \"text/plain\", .redirect = \"../dashboard\"};\n")
string(APPEND text "  return pages;\n}\n\n}  // namespace spindle::worker\n")
file(WRITE "${OUTPUT}" "${text}")

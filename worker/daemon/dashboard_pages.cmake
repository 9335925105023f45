# The pages of ops/dashboard as a library: worker/daemon/dashboard_pages.h.
set(dashboard ${PROJECT_SOURCE_DIR}/ops/dashboard)
file(GLOB_RECURSE dashboard_files CONFIGURE_DEPENDS
  ${dashboard}/logic/*.js ${dashboard}/view/*.js ${dashboard}/style/*.css)
list(APPEND dashboard_files ${dashboard}/app.js ${dashboard}/connection.js ${dashboard}/icon.svg)

set(dashboard_pages "/dashboard|${dashboard}/index.html")
foreach(file IN LISTS dashboard_files)
  file(RELATIVE_PATH name ${dashboard} ${file})
  list(APPEND dashboard_pages "/dashboard/${name}|${file}")
endforeach()

# Installed by npm; the build does without.
file(GLOB dashboard_uplot CONFIGURE_DEPENDS ${dashboard}/node_modules/uplot/dist/uPlot.esm.js
  ${dashboard}/node_modules/uplot/dist/uPlot.min.css)
list(LENGTH dashboard_uplot dashboard_uplot_files)
if(NOT dashboard_uplot_files EQUAL 2)
  message(STATUS "The dashboard is built without charts: no uPlot (npm ci in ops/dashboard)")
  set(dashboard_uplot)
endif()
foreach(file IN LISTS dashboard_uplot)
  get_filename_component(name ${file} NAME)
  list(APPEND dashboard_pages "/dashboard/uplot/${name}|${file}")
endforeach()

set(dashboard_source ${CMAKE_CURRENT_BINARY_DIR}/dashboard_pages.cc)
add_custom_command(OUTPUT ${dashboard_source}
  COMMAND ${CMAKE_COMMAND} -D OUTPUT=${dashboard_source} -D "PAGES=${dashboard_pages}"
          -P ${PROJECT_SOURCE_DIR}/cmake/EmbedPages.cmake
  DEPENDS ${PROJECT_SOURCE_DIR}/cmake/EmbedPages.cmake ${dashboard}/index.html ${dashboard_files}
          ${dashboard_uplot}
  COMMENT "Embedding the dashboard's pages" VERBATIM)
spindle_library(NAME spindle_dashboard_pages SRCS ${dashboard_source} DEPS spindle_http_server)

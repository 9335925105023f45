# The pages of ops/dashboard as a library: worker/daemon/dashboard_pages.h.
set(dashboard ${PROJECT_SOURCE_DIR}/ops/dashboard)
set(dashboard_names
  app.js connection.js icon.svg logic/colors.js logic/format.js logic/health.js logic/heat.js
  logic/histogram.js logic/history.js logic/moves.js logic/plans.js logic/requests.js
  logic/series.js logic/stages.js style/base.css style/charts.css style/panels.css
  view/banner.js view/dom.js view/figures.js view/heat_picture.js view/heatmap.js
  view/key_dialog.js view/kv_charts.js view/line_chart.js view/pipeline.js view/requests.js
  view/service_charts.js view/table.js view/theme.js)

set(dashboard_pages "/dashboard|${dashboard}/index.html")
set(dashboard_files ${dashboard}/index.html)
foreach(name IN LISTS dashboard_names)
  list(APPEND dashboard_pages "/dashboard/${name}|${dashboard}/${name}")
  list(APPEND dashboard_files ${dashboard}/${name})
endforeach()

# Installed by npm; the build does without. Run cmake again when it has come or gone.
set(dashboard_uplot ${dashboard}/node_modules/uplot/dist)
if(EXISTS ${dashboard_uplot}/uPlot.esm.js AND EXISTS ${dashboard_uplot}/uPlot.min.css)
  foreach(name uPlot.esm.js uPlot.min.css)
    list(APPEND dashboard_pages "/dashboard/uplot/${name}|${dashboard_uplot}/${name}")
    list(APPEND dashboard_files ${dashboard_uplot}/${name})
  endforeach()
else()
  message(STATUS "The dashboard is built without charts: no uPlot (npm ci in ops/dashboard)")
endif()

set(dashboard_source ${CMAKE_CURRENT_BINARY_DIR}/dashboard_pages.cc)
add_custom_command(OUTPUT ${dashboard_source}
  COMMAND ${CMAKE_COMMAND} -D OUTPUT=${dashboard_source} -D "PAGES=${dashboard_pages}"
          -P ${PROJECT_SOURCE_DIR}/cmake/EmbedPages.cmake
  DEPENDS ${PROJECT_SOURCE_DIR}/cmake/EmbedPages.cmake ${dashboard_files}
  COMMENT "Embedding the dashboard's pages" VERBATIM)
spindle_library(NAME spindle_dashboard_pages SRCS ${dashboard_source} DEPS spindle_http_server)

#pragma once
// The dashboard's pages (ops/dashboard), built into the program.

#include "cluster/api/http_pages.h"

namespace spindle::worker {

// "/dashboard" and what it loads, below "/dashboard/". The chart library is among them when it was
// installed (npm) at build time; without it the page shows tables instead of charts.
api::HttpPages::Map dashboard_pages();

}  // namespace spindle::worker

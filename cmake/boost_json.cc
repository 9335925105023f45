// Boost.JSON as a header-only library needs its definitions once.
#include <boost/json/src.hpp>

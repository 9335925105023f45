#pragma once
// The same outcome under its two names: StatusCode in the program, ErrorCode on the wire.

#include "kernels/core/status.h"
#include "proto/api.pb.h"

namespace spindle::api {

v1::ErrorCode error_code_of(StatusCode code);

// Codes this build does not know (a newer server's) become kInternal.
StatusCode status_code_of(v1::ErrorCode code);

// An Error as a Status; an Error with the code OK, which no server sends, is INTERNAL.
Status status_of(const v1::Error& error);

}  // namespace spindle::api

# Tests of the TCP API.
spindle_test(NAME framing_test SRCS framing_test.cc DEPS spindle_tcp_framing)

# A server whose output is scripted by the prompt; tests/ops drives the client program with it.
add_library(spindle_tcp_scripted_service STATIC tcp_scripted_service.cc)
target_link_libraries(spindle_tcp_scripted_service PUBLIC spindle_tcp_server)

spindle_test(NAME tcp_messages_test SRCS tcp_messages_test.cc DEPS spindle_tcp_server)
spindle_test(NAME tcp_server_test SRCS tcp_server_test.cc DEPS spindle_tcp_scripted_service)
spindle_test(NAME tcp_session_test SRCS tcp_session_test.cc DEPS spindle_tcp_scripted_service)
spindle_test(NAME tcp_client_test SRCS tcp_client_test.cc
  DEPS spindle_tcp_client spindle_tcp_scripted_service)
spindle_test(NAME tcp_service_test SRCS tcp_service_test.cc
  DEPS spindle_tcp_client spindle_tcp_server spindle_api_test_server)

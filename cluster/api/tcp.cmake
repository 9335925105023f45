# The TCP API: framing shared by both sides, the server, and the client library of ops/cli.
spindle_library(NAME spindle_tcp_framing
  SRCS framing.cc tcp_errors.cc
  DEPS spindle_core spindle_proto)

spindle_library(NAME spindle_tcp_server
  SRCS tcp_messages.cc tcp_session.cc tcp_session_scores.cc tcp_server.cc
  DEPS spindle_tcp_framing spindle_engine_api spindle_api_keys spindle_listener
  LIBS spindle_boost)

# Depends on neither the server nor the tokenizer.
spindle_library(NAME spindle_tcp_client
  SRCS tcp_client.cc
  DEPS spindle_tcp_framing
  LIBS spindle_boost)

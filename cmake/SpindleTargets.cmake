# The two functions with which every room declares its targets, so that all CMakeLists.txt read alike.

# spindle_library(NAME name SRCS a.cc ... [DEPS target ...] [LIBS external ...])
# A static library. DEPS are other Spindle libraries and must follow the arrows in README.md
# (tests/lint checks the includes); LIBS are external libraries.
function(spindle_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS;LIBS" ${ARGN})
  add_library(${ARG_NAME} STATIC ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PUBLIC spindle_options ${ARG_DEPS} ${ARG_LIBS})
endfunction()

# spindle_scaled_timeout(variable seconds)
# A limit for ctest: sanitizers make everything slower.
function(spindle_scaled_timeout VARIABLE SECONDS)
  if(SPINDLE_SANITIZE)
    math(EXPR SECONDS "4 * ${SECONDS}")
  endif()
  set(${VARIABLE} ${SECONDS} PARENT_SCOPE)
endfunction()

# spindle_command_test(NAME name COMMAND program argument ... TIMEOUT seconds [LABELS label ...]
#                      [PROCESSORS n] [ENVIRONMENT name=value ...] [SKIP_RETURN_CODE code])
# A program that is one ctest entry.
function(spindle_command_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT;PROCESSORS;SKIP_RETURN_CODE"
    "COMMAND;LABELS;ENVIRONMENT" ${ARGN})
  spindle_scaled_timeout(timeout ${ARG_TIMEOUT})
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_COMMAND})
  set_tests_properties(${ARG_NAME} PROPERTIES TIMEOUT ${timeout} LABELS "cpu;${ARG_LABELS}")
  foreach(property PROCESSORS SKIP_RETURN_CODE ENVIRONMENT)
    if(ARG_${property})
      set_tests_properties(${ARG_NAME} PROPERTIES ${property} "${ARG_${property}}")
    endif()
  endforeach()
endfunction()

# spindle_test(NAME name SRCS a.cc ... [DEPS target ...] [LABELS label ...] [TIMEOUT seconds]
#              [PROCESSORS n])
# A GoogleTest binary; every case in it becomes one ctest entry.
function(spindle_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT;PROCESSORS" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT SPINDLE_TESTS)
    return()
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  spindle_scaled_timeout(timeout ${ARG_TIMEOUT})
  if(NOT ARG_PROCESSORS)
    set(ARG_PROCESSORS 1)
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} spindle_test_support GTest::gmock GTest::gtest_main)
  set_target_properties(${ARG_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  # Discovery loses all but the first of several labels, so that they become one, "cpu-golden-long".
  # ctest's -L and -LE look for a pattern in it.
  list(JOIN ARG_LABELS "-" labels)
  string(JOIN "-" labels cpu ${labels})
  gtest_discover_tests(${ARG_NAME} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    PROPERTIES TIMEOUT ${timeout} PROCESSORS ${ARG_PROCESSORS} LABELS "${labels}")
endfunction()

# Everything that tests/gpu/run.sh runs.
if(SPINDLE_HAVE_CUDA)
  add_custom_target(spindle_gpu)
endif()

# spindle_gpu_test(NAME name SRCS a.cc ... [DEPS target ...] [GPUS n] [TIMEOUT seconds])
# A GoogleTest binary whose cases need n GPUs (label gpu1 or gpu2). It is built wherever CUDA is, and
# its cases skip themselves, with the reason, where there is no GPU.
function(spindle_gpu_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT;GPUS" "SRCS;DEPS" ${ARGN})
  if(NOT SPINDLE_TESTS OR NOT SPINDLE_HAVE_CUDA)
    return()
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(NOT ARG_GPUS)
    set(ARG_GPUS 1)
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} spindle_kernels_cuda spindle_test_support
    GTest::gmock GTest::gtest_main)
  set_target_properties(${ARG_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_dependencies(spindle_gpu ${ARG_NAME})
  gtest_discover_tests(${ARG_NAME} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "gpu${ARG_GPUS}" RESOURCE_LOCK gpu)
endfunction()

# What --version says beside the project's version: build/kernels/core/build_commit.h, written anew
# when HEAD moves. (Uncommitted changes do not show: that would mean a check on every build.)

set(SPINDLE_COMMIT_HEADER ${CMAKE_BINARY_DIR}/kernels/core/build_commit.h)

# The files that change when HEAD does; none outside git.
set(head_files)
find_package(Git QUIET)
if(Git_FOUND)
  foreach(file HEAD logs/HEAD)
    execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --git-path ${file}
      WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} RESULT_VARIABLE code OUTPUT_VARIABLE path
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(code EQUAL 0)
      get_filename_component(path ${path} ABSOLUTE BASE_DIR ${PROJECT_SOURCE_DIR})
      if(EXISTS ${path})
        list(APPEND head_files ${path})
      endif()
    endif()
  endforeach()
endif()

add_custom_command(OUTPUT ${SPINDLE_COMMIT_HEADER}
  COMMAND ${CMAKE_COMMAND} -DGIT=${GIT_EXECUTABLE} -DSOURCE=${PROJECT_SOURCE_DIR}
          -DHEADER=${SPINDLE_COMMIT_HEADER} -P ${CMAKE_CURRENT_LIST_DIR}/write_commit.cmake
  DEPENDS ${head_files} ${CMAKE_CURRENT_LIST_DIR}/write_commit.cmake
  COMMENT "The commit for --version" VERBATIM)

# External packages and the options every target is compiled with.

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(MPI 3.0 REQUIRED COMPONENTS CXX)
find_package(Protobuf REQUIRED)
find_package(Boost 1.81 REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(ZLIB REQUIRED)
find_package(spdlog REQUIRED)
find_package(CLI11 REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
if(SPINDLE_TESTS)
  find_package(GTest REQUIRED)
endif()

# oneDNN's own CMake package asks for OpenCL, which Debian's build does not need.
if(NOT SPINDLE_ONEDNN STREQUAL "OFF")
  find_path(DNNL_INCLUDE_DIR dnnl.hpp)
  find_library(DNNL_LIBRARY dnnl)
  if(DNNL_INCLUDE_DIR AND DNNL_LIBRARY)
    set(SPINDLE_HAVE_ONEDNN TRUE)
    add_library(spindle_dnnl INTERFACE)
    target_include_directories(spindle_dnnl SYSTEM INTERFACE ${DNNL_INCLUDE_DIR})
    target_link_libraries(spindle_dnnl INTERFACE ${DNNL_LIBRARY})
  elseif(SPINDLE_ONEDNN STREQUAL "ON")
    message(FATAL_ERROR "SPINDLE_ONEDNN=ON, but oneDNN was not found (Debian: libdnnl-dev)")
  endif()
endif()

# CUDA bodies are compiled whenever a toolkit and nccl.h are there, also on machines without a GPU.
set(SPINDLE_HAVE_CUDA FALSE)
if(NOT SPINDLE_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND)
    find_path(SPINDLE_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  endif()
  if(CUDAToolkit_FOUND AND SPINDLE_NCCL_INCLUDE_DIR)
    set(SPINDLE_HAVE_CUDA TRUE)
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
    endif()
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80 90a)
    endif()
    enable_language(CUDA)
    if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
  elseif(SPINDLE_CUDA STREQUAL "ON" AND NOT CUDAToolkit_FOUND)
    message(FATAL_ERROR "SPINDLE_CUDA=ON, but no CUDA toolkit was found. Install CUDA 12 or newer, "
                        "or point CUDAToolkit_ROOT to it, or set SPINDLE_CUDA=OFF.")
  elseif(SPINDLE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SPINDLE_CUDA=ON, but nccl.h was not found (NVIDIA's libnccl-dev). Install "
                        "it, or set SPINDLE_CUDA=OFF.")
  elseif(CUDAToolkit_FOUND)
    message(WARNING "A CUDA toolkit is here but nccl.h is not (NVIDIA's libnccl-dev): Spindle is "
                    "built for the CPU only.")
  endif()
endif()

# Options shared by every Spindle target.
add_library(spindle_options INTERFACE)
target_include_directories(spindle_options INTERFACE ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR})
target_compile_options(spindle_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Werror
    -Wno-restrict -Wno-stringop-overflow>)
target_link_libraries(spindle_options INTERFACE Threads::Threads)
if(SPINDLE_SANITIZE)
  target_compile_options(spindle_options INTERFACE -fsanitize=${SPINDLE_SANITIZE}
    -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(spindle_options INTERFACE -fsanitize=${SPINDLE_SANITIZE})
  # With their instrumentation GCC 12 takes coroutine frames for uninitialised memory, and for memory
  # that another allocator gave.
  target_compile_options(spindle_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized -Wno-mismatched-new-delete>)
  if(SPINDLE_SANITIZE MATCHES "thread")
    # GCC says that TSan does not see atomic_thread_fence, which Asio uses.
    target_compile_options(spindle_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-tsan>)
  endif()
endif()

# Boost is used as headers only: Asio, Beast, and JSON through the one translation unit beside this.
add_library(spindle_boost STATIC ${CMAKE_CURRENT_LIST_DIR}/boost_json.cc)
target_link_libraries(spindle_boost PUBLIC Boost::headers OpenSSL::SSL OpenSSL::Crypto Threads::Threads)
target_compile_definitions(spindle_boost PUBLIC
  BOOST_ASIO_NO_DEPRECATED BOOST_ASIO_DISABLE_BOOST_COROUTINE BOOST_JSON_NO_LIB BOOST_CONTAINER_NO_LIB)
if(SPINDLE_SANITIZE)
  # Not spindle_options: its warnings are not for code from outside. Without this TSan would not see
  # the reference counts that order one thread's frees after another's reads.
  target_compile_options(spindle_boost PRIVATE -fsanitize=${SPINDLE_SANITIZE} -fno-omit-frame-pointer
    -Wno-tsan)
endif()

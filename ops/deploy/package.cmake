# The Debian package: cpack -G DEB --config build/CPackConfig.cmake, after everything is built.
set(SPINDLE_PACKAGE_CONTACT "Spindle maintainers <spindle@users.noreply.spindle.example>" CACHE STRING
  "Maintainer of the package: Name <address>")

find_program(GZIP_PROGRAM gzip)
set(debian ${CMAKE_CURRENT_BINARY_DIR}/debian)
configure_file(debian/changelog.in ${debian}/changelog @ONLY)
if(GZIP_PROGRAM)
  execute_process(COMMAND ${GZIP_PROGRAM} -9nkf ${debian}/changelog)
  install(FILES ${debian}/changelog.gz DESTINATION ${doc})
endif()
install(FILES debian/copyright DESTINATION ${doc})
install(FILES debian/lintian-overrides RENAME spindle
  DESTINATION ${CMAKE_INSTALL_DATADIR}/lintian/overrides)

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME spindle)
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGE_CONTACT "${SPINDLE_PACKAGE_CONTACT}")
set(CPACK_STRIP_FILES ON)
# Files outside the prefix (/etc), and templates that are filled when the prefix is known.
set(CPACK_SET_DESTDIR ON)
set(CPACK_INSTALL_PREFIX /usr)

set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_COMPRESSION_TYPE gzip)  # most of it is weights, which xz makes hardly smaller
set(CPACK_DEBIAN_PACKAGE_SECTION net)
set(CPACK_DEBIAN_PACKAGE_PRIORITY optional)
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "distributed server for large language models")
set(CPACK_DEBIAN_PACKAGE_DESCRIPTION "Spindle serves a language model as a pipeline over the ranks of an MPI job,
with a KV cache that is compressed layer by layer. Clients use an
OpenAI-compatible HTTP API or a protobuf TCP API.

The package holds the daemon spindled with a systemd service, the client
program spindle, ready-to-run configurations and a small model.")
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
# mpirun; the other libraries are found in the programs.
set(CPACK_DEBIAN_PACKAGE_DEPENDS "adduser, openmpi-bin")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "openssh-client, bash-completion")
if(SPINDLE_HAVE_CUDA)
  # The daemon computes on the CPU where there is no driver, and needs NCCL for several GPUs only. It
  # is linked with cuBLAS, which may come without a package, so that none can be named.
  set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "libnccl2")
  set(CPACK_DEBIAN_PACKAGE_DESCRIPTION "${CPACK_DEBIAN_PACKAGE_DESCRIPTION}

This build also computes on NVIDIA GPUs (compute capability 8.0 or newer).")
endif()
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION TRUE)
set(CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA
  ${CMAKE_CURRENT_SOURCE_DIR}/debian/conffiles ${CMAKE_CURRENT_SOURCE_DIR}/debian/postinst
  ${CMAKE_CURRENT_SOURCE_DIR}/debian/prerm ${CMAKE_CURRENT_SOURCE_DIR}/debian/postrm)
include(CPack)

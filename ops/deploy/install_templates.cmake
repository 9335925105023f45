# Run by `cmake --install`: writes the files that name other installed files, when the prefix is
# known (an install may change it, and a package has its own).
#   SOURCE_DIR   this folder
#   BINDIR LIBEXECDIR DATADIR    relative to CMAKE_INSTALL_PREFIX, e.g. "bin"
#   COMPLETIONS_DIR              of the build
set(prefix ${CMAKE_INSTALL_PREFIX})
set(SYSCONFDIR ${prefix}/etc)
set(zsh_folder ${prefix}/${DATADIR}/zsh/site-functions)
if(prefix STREQUAL "/usr")
  set(SYSCONFDIR /etc)
  if(EXISTS /etc/debian_version)
    set(zsh_folder ${prefix}/${DATADIR}/zsh/vendor-completions)
  endif()
endif()
foreach(folder BINDIR LIBEXECDIR DATADIR)
  set(${folder} ${prefix}/${${folder}})
endforeach()

# An administrator's own file stays; packages have dpkg's care for conffiles instead.
function(install_template template file permissions)
  set(target $ENV{DESTDIR}${file})
  if(EXISTS ${target} AND file MATCHES "^${SYSCONFDIR}/")
    message(STATUS "Kept: ${target}")
    return()
  endif()
  message(STATUS "Installing: ${target}")
  configure_file(${SOURCE_DIR}/${template} ${target} @ONLY NO_SOURCE_PERMISSIONS)
  file(CHMOD ${target} PERMISSIONS ${permissions})
endfunction()

set(readable OWNER_READ OWNER_WRITE GROUP_READ WORLD_READ)
install_template(systemd/spindled.service.in ${prefix}/lib/systemd/system/spindled.service "${readable}")
install_template(spindle.pbtxt.in ${SYSCONFDIR}/spindle/spindle.pbtxt "${readable}")
install_template(systemd/spindle.default.in ${SYSCONFDIR}/default/spindle
  "OWNER_READ;OWNER_WRITE;GROUP_READ")
foreach(program spindle spindled)
  file(INSTALL ${COMPLETIONS_DIR}/_${program} DESTINATION ${zsh_folder})  # adds DESTDIR itself
endforeach()

# tmf_page: page.html as bytes, with the policy that names its hashes. The generator runs here, at build time.
add_executable(embed_page ${PROJECT_SOURCE_DIR}/tools/embed_page.c)
target_link_libraries(embed_page PRIVATE tmf_flags tmf_base)
add_custom_command(OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/page.c
    COMMAND embed_page ${CMAKE_CURRENT_SOURCE_DIR}/page.html ${CMAKE_CURRENT_BINARY_DIR}/page.c
    DEPENDS embed_page page.html VERBATIM)
add_library(tmf_page STATIC ${CMAKE_CURRENT_BINARY_DIR}/page.c)
target_link_libraries(tmf_page PRIVATE tmf_flags)

# Constrained decoding, tool calls, and the templates that ask for them.
tmf_test(grammar unit tmf_grammar tmf_datasets)
target_sources(test_grammar PRIVATE support/json_validate.c support/schema_maker.c
    support/alloc_fail.c)
target_link_options(test_grammar PRIVATE ${TMF_ALLOC_FAIL})
tmf_test(toolcall unit tmf_grammar)
target_sources(test_toolcall PRIVATE support/alloc_fail.c)
target_link_options(test_toolcall PRIVATE ${TMF_ALLOC_FAIL})
add_executable(grammar_lines support/grammar_lines.c)
target_link_libraries(grammar_lines PRIVATE tmf_flags tmf_grammar)
target_include_directories(grammar_lines PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})

tmf_test(jinja unit tmf_datasets)
target_sources(test_jinja PRIVATE support/alloc_fail.c)
target_link_options(test_jinja PRIVATE ${TMF_ALLOC_FAIL})
add_executable(jinja_lines support/jinja_lines.c)
target_link_libraries(jinja_lines PRIVATE tmf_flags tmf_formats)
target_include_directories(jinja_lines PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
if(Python3_FOUND)
    add_test(NAME oracle_jinja COMMAND ${Python3_EXECUTABLE}
        ${CMAKE_CURRENT_SOURCE_DIR}/oracle_jinja.py $<TARGET_FILE:jinja_lines> ${TMF_SHARED_DIR}
        ${CMAKE_CURRENT_SOURCE_DIR}/golden/jinja.json)
    set_tests_properties(oracle_jinja PROPERTIES LABELS e2e SKIP_RETURN_CODE 77 TIMEOUT 300)
endif()

tmf_fuzz(jinja tmf_formats)
tmf_fuzz(grammar tmf_grammar)
tmf_fuzz(toolcall tmf_grammar)
foreach(target replay_grammar fuzz_grammar)
    if(TARGET ${target})
        target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
        target_link_libraries(${target} PRIVATE PkgConfig::CHECK)
    endif()
endforeach()

# Constrained decoding, tool calls, and the templates that ask for them.
tmf_test(grammar unit tmf_grammar tmf_datasets)
target_sources(test_grammar PRIVATE support/json_validate.c)
add_executable(grammar_lines support/grammar_lines.c)
target_link_libraries(grammar_lines PRIVATE tmf_flags tmf_grammar)
target_include_directories(grammar_lines PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})

# Writing models: AWQ directories, workspaces, manifests.
tmf_test(w4_dir unit tmf_formats)
target_sources(test_w4_dir PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(convert unit tmf_formats)
target_sources(test_convert PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(tm_store unit tmf_formats)
target_sources(test_tm_store PRIVATE support/tiny_dir.c support/tiny_weights.c support/alloc_fail.c)
target_link_options(test_tm_store PRIVATE ${TMF_ALLOC_FAIL})
tmf_test(info unit tmf_formats)
target_sources(test_info PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_fuzz(yaml tmf_formats)

# Beside a reader of its own in NumPy, where Python has it.
add_executable(w4_dump support/w4_dump.c)
target_link_libraries(w4_dump PRIVATE tmf_flags tmf_formats)
add_test(NAME oracle_awq COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/cli/run.sh -b ${PROJECT_BINARY_DIR}/tools
    ${CMAKE_CURRENT_SOURCE_DIR}/oracle_awq.sh)
set_tests_properties(oracle_awq PROPERTIES LABELS e2e TIMEOUT 600 SKIP_RETURN_CODE 77
    ENVIRONMENT "TMF_SHARED=${TMF_SHARED_DIR}")
add_test(NAME workspace_scores COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/cli/run.sh -b ${PROJECT_BINARY_DIR}/tools
    ${CMAKE_CURRENT_SOURCE_DIR}/workspace_scores.sh)
set_tests_properties(workspace_scores PROPERTIES LABELS e2e TIMEOUT 600 SKIP_RETURN_CODE 77)

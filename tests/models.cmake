add_executable(make_model support/make_model.c)
target_link_libraries(make_model PRIVATE tmf_flags tmf_formats)

# Allocation failures are injected by wrapping our own allocators.
set(TMF_ALLOC_FAIL -Wl,--wrap=mem_alloc -Wl,--wrap=mem_strdup -Wl,--wrap=file_map_open)
tmf_test(safetensors unit tmf_formats)
target_sources(test_safetensors PRIVATE support/alloc_fail.c)
target_link_options(test_safetensors PRIVATE ${TMF_ALLOC_FAIL})
tmf_test(model unit tmf_formats)
tmf_test(hf_dir unit tmf_formats)
target_sources(test_hf_dir PRIVATE support/hf_case.c support/tiny_dir.c support/tiny_weights.c)
tmf_test(hf_awq unit tmf_formats)
target_sources(test_hf_awq PRIVATE support/hf_case.c support/alloc_fail.c support/tiny_dir.c
    support/tiny_weights.c)
target_link_options(test_hf_awq PRIVATE ${TMF_ALLOC_FAIL})
tmf_test(weights unit tmf_formats)
target_sources(test_weights PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(make_model unit tmf_formats)
target_compile_definitions(test_make_model PRIVATE TMF_MAKE_MODEL="$<TARGET_FILE:make_model>")
add_dependencies(test_make_model make_model)

# tmf_fuzz(NAME libs...): fuzz/fuzz_NAME.c over fuzz/corpus/NAME, replayed as a test. With
# -DWITH_FUZZER=ON and clang also fuzz_NAME, the fuzzer itself.
option(WITH_FUZZER "build the fuzzers (clang)" OFF)
function(tmf_fuzz name)
    add_executable(replay_${name} fuzz/replay.c fuzz/fuzz_${name}.c)
    target_link_libraries(replay_${name} PRIVATE tmf_flags ${ARGN})
    add_test(NAME fuzz_${name}
        COMMAND replay_${name} ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/corpus/${name})
    set_tests_properties(fuzz_${name} PROPERTIES LABELS fuzz)
    if(WITH_FUZZER)
        add_executable(fuzz_${name} fuzz/fuzz_${name}.c)
        target_link_libraries(fuzz_${name} PRIVATE tmf_flags ${ARGN})
        target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
    endif()
endfunction()
tmf_fuzz(safetensors tmf_formats)
tmf_fuzz(config tmf_formats)

# Beside the safetensors package, where Python has it.
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
    add_executable(st_dump support/st_dump.c)
    target_link_libraries(st_dump PRIVATE tmf_flags tmf_formats)
    add_test(NAME oracle_safetensors
        COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/oracle_safetensors.py
            $<TARGET_FILE:st_dump> $<TARGET_FILE:make_model>)
    set_tests_properties(oracle_safetensors PROPERTIES LABELS e2e SKIP_RETURN_CODE 77)
endif()

add_executable(make_model support/make_model.c)
target_link_libraries(make_model PRIVATE tmf_flags tmf_formats)

# Allocation failures are injected by wrapping our own allocators.
set(TMF_ALLOC_FAIL -Wl,--wrap=mem_alloc -Wl,--wrap=mem_strdup -Wl,--wrap=file_map_open)
tmf_test(safetensors unit tmf_formats)
target_sources(test_safetensors PRIVATE support/alloc_fail.c)
target_link_options(test_safetensors PRIVATE ${TMF_ALLOC_FAIL})
tmf_test(model unit tmf_formats)
tmf_test(hf_dir unit tmf_formats)
target_sources(test_hf_dir PRIVATE support/alloc_fail.c support/tiny_dir.c support/tiny_weights.c)
target_link_options(test_hf_dir PRIVATE ${TMF_ALLOC_FAIL})

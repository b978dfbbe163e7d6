# Serving: scheduler, engine.
tmf_test(sched unit tmf_engine)
foreach(name engine engine_limits)
    tmf_test(${name} unit tmf_engine)
    target_sources(test_${name} PRIVATE support/engine_case.c support/fake_constraint.c
        support/alloc_count.c)
    target_link_options(test_${name} PRIVATE -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc
        -Wl,--wrap=posix_memalign,--wrap=aligned_alloc,--wrap=mmap,--wrap=model_step)
endforeach()
add_executable(bench_engine bench_engine.c)
target_link_libraries(bench_engine PRIVATE tmf_flags tmf_engine tmf_grammar)
# Requests and their answers: the pure part.
tmf_test(api unit tmf_api)
tmf_fuzz(api tmf_api)

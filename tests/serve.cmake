# Serving: scheduler, engine.
tmf_test(sched unit tmf_engine)
tmf_test(engine unit tmf_engine)
target_sources(test_engine PRIVATE support/alloc_count.c support/fake_constraint.c)
target_link_options(test_engine PRIVATE -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc
    -Wl,--wrap=posix_memalign,--wrap=aligned_alloc,--wrap=mmap,--wrap=model_step)
add_executable(bench_engine bench_engine.c)
target_link_libraries(bench_engine PRIVATE tmf_flags tmf_engine tmf_grammar)
# Requests and their answers: the pure part.
tmf_test(api unit tmf_api)

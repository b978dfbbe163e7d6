# Serving: scheduler, engine.
tmf_test(sched unit tmf_engine)
foreach(name engine engine_limits)
    tmf_test(${name} unit tmf_engine)
    target_sources(test_${name} PRIVATE support/engine_case.c support/fake_constraint.c
        support/alloc_count.c support/tiny_weights.c)
    target_link_options(test_${name} PRIVATE -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc
        -Wl,--wrap=posix_memalign,--wrap=aligned_alloc,--wrap=mmap,--wrap=model_step)
endforeach()
add_executable(bench_engine bench_engine.c)
target_link_libraries(bench_engine PRIVATE tmf_flags tmf_engine tmf_grammar)
# Requests and their answers: the pure part.
tmf_test(api unit tmf_api)
target_sources(test_api PRIVATE support/alloc_fail.c)
target_link_options(test_api PRIVATE ${TMF_ALLOC_FAIL})
tmf_fuzz(api tmf_api)

# The server itself: before it has a model, then over plain sockets, by the official client, under abuse, and what
# HTTP costs. Times are looked at, so the slow ones run alone.
tmf_test(server unit tmf_http)
target_sources(test_server PRIVATE support/alloc_fail.c)
target_link_options(test_server PRIVATE ${TMF_ALLOC_FAIL})
function(tmf_serve name label)
    add_test(NAME serve_${name} COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/serve_${name}.py
        $<TARGET_FILE:tm-run> ${PROJECT_SOURCE_DIR}/datasets/demo)
    set_tests_properties(serve_${name} PROPERTIES LABELS ${label} SKIP_RETURN_CODE 77 TIMEOUT 1200)
endfunction()
if(Python3_FOUND)
    tmf_serve(errors cli)
    tmf_serve(routes cli)
    tmf_serve(setup cli)
    foreach(name openai abuse speed)
        tmf_serve(${name} slow)
        set_tests_properties(serve_${name} PROPERTIES RUN_SERIAL ON)
    endforeach()
endif()

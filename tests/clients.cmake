# What talks to servers: the framing of streams, and the page in a real browser (client.sh and bench_serve.sh are
# among the transcripts).
tmf_test(sse unit tmf_base)
target_sources(test_sse PRIVATE ${PROJECT_SOURCE_DIR}/tools/sse.c)
tmf_fuzz(sse tmf_base)
foreach(target replay_sse fuzz_sse)
    if(TARGET ${target})
        target_sources(${target} PRIVATE ${PROJECT_SOURCE_DIR}/tools/sse.c)
    endif()
endforeach()
if(Python3_FOUND)
    add_test(NAME serve_page COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/serve_page.py
        $<TARGET_FILE:tm-run> ${PROJECT_SOURCE_DIR}/datasets/demo)
    set_tests_properties(serve_page PROPERTIES LABELS slow SKIP_RETURN_CODE 77 TIMEOUT 300)
endif()

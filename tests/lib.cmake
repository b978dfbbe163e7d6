# libtmforge: through its header, from Python, and what it exports.
tmf_test(lib unit tmforge Threads::Threads)
set_tests_properties(lib PROPERTIES TIMEOUT 300)
if(Python3_FOUND)
    add_test(NAME lib_python COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/lib_python.py
        $<TARGET_FILE:tmforge> ${PROJECT_SOURCE_DIR})
    set_tests_properties(lib_python PROPERTIES LABELS cli SKIP_RETURN_CODE 77 TIMEOUT 300)
endif()

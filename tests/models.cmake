add_executable(make_model support/make_model.c)
target_link_libraries(make_model PRIVATE tmf_flags tmf_formats)

# Quantizing: the rounding rule, the artifacts, calibration, search and packing.
tmf_test(quantize unit tmf_kernels)
tmf_test(calib_file unit tmf_formats)
target_sources(test_calib_file PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(plan_file unit tmf_formats)
target_sources(test_plan_file PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(awq unit tmf_awq tmf_calib)
target_sources(test_awq PRIVATE support/tiny_dir.c support/tiny_weights.c)

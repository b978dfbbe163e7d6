# Writing models: AWQ directories, workspaces, manifests.
tmf_test(w4_dir unit tmf_formats)
target_sources(test_w4_dir PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(convert unit tmf_formats)
target_sources(test_convert PRIVATE support/tiny_dir.c support/tiny_weights.c)
tmf_test(tm_store unit tmf_formats)
target_sources(test_tm_store PRIVATE support/tiny_dir.c support/tiny_weights.c)

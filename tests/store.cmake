# Writing models: AWQ directories, workspaces, manifests.
tmf_test(w4_dir unit tmf_formats)
target_sources(test_w4_dir PRIVATE support/tiny_dir.c support/tiny_weights.c)

# Tokenizers, chat prompts, corpora.
tmf_test(tokenizer unit tmf_datasets)
target_sources(test_tokenizer PRIVATE support/alloc_fail.c)
target_link_options(test_tokenizer PRIVATE ${TMF_ALLOC_FAIL})
tmf_test(chat unit tmf_datasets)
tmf_test(corpus unit tmf_datasets)
target_sources(test_corpus PRIVATE support/alloc_fail.c)
target_link_options(test_corpus PRIVATE ${TMF_ALLOC_FAIL})
target_link_libraries(test_corpus PRIVATE PkgConfig::ARCHIVE PkgConfig::ZSTD)

# Tokenizers, chat prompts, corpora.
tmf_test(tokenizer unit tmf_datasets)
target_sources(test_tokenizer PRIVATE support/alloc_fail.c)
target_link_options(test_tokenizer PRIVATE ${TMF_ALLOC_FAIL})

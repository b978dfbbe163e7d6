/* A tokenizer whose ids are the bytes of the text: token streams can be read. 256 is <s> (put in
 * front), 257 </s>, 258 <|im_start|>, 259 <|im_end|>, all special. */
#ifndef TMF_TESTS_BYTE_TOKENIZER_H
#define TMF_TESTS_BYTE_TOKENIZER_H

#include <check.h>
#include <stdio.h>
#include <string.h>

#include "formats/tokenizer.h"

enum { BYTE_BOS = 256, BYTE_EOS, BYTE_START, BYTE_END, BYTE_VOCAB };

/* tokenizer.json; pre: the pre_tokenizer object. out has room for 16 KiB. */
static inline size_t byte_tokenizer_json(char *out, const char *pre)
{
    static const char *const special[] = {"<s>", "</s>", "<|im_start|>", "<|im_end|>"};
    size_t n = (size_t)sprintf(out, "{\"version\":\"1.0\",\"added_tokens\":[");
    for (int i = 0; i < 4; i++)
        n += (size_t)sprintf(
            out + n, "%s{\"id\":%d,\"content\":\"%s\",\"special\":true,\"normalized\":false}",
            i ? "," : "", BYTE_BOS + i, special[i]);
    n += (size_t)sprintf(
        out + n,
        "],\"normalizer\":null,\"pre_tokenizer\":%s,\"post_processor\":{\"type\":"
        "\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"}}]},\"decoder\":"
        "{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{",
        pre);
    unsigned next = 0x100; /* the characters that stand for bytes which do not print */
    for (unsigned b = 0; b < 256; b++) {
        const bool itself = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        const unsigned c = itself ? b : next++;
        n += (size_t)sprintf(out + n, "%s\"\\u%04x\":%u", b ? "," : "", c, b);
    }
    return n + (size_t)sprintf(out + n, "},\"merges\":[]}}");
}

static inline tokenizer *byte_tokenizer(void)
{
    char json[16 << 10];
    tokenizer *t;
    err e;
    const size_t n = byte_tokenizer_json(
        json, "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}");
    ck_assert_msg(tokenizer_open_memory(&t, "tokenizer.json", json, n, &e) == OK, "%s", e.msg);
    return t;
}

/* The ids as text: bytes, special tokens as their strings. */
static inline void byte_text(char *out, size_t cap, const int32_t *ids, int64_t n)
{
    static const char *const special[] = {"<s>", "</s>", "<|im_start|>", "<|im_end|>"};
    size_t k = 0;
    for (int64_t i = 0; i < n; i++) {
        const char c = (char)ids[i];
        const char *s = ids[i] < 256 ? &c : special[ids[i] - BYTE_BOS];
        const size_t len = ids[i] < 256 ? 1 : strlen(s);
        ck_assert_uint_lt(k + len, cap);
        memcpy(out + k, s, len);
        k += len;
    }
    out[k] = '\0';
}

#endif

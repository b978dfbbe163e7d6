/* Chat templates as rows: those of LMDeploy v0.5.3 to v0.7.3 by name (turbomind-format.md 7.2),
 * and, as "hf-...", what known chat_template texts render. A known text is recognised by its
 * digest. */
#include "formats/chat_table.h"

#include <string.h>

#include "base/hash.h"
#include "base/mem.h"

#define IM       "<|im_start|>"
#define END      "<|im_end|>"
#define H3(role) "<|start_header_id|>" role "<|end_header_id|>\n\n"

/* system, eosys, user, eoh, assistant, eoa, separator */
#define CHATML                                                                        \
    .system = IM "system\n", .eosys = END "\n", .user = IM "user\n", .eoh = END "\n", \
    .assistant = IM "assistant\n", .eoa = END, .separator = "\n"
#define CHATML_CLOSE                                                        \
    .system = IM "system\n", .eosys = END, .user = IM "user\n", .eoh = END, \
    .assistant = IM "assistant\n", .eoa = END
#define LLAMA3_BUT_SYSTEM                                                                         \
    .eosys = "<|eot_id|>", .user = H3("user"), .eoh = "<|eot_id|>", .assistant = H3("assistant"), \
    .eoa = "<|eot_id|>"
#define LLAMA3        .system = H3("system"), LLAMA3_BUT_SYSTEM
#define XCOMPOSER     "[UNUSED_TOKEN_146]"
#define XCOMPOSER_END "[UNUSED_TOKEN_145]"
#define PHI3                                                                        \
    .system = "<|system|>\n", .user = "<|user|>\n", .assistant = "<|assistant|>\n", \
    .stop = {"<|end|>", "<|endoftext|>"}
#define USUAL .flags = CHAT_CUT_LAST
#define INST  .user = "[INST] ", .eoh = " [/INST]", .eoa = CHAT_EOS
#define VICUNA                                                                               \
    .eosys = " ", .user = "USER: ", .eoh = " ", .assistant = "ASSISTANT: ", .eoa = CHAT_EOS, \
    .stop = {CHAT_EOS}
#define SOLAR                                                                         \
    .system = "### System:\n", .eosys = "\n\n", .user = "### User:\n", .eoh = "\n\n", \
    .assistant = "### Assistant:\n"
#define COGVLM  .user = "Question: ", .eoh = " ", .assistant = "Answer:", .separator = "\n"
#define DS_BAR  "\xef\xbd\x9c" /* fullwidth vertical line */
#define DS_END  "<" DS_BAR "end\xe2\x96\x81of\xe2\x96\x81sentence" DS_BAR ">"
#define DS_HEAD "<" DS_BAR "Assistant" DS_BAR ">"
#define DEEPSEEK \
    .user = "User: ", .eoh = "\n\n", .assistant = "Assistant: ", .eoa = DS_END, .gen = "Assistant:"
#define DEEPSEEK_V3                                                                               \
    .begin = CHAT_BOS, .user = "<" DS_BAR "User" DS_BAR ">", .assistant = DS_HEAD, .eoa = DS_END, \
    .bos = BOS_ROW

const chat_row chat_rows[] = {
    {.names = "base|llama", USUAL},
    {.names = "llama2|codellama",
     .system = "[INST] <<SYS>>\n",
     .eosys = "\n<</SYS>>\n\n",
     .assistant = " [/INST] ",
     .eoa = CHAT_EOS,
     .separator = CHAT_BOS "[INST] ",
     .first_user = "[INST] ",
     USUAL},
    {.names = "llama3",
     .begin = CHAT_BOS,
     LLAMA3,
     .stop = {"<|eot_id|>", "<|end_of_text|>"},
     .bos = BOS_ROW,
     USUAL},
    {.names = "llama3_1|llama3_2",
     .begin = CHAT_BOS,
     LLAMA3,
     .meta_prefix = "Cutting Knowledge Date: December 2023\nToday Date: 23 Jul 2024\n\n",
     .stop = {"<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"},
     .bos = BOS_ROW,
     USUAL},
    {.names = "internlm",
     .system = "<|System|>:",
     .eosys = "\n",
     .user = "<|User|>:",
     .eoh = "\n",
     .assistant = "<|Bot|>:",
     .eoa = "<eoa>",
     .separator = "\n",
     .stop = {"<eoa>"},
     USUAL},
    {.names = "internlm2|internlm3|internvl-internlm2|internvl2_5",
     CHATML,
     .stop = {END, "<|action_end|>"},
     USUAL},
    {.names = "internvl2-internlm2", CHATML, .stop = {IM, END}, USUAL},
    {.names = "internlm-xcomposer2|internlm-xcomposer2d5",
     .system = XCOMPOSER "system\n",
     .eosys = XCOMPOSER_END "\n",
     .user = XCOMPOSER "user\n",
     .eoh = XCOMPOSER_END "\n",
     .assistant = XCOMPOSER "assistant\n",
     .eoa = XCOMPOSER_END "\n",
     .separator = "\n",
     .stop = {XCOMPOSER_END},
     USUAL},
    {.names = "qwen|qwen2d5|minicpm3|minicpmv-2d6|chatml", CHATML, .stop = {END}, USUAL},
    {.names = "yi", CHATML, .stop = {END, "<|endoftext|>"}, USUAL},
    {.names = "dbrx", CHATML, USUAL},
    {.names = "llava-chatml|internvl-zh-hermes2", CHATML_CLOSE, USUAL},
    {.names = "vicuna|wizardlm", VICUNA, USUAL},
    {.names = "llava-v1|mini-gemini-vicuna", VICUNA, .gen = "ASSISTANT:", USUAL},
    {.names = "baichuan2", .user = "<reserved_106>", .assistant = "<reserved_107>", USUAL},
    {.names = "mistral|mixtral", INST, USUAL},
    {.names = "gemma",
     .user = "<start_of_turn>user\n",
     .eoh = "<end_of_turn>\n",
     .assistant = "<start_of_turn>model\n",
     .eoa = "<end_of_turn>\n",
     .stop = {"<end_of_turn>"},
     USUAL},
    {.names = "deepseek", DEEPSEEK, USUAL},
    {.names = "deepseek-vl", DEEPSEEK, .eosys = "\n\n", USUAL},
    {.names = "deepseek-coder",
     .user = "### Instruction:\n",
     .eoh = "\n",
     .assistant = "### Response:\n",
     .eoa = "\n<|EOT|>",
     .separator = "\n",
     .stop = {"<|EOT|>"},
     USUAL},
    {.names = "deepseek-v3", DEEPSEEK_V3, USUAL},
    {.names = "deepseek-r1", DEEPSEEK_V3, .gen = DS_HEAD "<think>\n", USUAL},
    {.names = "solar", SOLAR, USUAL},
    {.names = "ultracm|ultralm",
     .system = "User: ",
     .eosys = CHAT_EOS "\n",
     .user = "User: ",
     .eoh = CHAT_EOS "\n",
     .assistant = "Assistant: ",
     .eoa = CHAT_EOS,
     .separator = "\n",
     .stop = {CHAT_EOS},
     USUAL},
    {.names = "phi-3|internvl2-phi3",
     PHI3,
     .eosys = "<|end|>\n",
     .eoh = "<|end|>\n",
     .eoa = "<|end|>\n",
     .separator = "\n",
     USUAL},
    {.names = "internvl-phi3", PHI3, .eosys = "<|end|>", .eoh = "<|end|>", .eoa = "<|end|>", USUAL},
    {.names = "chatglm3",
     .begin = "[gMASK]sop",
     .system = "<|system|>\n ",
     .user = "<|user|>\n ",
     .assistant = "<|assistant|>\n ",
     .stop = {"<eos>"},
     USUAL},
    {.names = "glm4|codegeex4",
     .begin = "[gMASK]<sop>",
     .system = "<|system|>\n",
     .user = "<|user|>\n",
     .assistant = "<|assistant|>\n",
     .stop = {"<|user|>", "<|endoftext|>", "<|observation|>"},
     USUAL},
    {.names = "yi-vl",
     .user = "### Human: ",
     .eoh = "\n",
     .assistant = "### Assistant:",
     .eoa = "\n",
     .stop = {"###"},
     USUAL},
    {.names = "internvl-zh",
     .user = "<human>: ",
     .eoh = " ",
     .assistant = "<bot>: ",
     .eoa = CHAT_EOS,
     .gen = "<bot>:",
     USUAL},
    {.names = "cogvlm", COGVLM, .eoa = CHAT_EOS, .stop = {CHAT_EOS}, USUAL},
    {.names = "cogvlm2", COGVLM, .eoa = "<|end_of_text|>", .stop = {"<|end_of_text|>"}, USUAL},
    {.names = "chatglm",
     .user = "\xe9\x97\xae\xef\xbc\x9a",
     .eoh = "\n\n\xe7\xad\x94\xef\xbc\x9a",
     .flags = CHAT_CUT_LAST | CHAT_ROUNDS},
    {.names = "falcon|puyu", USUAL},

    /* what known chat_template texts render */
    {.names = "hf-chatml", CHATML, .stop = {END}, .bos = BOS_ROW},
    {.names = "hf-chatml-bos", .begin = CHAT_BOS, CHATML, .stop = {END}, .bos = BOS_ROW},
    {.names = "hf-chatml-eos",
     .begin = CHAT_BOS,
     CHATML,
     .stop = {END},
     .bos = BOS_ROW,
     .flags = CHAT_END_EOS},
    {.names = "hf-qwen1.5",
     CHATML,
     .default_system = "You are a helpful assistant",
     .stop = {END},
     .bos = BOS_ROW},
    {.names = "hf-qwen2",
     CHATML,
     .default_system = "You are a helpful assistant.",
     .stop = {END},
     .bos = BOS_ROW},
    {.names = "hf-qwen2.5",
     CHATML,
     .stop = {END},
     .bos = BOS_ROW,
     .default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    {.names = "hf-yi-1.5",
     .user = IM "user\n",
     .eoh = END "\n" IM "assistant\n",
     .eoa = END,
     .separator = "\n",
     .stop = {END},
     .bos = BOS_ROW},
    {.names = "hf-llama2",
     .system = "<<SYS>>\n",
     .eosys = "\n<</SYS>>\n\n",
     .user = CHAT_BOS "[INST] ",
     .eoh = " [/INST]",
     .assistant = " ",
     .eoa = " " CHAT_EOS,
     .gen = "",
     .bos = BOS_ROW,
     .flags = CHAT_TRIM | CHAT_SYSTEM_IN_USER | CHAT_ALTERNATE},
    {.names = "hf-mistral",
     .begin = CHAT_BOS,
     INST,
     .bos = BOS_ROW,
     .flags = CHAT_NO_SYSTEM | CHAT_ALTERNATE},
    {.names = "hf-mistral-v0.1",
     .begin = CHAT_BOS,
     INST,
     .separator = " ",
     .bos = BOS_ROW,
     .flags = CHAT_NO_SYSTEM | CHAT_ALTERNATE},
    {.names = "hf-llama3",
     .begin = CHAT_BOS,
     LLAMA3,
     .stop = {"<|eot_id|>", "<|end_of_text|>"},
     .bos = BOS_ROW,
     .flags = CHAT_TRIM},
    /* The text for 3.2 puts the day of the call here; a prompt that changes overnight serves
     * nobody. */
    {.names = "hf-llama3.1",
     .begin = CHAT_BOS,
     LLAMA3_BUT_SYSTEM,
     .system = H3("system") "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
     .default_system = "",
     .stop = {"<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"},
     .bos = BOS_ROW,
     .flags = CHAT_TRIM},
    {.names = "hf-zephyr",
     .system = "<|system|>\n",
     .eosys = CHAT_EOS "\n",
     .user = "<|user|>\n",
     .eoh = CHAT_EOS "\n",
     .assistant = "<|assistant|>\n",
     .eoa = CHAT_EOS,
     .separator = "\n",
     .bos = BOS_ROW},
    {.names = "hf-openchat",
     .begin = CHAT_BOS,
     .system = "GPT4 Correct System: ",
     .eosys = "<|end_of_turn|>",
     .user = "GPT4 Correct User: ",
     .eoh = "<|end_of_turn|>",
     .assistant = "GPT4 Correct Assistant: ",
     .eoa = "<|end_of_turn|>",
     .gen = "GPT4 Correct Assistant:",
     .stop = {"<|end_of_turn|>"},
     .bos = BOS_ROW},
    {.names = "hf-solar", SOLAR, .bos = BOS_ROW, .flags = CHAT_SKIP_EMPTY},
    {.names = "hf-deepseek-r1", DEEPSEEK_V3, .gen = DS_HEAD "<think>\n", .flags = CHAT_CUT_THINK},
    {.names = "hf-deepseek-r1-0120", DEEPSEEK_V3, .flags = CHAT_CUT_THINK},
};
const int chat_n_rows = (int)(sizeof chat_rows / sizeof *chat_rows);

static bool names_have(const char *names, const char *name)
{
    const size_t n = strlen(name);
    for (const char *p = names; *p; p += strcspn(p, "|") + (p[strcspn(p, "|")] == '|'))
        if (strcspn(p, "|") == n && memcmp(p, name, n) == 0) return true;
    return false;
}

const chat_row *chat_row_find(const char *name)
{
    for (int i = 0; *name && i < chat_n_rows; i++)
        if (names_have(chat_rows[i].names, name)) return &chat_rows[i];
    return NULL;
}

/* ---- recognising a chat_template text ---- */

/* XXH3-128 of a template's text in the form that text_plain makes. */
static const struct {
    const char *digest, *row;
} known_texts[] = {
    {"30db0426264ef8310a8452d646d7af05", "hf-chatml"},
    {"64a49ea804c3a72ffe14994ea8f1ddab", "hf-chatml"},
    {"e93802e69fbfa8fbed89eab3f92f2857", "hf-chatml"},
    {"1b17cb0a23e306de74a8c435dde53fe5", "hf-chatml-bos"},
    {"b0cc649988b4107044e9948c80f60169", "hf-chatml-bos"},
    {"f2a5177122d052da56ab006a2e098e13", "hf-chatml-bos"},
    {"04ceea10627603829895c3972ade2d4e", "hf-chatml-eos"},
    {"999d1207c429f50dbf64080a86a5a245", "hf-deepseek-r1"},
    {"836ecf33df458636d8322e53ace43f8a", "hf-deepseek-r1-0120"},
    {"5d36859b588eff32240849fd33531ef5", "hf-llama2"},
    {"702d3f8a51b291f2f75961eb57b92946", "hf-llama2"},
    {"091115a03ef551a0eccf9bc8c7059b96", "hf-llama3"},
    {"c49c920d4001258a95f65e723a3bc451", "hf-llama3.1"},
    {"f364e99a8288fe3c993eed386aefbf0f", "hf-llama3.1"},
    {"54e9896b718b3854bba2967e02cbfe70", "hf-mistral"},
    {"a1f75b94066295288e03cb8ca299f8c7", "hf-mistral-v0.1"},
    {"9c06deb1c954b976f145cd0c40607ec1", "hf-openchat"},
    {"c3b786a78ffc418537ff9389b0ac93ee", "hf-qwen1.5"},
    {"019ccb65f0f85799803284503a9b53b3", "hf-qwen2"},
    {"b1efa01b75ba8f05076023a31428d9ea", "hf-qwen2"},
    {"ba091f836e152342b49b99b327726122", "hf-qwen2.5"},
    {"548b6e2707d2e7c48ad69eb5ed1f36bc", "hf-solar"},
    {"9fe7614b4810e2a5734ef205cfe84f2e", "hf-yi-1.5"},
    {"70adc823cce153c16e639ddc5c54ef90", "hf-zephyr"},
};

/* White space that means nothing is left out: at the ends, and within tags outside of strings.
 * The two characters \n of a string become a line end. Returns the length; out has room for
 * strlen(text). */
static size_t text_plain(char *out, const char *text)
{
    size_t n = strlen(text), k = 0, a = 0;
    char quote = 0;
    bool tag = false;
    while (n && strchr(" \t\r\n", text[n - 1])) n--;
    while (a < n && strchr(" \t\r\n", text[a])) a++;
    for (size_t i = a; i < n; i++) {
        const char c = text[i], next = i + 1 < n ? text[i + 1] : '\0';
        if (c == '\r') continue;
        if (!quote && c == '{' && (next == '{' || next == '%' || next == '#')) tag = true;
        if (!quote && tag && c == '}') tag = false;
        if (tag && (c == '\'' || c == '"') && (!quote || quote == c)) quote = quote ? '\0' : c;
        if (tag && !quote && (c == ' ' || c == '\n' || c == '\t')) continue;
        if (c == '\\' && next == 'n') i++;
        out[k++] = c == '\\' && next == 'n' ? '\n' : c;
    }
    return k;
}

static bool digest_of_text(hash128 *h, const char *text)
{
    char *buf;
    err e;
    if (mem_alloc((void **)&buf, strlen(text) + 1, 1, "chat template", &e) != OK) return false;
    *h = hash_xxh128(buf, text_plain(buf, text));
    mem_free(buf);
    return true;
}

/* The marks that only one kind of template has. */
static const char *row_by_marks(const char *text)
{
    if (strstr(text, IM)) return strstr(text, "bos_token") ? "hf-chatml-bos" : "hf-chatml";
    if (strstr(text, "<|start_header_id|>")) return "hf-llama3";
    if (strstr(text, "<<SYS>>")) return "hf-llama2";
    if (strstr(text, "[INST]")) return "hf-mistral";
    if (strstr(text, "<|user|>") && strstr(text, "eos_token")) return "hf-zephyr";
    return "";
}

const chat_row *chat_row_of_text(const char *text, bool *exact)
{
    hash128 h;
    *exact = true;
    if (!digest_of_text(&h, text)) return NULL;
    for (size_t i = 0; i < sizeof known_texts / sizeof *known_texts; i++)
        if (!strcmp(h.hex, known_texts[i].digest)) return chat_row_find(known_texts[i].row);
    *exact = false;
    return chat_row_find(row_by_marks(text));
}

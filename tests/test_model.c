/* formats/model, family, hf_config: what config files say, what we make of it, and what we refuse.
 * */
#include "formats/model.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/chat.h"
#include "formats/hf_config.h"
#include "support/suite.h"

#define GOLDEN  TMF_SOURCE_DIR "/tests/golden"
#define CONFIGS TMF_SHARED_DIR "/data/hf-configs"

static model_desc m;
static hf_quant q;
static const family *f;
static err e;

static err_code parse(const char *config, const char *generation, const char *side)
{
    const hf_text c = {config, strlen(config)};
    const hf_text g = {generation, generation ? strlen(generation) : 0},
                  s = {side, side ? strlen(side) : 0};
    return hf_config_parse(&m, &q, &f, c, generation ? &g : NULL, side ? &s : NULL, "config.json",
                           &e);
}

/* A small Llama config with `more` put in front of its keys, so that it may not repeat one of them.
 * */
#define SMALL                                                                         \
    "\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"hidden_size\":64," \
    "\"intermediate_size\":96,"                                                       \
    "\"num_hidden_layers\":3,\"num_attention_heads\":4"

static err_code parse_more(const char *more)
{
    char text[2048];
    (void)snprintf(text, sizeof text, "{%s%s" SMALL "}", more, *more ? "," : "");
    return parse(text, NULL, NULL);
}

/* ---- model.h ---- */
START_TEST(model_roles)
{
    tensor_role r;
    for (int i = 0; i < ROLE_COUNT; i++) {
        ck_assert(role_from_name(&r, role_name((tensor_role)i)));
        ck_assert_int_eq((int)r, i);
    }
    ck_assert(!role_from_name(&r, "qkvo"));
}
END_TEST

START_TEST(model_linears)
{
    tensor_role r[7];
    ck_assert_msg(parse_more("\"num_key_value_heads\":2,\"head_dim\":32") == OK, "%s", e.msg);
    ck_assert_int_eq(model_block_linears(&m, r), 7);
    ck_assert_int_eq((int)r[0], ROLE_Q);
    ck_assert_int_eq((int)r[6], ROLE_DOWN);
    ck_assert_int_eq(model_linear_n(&m, ROLE_Q), 128);
    ck_assert_int_eq(model_linear_n(&m, ROLE_K), 64);
    ck_assert_int_eq(model_linear_n(&m, ROLE_O), 64);
    ck_assert_int_eq(model_linear_k(&m, ROLE_O), 128);
    ck_assert_int_eq(model_linear_n(&m, ROLE_UP), 96);
    ck_assert_int_eq(model_linear_k(&m, ROLE_DOWN), 96);
    ck_assert_int_eq(model_linear_n(&m, ROLE_HEAD), 100);
    m.qkv = QKV_GROUPED;
    ck_assert_int_eq(model_block_linears(&m, r), 5);
    ck_assert_int_eq((int)r[0], ROLE_QKV);
    ck_assert_int_eq(model_linear_n(&m, ROLE_QKV), 256);
}
END_TEST

/* Each field out of its bounds is named. */
START_TEST(model_check_names_the_field)
{
#define WRONG(assignment, name)                                                                  \
    do {                                                                                         \
        ck_assert(                                                                               \
            parse_more(                                                                          \
                "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1," \
                "\"high_freq_factor\":4,\"original_max_position_embeddings\":64}") == OK);       \
        ck_assert(model_desc_check(&m, &e) == OK);                                               \
        assignment;                                                                              \
        ck_assert_int_eq(model_desc_check(&m, &e), E_INPUT);                                     \
        ck_assert_msg(strstr(e.msg, name), "%s", e.msg);                                         \
    } while (0)
    WRONG(m.layers = 0, "layers is 0");
    WRONG(m.layers = MODEL_MAX_LAYERS + 1, "layers is 1025");
    WRONG(m.hidden = -1, "hidden is -1");
    WRONG(m.ffn = 1 << 21, "ffn is");
    WRONG(m.vocab = 0, "vocab is 0");
    WRONG(m.heads = 0, "heads is 0");
    WRONG(m.kv_heads = 8, "kv_heads is 8");
    WRONG(m.kv_heads = 3, "not a multiple of kv_heads 3");
    WRONG(m.head_dim = 15, "head_dim is 15");
    WRONG((m.heads = m.kv_heads = 4096, m.head_dim = 1024), "heads * head_dim");
    WRONG(m.max_tokens = 0, "max_tokens is 0");
    WRONG(m.norm_eps = NAN, "norm_eps is nan");
    WRONG(m.norm_eps = 0, "norm_eps is 0");
    WRONG(m.rope_theta = INFINITY, "rope_theta is inf");
    WRONG(m.rope_dims = 18, "rope_dims is 18");
    WRONG(m.rope_dims = 7, "rope_dims is 7");
    WRONG(m.scaling.factor = 0, "factor is 0");
    WRONG(m.scaling.low_freq_factor = -1, "low_freq_factor is -1");
    WRONG(m.scaling.high_freq_factor = 1, "not above low_freq_factor");
    WRONG(m.scaling.original_max_positions = 0, "original_max_position_embeddings is 0");
    WRONG((m.scaling.kind = ROPE_YARN, m.scaling.beta_fast = 0), "beta_fast is 0");
    WRONG((m.scaling.kind = ROPE_YARN, m.scaling.beta_fast = 32, m.scaling.beta_slow = NAN),
          "beta_slow is nan");
    WRONG((m.scaling.kind = ROPE_DYNAMIC, m.scaling.factor = 0.5f), "factor is 0.5");
    WRONG(m.sliding_window = -1, "sliding_window is -1");
    WRONG(m.sliding_from = 4, "sliding_from is 4");
    WRONG(m.experts = -1, "experts is -1");
    WRONG(m.experts_used = 1, "experts_used is 1");
    WRONG(m.w4_group = 16, "w4_group is 16");
    WRONG(m.dt = DT_I32, "dtype is I32");
    WRONG(m.bos = 100, "bos is 100");
    WRONG(m.eos = -2, "eos is -2");
    WRONG((m.n_stop = 1, m.stop[0] = 100), "stop id is 100");
    WRONG(m.n_stop = MODEL_MAX_STOP + 1, "number of stop ids");
#undef WRONG
}
END_TEST

/* ---- rope ---- */
static int64_t ulps(float a, float b)
{
    int32_t x, y;
    memcpy(&x, &a, 4);
    memcpy(&y, &b, 4);
    return llabs((long long)x - y);
}

START_TEST(model_rope_vectors)
{
    cJSON *list;
    int n = 0;
    ck_assert_msg(json_load(&list, GOLDEN "/rope.json", 1 << 20, &e) == OK, "%s", e.msg);
    for (const cJSON *c = list->child; c; c = c->next, n++) {
        const char *name = cJSON_GetObjectItem(c, "name")->valuestring;
        const cJSON *want = cJSON_GetObjectItem(c, "inv_freq");
        float got[MODEL_MAX_HEAD_DIM / 2], mscale;
        char *config;
        int i = 0;
        ck_assert(json_print(&config, cJSON_GetObjectItem(c, "config"), false, &e) == OK);
        ck_assert_msg(parse(config, NULL, NULL) == OK, "%s: %s", name, e.msg);
        ck_assert_msg(m.rope_dims / 2 == cJSON_GetArraySize(want), "%s: rope_dims %d", name,
                      m.rope_dims);
        model_inv_freq(&m, cJSON_GetObjectItem(c, "tokens")->valueint, got, &mscale);
        for (const cJSON *v = want->child; v; v = v->next, i++)
            ck_assert_msg(ulps(got[i], (float)v->valuedouble) <= 3,
                          "%s: inv_freq[%d]: expected %.9g, got %.9g", name, i, v->valuedouble,
                          (double)got[i]);
        ck_assert_msg(ulps(mscale, (float)cJSON_GetObjectItem(c, "mscale")->valuedouble) <= 1,
                      "%s: mscale %.9g", name, (double)mscale);
        mem_free(config);
    }
    ck_assert_int_eq(n, 18);
    cJSON_Delete(list);
}
END_TEST

START_TEST(model_rope_config)
{
    static const struct {
        const char *more;
        err_code code;
        const char *fragment;
    } cases[] = {
        {"\"rope_scaling\":null", OK, ""},
        {"\"rope_scaling\":{\"rope_type\":\"default\"}", OK, ""},
        {"\"rope_scaling\":{\"type\":\"linear\",\"rope_type\":\"linear\",\"factor\":2}", OK, ""},
        {"\"rope_scaling\":[]", E_INPUT, "'rope_scaling'"},
        {"\"rope_scaling\":{\"type\":\"linear\"}", E_INPUT, "factor"},
        {"\"rope_scaling\":{\"type\":\"linear\",\"factor\":\"2\"}", E_INPUT, "factor"},
        {"\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}", E_INPUT, "factor is 0"},
        {"\"rope_scaling\":{\"type\":\"linear\",\"factor\":-1}", E_INPUT, "factor is -1"},
        {"\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":0.5}", E_INPUT, "factor is 0.5"},
        {"\"rope_scaling\":{\"type\":\"linear\",\"rope_type\":\"dynamic\",\"factor\":2}", E_INPUT,
         "rope_type is 'dynamic'"},
        {"\"rope_scaling\":{\"type\":\"longrope\",\"factor\":2}", E_UNSUPPORTED, "'longrope'"},
        {"\"rope_scaling\":{\"type\":\"su\"}", E_UNSUPPORTED, "'su'"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}", E_INPUT, "low_freq_factor"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_"
         "freq_factor\":4,"
         "\"original_max_position_embeddings\":64}",
         E_INPUT, "high_freq_factor"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_"
         "freq_factor\":4}",
         E_INPUT, "original_max_position_embeddings"},
        {"\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"truncate\":false}", E_UNSUPPORTED,
         "truncate"},
        {"\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\"}}", E_UNSUPPORTED,
         "full_attention"},
        {"\"rope_theta\":0", E_INPUT, "rope_theta is 0"},
        {"\"rope_theta\":-1e4", E_INPUT, "rope_theta is -10000"},
        {"\"partial_rotary_factor\":0", E_INPUT, "partial_rotary_factor"},
        {"\"partial_rotary_factor\":1.5", E_INPUT, "partial_rotary_factor"},
        {"\"partial_rotary_factor\":0.05", E_INPUT, "rope_dims is 0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const err_code rc = parse_more(cases[i].more);
        ck_assert_msg(rc == cases[i].code, "%s: %s %s", cases[i].more, err_name(rc),
                      rc ? e.msg : "");
        if (rc) ck_assert_msg(strstr(e.msg, cases[i].fragment), "%s: %s", cases[i].more, e.msg);
        if (rc) ck_assert_msg(strncmp(e.msg, "config.json: ", 13) == 0, "%s", e.msg);
    }
}
END_TEST

/* ---- families ---- */
static void load_fixture(const char *name)
{
    char dir[512];
    (void)snprintf(dir, sizeof dir, GOLDEN "/family/%s", name);
    ck_assert_msg(hf_config_load(&m, &q, &f, dir, &e) == OK, "%s", e.msg);
    ck_assert_ptr_eq(family_by_name(m.family), f);
    ck_assert(!q.awq);
}

static void check_name(tensor_role r, int32_t layer, const char *want)
{
    char got[128];
    ck_assert_msg(family_tensor_name(&m, r, layer, -1, got, sizeof got, &e) == OK, "%s", e.msg);
    ck_assert_str_eq(got, want);
}

static void check_smooth(const char *want)
{
    char got[128] = "";
    for (int i = 0; i < f->n_smooth; i++) {
        (void)snprintf(got + strlen(got), sizeof got - strlen(got), "%s>",
                       role_name(f->smooth[i].source));
        for (int k = 0; k < f->smooth[i].n_targets; k++)
            (void)snprintf(got + strlen(got), sizeof got - strlen(got), "%s%s", k ? "," : "",
                           role_name(f->smooth[i].targets[k]));
        (void)snprintf(got + strlen(got), sizeof got - strlen(got), " ");
    }
    ck_assert_str_eq(got, want);
}

START_TEST(family_llama)
{
    load_fixture("llama");
    ck_assert_str_eq(m.family, "llama");
    ck_assert_str_eq(m.architecture, "LlamaForCausalLM");
    ck_assert_int_eq(m.head_dim, 128);
    ck_assert_int_eq(m.rope_dims, 128);
    ck_assert_float_eq(m.rope_theta, 10000);
    ck_assert_int_eq((int)m.dt, DT_F16);
    ck_assert(m.qkv == QKV_SPLIT && !m.qkv_bias && !m.o_bias && !m.tied_embed &&
              !m.rope_interleaved);
    ck_assert_int_eq(m.n_stop, 1);
    check_name(ROLE_EMBED, -1, "model.embed_tokens");
    check_name(ROLE_FINAL_NORM, -1, "model.norm");
    check_name(ROLE_HEAD, -1, "lm_head");
    check_name(ROLE_FFN_NORM, 31, "model.layers.31.post_attention_layernorm");
    check_name(ROLE_V, 0, "model.layers.0.self_attn.v_proj");
    check_name(ROLE_DOWN, 7, "model.layers.7.mlp.down_proj");
    check_smooth("attn_norm>q,k,v ffn_norm>gate,up up>down ");
    char buf[64];
    ck_assert_int_eq(family_tensor_name(&m, ROLE_QKV, 0, -1, buf, sizeof buf, &e), E_INPUT);
    ck_assert_int_eq(family_tensor_name(&m, ROLE_Q, 32, -1, buf, sizeof buf, &e), E_INPUT);
    ck_assert_int_eq(family_tensor_name(&m, ROLE_EMBED, 0, -1, buf, sizeof buf, &e), E_INPUT);
    ck_assert_int_eq(family_tensor_name(&m, ROLE_Q, 0, -1, buf, 8, &e), E_LIMIT);
    ck_assert_str_eq(family_chat_template(&m), "llama2");
    load_fixture("llama3");
    ck_assert_int_eq((int)m.dt, DT_BF16); /* the newer key */
    ck_assert(m.tied_embed && m.scaling.kind == ROPE_LLAMA3);
    ck_assert_int_eq(m.n_stop, 3);
    ck_assert_int_eq(m.stop[2], 128009);
    ck_assert_int_eq(m.eos, 128001);
    ck_assert_str_eq(family_chat_template(&m), "llama3_1");
    ck_assert(parse_more("\"attention_bias\":true") == OK);
    ck_assert(m.qkv_bias && m.o_bias);
    ck_assert_int_eq(parse_more("\"mlp_bias\":true"), E_UNSUPPORTED);
    ck_assert_int_eq(parse_more("\"hidden_act\":\"gelu\""), E_UNSUPPORTED);
}
END_TEST

START_TEST(family_internlm2)
{
    load_fixture("internlm2");
    ck_assert(m.qkv == QKV_GROUPED && !m.qkv_bias);
    ck_assert(m.scaling.kind == ROPE_DYNAMIC);
    ck_assert_float_eq(m.scaling.factor, 2);
    check_name(ROLE_EMBED, -1, "model.tok_embeddings");
    check_name(ROLE_HEAD, -1, "output");
    check_name(ROLE_QKV, 3, "model.layers.3.attention.wqkv");
    check_name(ROLE_O, 3, "model.layers.3.attention.wo");
    check_name(ROLE_GATE, 3, "model.layers.3.feed_forward.w1");
    check_name(ROLE_UP, 3, "model.layers.3.feed_forward.w3");
    check_name(ROLE_DOWN, 3, "model.layers.3.feed_forward.w2");
    check_smooth("attn_norm>qkv ffn_norm>gate,up up>down ");
}
END_TEST

START_TEST(family_yi)
{
    load_fixture("yi");
    ck_assert_str_eq(m.family, "yi");
    ck_assert_str_eq(m.architecture, "LlamaForCausalLM");
    ck_assert_str_eq(family_chat_template(&m), "yi");
    ck_assert_float_eq(m.rope_theta, 5e6f);
    ck_assert(parse_more("\"model_type\":\"Yi\"") == OK);
    ck_assert_str_eq(m.family, "yi");
    ck_assert(parse_more("\"model_type\":\"llama\"") == OK);
    ck_assert_str_eq(m.family, "llama");
}
END_TEST

#define FOUR_LAYERS                                                                           \
    "\"num_hidden_layers\":4,\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96," \
    "\"num_attention_heads\":4"

static err_code parse_window(const char *arch, const char *more)
{
    char text[1024];
    (void)snprintf(text, sizeof text, "{\"architectures\":[\"%sForCausalLM\"],%s" FOUR_LAYERS "}",
                   arch, more);
    return parse(text, NULL, NULL);
}

START_TEST(family_windows)
{
    static const struct {
        const char *arch, *more;
        int32_t window, from;
    } cases[] = {
        {"Mistral", "", 4096, 0},
        {"Mistral", "\"sliding_window\":null,", 0, 0},
        {"Mistral", "\"sliding_window\":16,", 16, 0},
        {"Qwen2", "", 0, 0},
        {"Qwen2", "\"sliding_window\":16,\"max_window_layers\":1,", 0, 0},
        {"Qwen2", "\"use_sliding_window\":false,\"sliding_window\":16,\"max_window_layers\":1,", 0,
         0},
        {"Qwen2", "\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":1,", 16,
         1},
        {"Qwen2", "\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":0,", 16,
         0},
        {"Qwen2", "\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":4,", 0,
         0},
        {"Qwen2", "\"use_sliding_window\":true,\"sliding_window\":16,", 0,
         0}, /* 28 full layers by default */
        {"Qwen2", "\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":1,", 0,
         0},
        {"Qwen2", "\"use_sliding_window\":true,\"max_window_layers\":3,", 4096, 3},
        {"Qwen2",
         "\"use_sliding_window\":true,\"sliding_window\":16,\"layer_types\":[\"full_attention\","
         "\"full_attention\","
         "\"sliding_attention\",\"sliding_attention\"],",
         16, 2},
        {"Qwen2",
         "\"use_sliding_window\":true,\"sliding_window\":16,\"max_window_layers\":1,\"layer_"
         "types\":[\"full_attention\","
         "\"full_attention\",\"full_attention\",\"full_attention\"],",
         0, 0},
        {"Llama", "", 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *arch = cases[i].arch, *more = cases[i].more;
        ck_assert_msg(parse_window(arch, more) == OK, "%s %s: %s", arch, more, e.msg);
        ck_assert_msg(m.sliding_window == cases[i].window && m.sliding_from == cases[i].from,
                      "%s %s: %d from %d", arch, more, m.sliding_window, m.sliding_from);
        for (int32_t l = 0; l < 4; l++)
            ck_assert_int_eq(model_window(&m, l), l >= cases[i].from ? cases[i].window : 0);
    }
}
END_TEST

START_TEST(family_wrong_windows)
{
    static const struct {
        const char *arch, *more;
        err_code code;
    } bad[] = {
        {"Mistral", "\"sliding_window\":0,", E_INPUT},
        {"Mistral", "\"sliding_window\":-5,", E_INPUT},
        {"Mistral", "\"sliding_window\":\"4096\",", E_INPUT},
        {"Qwen2", "\"use_sliding_window\":1,", E_INPUT},
        {"Qwen2", "\"max_window_layers\":-1,", E_INPUT},
        {"Qwen2", "\"layer_types\":[\"full_attention\"],", E_INPUT},
        {"Qwen2",
         "\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\",\"sliding_"
         "attention\"],",
         E_INPUT},
        {"Mistral",
         "\"layer_types\":[\"sliding_attention\",\"full_attention\",\"sliding_attention\",\"full_"
         "attention\"],",
         E_UNSUPPORTED},
        {"Llama",
         "\"layer_types\":[\"full_attention\",\"full_attention\",\"chunked_attention\",\"full_"
         "attention\"],",
         E_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        ck_assert_msg(parse_window(bad[i].arch, bad[i].more) == bad[i].code, "%s %s", bad[i].arch,
                      bad[i].more);
}
END_TEST

START_TEST(family_qwen2)
{
    load_fixture("qwen2");
    ck_assert(m.qkv_bias && !m.o_bias && m.qkv == QKV_SPLIT);
    ck_assert_int_eq(m.sliding_window, 4096);
    ck_assert_int_eq(m.sliding_from, 21);
    ck_assert_int_eq(model_window(&m, 20), 0);
    ck_assert_int_eq(model_window(&m, 21), 4096);
    load_fixture("mistral");
    ck_assert_int_eq(model_window(&m, 0), 4096);
    ck_assert_str_eq(family_chat_template(&m), "mistral");
}
END_TEST

/* The chat templates that families name are ones that formats/chat knows. */
START_TEST(family_templates)
{
    static const char *const fixtures[] = {"llama",   "llama3", "internlm2",
                                           "mistral", "yi",     "qwen2"};
    for (int i = 0; i < 6; i++) {
        load_fixture(fixtures[i]);
        ck_assert_msg(chat_known(family_chat_template(&m)), "%s", family_chat_template(&m));
    }
}
END_TEST

START_TEST(family_unknown)
{
    ck_assert_int_eq(parse("{\"architectures\":[\"GPT2LMHeadModel\"]}", NULL, NULL), E_UNSUPPORTED);
    ck_assert_msg(
        strstr(e.msg,
               "'GPT2LMHeadModel' is not known; known are InternLM2ForCausalLM, LlamaForCausalLM, "
               "MistralForCausalLM, Qwen2ForCausalLM"),
        "%s", e.msg);
    ck_assert_int_eq(parse("{\"architectures\":[\"MixtralForCausalLM\"]}", NULL, NULL),
                     E_UNSUPPORTED);
    ck_assert_int_eq(parse("{\"architectures\":[\"InternLMForCausalLM\"]}", NULL, NULL),
                     E_UNSUPPORTED);
    ck_assert_int_eq(parse("{\"architectures\":[]}", NULL, NULL), E_INPUT);
    ck_assert_int_eq(parse("{\"architectures\":\"LlamaForCausalLM\"}", NULL, NULL), E_INPUT);
    ck_assert_int_eq(parse("{\"model_type\":\"llama\"}", NULL, NULL), E_INPUT);
    ck_assert_ptr_null(family_by_name("gpt2"));
    ck_assert_ptr_null(family_chat_template(&(model_desc){.family = "gpt2"}));
}
END_TEST

/* ---- configs that lie ---- */
START_TEST(config_lies)
{
    static const struct {
        const char *text, *fragment;
    } cases[] = {
        {"", "config.json"},
        {"{", "config.json"},
        {"[]", "expected an object"},
        {"{\"architectures\":[\"LlamaForCausalLM\"]}", "vocab_size"},
        {"{" SMALL ",\"vocab_size\":5}", "vocab_size"}, /* twice */
        {"{" SMALL ",\"num_key_value_heads\":8}", "kv_heads is 8"},
        {"{" SMALL ",\"num_key_value_heads\":3}", "kv_heads 3"},
        {"{" SMALL ",\"num_key_value_heads\":0}", "num_key_value_heads"},
        {"{" SMALL ",\"head_dim\":0}", "head_dim"},
        {"{" SMALL ",\"head_dim\":17}", "head_dim is 17"},
        {"{" SMALL ",\"head_dim\":1e9}", "head_dim"},
        {"{" SMALL ",\"rms_norm_eps\":0}", "norm_eps is 0"},
        {"{" SMALL ",\"rms_norm_eps\":\"1e-5\"}", "rms_norm_eps"},
        {"{" SMALL ",\"max_position_embeddings\":0}", "max_position_embeddings"},
        {"{" SMALL ",\"max_position_embeddings\":1e18}", "max_position_embeddings"},
        {"{" SMALL ",\"eos_token_id\":100}", "100"},
        {"{" SMALL ",\"eos_token_id\":[1,\"2\"]}", "eos_token_id"},
        {"{" SMALL ",\"eos_token_id\":1.5}", "eos_token_id"},
        {"{" SMALL ",\"eos_token_id\":[0,1,2,3,4,5,6,7,8]}", "more than 8 stop ids"},
        {"{" SMALL ",\"bos_token_id\":100}", "bos is 100"},
        {"{" SMALL ",\"bos_token_id\":-7}", "bos_token_id"},
        {"{" SMALL ",\"tie_word_embeddings\":\"yes\"}", "tie_word_embeddings"},
        {"{" SMALL ",\"torch_dtype\":\"int8\"}", "'int8'"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"hidden_size\":65,"
         "\"intermediate_size\":96,"
         "\"num_hidden_layers\":3,\"num_attention_heads\":4}",
         "multiple of num_attention_heads 4"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":-100,\"hidden_size\":64,"
         "\"intermediate_size\":96,"
         "\"num_hidden_layers\":3,\"num_attention_heads\":4}",
         "vocab_size"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"hidden_size\":64,"
         "\"intermediate_size\":96.5,"
         "\"num_hidden_layers\":3,\"num_attention_heads\":4}",
         "intermediate_size"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"hidden_size\":64,"
         "\"intermediate_size\":96,"
         "\"num_hidden_layers\":1000000,\"num_attention_heads\":4}",
         "num_hidden_layers"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"hidden_size\":99999999999,"
         "\"intermediate_size\":96,"
         "\"num_hidden_layers\":3,\"num_attention_heads\":4}",
         "hidden_size"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const err_code rc = parse(cases[i].text, NULL, NULL);
        ck_assert_msg(rc == E_INPUT || rc == E_UNSUPPORTED, "%s: %s", cases[i].text, err_name(rc));
        ck_assert_msg(strstr(e.msg, cases[i].fragment), "%s: '%s' lacks '%s'", cases[i].text, e.msg,
                      cases[i].fragment);
    }
    ck_assert_msg(parse_more("") == OK, "%s", e.msg);
    ck_assert_int_eq(m.max_tokens, 2048);
    ck_assert_int_eq(m.bos, -1);
    ck_assert_int_eq(m.n_stop, 0);
    ck_assert(parse_more("\"max_sequence_length\":77,\"n_positions\":5,\"eos_token_id\":-1,\"torch_"
                         "dtype\":\"torch.bfloat16\"") == OK);
    ck_assert_int_eq(m.max_tokens, 77);
    ck_assert_int_eq(m.eos, -1);
    ck_assert_int_eq((int)m.dt, DT_BF16);
}
END_TEST

START_TEST(config_stop_ids)
{
    ck_assert(parse("{" SMALL ",\"eos_token_id\":2}", "{\"eos_token_id\":[7,2,9]}", NULL) == OK);
    ck_assert_int_eq(m.n_stop, 3);
    ck_assert_int_eq(m.eos, 2);
    ck_assert_int_eq(m.stop[1], 7);
    ck_assert_int_eq(m.stop[2], 9);
    ck_assert(parse("{" SMALL "}", "{\"eos_token_id\":5}", NULL) == OK);
    ck_assert_int_eq(m.eos, 5);
    ck_assert(parse("{" SMALL ",\"eos_token_id\":null}", "{\"eos_token_id\":null}", NULL) == OK);
    ck_assert_int_eq(m.eos, -1);
    ck_assert_int_eq(parse("{" SMALL "}", "{\"eos_token_id\":\"5\"}", NULL), E_INPUT);
    ck_assert_msg(strncmp(e.msg, "generation_config.json: ", 24) == 0, "%s", e.msg);
    ck_assert_int_eq(parse("{" SMALL "}", "{\"eos_token_id\":500}", NULL), E_INPUT);
    ck_assert_int_eq(parse("{" SMALL "}", "[]", NULL), E_INPUT);
    ck_assert_int_eq(parse("{" SMALL "}", "{,}", NULL), E_INPUT);
}
END_TEST

START_TEST(config_quantization)
{
    static const struct {
        const char *quant;
        err_code code;
        const char *fragment;
        int32_t group;
    } cases[] = {
        {"null", OK, "", 0},
        {"{\"quant_method\":\"awq\"}", OK, "", 128},
        {"{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"version\":\"gemm\",\"zero_"
         "point\":true}",
         OK, "", 128},
        {"{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":64,\"version\":\"GEMM\"}", OK, "",
         64},
        {"{\"quant_method\":\"awq\",\"w_bit\":4,\"q_group_size\":32}", OK, "", 32},
        {"{\"quant_method\":\"awq\",\"version\":\"gemv\"}", E_UNSUPPORTED, "version 'gemv'", 0},
        {"{\"quant_method\":\"awq\",\"version\":\"marlin\"}", E_UNSUPPORTED, "version 'marlin'", 0},
        {"{\"quant_method\":\"awq\",\"version\":\"gemv_fast\"}", E_UNSUPPORTED, "'gemv_fast'", 0},
        {"{\"quant_method\":\"awq\",\"bits\":8}", E_UNSUPPORTED, "8 bits", 0},
        {"{\"quant_method\":\"awq\",\"bits\":3}", E_UNSUPPORTED, "3 bits", 0},
        {"{\"quant_method\":\"awq\",\"group_size\":-1}", E_UNSUPPORTED, "group size -1", 0},
        {"{\"quant_method\":\"awq\",\"group_size\":16}", E_UNSUPPORTED, "group size 16", 0},
        {"{\"quant_method\":\"awq\",\"group_size\":0}", E_UNSUPPORTED, "group size 0", 0},
        {"{\"quant_method\":\"awq\",\"group_size\":\"128\"}", E_INPUT, "group_size", 0},
        {"{\"quant_method\":\"gptq\",\"bits\":4}", E_UNSUPPORTED, "'gptq'", 0},
        {"{\"quant_method\":\"bitsandbytes\"}", E_UNSUPPORTED, "'bitsandbytes'", 0},
        {"{\"quant_method\":\"compressed-tensors\"}", E_UNSUPPORTED, "'compressed-tensors'", 0},
        {"{\"quant_method\":\"fp8\"}", E_UNSUPPORTED, "'fp8'", 0},
        {"{\"bits\":4}", E_INPUT, "quant_method", 0},
        {"{}", E_INPUT, "quant_method", 0},
        {"4", E_INPUT, "expected an object", 0},
    };
    char text[512];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        (void)snprintf(text, sizeof text, "\"quantization_config\":%s", cases[i].quant);
        const err_code rc = parse_more(text);
        ck_assert_msg(rc == cases[i].code, "%s: %s %s", text, err_name(rc), rc ? e.msg : "");
        if (rc)
            ck_assert_msg(strstr(e.msg, cases[i].fragment), "%s: %s", text, e.msg);
        else
            ck_assert_int_eq(m.w4_group, cases[i].group);
    }
    ck_assert_int_eq(parse_more("\"compression_config\":{}"), E_UNSUPPORTED);
    /* the file that old writers left beside a silent config.json */
    ck_assert(parse("{" SMALL "}", NULL,
                    "{\"w_bit\":4,\"q_group_size\":64,\"zero_point\":true,\"version\":\"GEMM\"}") ==
              OK);
    ck_assert(q.awq && q.zero_point);
    ck_assert_int_eq(m.w4_group, 64);
    ck_assert_int_eq(parse("{" SMALL "}", NULL, "{\"w_bit\":4,\"version\":\"GEMV\"}"),
                     E_UNSUPPORTED);
    ck_assert_msg(strncmp(e.msg, "quant_config.json: ", 19) == 0, "%s", e.msg);
}
END_TEST

/* Configs of real models: read, or refused for the reason that holds. */
START_TEST(config_collection)
{
    static const struct {
        const char *name;
        err_code code;
        const char *what;
    } cases[] = {
        {"internlm-20b", E_UNSUPPORTED, "'InternLMForCausalLM'"},
        {"internlm2-chat-1.8b", OK, "internlm2"},
        {"llama-2-7b-chat", OK, "llama"},
        {"llama-3.1-8b-instruct-bnb8", E_UNSUPPORTED, "'bitsandbytes'"},
        {"llama-fake", OK, "llama"},
        {"llama3-ollama-test", OK, "llama"},
        {"mixtral-8x7b", E_UNSUPPORTED, "'MixtralForCausalLM'"},
        {"qwen-7b", E_UNSUPPORTED, "'QWenLMHeadModel'"},
        {"qwen2.5-3b", OK, "qwen2"},
        {"yi-1.5-6b", OK, "yi"},
    };
    if (!file_is_dir(CONFIGS)) {
        printf("SKIP config_collection: " CONFIGS " is not there\n");
        return;
    }
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char dir[4096];
        (void)snprintf(dir, sizeof dir, CONFIGS "/%s", cases[i].name);
        const err_code rc = hf_config_load(&m, &q, &f, dir, &e);
        ck_assert_msg(rc == cases[i].code, "%s: %s %s", cases[i].name, err_name(rc),
                      rc ? e.msg : "");
        if (rc == OK)
            ck_assert_str_eq(m.family, cases[i].what);
        else
            ck_assert_msg(strstr(e.msg, cases[i].what) && strncmp(e.msg, dir, strlen(dir)) == 0,
                          "%s", e.msg);
    }
    ck_assert(hf_config_load(&m, &q, &f, CONFIGS "/qwen2.5-3b", &e) == OK);
    ck_assert(m.tied_embed && m.sliding_window == 0);
    ck_assert_int_eq(m.kv_heads, 2);
    ck_assert(hf_config_load(&m, &q, &f, CONFIGS "/llama3-ollama-test", &e) == OK);
    ck_assert(m.scaling.kind == ROPE_LLAMA3);
    ck_assert_str_eq(family_chat_template(&m), "llama3_1");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("model");
    TCase *t = tcase_create("all");
    tcase_add_test(t, model_roles);
    tcase_add_test(t, model_linears);
    tcase_add_test(t, model_check_names_the_field);
    tcase_add_test(t, model_rope_vectors);
    tcase_add_test(t, model_rope_config);
    tcase_add_test(t, family_llama);
    tcase_add_test(t, family_internlm2);
    tcase_add_test(t, family_yi);
    tcase_add_test(t, family_windows);
    tcase_add_test(t, family_wrong_windows);
    tcase_add_test(t, family_qwen2);
    tcase_add_test(t, family_templates);
    tcase_add_test(t, family_unknown);
    tcase_add_test(t, config_lies);
    tcase_add_test(t, config_stop_ids);
    tcase_add_test(t, config_quantization);
    tcase_add_test(t, config_collection);
    suite_add_tcase(s, t);
    return suite_run(s);
}

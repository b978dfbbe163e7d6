/* make_model: writes a Hugging Face directory with random weights in a given shape, with a
 * tokenizer that covers its vocabulary, so that any tool can be tried at any size without a
 * download.
 *
 *     make_model --shape internlm2_1p8b --seed 1 --dtype bf16 --shards 2 OUT_DIR
 *
 * Weights are normal with deviation 0.02, norms around 1. Every tensor's values follow from the
 * seed and its name alone, whatever the shards and layers. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/cli.h"
#include "base/half.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/family.h"
#include "formats/safetensors.h"

typedef struct {
    const char *name, *family, *architecture, *model_type;
    int32_t hidden, ffn, layers, heads, kv_heads, head_dim, vocab, max_tokens;
    double theta;
} shape;

#define W4_GROUP 128

#define LLAMA     "llama", "LlamaForCausalLM", "llama"
#define INTERNLM2 "internlm2", "InternLM2ForCausalLM", "internlm2"
static const shape shapes[] = {
    {"tinyllama1p1b", LLAMA, 2048, 5632, 22, 32, 4, 64, 32000, 2048, 1e4},
    {"internlm2_1p8b", INTERNLM2, 2048, 8192, 24, 16, 8, 128, 92544, 32768, 1e6},
    {"llama7b", LLAMA, 4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4},
    {"llama70b_layers", LLAMA, 8192, 28672, 2, 64, 8, 128, 32000, 4096, 1e4},
    {"tiny", LLAMA, 256, 512, 2, 4, 2, 64, 512, 256, 1e4},
    {"tiny-llama", LLAMA, 256, 512, 2, 4, 2, 64, 512, 256, 1e4},
    {"tiny-llama3", LLAMA, 256, 512, 2, 4, 2, 64, 512, 1024, 5e5},
    {"tiny-internlm2", INTERNLM2, 256, 512, 2, 4, 2, 64, 512, 256, 1e6},
    {"tiny-mistral", "mistral", "MistralForCausalLM", "mistral", 256, 512, 2, 4, 2, 64, 512, 256,
     1e4},
    {"tiny-qwen2", "qwen2", "Qwen2ForCausalLM", "qwen2", 256, 512, 2, 4, 2, 64, 512, 256, 1e6},
    {"tiny-qwen2-window", "qwen2", "Qwen2ForCausalLM", "qwen2", 256, 512, 3, 4, 2, 64, 512, 256,
     1e6},
    {"tiny-yi", "yi", "LlamaForCausalLM", "Yi", 256, 512, 2, 4, 2, 64, 512, 256, 5e6},
    {"tiny-hd80", LLAMA, 256, 512, 2, 4, 2, 80, 512, 256, 1e4},
    {"tiny-hd96", LLAMA, 256, 512, 2, 4, 2, 96, 512, 256, 1e4},
    {"tiny-hd128", LLAMA, 256, 512, 2, 2, 1, 128, 512, 256, 1e4},
    {"tiny-hd256", LLAMA, 256, 512, 2, 2, 1, 256, 512, 256, 1e4},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

typedef struct {
    shape s;
    dtype dt;
    int64_t seed, shards;
    bool w4; /* linears as an AWQ directory has them */
    const char *dir;
    model_desc m;    /* what our own reader makes of the config */
    uint16_t *table; /* [65536] normal quantiles in dt; f32 in table32 */
    float *table32;
} plan;

/* ---- config and tokenizer ---- */
static err_code write_json(const char *dir, const char *name, const cJSON *o, bool pretty, err *e)
{
    char path[4096], *text;
    file_writer *w = NULL;
    err_code rc;
    TRY(path_join(path, sizeof path, dir, name, e));
    TRY(json_print(&text, o, pretty, e));
    if ((rc = file_writer_open(&w, path, true, e)) != OK) goto done;
    if ((rc = file_writer_write(w, text, strlen(text), e)) != OK) goto done;
    rc = file_writer_commit(&w, e);
done:
    file_writer_abort(&w);
    mem_free(text);
    return rc;
}

static bool is_qwen(const plan *p) { return strcmp(p->s.family, "qwen2") == 0; }
static int32_t end_id(const plan *p) { return p->s.vocab - 1; }
static int32_t bos_id(const plan *p) { return is_qwen(p) ? p->s.vocab - 3 : 1; }
static int32_t eos_id(const plan *p) { return is_qwen(p) ? p->s.vocab - 1 : 2; }

static void add_family_keys(const plan *p, cJSON *o)
{
    if (strcmp(p->s.family, "internlm2") == 0) (void)cJSON_AddBoolToObject(o, "bias", false);
    if (strcmp(p->s.family, "mistral") == 0)
        (void)cJSON_AddNumberToObject(o, "sliding_window", p->s.max_tokens / 4);
    if (strcmp(p->s.name, "tiny-qwen2-window") == 0) {
        (void)cJSON_AddBoolToObject(o, "use_sliding_window", true);
        (void)cJSON_AddNumberToObject(o, "sliding_window", p->s.max_tokens / 4);
        (void)cJSON_AddNumberToObject(o, "max_window_layers", 1);
    }
    if (strcmp(p->s.name, "tiny-llama3") == 0) {
        cJSON *r = cJSON_AddObjectToObject(o, "rope_scaling");
        (void)cJSON_AddStringToObject(r, "rope_type", "llama3");
        (void)cJSON_AddNumberToObject(r, "factor", 8);
        (void)cJSON_AddNumberToObject(r, "low_freq_factor", 1);
        (void)cJSON_AddNumberToObject(r, "high_freq_factor", 4);
        (void)cJSON_AddNumberToObject(r, "original_max_position_embeddings", p->s.max_tokens / 8);
    }
}

static cJSON *make_config(const plan *p)
{
    static const char *const dtypes[] = {
        [DT_F32] = "float32", [DT_F16] = "float16", [DT_BF16] = "bfloat16"};
    const shape *s = &p->s;
    cJSON *o = cJSON_CreateObject();
    cJSON_AddItemToObject(o, "architectures", cJSON_CreateStringArray(&s->architecture, 1));
    (void)cJSON_AddStringToObject(o, "model_type", s->model_type);
    (void)cJSON_AddNumberToObject(o, "vocab_size", s->vocab);
    (void)cJSON_AddNumberToObject(o, "hidden_size", s->hidden);
    (void)cJSON_AddNumberToObject(o, "intermediate_size", s->ffn);
    (void)cJSON_AddNumberToObject(o, "num_hidden_layers", s->layers);
    (void)cJSON_AddNumberToObject(o, "num_attention_heads", s->heads);
    (void)cJSON_AddNumberToObject(o, "num_key_value_heads", s->kv_heads);
    if (s->head_dim * s->heads != s->hidden)
        (void)cJSON_AddNumberToObject(o, "head_dim", s->head_dim);
    (void)cJSON_AddStringToObject(o, "hidden_act", "silu");
    (void)cJSON_AddNumberToObject(o, "rms_norm_eps", 1e-5);
    (void)cJSON_AddNumberToObject(o, "rope_theta", s->theta);
    (void)cJSON_AddNumberToObject(o, "max_position_embeddings", s->max_tokens);
    (void)cJSON_AddBoolToObject(o, "tie_word_embeddings", is_qwen(p));
    add_family_keys(p, o);
    if (p->w4) {
        cJSON *q = cJSON_AddObjectToObject(o, "quantization_config");
        (void)cJSON_AddStringToObject(q, "quant_method", "awq");
        (void)cJSON_AddNumberToObject(q, "bits", 4);
        (void)cJSON_AddNumberToObject(q, "group_size", W4_GROUP);
        (void)cJSON_AddBoolToObject(q, "zero_point", true);
        (void)cJSON_AddStringToObject(q, "version", "gemm");
    }
    (void)cJSON_AddStringToObject(o, "torch_dtype", dtypes[p->dt]);
    (void)cJSON_AddNumberToObject(o, "bos_token_id", bos_id(p));
    (void)cJSON_AddNumberToObject(o, "eos_token_id", eos_id(p));
    return o;
}

/* The byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and up. */
static void byte_char(int byte, char out[3])
{
    int code = byte, shift = 0;
    const bool plain = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) ||
                       byte >= 0xae;
    if (!plain) {
        for (int b = 0; b < byte; b++)
            shift += !((b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae);
        code = 256 + shift;
    }
    out[0] = (char)(code < 0x80 ? code : 0xc0 | code >> 6);
    out[1] = (char)(code < 0x80 ? 0 : 0x80 | (code & 63));
    out[2] = 0;
}

static void add_special(cJSON *list, const char *text, int32_t id)
{
    cJSON *o = cJSON_CreateObject();
    (void)cJSON_AddNumberToObject(o, "id", id);
    (void)cJSON_AddStringToObject(o, "content", text);
    (void)cJSON_AddBoolToObject(o, "single_word", false);
    (void)cJSON_AddBoolToObject(o, "lstrip", false);
    (void)cJSON_AddBoolToObject(o, "rstrip", false);
    (void)cJSON_AddBoolToObject(o, "normalized", false);
    (void)cJSON_AddBoolToObject(o, "special", true);
    cJSON_AddItemToArray(list, o);
}

/* Every vocabulary id has a text: specials, 256 bytes, then words that no merge makes. */
static cJSON *make_vocab(const plan *p, cJSON *added)
{
    const int32_t v = p->s.vocab, first = is_qwen(p) ? 0 : 3;
    cJSON *o = cJSON_CreateObject(), *prev = NULL;
    static const char *const front[] = {"<unk>", "<s>", "</s>"};
    for (int32_t id = 0; id < v; id++) {
        char text[32];
        if (id < first)
            (void)snprintf(text, sizeof text, "%s", front[id]);
        else if (id < first + 256)
            byte_char(id - first, text);
        else
            (void)snprintf(text, sizeof text, "w%d", id);
        if (id == v - 3 && is_qwen(p)) (void)snprintf(text, sizeof text, "<|endoftext|>");
        if (id == v - 2) (void)snprintf(text, sizeof text, "<|im_start|>");
        if (id == v - 1) (void)snprintf(text, sizeof text, "<|im_end|>");
        if (text[0] == '<' && text[1]) add_special(added, text, id);
        cJSON *n = cJSON_CreateNumber(id);
        n->string = strdup(text); /* cJSON_Add walks the list: too slow for 90,000 */
        if (prev) {
            prev->next = n;
            n->prev = prev;
            o->child->prev = n;
        } else {
            o->child = n;
            n->prev = n;
        }
        prev = n;
    }
    return o;
}

static void add_bos_template(const plan *p, cJSON *o)
{
    char text[512];
    (void)snprintf(text, sizeof text,
                   "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\","
                   "\"type_id\":0}},"
                   "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[{\"Sequence\":{\"id\":"
                   "\"A\",\"type_id\":0}},"
                   "{\"Sequence\":{\"id\":\"B\",\"type_id\":1}}],\"special_tokens\":{\"<s>\":{"
                   "\"id\":\"<s>\",\"ids\":[%d],"
                   "\"tokens\":[\"<s>\"]}}}",
                   bos_id(p));
    cJSON_AddItemToObject(o, "post_processor", cJSON_Parse(text));
}

static err_code write_tokenizer(const plan *p, err *e)
{
    static const char pre[] = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":"
                              "true,\"use_regex\":true}";
    cJSON *o = cJSON_CreateObject(), *added, *model;
    (void)cJSON_AddStringToObject(o, "version", "1.0");
    (void)cJSON_AddNullToObject(o, "truncation");
    (void)cJSON_AddNullToObject(o, "padding");
    added = cJSON_AddArrayToObject(o, "added_tokens");
    (void)cJSON_AddNullToObject(o, "normalizer");
    cJSON_AddItemToObject(o, "pre_tokenizer", cJSON_Parse(pre));
    if (is_qwen(p))
        (void)cJSON_AddNullToObject(o, "post_processor");
    else
        add_bos_template(p, o);
    cJSON_AddItemToObject(o, "decoder", cJSON_Parse(pre));
    model = cJSON_AddObjectToObject(o, "model");
    (void)cJSON_AddStringToObject(model, "type", "BPE");
    (void)cJSON_AddBoolToObject(model, "byte_fallback", false);
    cJSON_AddItemToObject(model, "vocab", make_vocab(p, added));
    (void)cJSON_AddArrayToObject(model, "merges");
    err_code rc = write_json(p->dir, "tokenizer.json", o, false, e);
    cJSON_Delete(o);
    if (rc != OK) return rc;
    o = cJSON_CreateObject();
    (void)cJSON_AddStringToObject(o, "tokenizer_class", "PreTrainedTokenizerFast");
    (void)cJSON_AddBoolToObject(o, "add_bos_token", !is_qwen(p));
    (void)cJSON_AddBoolToObject(o, "add_eos_token", false);
    if (is_qwen(p))
        (void)cJSON_AddNullToObject(o, "bos_token");
    else
        (void)cJSON_AddStringToObject(o, "bos_token", "<s>");
    (void)cJSON_AddStringToObject(o, "eos_token", is_qwen(p) ? "<|im_end|>" : "</s>");
    (void)cJSON_AddNumberToObject(o, "model_max_length", p->s.max_tokens);
    rc = write_json(p->dir, "tokenizer_config.json", o, true, e);
    cJSON_Delete(o);
    return rc;
}

static err_code write_configs(plan *p, err *e)
{
    const family *f;
    const int stops[2] = {eos_id(p), is_qwen(p) ? bos_id(p) : end_id(p)};
    cJSON *config = make_config(p), *generation = cJSON_CreateObject();
    err_code rc;
    (void)cJSON_AddNumberToObject(generation, "bos_token_id", bos_id(p));
    cJSON_AddItemToObject(generation, "eos_token_id", cJSON_CreateIntArray(stops, 2));
    if ((rc = family_of_config(&f, config, e)) != OK) goto done;
    if ((rc = f->read_config(config, &p->m, e)) != OK) goto done;
    (void)snprintf(p->m.family, sizeof p->m.family, "%s", f->name);
    if ((rc = model_desc_check(&p->m, e)) != OK) goto done;
    if ((rc = write_json(p->dir, "config.json", config, true, e)) != OK) goto done;
    rc = write_json(p->dir, "generation_config.json", generation, true, e);
done:
    cJSON_Delete(generation);
    cJSON_Delete(config);
    return rc;
}

/* ---- weights ---- */
/* The value below which a share `q` of a standard normal lies, by bisection. */
static double normal_quantile(double q)
{
    double lo = -8, hi = 8;
    for (int i = 0; i < 50; i++) {
        const double mid = (lo + hi) / 2;
        if (0.5 * erfc(-mid / sqrt(2)) < q)
            lo = mid;
        else
            hi = mid;
    }
    return (lo + hi) / 2;
}

static err_code make_tables(plan *p, err *e)
{
    TRY(mem_alloc((void **)&p->table32, 65536, sizeof *p->table32, "table", e));
    TRY(mem_alloc((void **)&p->table, 65536, sizeof *p->table, "table", e));
    for (int i = 0; i < 32768; i++) {
        const float v = (float)(0.02 * normal_quantile((i + 0.5) / 65536));
        p->table32[i] = v;
        p->table32[65535 - i] = -v;
    }
    for (int i = 0; i < 65536; i++)
        p->table[i] = p->dt == DT_F16 ? f32_to_f16(p->table32[i]) : f32_to_bf16(p->table32[i]);
    return OK;
}

typedef struct {
    uint64_t s[4];
} rng;

static uint64_t rotl(uint64_t x, int k) { return x << k | x >> (64 - k); }

static uint64_t rng_next(rng *r) /* xoshiro256++ */
{
    uint64_t *s = r->s;
    const uint64_t out = rotl(s[0] + s[3], 23) + s[0], t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl(s[3], 45);
    return out;
}

static rng rng_of(int64_t seed, const char *name)
{
    rng r;
    for (uint64_t i = 0; i < 4; i++)
        r.s[i] = XXH3_64bits_withSeed(name, strlen(name), (uint64_t)seed * 4 + i + 1);
    return r;
}

enum { CHUNK = 1 << 21 }; /* values; a multiple of 4 */

static void fill(const plan *p, rng *r, float mean, void *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += 4) {
        uint64_t u = rng_next(r);
        for (int64_t k = i; k < i + 4 && k < n; k++, u >>= 16) {
            if (mean == 0 && p->dt != DT_F32) {
                ((uint16_t *)out)[k] = p->table[u & 0xffff];
                continue;
            }
            const float v = mean + p->table32[u & 0xffff];
            if (p->dt == DT_F32)
                ((float *)out)[k] = v;
            else
                ((uint16_t *)out)[k] = p->dt == DT_F16 ? f32_to_f16(v) : f32_to_bf16(v);
        }
    }
}

typedef enum {
    AS_NORMAL,
    AS_CODES,
    AS_ZEROS,
    AS_SCALES
} filling; /* the last three: AWQ's tensors */

#define W4_SCALE 0.00433f /* codes are even over 0..15: a deviation of 4.61 times this is 0.02 */

/* Codes from 0 to 15, zeros of 7 or 8, scales within a quarter of W4_SCALE. */
static void fill_packed(filling how, rng *r, void *out, int64_t n)
{
    const int per = how == AS_SCALES ? 4 : 2;
    for (int64_t i = 0; i < n; i += per) {
        uint64_t u = rng_next(r);
        if (how == AS_ZEROS) u = (u & 0x1111111111111111u) + 0x7777777777777777u;
        for (int64_t k = i; k < i + per && k < n; k++, u >>= 64 / per) {
            if (how == AS_SCALES)
                ((uint16_t *)out)[k] = f32_to_f16(W4_SCALE *
                                                  (0.75f + (float)(u & 0xffff) * (0.5f / 65536)));
            else
                ((uint32_t *)out)[k] = (uint32_t)u;
        }
    }
}

typedef struct {
    char name[160];
    int ndim;
    int64_t shape[2];
    float mean;
    int shard;
    filling how;
    dtype dt;
} entry;
typedef struct {
    entry *e;
    int64_t n, cap;
} entries;

static err_code add_entry(const plan *p, entries *l, tensor_role r, int32_t layer,
                          const char *suffix, int ndim, int64_t n, int64_t k, float mean, err *e)
{
    entry *t = &l->e[l->n];
    char base[128];
    if (l->n == l->cap) return err_set(e, E_LIMIT, "more tensors than planned");
    TRY(family_tensor_name(&p->m, r, layer, -1, base, sizeof base, e));
    (void)snprintf(t->name, sizeof t->name, "%s%s", base, suffix);
    t->ndim = ndim;
    t->shape[0] = n;
    t->shape[1] = k;
    t->mean = mean;
    t->dt = p->dt;
    l->n++;
    return OK;
}

/* A linear as AWQ packs it: codes and zeros 8 a word along the outputs, groups of W4_GROUP
 * inputs. */
static err_code add_packed(const plan *p, entries *l, tensor_role r, int32_t layer, int64_t n,
                           int64_t k, err *e)
{
    static const char *const suffix[] = {".qweight", ".qzeros", ".scales"};
    static const filling how[] = {AS_CODES, AS_ZEROS, AS_SCALES};
    for (int i = 0; i < 3; i++) {
        TRY(add_entry(p, l, r, layer, suffix[i], 2, i ? k / W4_GROUP : k, i < 2 ? n / 8 : n, 0, e));
        l->e[l->n - 1].how = how[i];
        l->e[l->n - 1].dt = i < 2 ? DT_I32 : DT_F16;
    }
    return OK;
}

static err_code list_layer(const plan *p, entries *l, int32_t layer, err *e)
{
    const model_desc *m = &p->m;
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    TRY(add_entry(p, l, ROLE_ATTN_NORM, layer, ".weight", 1, m->hidden, 1, 1, e));
    TRY(add_entry(p, l, ROLE_FFN_NORM, layer, ".weight", 1, m->hidden, 1, 1, e));
    for (int i = 0; i < n; i++) {
        const tensor_role r = linears[i];
        const bool bias = m->qkv_bias &&
                          (r == ROLE_Q || r == ROLE_K || r == ROLE_V || r == ROLE_QKV);
        if (p->w4)
            TRY(add_packed(p, l, r, layer, model_linear_n(m, r), model_linear_k(m, r), e));
        else
            TRY(add_entry(p, l, r, layer, ".weight", 2, model_linear_n(m, r), model_linear_k(m, r),
                          0, e));
        if (bias) TRY(add_entry(p, l, r, layer, ".bias", 1, model_linear_n(m, r), 1, 0, e));
    }
    return OK;
}

static err_code list_tensors(const plan *p, entries *l, err *e)
{
    const model_desc *m = &p->m;
    l->cap = 3 + (int64_t)m->layers * 40;
    TRY(mem_alloc((void **)&l->e, (size_t)l->cap, sizeof *l->e, "tensor list", e));
    TRY(add_entry(p, l, ROLE_EMBED, -1, ".weight", 2, m->vocab, m->hidden, 0, e));
    for (int32_t i = 0; i < m->layers; i++) TRY(list_layer(p, l, i, e));
    TRY(add_entry(p, l, ROLE_FINAL_NORM, -1, ".weight", 1, m->hidden, 1, 1, e));
    if (!m->tied_embed)
        TRY(add_entry(p, l, ROLE_HEAD, -1, ".weight", 2, m->vocab, m->hidden, 0, e));
    return OK;
}

static int64_t entry_bytes(const entry *t)
{
    return t->shape[0] * t->shape[1] * (int64_t)dtype_bytes(t->dt);
}

/* Consecutive tensors share a shard; returns the bytes of all. */
static int64_t spread(const plan *p, entries *l)
{
    int64_t total = 0, before = 0;
    for (int64_t i = 0; i < l->n; i++) total += entry_bytes(&l->e[i]);
    for (int64_t i = 0; i < l->n; i++) {
        l->e[i].shard = (int)(before * p->shards / total);
        before += entry_bytes(&l->e[i]);
    }
    return total;
}

static void shard_name(const plan *p, int shard, char *buf, size_t cap)
{
    if (p->shards == 1)
        (void)snprintf(buf, cap, "model.safetensors");
    else
        (void)snprintf(buf, cap, "model-%05d-of-%05d.safetensors", shard + 1, (int)p->shards);
}

static err_code write_shard(const plan *p, const entries *l, int shard, void *buf, err *e)
{
    static const char *const meta[] = {"format", "pt", NULL};
    char name[64], path[4096];
    st_writer *w = NULL;
    err_code rc;
    shard_name(p, shard, name, sizeof name);
    if ((rc = path_join(path, sizeof path, p->dir, name, e)) != OK) goto done;
    if ((rc = st_writer_open(&w, path, meta, true, e)) != OK) goto done;
    for (int64_t i = 0; i < l->n; i++)
        if (l->e[i].shard == shard &&
            (rc = st_writer_add(w, l->e[i].name, l->e[i].dt, l->e[i].ndim, l->e[i].shape, e)) != OK)
            goto done;
    for (int64_t i = 0; i < l->n; i++) {
        const entry *t = &l->e[i];
        const int64_t count = t->shape[0] * t->shape[1];
        rng r = rng_of(p->seed, t->name);
        if (t->shard != shard) continue;
        for (int64_t at = 0; at < count; at += CHUNK) {
            const int64_t n = count - at < CHUNK ? count - at : CHUNK;
            if (t->how == AS_NORMAL)
                fill(p, &r, t->mean, buf, n);
            else
                fill_packed(t->how, &r, buf, n);
            if ((rc = st_writer_part(w, t->name, at, buf, n, e)) != OK) goto done;
        }
    }
    rc = st_writer_commit(&w, e);
done:
    st_writer_abort(&w);
    return rc;
}

static err_code write_index(const plan *p, const entries *l, int64_t bytes, err *e)
{
    cJSON *o = cJSON_CreateObject(), *map;
    (void)cJSON_AddNumberToObject(cJSON_AddObjectToObject(o, "metadata"), "total_size",
                                  (double)bytes);
    map = cJSON_AddObjectToObject(o, "weight_map");
    for (int64_t i = 0; i < l->n; i++) {
        char name[64];
        shard_name(p, l->e[i].shard, name, sizeof name);
        (void)cJSON_AddStringToObject(map, l->e[i].name, name);
    }
    const err_code rc = write_json(p->dir, "model.safetensors.index.json", o, true, e);
    cJSON_Delete(o);
    return rc;
}

static err_code write_weights(plan *p, err *e)
{
    entries l = {0};
    void *buf = NULL;
    err_code rc;
    if ((rc = make_tables(p, e)) != OK) goto done;
    if ((rc = mem_alloc(&buf, CHUNK, 4, "buffer", e)) != OK) goto done;
    if ((rc = list_tensors(p, &l, e)) != OK) goto done;
    const int64_t bytes = spread(p, &l);
    for (int i = 0; i < p->shards; i++)
        if ((rc = write_shard(p, &l, i, buf, e)) != OK) goto done;
    if (p->shards > 1) rc = write_index(p, &l, bytes, e);
done:
    mem_free(l.e);
    mem_free(buf);
    mem_free(p->table);
    mem_free(p->table32);
    return rc;
}

/* ---- command line ---- */
static const char *shape_name = "tiny", *dtype_text = "bf16";
static int64_t layers, vocab, head_dim;

static plan the_plan = {.shards = 1};

/* name, letter, kind, target, arg, help, lo, hi, choices, alias */
static const cli_option options[] = {
    {"shape", 0, CLI_STR, &shape_name, "NAME", "which model [tiny]", 0, 0, NULL, NULL},
    {"seed", 0, CLI_I64, &the_plan.seed, "N", "of the weights [0]", 0, 1e9, NULL, NULL},
    {"dtype", 0, CLI_CHOICE, &dtype_text, "TYPE", "of tensors [bf16]", 0, 0, "bf16|f16|f32", NULL},
    {"shards", 0, CLI_I64, &the_plan.shards, "N", "safetensors files [1]", 1, 999, NULL, NULL},
    {"w4", 0, CLI_FLAG, &the_plan.w4, NULL, "an AWQ directory: linears of 4 bits", 0, 0, NULL,
     NULL},
    {"layers", 0, CLI_I64, &layers, "N", "in place of the shape's", 1, 1024, NULL, NULL},
    {"vocab", 0, CLI_I64, &vocab, "N", "in place of the shape's", 264, 1e6, NULL, NULL},
    {"head-dim", 0, CLI_I64, &head_dim, "N", "in place of the shape's", 2, 1024, NULL, NULL},
};
static const cli_spec spec = {.tool = "make_model",
                              .usage = "[options] OUT_DIR",
                              .summary = "Writes a model directory with random weights.",
                              .options = options,
                              .n_options = sizeof options / sizeof options[0],
                              .min_args = 1,
                              .max_args = 1};

static err_code take_shape(plan *p, err *e)
{
    for (int i = 0; i < N_SHAPES; i++)
        if (strcmp(shapes[i].name, shape_name) == 0) p->s = shapes[i];
    if (!p->s.name)
        return err_set(e, E_USAGE, "--shape '%s' is not known (--help lists them)", shape_name);
    if (layers) p->s.layers = (int32_t)layers;
    if (vocab) p->s.vocab = (int32_t)vocab;
    if (head_dim) p->s.head_dim = (int32_t)head_dim;
    if (p->s.vocab < 264)
        return err_set(e, E_USAGE, "--vocab %d: expected at least 264", p->s.vocab);
    return OK;
}

static int show_help(void)
{
    cli_help(&spec, stdout);
    for (int i = 0; i < N_SHAPES; i++) printf("%s %s", i ? "," : "\nshapes:", shapes[i].name);
    printf("\n");
    return 0;
}

static err_code make(plan *p, err *e)
{
    p->dt = strcmp(dtype_text, "f32") == 0   ? DT_F32
            : strcmp(dtype_text, "f16") == 0 ? DT_F16
                                             : DT_BF16;
    TRY(take_shape(p, e));
    TRY(dir_make(p->dir, e));
    TRY(write_configs(p, e));
    TRY(write_tokenizer(p, e));
    return write_weights(p, e);
}

int main(int argc, char **argv)
{
    bool help, version;
    int n;
    err e;
    err_code rc = cli_parse(&spec, argc, argv, &the_plan.dir, 1, &n, &help, &version, &e);
    if (rc == OK && help) return show_help();
    if (rc == OK) rc = make(&the_plan, &e);
    if (rc == OK) return 0;
    fprintf(stderr, "make_model: %s\n", e.msg);
    return 1;
}

/* The JSON object of a call, character by character: at its first level the name and the arguments,
 * which go out as they come. */
#include <string.h>

#include "runtime/serve/toolcall_internal.h"

enum { MAX_LEVELS = 256 };

/* A JSON string of raw, decoded, into the name; empty when it does not fit. */
static bool take_name(toolcall *t, size_t from, size_t to)
{
    cJSON *o;
    err ignored;
    t->name[0] = '\0';
    if (json_parse(&o, t->raw.p + from, to - from, "name", &ignored) != OK) return false;
    const bool ok = cJSON_IsString(o) && o->valuestring[0] &&
                    strlen(o->valuestring) <= TOOLCALL_MAX_NAME;
    if (ok) strcpy(t->name, o->valuestring);
    cJSON_Delete(o);
    return ok;
}

static err_code send_args(toolcall *t, size_t to)
{
    if (!t->begun || t->raw.p[t->args_from] == '"') return OK;
    const size_t from = t->sent;
    if (to <= from) return OK;
    t->sent = to;
    return toolcall_tell(t, TOOLCALL_ARGS, t->raw.p + from, to - from);
}

/* Arguments that are written as a string are what it holds. */
static err_code send_string(toolcall *t)
{
    cJSON *o;
    err ignored;
    if (json_parse(&o, t->raw.p + t->args_from, t->args_to - t->args_from, "arguments", &ignored) !=
        OK)
        return OK;
    const err_code rc = toolcall_tell(t, TOOLCALL_ARGS, o->valuestring, strlen(o->valuestring));
    cJSON_Delete(o);
    return rc;
}

static err_code value_ends(toolcall *t, size_t to)
{
    t->part = OBJ_KEY;
    if (t->key == KEY_NAME && !t->begun && take_name(t, t->from, to) && t->args_to) {
        TRY(toolcall_call_begin(t)); /* the arguments came first */
        t->sent = t->args_from;
        return t->raw.p[t->args_from] == '"' ? send_string(t) : send_args(t, t->args_to);
    }
    if (t->key != KEY_ARGS) return OK;
    t->args_to = to;
    if (!t->begun) return OK;
    return t->raw.p[t->args_from] == '"' ? send_string(t) : send_args(t, to);
}

static err_code object_ends(toolcall *t)
{
    if (t->key == KEY_BARE) TRY(send_args(t, t->raw.n));
    /* an answer that is JSON may well have a name: without arguments it is none of a call */
    const bool bare_text = t->format == CHAT_TOOLS_LLAMA3 && !t->args_to;
    if (!t->begun && (!t->name[0] || bare_text)) return toolcall_give_back(t);
    if (!t->begun) TRY(toolcall_call_begin(t));
    if (!t->args_to && t->key != KEY_BARE) TRY(toolcall_tell(t, TOOLCALL_ARGS, "{}", 2));
    t->at = AT_CLOSE;
    t->begun = false;
    t->raw.n = t->back.n = 0;
    return OK;
}

static key_kind kind_of_key(const char *s, size_t n)
{
    if (n == 6 && !memcmp(s, "\"name\"", 6)) return KEY_NAME;
    if (n == 11 && !memcmp(s, "\"arguments\"", 11)) return KEY_ARGS;
    return n == 12 && !memcmp(s, "\"parameters\"", 12) ? KEY_ARGS : KEY_OTHER;
}

static err_code value_begins(toolcall *t)
{
    t->from = t->raw.n - 1;
    t->part = OBJ_IN_VALUE;
    if (t->key != KEY_ARGS || t->args_from) {
        if (t->key == KEY_ARGS) t->key = KEY_OTHER; /* a second one */
        return OK;
    }
    t->args_from = t->sent = t->from;
    return t->name[0] && !t->begun ? toolcall_call_begin(t) : OK;
}

/* One character outside of strings. */
static err_code structure(toolcall *t, char c, bool *bad)
{
    const bool opens = c == '{' || c == '[', closes = c == '}' || c == ']';
    if (t->depth == 1 && c == ']') { /* it was opened by a brace */
        *bad = true;
        return OK;
    }
    if (t->key == KEY_BARE) { /* whatever is in it is the arguments */
        t->in_string = c == '"';
        t->depth += opens - closes;
        *bad = t->depth > MAX_LEVELS;
        return t->depth == 0 ? object_ends(t) : OK;
    }
    if (t->depth == 1 && t->part == OBJ_IN_VALUE && (c == ',' || c == '}'))
        TRY(value_ends(t, t->raw.n - 1));
    if (t->depth == 1 && t->part == OBJ_VALUE && !toolcall_is_space(c)) {
        if (c == ',' || closes) *bad = true;
        TRY(value_begins(t));
    }
    if (t->depth == 1 && t->part == OBJ_COLON && !toolcall_is_space(c)) {
        *bad = c != ':';
        t->part = OBJ_VALUE;
    } else if (t->depth == 1 && t->part == OBJ_KEY && !toolcall_is_space(c) && c != ',' &&
               c != '"' && c != '}') {
        *bad = true;
    }
    if (c == '"') {
        t->in_string = true;
        if (t->depth == 1 && t->part == OBJ_KEY) {
            t->part = OBJ_IN_KEY;
            t->from = t->raw.n - 1;
        }
    }
    t->depth += opens - closes;
    if (t->depth > MAX_LEVELS) *bad = true;
    if (t->depth == 0) return object_ends(t);
    if (closes && t->depth == 1 && t->part == OBJ_IN_VALUE) return value_ends(t, t->raw.n);
    return OK;
}

static err_code string_char(toolcall *t, char c)
{
    if (t->escaped) {
        t->escaped = false;
        return OK;
    }
    t->escaped = c == '\\';
    if (c != '"') return OK;
    t->in_string = false;
    if (t->depth != 1 || t->key == KEY_BARE) return OK;
    if (t->part == OBJ_IN_KEY) {
        t->key = kind_of_key(t->raw.p + t->from, t->raw.n - t->from);
        t->part = OBJ_COLON;
        return OK;
    }
    return t->part == OBJ_IN_VALUE ? value_ends(t, t->raw.n) : OK;
}

/* Feeds the object until it ends or there is no more. */
err_code toolcall_run_object(toolcall *t)
{
    size_t i = 0;
    bool bad = false;
    err_code rc = OK;
    for (; i < t->in.n && t->at == AT_OBJECT && rc == OK && !bad;) {
        const char c = t->in.p[i++];
        if ((rc = toolcall_buf_add(&t->raw, &c, 1, t->e)) != OK) break;
        if (t->raw.n > TOOLCALL_MAX_BYTES || ((uint8_t)c < 0x20 && t->in_string)) bad = true;
        if (bad) break;
        if (t->part == OBJ_BEGIN) { /* "{" */
            t->depth = 1;
            t->part = t->key == KEY_BARE ? OBJ_IN_VALUE : OBJ_KEY;
        } else if (t->in_string) {
            rc = string_char(t, c);
        } else {
            rc = structure(t, c, &bad);
        }
    }
    toolcall_buf_drop(&t->in, i);
    if (rc != OK) return rc;
    const bool open = t->at == AT_OBJECT && t->part == OBJ_IN_VALUE;
    if (open && (t->key == KEY_ARGS || t->key == KEY_BARE)) TRY(send_args(t, t->raw.n - bad));
    return bad ? toolcall_give_back(t) : OK;
}

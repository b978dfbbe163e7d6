/* jinja_lines: reads lines {"template": text, "context": object, "now": seconds} and writes for
 * each {"text": rendered} or {"error": message}. For scripts that compare with Jinja2. */
#include <stdio.h>
#include <string.h>

#include "support/jinja_scope.h"

int main(void)
{
    static char line[8 << 20];
    while (fgets(line, sizeof line, stdin)) {
        cJSON *in = cJSON_Parse(line), *out = cJSON_CreateObject();
        const cJSON *t = cJSON_GetObjectItem(in, "template"), *now = cJSON_GetObjectItem(in, "now");
        err_code rc = E_INPUT;
        err e = {E_INPUT, "no template"};
        jinja_text text = {0};
        if (cJSON_IsString(t))
            text = jinja_with(t->valuestring, strlen(t->valuestring),
                              cJSON_GetObjectItem(in, "context"),
                              now ? (int64_t)now->valuedouble : 0, &rc, &e);
        if (rc == OK)
            cJSON_AddStringToObject(out, "text", text.text);
        else
            cJSON_AddStringToObject(out, "error", e.msg);
        char *s = cJSON_PrintUnformatted(out);
        puts(s);
        cJSON_free(s);
        jinja_text_free(&text);
        cJSON_Delete(in);
        cJSON_Delete(out);
    }
    return 0;
}

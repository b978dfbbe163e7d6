/* The family table: one file family_<name>.c and one line in family.c per family. Nothing else may
 * switch on a family name. */
#ifndef TMF_FORMATS_FAMILY_H
#define TMF_FORMATS_FAMILY_H

#include "base/json.h"
#include "formats/model.h"

typedef struct {
    const char *name;
    const char *const *architectures; /* NULL-ended */
    /* For a family that shares its architecture's name with another: true when the config is of
     * this one. NULL: the architecture is enough. Families with a match are asked first. */
    bool (*match)(const cJSON *config);
    err_code (*read_config)(const cJSON *config, model_desc *out, err *e);
    /* Name of a weight without suffix (".weight", ".bias", ".qweight" follow):
     * "model.layers.3.mlp.up_proj" */
    err_code (*tensor_name)(const model_desc *m, tensor_role r, int32_t layer, int32_t expert,
                            char *buf, size_t cap, err *e);
    const smooth_group *smooth; /* groups that AWQ searches: norm->inputs, up->down */
    int n_smooth;
    const char
        *chat_template; /* default template name (formats/chat.h) when the directory has none */
    const char *(*template_for)(
        const model_desc *m); /* where it depends on the generation; else NULL */
} family;

/* By config.json: architectures[0]; unknown ones are E_UNSUPPORTED listing what is known. */
err_code family_of_config(const family **out, const cJSON *config, err *e);
const family *family_by_name(const char *name); /* NULL when unknown */
/* Default chat template of a model, NULL when its family is unknown. */
const char *family_chat_template(const model_desc *m);
/* tensor_name of the family that m names, E_UNSUPPORTED when it is unknown. */
err_code family_tensor_name(const model_desc *m, tensor_role r, int32_t layer, int32_t expert,
                            char *buf, size_t cap, err *e);

#endif

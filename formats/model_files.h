/* Which files of a Hugging Face directory go along with converted weights: tokenizer, generation
 * settings, chat template, model code for other readers, licence. Not config.json, which writers
 * change. */
#ifndef TMF_FORMATS_MODEL_FILES_H
#define TMF_FORMATS_MODEL_FILES_H

#include "base/file.h"

/* Sorted plain names of those files in `dir`. Free with dir_list_free. */
err_code model_files_list(dir_list *out, const char *dir, err *e);

#endif

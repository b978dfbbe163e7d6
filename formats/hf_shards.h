/* The safetensors files of a Hugging Face directory as one name space. Private to formats. */
#ifndef TMF_FORMATS_HF_SHARDS_H
#define TMF_FORMATS_HF_SHARDS_H

#include "base/hash.h"
#include "formats/safetensors.h"

typedef struct hf_shards hf_shards;

/* Which files: those that model.safetensors.index.json names; without it every model*.safetensors;
 * without those every *.safetensors. E_INPUT for a missing shard, a shard of the model-x-of-y kind
 * that the index does not name, a tensor in two files, an index whose entries leave the directory
 * or do not hold. E_UNSUPPORTED naming a .bin file when there is nothing else. Every file's size is
 * checked against its header. */
err_code hf_shards_open(hf_shards **out, const char *dir, err *e);
void hf_shards_close(hf_shards **s);
/* file, when not NULL, is the plain name of the file that has it. The view may be unaligned
 * (st_aligned). */
bool hf_shards_find(const hf_shards *s, const char *name, tensor *view, const char **file);
void hf_shards_advise(const hf_shards *s, const char *name, bool need);

/* A digest that names this content: SHA-256 over `config` (the text of config.json) and, for each
 * file sorted by name, over its name, size, header, and data. Of at most HF_DIGEST_WHOLE bytes of
 * files the data goes in whole (through XXH3-128); of more, the first and last HF_DIGEST_PIECE
 * bytes of each tensor and two pieces between. So 100 GB cost a few thousand small reads; training,
 * merging or casting moves the digest; a change of a few single weights in a large model does not.
 * */
#define HF_DIGEST_WHOLE ((uint64_t)256 << 20)
#define HF_DIGEST_PIECE ((size_t)4096)
err_code hf_shards_digest(const hf_shards *s, const char *config, size_t n, hash256 *out, err *e);

#endif

/* The only C++ of the project: a handle, load and encode. Everything that can throw is caught
 * here. */
#include "formats/sp_shim.h"

#include <sentencepiece_processor.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <vector>

struct sp_shim {
    sentencepiece::SentencePieceProcessor processor;
};

static sp_status fail(sp_status code, char *msg, size_t cap, const char *why)
{
    std::snprintf(msg, cap, "%s", why);
    return code;
}

extern "C" sp_status sp_shim_open(sp_shim **out, const char *model, size_t n, char *msg, size_t cap)
{
    *out = nullptr;
    try {
        std::unique_ptr<sp_shim> s(new sp_shim);
        const auto status = s->processor.LoadFromSerializedProto(absl::string_view(model, n));
        if (!status.ok()) return fail(SP_BAD, msg, cap, status.message());
        *out = s.release();
        return SP_OK;
    } catch (const std::bad_alloc &) {
        return fail(SP_NOMEM, msg, cap, "out of memory");
    } catch (const std::exception &x) {
        return fail(SP_BAD, msg, cap, x.what());
    } catch (...) {
        return fail(SP_BAD, msg, cap, "unknown failure");
    }
}

extern "C" void sp_shim_close(sp_shim *s) { delete s; }

extern "C" sp_status sp_shim_encode(const sp_shim *s, const char *text, size_t n,
                                    int (*push)(void *ctx, int id), void *ctx, char *msg,
                                    size_t cap)
{
    try {
        std::vector<int> ids;
        const auto status = s->processor.Encode(absl::string_view(text, n), &ids);
        if (!status.ok()) return fail(SP_BAD, msg, cap, status.message());
        for (int id : ids)
            if (push(ctx, id)) return SP_STOPPED;
        return SP_OK;
    } catch (const std::bad_alloc &) {
        return fail(SP_NOMEM, msg, cap, "out of memory");
    } catch (const std::exception &x) {
        return fail(SP_BAD, msg, cap, x.what());
    } catch (...) {
        return fail(SP_BAD, msg, cap, "unknown failure");
    }
}

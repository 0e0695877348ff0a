/* llama_quantize IN.gguf OUT.gguf KIND [IMPORTANCE], KIND a number of enum llama_ftype: by llama.cpp's library. Built by
 * eval/llama_cpp.py. With an importance matrix (its oldest format: count, then name, calls and values of each) embedding and head stay
 * as they are. */
#include <stdio.h>
#include <stdlib.h>

#include "llama.h"

static int32_t number(FILE *file) {
    int32_t v;
    if (fread(&v, sizeof v, 1, file) != 1 || v < 0) exit(3);
    return v;
}
static void *block(FILE *file, size_t size, size_t more) {
    char *data = calloc(size + more, 1);
    if (!data || fread(data, 1, size, file) != size) exit(3);
    return data;
}

static struct llama_model_imatrix_data *importance(const char *name) {
    FILE *file = fopen(name, "rb");
    if (!file) exit(3);
    int32_t count = number(file);
    struct llama_model_imatrix_data *entries = calloc((size_t)count + 1, sizeof *entries);
    for (int32_t i = 0; i < count; i++) {
        entries[i].name = block(file, (size_t)number(file), 1);
        number(file);
        entries[i].size = (size_t)number(file);
        entries[i].data = block(file, entries[i].size * sizeof(float), 0);
    }
    fclose(file);
    return entries;
}

int main(int count, char **arguments) {
    if (count != 4 && count != 5) return 2;
    struct llama_model_quantize_params options = llama_model_quantize_default_params();
    llama_backend_init();
    options.ftype = (enum llama_ftype)atoi(arguments[3]), options.nthread = count == 5 ? 1 : 2;
    if (count == 5) {
        options.imatrix = importance(arguments[4]);
        options.token_embedding_type = GGML_TYPE_F32, options.quantize_output_tensor = false;
    }
    return (int)llama_model_quantize(arguments[1], arguments[2], &options);
}

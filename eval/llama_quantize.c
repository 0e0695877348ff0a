/* llama_quantize IN.gguf OUT.gguf KIND, a number of enum llama_ftype: by llama.cpp's library. Built by eval/decoding.py. */
#include <stdlib.h>

#include "llama.h"

int main(int count, char **arguments) {
    if (count != 4) return 2;
    struct llama_model_quantize_params options = llama_model_quantize_default_params();
    llama_backend_init();
    options.ftype = (enum llama_ftype)atoi(arguments[3]), options.nthread = 2;
    return (int)llama_model_quantize(arguments[1], arguments[2], &options);
}

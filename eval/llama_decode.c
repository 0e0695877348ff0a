/* llama_decode MODEL.gguf PROMPT_TOKENS NEW_TOKENS THREADS BACKENDS_FOLDER: greedy decoding at batch 1 by llama.cpp's library.
 * Prints JSON: milliseconds of the clock and of the CPU for every token but the first. Built by eval/decoding.py. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "ggml-backend.h"
#include "llama.h"

static double milliseconds(clockid_t clock) {
    struct timespec at;
    clock_gettime(clock, &at);
    return 1e3 * (double)at.tv_sec + 1e-6 * (double)at.tv_nsec;
}

static void quiet(enum ggml_log_level level, const char *text, void *data) { (void)level, (void)text, (void)data; }

static llama_token likeliest(const float *logits, int count) {
    llama_token best = 0;
    for (int i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

int main(int count, char **arguments) {
    if (count != 6) return 2;
    int prompt = atoi(arguments[2]), new_tokens = atoi(arguments[3]), threads = atoi(arguments[4]);
    llama_log_set(quiet, NULL);
    ggml_backend_load_all_from_path(arguments[5]);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (!model) return 1;
    struct llama_context_params options = llama_context_default_params();
    options.n_ctx = (uint32_t)(prompt + new_tokens + 64), options.n_threads = options.n_threads_batch = threads;
    struct llama_context *context = llama_init_from_model(model, options);
    int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token *tokens = malloc((size_t)prompt * sizeof *tokens), token;
    for (int i = 0; i < prompt; i++) tokens[i] = i % 1000;
    double begun = milliseconds(CLOCK_MONOTONIC);
    if (!context || llama_decode(context, llama_batch_get_one(tokens, prompt))) return 1;
    printf("{\"prompt_ms\": %.3f, \"tokens\": [", milliseconds(CLOCK_MONOTONIC) - begun);
    token = likeliest(llama_get_logits_ith(context, -1), vocabulary);
    for (int i = 1; i < new_tokens; i++) {
        double wall = milliseconds(CLOCK_MONOTONIC), cpu = milliseconds(CLOCK_PROCESS_CPUTIME_ID);
        if (llama_decode(context, llama_batch_get_one(&token, 1))) return 1;
        token = likeliest(llama_get_logits_ith(context, -1), vocabulary);
        wall = milliseconds(CLOCK_MONOTONIC) - wall, cpu = milliseconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        printf("%s[%d, %.3f, %.3f]", i > 1 ? ", " : "", (int)token, wall, cpu);
    }
    puts("]}");
    return 0;
}

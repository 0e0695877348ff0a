/* Numbers in vectors of the compiler's, so that what is written once is compiled for every CPU. */
#pragma GCC diagnostic ignored "-Wpsabi" /* how vectors are passed does not matter: every function that takes one is inlined */

#include "floats.h"

enum { LANES = 16 };

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t whole __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

INLINE lanes load(const char *p, int dtype) {
    if (dtype == FP32) {
        lanes v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    halves h;
    memcpy(&h, p, sizeof h);
    whole wide = __builtin_convertvector(h, whole) << 16;
    lanes v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

/* Number `c` of the vectors of a row: what is behind its end is zero. */
INLINE lanes load_some(const char *row, int64_t c, int64_t width, int dtype) {
    int64_t left = width - c * LANES;
    if (left >= LANES) return load(row + c * LANES * dtype, dtype);
    char some[LANES * FP32] = {0};
    memcpy(some, row + c * LANES * dtype, (size_t)(left * dtype));
    return load(some, dtype);
}

/* To bf16 and back: to nearest, ties to even; NaN stays NaN. */
INLINE whole rounded_bits(lanes v) {
    whole bits, wide, none = v != v;
    memcpy(&bits, &v, sizeof bits);
    wide = bits + 0x7fff + ((bits >> 16) & 1);
    return ((wide & ~none) | ((bits | 0x400000) & none)) & (int32_t)0xffff0000;
}

INLINE lanes rounded(lanes v, int dtype) {
    if (dtype == FP32) return v;
    whole bits = rounded_bits(v);
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Number `c` of the vectors of a row, as far as the row goes. */
INLINE void store_some(char *row, int64_t c, int64_t width, lanes v, int dtype) {
    int64_t left = width - c * LANES < LANES ? width - c * LANES : LANES;
    if (dtype == FP32) memcpy(row + c * LANES * FP32, &v, left == LANES ? sizeof v : (size_t)(left * FP32));
    else {
        halves h = __builtin_convertvector((rounded_bits(v) >> 16) & 0xffff, halves);
        memcpy(row + c * LANES * BF16, &h, left == LANES ? sizeof h : (size_t)(left * BF16));
    }
}

/* DEFINE(name, target) for each level of CPU, where a compiler is there that knows it. */
static int always(void) { return 1; }
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include "avx.h"
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,popcnt")))
static int has_avx512(void) {
    return has_avx512f() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#define EACH_TARGET(DEFINE) DEFINE(portable, ) DEFINE(avx2, WITH_AVX2) DEFINE(avx512, WITH_AVX512)
#define X86_KERNELS {"avx512", BF16, has_avx512, avx512_bf16}, {"avx512", FP32, has_avx512, avx512_fp32}, {"avx2", BF16, has_avx2, avx2_bf16}, {"avx2", FP32, has_avx2, avx2_fp32},
#else
#define EACH_TARGET(DEFINE) DEFINE(portable, )
#define X86_KERNELS
#endif

/* The table of what EACH_TARGET made, the fastest first, and what asks it. */
#define KERNELS                                                                                               \
    static const struct kernel {                                                                              \
        const char *name;                                                                                     \
        int32_t dtype;                                                                                        \
        int (*runs_here)(void);                                                                               \
        kernel_function *run;                                                                                 \
    } kernels[] = {X86_KERNELS{"portable", BF16, always, portable_bf16}, {"portable", FP32, always, portable_fp32}}; \
    enum { COUNT = sizeof kernels / sizeof *kernels };                                                        \
    const char *kernel_name(int32_t k) { return k >= 0 && k < COUNT ? kernels[k].name : NULL; }               \
    int32_t kernel_fits(int32_t k, int32_t dtype) {                                                           \
        return k >= 0 && k < COUNT && kernels[k].dtype == dtype && kernels[k].runs_here();                    \
    }

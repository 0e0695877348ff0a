/* The dtypes of weights and activations, each named by its bytes. */
#include <stdint.h>
#include <string.h>

enum { BF16 = 2, FP32 = 4 };

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

static float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE float get(const void *p, int64_t i, int dtype) {
    return dtype == FP32 ? ((const float *)p)[i] : widen(((const uint16_t *)p)[i]);
}

static uint16_t narrow(float wide) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return wide == wide ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)(bits >> 16 | 0x40);
}

INLINE void put(void *p, int64_t i, int dtype, float value) {
    if (dtype == FP32) ((float *)p)[i] = value;
    else ((uint16_t *)p)[i] = narrow(value);
}

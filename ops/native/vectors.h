/* Vectors of LANES numbers, rounding and float16, as torch computes them.
 *
 * Compiled with -ffp-contract=off: +, -, *, / and rounding in float32. GCC and clang only.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define LANES 16

/* Vectors of GCC and clang; a processor of narrower registers takes several. */
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t M __attribute__((vector_size(4 * LANES)));

static inline V pick(M which, V yes, V no) { return (V)(((M)yes & which) | ((M)no & ~which)); }
static inline V all(float value) { return value - (V){0}; }
/* NaN passes, as through torch.clamp. */
static inline V above(V x, V least) { return pick(x < least, least, x); }
static inline V below(V x, V most) { return pick(x > most, most, x); }

/* Half to even, of values within +-2^22: beyond it float32 has no fractions to spare. */
static inline V whole(V x) {
    const V shift = all(12582912.0f);
    return (x + shift) - shift;
}

/* clamp(round(x)): limits are whole numbers, so that the order does not matter. */
static inline V to_code(V x, V least, V most) { return whole(below(above(x, least), most)); }

/* ---- float16 ---- */

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Rounded to nearest even; infinity above 65519. */
static inline uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;
    if (rest < 0x38800000u) { /* below the least normal number: the adder rounds */
        float sum = of_bits(rest) + 0.5f;
        return sign | (bits_of(sum) - 0x3f000000u);
    }
    return sign | ((rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13);
}

static inline float of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest < 0x400u) return (sign ? -1.0f : 1.0f) * (float)rest * 0x1p-24f;
    return of_bits(sign | ((rest << 13) + 0x38000000u));
}

static inline V as_stored(V values) {
    for (int l = 0; l < LANES; l++) values[l] = of_half(to_half(values[l]));
    return values;
}

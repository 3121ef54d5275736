/* Q8_0 and INT8 rows, and what storing them lost, in one pass over the weights.
 *
 * The values are those of ops/blocks/legacy.py, ops/reference.py and ops/rotation.py, to the bit.
 * Sums of squares are float64, of LANES / 2 parts that are added in a fixed order.
 */
#include "vectors.h"

typedef double W __attribute__((vector_size(4 * LANES)));

typedef struct {
    double signal, noise, largest; /* sum w^2, sum (stored - w)^2, max |stored - w| */
} Lost;

typedef struct {
    W signal, noise;
    V largest;
} Sums;

enum { FINE = 0, NOT_FINITE = 1, TOO_LARGE = 2 };

static inline V magnitude(V x) { return (V)((M)x & 0x7fffffff); }

static inline W first_half(V x) {
    W wide;
    for (int l = 0; l < LANES / 2; l++) wide[l] = x[l];
    return wide;
}

static inline W second_half(V x) {
    W wide;
    for (int l = 0; l < LANES / 2; l++) wide[l] = x[l + LANES / 2];
    return wide;
}

static inline void add_squares(W *sum, V x) {
    W first = first_half(x), second = second_half(x);
    *sum += first * first;
    *sum += second * second;
}

static inline void count(Sums *sums, V weights, V stored) {
    V error = stored - weights;
    add_squares(&sums->signal, weights);
    add_squares(&sums->noise, error);
    V size = magnitude(error);
    sums->largest = pick(size > sums->largest, size, sums->largest);
}

static void total(const Sums *sums, Lost *lost) {
    lost->signal = lost->noise = lost->largest = 0;
    for (int l = 0; l < LANES / 2; l++) {
        lost->signal += sums->signal[l];
        lost->noise += sums->noise[l];
    }
    for (int l = 0; l < LANES; l++)
        if (sums->largest[l] > lost->largest) lost->largest = sums->largest[l];
}

static inline V load(const void *weights, int bf16, int64_t at) {
    V x;
    if (bf16) {
        M bits;
        const uint16_t *from = (const uint16_t *)weights + at;
        for (int l = 0; l < LANES; l++) bits[l] = (int32_t)((uint32_t)from[l] << 16);
        return (V)bits;
    }
    memcpy(&x, (const float *)weights + at, sizeof x);
    return x;
}

static inline int any(M flags) {
    uint64_t words[LANES / 2], found = 0;
    memcpy(words, &flags, sizeof words);
    for (int l = 0; l < LANES / 2; l++) found |= words[l];
    return found != 0;
}

static inline float largest_of(V x) {
    float most = x[0];
    for (int l = 1; l < LANES; l++) most = x[l] > most ? x[l] : most;
    return most;
}

typedef int8_t B __attribute__((vector_size(LANES)));

static inline void store_codes(int8_t *to, M codes) {
    B bytes = __builtin_convertvector(codes, B);
    memcpy(to, &bytes, sizeof bytes);
}

typedef int32_t M8 __attribute__((vector_size(32)));
typedef int32_t M4 __attribute__((vector_size(16)));

/* By halves: a loop over the lanes is not vectorized. */
static inline int32_t largest_bits(M a, M b) {
    M both = (a & (a > b)) | (b & ~(a > b));
    M8 x, y;
    memcpy(&x, &both, sizeof x);
    memcpy(&y, (char *)&both + sizeof x, sizeof y);
    x = (x & (x > y)) | (y & ~(x > y));
    M4 u, v;
    memcpy(&u, &x, sizeof u);
    memcpy(&v, (char *)&x + sizeof u, sizeof v);
    u = (u & (u > v)) | (v & ~(u > v));
    int32_t left = u[0] > u[1] ? u[0] : u[1], right = u[2] > u[3] ? u[2] : u[3];
    return left > right ? left : right;
}

/* n blocks of 32 weights, bfloat16 or float32 -> blocks [n, 34].
 *
 * The scales of LANES blocks are made side by side: a division and a float16 for each by itself
 * would take longer than the codes. Magnitudes are compared as whole numbers, where infinities and
 * NaN come last. */
static inline int q8_0(const void *weights, int bf16, int64_t n, uint8_t *blocks, Lost *lost) {
    Sums sums = {0};
    const M sign_bit = ~(M){0} << 31, half_code = (M)all(0.5f - 0x1p-25f);
    for (int64_t first = 0; first < n; first += LANES) {
        int64_t count_here = n - first < LANES ? n - first : LANES;
        int32_t sizes[LANES] = {0};
        for (int64_t b = 0; b < count_here; b++) {
            int64_t at = 32 * (first + b);
            sizes[b] = largest_bits((M)load(weights, bf16, at) & ~sign_bit,
                                    (M)load(weights, bf16, at + LANES) & ~sign_bit);
        }
        V most;
        memcpy(&most, sizes, sizeof most);
        if (any(~(most < all(INFINITY)))) return NOT_FINITE;
        V scales = most / all(127.0f), inverses = all(1) / scales;
        inverses = pick((scales > all(0)) & (inverses < all(INFINITY)), inverses, all(0));
        float scale[LANES], inverse[LANES];
        memcpy(scale, &scales, sizeof scale);
        memcpy(inverse, &inverses, sizeof inverse);
        for (int64_t b = 0; b < count_here; b++) {
            int64_t at = 32 * (first + b);
            uint16_t half = to_half(scale[b]);
            if ((half & 0x7c00u) == 0x7c00u) return TOO_LARGE;
            uint8_t *block = blocks + 34 * (first + b);
            memcpy(block, &half, 2);
            V stored_scale = all(of_half(half));
            for (int part = 0; part < 2; part++) {
                V x = load(weights, bf16, at + LANES * part), code = x * all(inverse[b]);
                code += (V)(((M)code & sign_bit) | half_code);
                M whole_code = __builtin_convertvector(code, M);
                store_codes((int8_t *)block + 2 + LANES * part, whole_code);
                count(&sums, x, __builtin_convertvector(whole_code, V) * stored_scale);
            }
        }
    }
    total(&sums, lost);
    return FINE;
}

EXPORT int i4q_q8_0(const void *weights, int bf16, int64_t n, uint8_t *blocks, Lost *lost) {
    return bf16 ? q8_0(weights, 1, n, blocks, lost) : q8_0(weights, 0, n, blocks, lost);
}

/* ConvRot's matrix of order 16 (H4 x H4, +-1): row r, column c. */
#define SIGN4(r, c) ((r) + (c) == 3 ? -1 : 1)
#define SIGN(r, c) (0.25f * SIGN4((r) >> 2, (c) >> 2) * SIGN4((r) & 3, (c) & 3))
#define FOUR(r, c) SIGN(r, c), SIGN(r, c + 1), SIGN(r, c + 2), SIGN(r, c + 3)
#define ROW(r) {FOUR(r, 0), FOUR(r, 4), FOUR(r, 8), FOUR(r, 12)}
static const V H16[LANES] = {
    ROW(0), ROW(1), ROW(2),  ROW(3),  ROW(4),  ROW(5),  ROW(6),  ROW(7),
    ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15),
};

/* 256 values, as rotation.rotate: each run of 16, then across the runs; products by 1/4 are exact. */
static void rotate(const V *x, V *y) {
    V turned[LANES];
    for (int r = 0; r < LANES; r++) {
        V sum = all(x[r][0]) * H16[0];
        for (int k = 1; k < LANES; k++) sum += all(x[r][k]) * H16[k];
        turned[r] = sum;
    }
    for (int r = 0; r < LANES; r++) {
        V sum = turned[0] * all(H16[r][0]);
        for (int k = 1; k < LANES; k++) sum += turned[k] * all(H16[r][k]);
        y[r] = sum;
    }
}

/* Rows [n, k] -> codes [n, k], scale [n]; k a multiple of 256, scratch [k] float32. */
EXPORT int i4q_int8_rows(const void *weights, int bf16, int64_t n, int64_t k, int rotated, int8_t *codes,
                  float *scales, V *scratch, Lost *lost) {
    Sums sums = {0};
    const V infinite = all(INFINITY);
    const int64_t vectors = k / LANES;
    for (int64_t row = 0; row < n; row++) {
        V most = all(0);
        M finite = ~(M){0};
        for (int64_t at = 0; at < vectors; at += LANES) {
            V x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load(weights, bf16, row * k + LANES * (at + i));
            if (rotated) rotate(x, scratch + at);
            else memcpy(scratch + at, x, sizeof x);
            for (int i = 0; i < LANES; i++) {
                V size = magnitude(scratch[at + i]);
                finite &= (magnitude(x[i]) < infinite) & (size < infinite);
                most = pick(size > most, size, most);
            }
        }
        if (any(~finite)) return NOT_FINITE;
        float scale = largest_of(most) / 127.0f;
        scale = scale < 1e-30f ? 1e-30f : scale;
        scales[row] = scale;
        for (int64_t at = 0; at < vectors; at += LANES) {
            V x[LANES], stored[LANES];
            for (int i = 0; i < LANES; i++) {
                V code = to_code(scratch[at + i] / all(scale), all(-127), all(127));
                M whole_code = __builtin_convertvector(code, M);
                for (int l = 0; l < LANES; l++)
                    codes[row * k + LANES * (at + i) + l] = (int8_t)whole_code[l];
                stored[i] = code * all(scale);
                x[i] = load(weights, bf16, row * k + LANES * (at + i));
            }
            if (rotated) {
                V turned[LANES];
                rotate(stored, turned);
                memcpy(stored, turned, sizeof stored);
            }
            for (int i = 0; i < LANES; i++) count(&sums, x[i], stored[i]);
        }
    }
    total(&sums, lost);
    return FINE;
}

/* What n stored values lost of the true ones; n a multiple of LANES. */
EXPORT int i4q_lost(const float *weights, const float *stored, int64_t n, Lost *lost) {
    Sums sums = {0};
    M finite = ~(M){0};
    for (int64_t at = 0; at < n; at += LANES) {
        V x = load(weights, 0, at), y = load(stored, 0, at);
        finite &= (magnitude(x) < all(INFINITY)) & (magnitude(y) < all(INFINITY));
        count(&sums, x, y);
    }
    total(&sums, lost);
    return any(~finite) ? NOT_FINITE : FINE;
}

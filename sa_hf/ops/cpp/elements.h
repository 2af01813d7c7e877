// The kinds of elements that rows have, read as floats and written from them.
#pragma once

#include "vectors.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

static inline vu load_bits(const uint16_t* p) { return __builtin_convertvector(*(const vh_any*)p, vu); }
static inline void store_bits(uint16_t* p, vu x) { *(vh_any*)p = __builtin_convertvector(x, vh); }

static inline vf load(const Bf16* p) { return (vf)(load_bits(&p->bits) << 16); }

static inline void store(Bf16* p, vf x) {  // to nearest, ties to even
    vu bits = (vu)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    store_bits(&p->bits, (vu)(x == x ? (vi)rounded : (vi)((bits >> 16) | 0x40u)));
}

#if defined(__F16C__) && defined(__AVX512F__)
// Masked, for GCC warns of what its plain forms leave undefined.
static inline vf load(const Fp16* p) {
    return (vf)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p));
}
static inline void store(Fp16* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
static inline vf load(const Fp16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(Fp16* p, vf x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline vf load(const Fp16* p) {
    vu bits = load_bits(&p->bits), size = (bits & 0x7fffu) << 13;
    vf x = (vf)size * 0x1p112f;  // a subnormal float as the exponent asks
    vu found = (vu)((bits & 0x7c00u) == 0x7c00u ? (vi)(size | 0x7f800000u) : (vi)x);
    return (vf)(found | (bits & 0x8000u) << 16);
}

static inline void store(Fp16* p, vf x) {  // to nearest, ties to even
    vu bits = (vu)x, twice = bits + bits, exponent = twice & 0xff000000u;
    exponent = (vu)(exponent < 0x71000000u ? (vi)(vu{} + 0x71000000u) : (vi)exponent);
    vf size = (vf)(bits & 0x7fffffffu) * 0x1p112f * 0x1p-110f;  // inf beyond the largest
    vu sum = (vu)((vf)((exponent >> 1) + 0x07800000u) + size);  // the addition rounds
    vu found = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
    found = (vu)(twice > 0xff000000u ? (vi)(vu{} + 0x7e00u) : (vi)found);
    store_bits(&p->bits, found | (bits >> 16 & 0x8000u));
}
#endif

// ``count`` < W elements, zeros behind them; and the first of a vector.
template <class E>
static inline vf load_part(const E* p, int64_t count) {
    E part[W] = {};
    for (int64_t d = 0; d < count; ++d) part[d] = p[d];
    return load(part);
}

template <class E>
static inline void store_part(E* p, vf x, int64_t count) {
    E part[W];
    store(part, x);
    for (int64_t d = 0; d < count; ++d) p[d] = part[d];
}

// Whose lanes add up to a product of rows.
template <class X, class Y>
static inline vf dot_lanes(const X* x, const Y* y, int64_t depth) {
    vf sum = {};
    int64_t d = 0;
    for (; d + W <= depth; d += W) sum += load(x + d) * load(y + d);
    if (d < depth) sum += load_part(x + d, depth - d) * load_part(y + d, depth - d);
    return sum;
}

template <class X, class Y>
static inline float dot(const X* x, const Y* y, int64_t depth) {
    return lanes_sum(dot_lanes(x, y, depth));
}

// y += a x
template <class X, class Y>
static inline void add_scaled(float a, const X* x, Y* y, int64_t depth) {
    int64_t d = 0;
    for (; d + W <= depth; d += W) store(y + d, load(y + d) + load(x + d) * a);
    if (d < depth) store_part(y + d, load_part(y + d, depth - d) + load_part(x + d, depth - d) * a, depth - d);
}

// y += the sum of a[n] x[n], in this order, for N rows
template <int N, class X>
static inline void add_several(const float* a, const X* const* x, float* y, int64_t depth) {
    int64_t d = 0;
    for (; d + W <= depth; d += W) {
        vf sum = load(y + d);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum += load(x[n] + d) * a[n];
        store(y + d, sum);
    }
    for (int n = 0; n < N && d < depth; ++n) add_scaled(a[n], x[n] + d, y + d, depth - d);
}

template <class X, class Y>
static inline void convert(const X* x, Y* y, int64_t depth) {
    int64_t d = 0;
    for (; d + W <= depth; d += W) store(y + d, load(x + d));
    if (d < depth) store_part(y + d, load_part(x + d, depth - d), depth - d);
}

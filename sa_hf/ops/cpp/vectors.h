// Vectors, the product of small matrices, elementary functions.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// Lanes of a vector; rows and vectors of the tile that a product keeps in registers: 24 sums where there are 32
// registers, 12 where there are 16.
#if defined(__AVX512F__)
constexpr int W = 16, MR = 6, NV = 4;
#elif defined(__AVX__)
constexpr int W = 8, MR = 6, NV = 2;
#elif defined(__x86_64__) || defined(__i386__)
constexpr int W = 4, MR = 3, NV = 4;
#else
constexpr int W = 4, MR = 6, NV = 4;
#endif
// Queries and keys of the largest tile of scores: 16 KB, half of a small first-level cache.
constexpr int TILE = 64, VECTORS = TILE / W;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
constexpr float INF = __builtin_inff();

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline vi load_int(const int32_t* p) { return *(const vi_any*)p; }
static inline vf splat(float x) { return x - vf{}; }  // -0 + 0 is not -0: a sum would stay an addition
static inline vi splat_int(int32_t x) { return vi{} + x; }
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline vf smaller(vf a, vf b) { return a < b ? a : b; }
static inline vf select(vi keep, vf x, vf otherwise) { return (vf)(((vi)x & keep) | ((vi)otherwise & ~keep)); }

static inline bool any(vi x) {
    int32_t found = 0;
    for (int lane = 0; lane < W; ++lane) found |= x[lane];
    return found != 0;
}

static inline vi lane_numbers() {
    vi x;
    for (int lane = 0; lane < W; ++lane) x[lane] = lane;
    return x;
}

// 2^x to a relative 8e-8 (minimax polynomial, 2e-9 before rounding); 0 below -126, inf from 128, NaN stays.
static inline vf exp2(vf x) {
    // 1.5 * 2^23: adding it leaves the nearest integer in the low bits; 127 makes that the exponent of a float.
    const float round = 12582912.0f + 127.0f;
    x = 128.0f < x ? splat(128.0f) : x;
    vf shifted = x + round, f = x - (shifted - round);
    vf p = splat(1.5353361959569156e-4f);
    p = p * f + 1.3398873852565885e-3f;
    p = p * f + 9.61843691766262e-3f;
    p = p * f + 5.5503323674201965e-2f;
    p = p * f + 2.4022647738456726e-1f;
    p = p * f + 6.931471824645996e-1f;
    p = p * f + 1.0f;
    vf result = p * (vf)((vu)shifted << 23);
    return (vf)((vi)result & ~(vi)(x < -126.0f));
}

// log2 of a normal positive number, to 1e-7 of it or of 1; -inf of 0, inf of inf, NaN stays.
static inline vf log2(vf x) {
    const vi exponent = ((vi)x - 0x3f3504f3) >> 23;  // that leaves sqrt(1/2) <= m < sqrt(2)
    const vf m = (vf)((vi)x - exponent * (1 << 23));
    const vf f = (m - 1.0f) / (m + 1.0f), s = f * f;
    vf p = splat(1.0f / 9);  // artanh
    p = p * s + 1.0f / 7;
    p = p * s + 1.0f / 5;
    p = p * s + 1.0f / 3;
    p = p * s + 1.0f;
    vf result = __builtin_convertvector(exponent, vf) + p * f * (2 * LOG2E);
    result = select(x == 0.0f, splat(-INF), result);
    return select((x < INF) & (x >= 0.0f), result, x);
}

static inline vf tanh(vf x) {
    vf square = x * x, p = splat(62.0f / 2835);
    p = p * square - 17.0f / 315;
    p = p * square + 2.0f / 15;
    p = p * square - 1.0f / 3;
    vf near = x + x * square * p;  // the quotient loses digits near 0
    vf size = larger(x, -x), far = 1.0f - 2.0f / (exp2(smaller(size, splat(16.0f)) * (2 * LOG2E)) + 1.0f);
    vf result = select(size < 0.25f, near, select(x < 0.0f, -far, far));
    return select(x == x, result, x);
}

static inline float lanes_sum(vf x) {
#if defined(__clang__)
    float sum = 0;
    for (int lane = 0; lane < W; ++lane) sum += x[lane];
    return sum;
#else
#pragma GCC unroll 4
    for (int step = W / 2; step > 0; step /= 2) x += __builtin_shuffle(x, lane_numbers() ^ step);
    return x[0];
#endif
}

// The sum of the lanes of x[n] as lane n, by additions in the order of lanes_sum; x is used up.
static inline vf lanes_sums(vf* x) {
#if defined(__clang__)
    vf sums;
    for (int n = 0; n < W; ++n) sums[n] = lanes_sum(x[n]);
    return sums;
#else
#pragma GCC unroll 4
    for (int step = W / 2; step > 0; step /= 2) {
        const vi lane = lane_numbers(), upper = (lane & step) != 0;
        const vi own = upper ? lane + W : lane, other = upper ? (lane ^ step) + W : lane ^ step;
#pragma GCC unroll 8
        for (int n = 0; n < step; ++n)
            x[n] = __builtin_shuffle(x[n], x[n + step], own) + __builtin_shuffle(x[n], x[n + step], other);
    }
    return x[0];
#endif
}

// One tile of C = [C +] A B in registers: R rows of A, element by element, times V vectors of each row of B.
template <int R, int V, bool ADD>
static inline void product_tile(const float* A, int64_t a_row, int64_t a_column, const float* B, int64_t b_row,
                                int64_t depth, float* C, int64_t c_row) {
    vf sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < V; ++c) sum[r][c] = ADD ? load(C + r * c_row + c * W) : vf{};
    for (int64_t x = 0; x < depth; ++x) {
        vf b[V];
#pragma GCC unroll 8
        for (int c = 0; c < V; ++c) b[c] = load(B + x * b_row + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            vf a = splat(A[r * a_row + x * a_column]);
#pragma GCC unroll 8
            for (int c = 0; c < V; ++c) sum[r][c] += a * b[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < V; ++c) store(C + r * c_row + c * W, sum[r][c]);
}

template <int V, bool ADD>
static void product_columns(const float* A, int64_t a_row, int64_t a_column, const float* B, int64_t b_row,
                            int64_t rows, int64_t depth, float* C, int64_t c_row) {
    int64_t r = 0;
    for (; r + MR <= rows; r += MR)
        product_tile<MR, V, ADD>(A + r * a_row, a_row, a_column, B, b_row, depth, C + r * c_row, c_row);
    if (MR > 4 && r + 4 <= rows) {
        product_tile<4, V, ADD>(A + r * a_row, a_row, a_column, B, b_row, depth, C + r * c_row, c_row);
        r += 4;
    }
    if (r + 2 <= rows) {
        product_tile<2, V, ADD>(A + r * a_row, a_row, a_column, B, b_row, depth, C + r * c_row, c_row);
        r += 2;
    }
    if (r < rows) product_tile<1, V, ADD>(A + r * a_row, a_row, a_column, B, b_row, depth, C + r * c_row, c_row);
}

// C [rows, vectors * W] = [C +] A [rows, depth] B [depth, vectors * W].
template <bool ADD>
static void product(const float* A, int64_t a_row, int64_t a_column, const float* B, int64_t b_row, int64_t rows,
                    int64_t depth, int64_t vectors, float* C, int64_t c_row) {
    for (; vectors >= NV; vectors -= NV, B += NV * W, C += NV * W)
        product_columns<NV, ADD>(A, a_row, a_column, B, b_row, rows, depth, C, c_row);
    if (NV > 3 && vectors == 3) product_columns<3, ADD>(A, a_row, a_column, B, b_row, rows, depth, C, c_row);
    if (NV > 2 && vectors == 2) product_columns<2, ADD>(A, a_row, a_column, B, b_row, rows, depth, C, c_row);
    if (vectors == 1) product_columns<1, ADD>(A, a_row, a_column, B, b_row, rows, depth, C, c_row);
}

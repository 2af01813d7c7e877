// Tiles of bfloat16 by the machine's own units: its matrix unit (AMX), or dot products of pairs (AVX512-BF16).
//
// Both multiply pairs of neighbours: A [rows, 2 * pairs] in rows, B [pairs, columns] of two elements each, and add in
// floats. Every operand here has whole pairs, 16 rows and 32 elements of depth: zeros fill them up.
#pragma once

#include "operands.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define SA_HF_PAIRS
#include <immintrin.h>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define SA_HF_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

constexpr int64_t DOTS = 1, AMX = 2;

// The units that there are, a sum of the above. Linux lends the matrix unit's registers on request.
extern "C" int64_t sa_hf_units() {
    int64_t found = 0;
#if defined(SA_HF_PAIRS)
    found |= DOTS;
#endif
#if defined(SA_HF_AMX)
    const int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) found |= AMX;
#endif
    return found;
}

// A thread's use of the matrix unit: registers of 16 rows of 64 bytes.
struct Unit {
    bool amx;

    explicit Unit(const Call& c) : amx(c.units == AMX) {
#if defined(SA_HF_AMX)
        if (!amx) return;
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        asm volatile("ldtilecfg %0" ::"m"(shape));  // GCC 12's own name for it drops the shape
#endif
    }
    ~Unit() {
#if defined(SA_HF_AMX)
        if (amx) _tile_release();
#endif
    }
    Unit(const Unit&) = delete;
};

#if defined(SA_HF_PAIRS)

#if defined(SA_HF_AMX)
// 16 R rows and 16 V columns of C: registers 0 to 3 for C, 4 and 5 for A, 6 and 7 for B.
template <int R, int V, bool ADD>
static inline void amx_block(const Bf16* A, int64_t a_row, const uint32_t* B, int64_t b_row, int64_t pairs, float* C,
                             int64_t c_row) {
    float* C2 = C + 16 * c_row;
    if (!ADD) {
        _tile_zero(0);
        if (V > 1) _tile_zero(1);
        if (R > 1) _tile_zero(2);
        if (R > 1 && V > 1) _tile_zero(3);
    }
    for (int64_t x = 0; x < pairs; x += 16) {
        const bool first = ADD && x == 0;  // a register of C is loaded just before it is used
        _tile_loadd(6, B + x * b_row, 4 * b_row);
        _tile_loadd(4, A + 2 * x, 2 * a_row);
        if (first) _tile_loadd(0, C, 4 * c_row);
        _tile_dpbf16ps(0, 4, 6);
        if (V > 1) {
            _tile_loadd(7, B + x * b_row + 16, 4 * b_row);
            if (first) _tile_loadd(1, C + 16, 4 * c_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, A + 16 * a_row + 2 * x, 2 * a_row);
            if (first) _tile_loadd(2, C2, 4 * c_row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (R > 1 && V > 1) {
            if (first) _tile_loadd(3, C2 + 16, 4 * c_row);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, C, 4 * c_row);
    if (V > 1) _tile_stored(1, C + 16, 4 * c_row);
    if (R > 1) _tile_stored(2, C2, 4 * c_row);
    if (R > 1 && V > 1) _tile_stored(3, C2 + 16, 4 * c_row);
}

template <bool ADD>
static void amx_product(const Bf16* A, int64_t a_row, const uint32_t* B, int64_t b_row, int64_t rows, int64_t pairs,
                        int64_t vectors, float* C, int64_t c_row) {
    for (; vectors > 0; vectors -= 2, B += 32, C += 32)
        for (int64_t r = 0; r < rows; r += 32) {
            const Bf16* a = A + r * a_row;
            float* to = C + r * c_row;
            if (r + 16 < rows)
                (vectors > 1 ? amx_block<2, 2, ADD> : amx_block<2, 1, ADD>)(a, a_row, B, b_row, pairs, to, c_row);
            else
                (vectors > 1 ? amx_block<1, 2, ADD> : amx_block<1, 1, ADD>)(a, a_row, B, b_row, pairs, to, c_row);
        }
}
#endif

template <int V, bool ADD>
static void dot_columns(const Bf16* A, int64_t a_row, const uint32_t* B, int64_t b_row, int64_t rows, int64_t pairs,
                        float* C, int64_t c_row) {
    typedef int32_t pair __attribute__((may_alias, aligned(2)));
    constexpr int R = 4;
    for (; rows > 0; rows -= R, A += R * a_row, C += R * c_row) {
        __m512 sum[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] = ADD ? (__m512)load(C + r * c_row + v * W) : _mm512_setzero_ps();
        for (int64_t x = 0; x < pairs; ++x) {
            __m512bh b[V];
            for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(B + x * b_row + v * W);
            for (int r = 0; r < R; ++r) {
                __m512bh a = (__m512bh)_mm512_set1_epi32(*(const pair*)(A + r * a_row + 2 * x));
                for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(C + r * c_row + v * W, (vf)sum[r][v]);
    }
}

// C [rows, vectors * W] = [C +] A [rows, 2 * pairs] B [pairs, vectors * W].
template <bool ADD>
static void pairs_product(bool amx, const Bf16* A, int64_t a_row, const uint32_t* B, int64_t b_row, int64_t rows,
                          int64_t pairs, int64_t vectors, float* C, int64_t c_row) {
#if defined(SA_HF_AMX)
    if (amx) return amx_product<ADD>(A, a_row, B, b_row, rows, pairs, vectors, C, c_row);
#endif
    (void)amx;
    for (; vectors >= 4; vectors -= 4, B += 4 * W, C += 4 * W)
        dot_columns<4, ADD>(A, a_row, B, b_row, rows, pairs, C, c_row);
    for (; vectors >= 2; vectors -= 2, B += 2 * W, C += 2 * W)
        dot_columns<2, ADD>(A, a_row, B, b_row, rows, pairs, C, c_row);
    if (vectors == 1) dot_columns<1, ADD>(A, a_row, B, b_row, rows, pairs, C, c_row);
}

// Floats as bfloat16: those of ``low`` and then those of ``high``; and each of ``low`` before its own of ``high``.
static inline __m512i narrowed(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

static inline __m512i paired(__m512i both) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

static inline int64_t whole(int64_t x, int64_t of) { return ceil_div(x, of) * of; }

// A tile's operands in bfloat16, in pairs. ``depth``: head_dim filled up to 32.
struct Paired {
    typedef Bf16 Element;
    static constexpr int GRAIN = 2;

    float *sums, *scores, *upstream, *bend, *key_sums;
    uint32_t *queries, *grads;            // [depth / 2, width], pairs of depth
    uint32_t *query_rows, *grad_rows;     // [TILE / 2, padded_dim], pairs of queries
    uint32_t* weights;                    // [TILE / 2, width], pairs of keys
    Bf16 *score_rows, *upstream_rows;     // [TILE, TILE]
    Bf16 *keys, *values, *turned, *rows;  // [TILE, depth]; turned [depth, TILE]
    const Bf16 *K, *V;
    int64_t D, P, depth, k_step, v_step;
    float shape_by = 1, weigh_by = 1;
    bool amx;

    static int64_t elements(const Call& c) {  // in floats
        return TILE * (5 * whole(c.head_dim, 32) + 3 * c.padded_dim + 5 * TILE);
    }

    Paired(const Call& c, float* at) : D(c.head_dim), P(c.padded_dim), depth(whole(D, 32)), amx(c.units == AMX) {
        for (float** x : {&scores, &upstream, &bend}) *x = at, at += TILE * TILE;
        sums = at, at += TILE * depth;
        key_sums = at, at += TILE * P;
        for (uint32_t** x : {&queries, &grads}) *x = (uint32_t*)at, at += TILE * depth / 2;
        for (uint32_t** x : {&query_rows, &grad_rows}) *x = (uint32_t*)at, at += TILE * P / 2;
        weights = (uint32_t*)at, at += TILE * TILE / 2;
        for (Bf16** x : {&score_rows, &upstream_rows}) *x = (Bf16*)at, at += TILE * TILE / 2;
        for (Bf16** x : {&keys, &values, &turned, &rows}) *x = (Bf16*)at, at += TILE * depth / 2;
        const float factor = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
        (plain(c) && c.scale > 0 ? weigh_by : shape_by) = factor;
    }

    // The tile's rows, together; zeros beyond.
    void gather_queries(const Tile& t, const Rows& of) {
        const Bf16* first = of.of<Bf16>(t.batch, t.head);
        for (int i = 0; i < TILE; ++i)
            copy_row(i < t.rows && t.row[i] >= 0 ? first + t.row[i] * of.step : nullptr, rows + i * depth);
    }

    void copy_row(const Bf16* from, Bf16* to) const {
        for (int64_t d = 0; d < depth; d += 2 * W) {
            const __mmask32 there = from == nullptr ? 0 : D - d >= 2 * W ? ~0u : (1u << (D - d)) - 1;
            _mm512_storeu_si512(to + d, _mm512_maskz_loadu_epi16(there, from == nullptr ? to : from + d));
        }
    }

    // ``rows`` as columns: pairs of depth.
    void columns(const Tile& t, uint32_t* to) const {
        for (int first = 0; first < t.width; first += W)
            for (int64_t d = 0; d < depth; d += 2 * W) {
                vf block[W];
                for (int r = 0; r < W; ++r) block[r] = load((const float*)(rows + (first + r) * depth + d));
                transpose_block(block);
                for (int r = 0; r < W; ++r) store((float*)to + (d / 2 + r) * t.width + first, block[r]);
            }
    }

    // ``rows`` as they are: pairs of queries.
    void pair_rows(uint32_t* to) const {
        for (int i = 0; i < TILE; i += 2)
            for (int64_t d = 0; d < P; d += W) {
                const Bf16* at = rows + i * depth + d;
                *(vi_any*)(to + i / 2 * P + d) = (vi)(load_bits(&at->bits) | load_bits(&at[depth].bits) << 16);
            }
    }

    void load_queries(const Call& c, const Tile& t) {
        gather_queries(t, c.query);
        columns(t, queries);
    }

    void load_gradients(const Call& c, const Tile& t) {  // behind load_queries
        pair_rows(query_rows);
        gather_queries(t, c.grad_out);
        columns(t, grads);
        pair_rows(grad_rows);
        std::fill(sums, sums + D * t.width, 0.0f);
    }

    const Bf16* rows_of(const Call& c, const Tile& t, const Chunk& x, const Rows& of, Bf16* to, int64_t* step) const {
        const Bf16* first = of.of<Bf16>(t.batch, t.key_head(c));
        *step = of.step;
        const bool listed = t.key_at != nullptr && c.in_place;
        if (!listed && D == depth && x.count % 32 == 0) return first + t.key_row(c, x.key) * of.step;
        *step = depth;
        for (int j = 0; j < whole(x.count, 32); ++j) {
            const bool there = j < x.count && t.key_filled(x.key + j);
            copy_row(there ? first + t.key_row(c, x.key + j) * of.step : nullptr, to + j * depth);
        }
        return to;
    }

    void load_keys(const Call& c, const Tile& t, const Chunk& x) {
        K = rows_of(c, t, x, c.key, keys, &k_step);
        V = rows_of(c, t, x, c.value, values, &v_step);
    }

    // Between what writes the weights and the product that reads them: its loads wait for stores of the moment before.
    void turn_values(const Chunk& x) const { turn(V, v_step, x.count); }
    void turn_keys(const Chunk& x) const { turn(K, k_step, x.count); }

    // Rows [count, depth] to ``turned``: pairs of keys from columns to rows.
    void turn(const Bf16* from, int64_t step, int count) const {
        for (int j = 0; j < count; j += 32)
            for (int64_t d = 0; d < depth; d += 32) {
                // Of each four of eight neighbours in depth the first or the last: _mm512_unpack(lo|hi)_epi16.
                vf low[W], high[W];
                for (int r = 0; r < W; ++r) {
                    const __m512i a = _mm512_loadu_si512(from + (j + 2 * r) * step + d);
                    const __m512i b = _mm512_loadu_si512(from + (j + 2 * r + 1) * step + d);
                    low[r] = (vf)_mm512_unpacklo_epi16(a, b), high[r] = (vf)_mm512_unpackhi_epi16(a, b);
                }
                transpose_block(low);
                transpose_block(high);
                for (int r = 0; r < W; ++r) {
                    Bf16* to = turned + (d + r / 4 * 8 + r % 4) * TILE + j;
                    store((float*)to, low[r]);
                    store((float*)(to + 4 * TILE), high[r]);
                }
            }
    }

    // 2^x to a relative 3e-6, a thousandth of what rounding to bfloat16 leaves: minimax over a fraction in [0, 1).
    static vf power(vf x) {
        const vf f = (vf)_mm512_maskz_reduce_ps((__mmask16)-1, (__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        vf p = splat(1.3534167781472206e-2f);
        p = p * f + 5.2011460065841675e-2f;
        p = p * f + 2.414427548646927e-1f;
        p = p * f + 6.930038332939148e-1f;
        p = p * f + 1.0000026226043701f;
        return (vf)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)x);
    }

    void put_weights(const Tile& t, int j, int v, const vf* pair) const {
        _mm512_storeu_si512(weights + j / 2 * t.width + v * W, paired(narrowed(pair[0], pair[1])));
    }

    void put_gradients(const Tile& t, int j, int v, const vf* seen, const vf* grad) const {
        const __m512i of_seen = narrowed(seen[0], seen[1]), of_grad = narrowed(grad[0], grad[1]);
        put_rows(score_rows, j, v, of_seen);
        put_rows(upstream_rows, j, v, of_grad);
        _mm512_storeu_si512(weights + j / 2 * t.width + v * W, paired(of_grad));
    }

    static void put_rows(Bf16* to, int j, int v, __m512i both) {
        _mm256_storeu_si256((__m256i*)(to + j * TILE + v * W), _mm512_maskz_extracti64x4_epi64(0xf, both, 0));
        _mm256_storeu_si256((__m256i*)(to + (j + 1) * TILE + v * W), _mm512_maskz_extracti64x4_epi64(0xf, both, 1));
    }

    void score(const Tile& t, const Span& p) const { by_depth(t, p, K, k_step, queries, scores); }
    void lift(const Tile& t, const Span& p) const { by_depth(t, p, V, v_step, grads, upstream); }

    void by_depth(const Tile& t, const Span& p, const Bf16* of, int64_t step, const uint32_t* columns,
                  float* to) const {
        pairs_product<false>(amx, of + p.j0 * step, step, columns + p.c0 * W, t.width, whole(p.j1 - p.j0, 16),
                             depth / 2, p.c1 - p.c0, to + p.j0 * t.width + p.c0 * W, t.width);
    }

    void add_queries(const Tile& t, const Span& p) const { add_values<true>(t, p); }

    template <bool ADD>
    void add_values(const Tile& t, const Span& p) const {
        const int end = (int)whole(p.j1, 32);
        for (int j = (int)whole(p.j1, 2); j < end; j += 2)
            for (int v = p.c0; v < p.c1; ++v) store((float*)weights + j / 2 * t.width + v * W, vf{});
        pairs_product<ADD>(amx, turned + p.j0, TILE, weights + p.j0 / 2 * t.width + p.c0 * W, t.width, whole(D, 16),
                           (end - p.j0) / 2, p.c1 - p.c0, sums + p.c0 * W, t.width);
    }

    void add_keys(const Call& c, const Tile& t, const Chunk& x, const Span& p, const Sums& s) const {
        by_queries(c, t, x, p, score_rows, grad_rows, s.value);
        by_queries(c, t, x, p, upstream_rows, query_rows, s.key);
    }

    void by_queries(const Call& c, const Tile& t, const Chunk& x, const Span& p, Bf16* narrow, const uint32_t* of,
                    float* grad) const {
        const int64_t count = p.j1 - p.j0, rows = whole(count, 16), pairs = (p.c1 - p.c0) * W / 2;
        std::fill(narrow + whole(p.j1, 2) * TILE, narrow + (p.j0 + rows) * TILE, Bf16{0});
        const Bf16* A = narrow + p.j0 * TILE + p.c0 * W;
        const uint32_t* B = of + p.c0 * W / 2 * P;
        if (rows == count && (t.key_at == nullptr || !c.in_place)) {
            float* to = grad + t.key_row(c, x.key + p.j0) * P;
            pairs_product<true>(amx, A, TILE, B, P, rows, pairs, P / W, to, P);
        } else {
            pairs_product<false>(amx, A, TILE, B, P, rows, pairs, P / W, key_sums, P);
            add_listed(c, t, x, p, key_sums, grad);
        }
    }
};

#endif

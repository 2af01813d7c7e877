// What the passes multiply, from rows where they lie; and the products' sums as rows.
//
// Shapes as in tiles.h: queries, gradients and sums as columns [head_dim, width], keys and values as rows.
#pragma once

#include "tiles.h"

// A W x W block of rows to columns, by exchanging ever smaller quarters.
static inline void transpose_block(vf* x) {
#if defined(__clang__)
    for (int r = 0; r < W; ++r)
        for (int lane = 0; lane < r; ++lane) std::swap(((float*)&x[r])[lane], ((float*)&x[lane])[r]);
#else
#pragma GCC unroll 4
    for (int step = W / 2; step > 0; step /= 2) {
        vi lane = lane_numbers(), upper = (lane & step) != 0;
        vi low = upper ? lane + (W - step) : lane, high = upper ? lane + W : lane + step;
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
            if ((r & step) == 0) {
                vf a = x[r], b = x[r + step];
                x[r] = __builtin_shuffle(a, b, low);
                x[r + step] = __builtin_shuffle(a, b, high);
            }
    }
#endif
}

// Rows of ``x``, times ``factor``, as columns [depth, width]; zeros for rows of -1 and beyond the tile's.
template <class E>
static void to_columns(const Tile& t, const E* x, int64_t step, int64_t depth, float factor, float* to) {
    for (int first = 0; first < t.width; first += W) {
        const E* row[W];
        for (int r = 0; r < W; ++r)
            row[r] = first + r < t.rows && t.row[first + r] >= 0 ? x + t.row[first + r] * step : nullptr;
        for (int64_t d = 0; d < depth; d += W) {
            const int count = (int)std::min<int64_t>(W, depth - d);
            vf block[W];
            for (int r = 0; r < W; ++r) {
                if (row[r] == nullptr)
                    block[r] = vf{};
                else
                    block[r] = (count == W ? load(row[r] + d) : load_part(row[r] + d, count)) * factor;
            }
            transpose_block(block);
            for (int r = 0; r < count; ++r) store(to + (d + r) * t.width + first, block[r]);
        }
    }
}

// Columns [depth, width], each times its factor, to the rows of ``to``: added to what is there times ``before``, which
// is not read where that is 0. Nothing is written where both are 0.
template <class E>
static void to_rows(const Tile& t, const float* x, int64_t depth, const float* factor, const float* before, E* to,
                    int64_t step) {
    for (int first = 0; first < t.rows; first += W)
        for (int64_t d = 0; d < depth; d += W) {
            const int count = (int)std::min<int64_t>(W, depth - d);
            vf block[W] = {};
            for (int r = 0; r < count; ++r) block[r] = load(x + (d + r) * t.width + first);
            transpose_block(block);
            for (int r = 0; r < W && first + r < t.rows; ++r) {
                const int i = first + r;
                E* at = to + t.row[i] * step + d;
                if (t.row[i] < 0 || (factor[i] == 0 && before[i] == 0)) continue;
                vf row = block[r] * factor[i];
                if (before[i] != 0) row += (count == W ? load(at) : load_part(at, count)) * before[i];
                count == W ? store(at, row) : store_part(at, row, count);
            }
        }
}

// Where a piece of a lane's gradients adds up.
struct Sums {
    float *query, *key, *value, *bias = nullptr, *spans = nullptr, *query_term = nullptr, *key_term = nullptr;

    // ``own``: the thread's number among ``query_sums``, and among the others where grad_keys is there.
    Sums(const Call& c, int64_t lane, int64_t piece, int64_t own) {
        const int64_t key_lane = lane / (c.heads / c.kv_heads), lanes = c.batch * c.heads;
        const int64_t keys = (c.grad_keys.data ? own : piece * c.batch * c.kv_heads + key_lane) * c.key_rows;
        query = c.query_sums == nullptr ? nullptr : c.query_sums + own * c.query_rows * c.head_dim;
        key = c.key_sums + keys * c.padded_dim;
        value = c.value_sums + keys * c.padded_dim;
        if (c.grad_bias != nullptr) bias = c.grad_bias + (piece * lanes + lane) * c.bias_columns;
        if (c.grad_spans != nullptr) spans = c.grad_spans + (piece * lanes + lane) * c.key_rows;
        // A query is in one piece alone.
        if (c.grad_query_term != nullptr) query_term = c.grad_query_term + lane * c.term_queries * c.query_width;
        if (c.grad_key_term != nullptr) key_term = c.grad_key_term + (piece * lanes + lane) * c.term_keys * c.key_width;
    }
};

// A tile's gradients of the queries, as columns, to where they belong.
template <class E>
static void write_query_gradients(const Call& c, const Tile& t, const Sums& s, const float* x) {
    float one[TILE], none[TILE] = {};
    std::fill(one, one + TILE, 1.0f);
    if (s.query != nullptr)
        to_rows(t, x, c.head_dim, one, one, s.query, c.head_dim);
    else if (c.narrow)
        to_rows(t, x, c.head_dim, one, none, c.grad_query.of<E>(t.batch, t.head), c.grad_query.step);
    else
        to_rows(t, x, c.head_dim, one, one, c.grad_query.of<float>(t.batch, t.head), c.grad_query.step);
}

// Add the product of a span, rows [keys, padded_dim], to the gradients of the keys listed.
static void add_listed(const Call& c, const Tile& t, const Chunk& x, const Span& p, const float* rows, float* grad) {
    const int64_t P = c.padded_dim;
    for (int j = 0; j < p.j1 - p.j0; ++j) {
        const int64_t slot = x.key + p.j0 + j;
        if (!t.key_filled(slot)) continue;
        float* to = grad + t.key_row(c, slot) * P;
        for (int64_t d = 0; d < P; d += W) store(to + d, load(to + d) + load(rows + j * P + d));
    }
}

// A tile's operands in floats, whatever its rows' elements are; keys and values [keys, head_dim].
template <class E>
struct Widened {
    typedef E Element;
    static constexpr int GRAIN = 1;

    float *queries, *sums, *scores, *keys, *values;                      // sums [head_dim, width]
    float *grads, *upstream, *bend, *query_rows, *grad_rows, *key_sums;  // backward
    const float *K, *V;
    int64_t D, P, k_step, v_step;
    float shape_by = 1, weigh_by = 1;  // factors of the products in shape(), and of the shaped scores

    static int64_t elements(const Call& c) { return TILE * (5 * c.head_dim + 3 * c.padded_dim + 3 * TILE); }

    Widened(const Call& c, float* at) : D(c.head_dim), P(c.padded_dim) {
        for (float** x : {&queries, &sums, &keys, &values, &grads}) *x = at, at += TILE * D;
        for (float** x : {&query_rows, &grad_rows, &key_sums}) *x = at, at += TILE * P;
        for (float** x : {&scores, &upstream, &bend}) *x = at, at += TILE * TILE;
    }

    void load_queries(const Call& c, const Tile& t) {
        const float factor = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
        to_columns(t, c.query.of<E>(t.batch, t.head), c.query.step, D, factor, queries);
    }

    void load_gradients(const Call& c, const Tile& t) {
        const E *query = c.query.of<E>(t.batch, t.head), *grad = c.grad_out.of<E>(t.batch, t.head);
        to_columns(t, grad, c.grad_out.step, D, 1, grads);
        std::fill(query_rows, query_rows + 2 * TILE * P, 0.0f);  // grad_rows too
        for (int i = 0; i < t.rows; ++i) {
            if (t.row[i] < 0) continue;
            convert(query + t.row[i] * c.query.step, query_rows + i * P, D);
            convert(grad + t.row[i] * c.grad_out.step, grad_rows + i * P, D);
        }
        std::fill(sums, sums + D * t.width, 0.0f);
    }

    // The rows of a chunk's keys: where they lie, or brought together in ``to``.
    const float* rows_of(const Call& c, const Tile& t, const Chunk& x, const Rows& rows, float* to, int64_t* step) {
        const E* first = rows.of<E>(t.batch, t.key_head(c));
        if constexpr (std::is_same<E, float>::value) {
            *step = rows.step;
            if (t.key_at == nullptr || !c.in_place) return first + t.key_row(c, x.key) * rows.step;
        }
        *step = D;
        for (int j = 0; j < x.count; ++j) {
            if (t.key_filled(x.key + j))
                convert(first + t.key_row(c, x.key + j) * rows.step, to + j * D, D);
            else
                std::fill(to + j * D, to + (j + 1) * D, 0.0f);
        }
        return to;
    }

    void load_keys(const Call& c, const Tile& t, const Chunk& x) {
        K = rows_of(c, t, x, c.key, keys, &k_step);
        V = rows_of(c, t, x, c.value, values, &v_step);
    }

    void turn_values(const Chunk&) {}
    void turn_keys(const Chunk&) {}

    static vf power(vf x) { return exp2(x); }

    // Of the keys j and j + 1 with the queries of vector v: what multiplies the values; in the backward the
    // probabilities and the scores' gradients.
    void put_weights(const Tile& t, int j, int v, const vf* pair) const { put(t, j, v, pair, scores); }
    void put_gradients(const Tile& t, int j, int v, const vf* seen, const vf* grad) const {
        put(t, j, v, seen, scores);
        put(t, j, v, grad, upstream);
    }

    void put(const Tile& t, int j, int v, const vf* pair, float* to) const {
        for (int n = 0; n < 2; ++n) store(to + (j + n) * t.width + v * W, pair[n]);
    }

    void score(const Tile& t, const Span& p) { by_depth(t, p, K, k_step, queries, scores); }
    void lift(const Tile& t, const Span& p) { by_depth(t, p, V, v_step, grads, upstream); }

    void by_depth(const Tile& t, const Span& p, const float* rows, int64_t step, const float* columns, float* to) {
        product<false>(rows + p.j0 * step, step, 1, columns + p.c0 * W, t.width, p.j1 - p.j0, D, p.c1 - p.c0,
                       to + p.j0 * t.width + p.c0 * W, t.width);
    }

    template <bool ADD>
    void add_values(const Tile& t, const Span& p) {
        by_keys<ADD>(t, p, V, v_step, scores);
    }

    void add_queries(const Tile& t, const Span& p) { by_keys<true>(t, p, K, k_step, upstream); }

    template <bool ADD>
    void by_keys(const Tile& t, const Span& p, const float* rows, int64_t step, const float* weights) {
        product<ADD>(rows + p.j0 * step, 1, step, weights + p.j0 * t.width + p.c0 * W, t.width, D, p.j1 - p.j0,
                     p.c1 - p.c0, sums + p.c0 * W, t.width);
    }

    void add_keys(const Call& c, const Tile& t, const Chunk& x, const Span& p, const Sums& s) {
        by_queries(c, t, x, p, scores, grad_rows, s.value);
        by_queries(c, t, x, p, upstream, query_rows, s.key);
    }

    void by_queries(const Call& c, const Tile& t, const Chunk& x, const Span& p, const float* scores, const float* rows,
                    float* grad) {
        const int64_t count = p.j1 - p.j0;
        const int queries = std::min(t.rows, p.c1 * W) - p.c0 * W;
        const float *weights = scores + p.j0 * t.width + p.c0 * W, *of = rows + p.c0 * W * P;
        if (t.key_at == nullptr || !c.in_place) {
            float* to = grad + t.key_row(c, x.key + p.j0) * P;
            product<true>(weights, t.width, 1, of, P, count, queries, P / W, to, P);
        } else {
            product<false>(weights, t.width, 1, of, P, count, queries, P / W, key_sums, P);
            add_listed(c, t, x, p, key_sums, grad);
        }
    }
};

static float* buffer(int64_t elements) { return (float*)aligned_alloc(64, (size_t)ceil_div(elements * 4, 64) * 64); }

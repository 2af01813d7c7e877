// The forward and the backward pass over the tiles of block lists and segments.
#pragma once

#include "tiles.h"

// -- forward: online softmax, the scores key by key in rows, so that every reduction runs along vectors ------------

struct Softmax {
    vf peak[VECTORS], total[VECTORS];
    bool empty = true;  // nothing has been added to the sums
};

// A peak that grew by less than 8 (256 times) stays: its sums need no new factor.
constexpr float SLACK = 8;

static void raise_peak(const Call& c, const Tile& t, const Chunk& x, const float* scores, Softmax& s, float* sums) {
    vf peak[VECTORS];
    for (int v = 0; v < t.vectors; ++v) peak[v] = splat(-INF);
    for (int n = 0; n < x.spans; ++n)
        for (int j = x.span[n].j0; j < x.span[n].j1; ++j)
            for (int v = x.span[n].c0; v < x.span[n].c1; ++v)
                peak[v] = larger(peak[v], load(scores + j * t.width + v * W));
    vi grown[VECTORS], some = {};
    for (int v = 0; v < t.vectors; ++v) some |= grown[v] = peak[v] > s.peak[v] + SLACK;
    if (!any(some)) return;
    vf factor[VECTORS];
    // Each query by its own scores alone: no bit of its result depends on another query of the tile.
    for (int v = 0; v < t.vectors; ++v) {
        factor[v] = exp2(select(grown[v], s.peak[v] - peak[v], vf{}));
        s.peak[v] = select(grown[v], peak[v], s.peak[v]);
        s.total[v] *= factor[v];
    }
    if (s.empty) return;
    for (int64_t d = 0; d < c.head_dim; ++d)
        for (int v = 0; v < t.vectors; ++v) {
            float* at = sums + d * t.width + v * W;
            store(at, load(at) * factor[v]);
        }
}

static void weigh(const Call& c, const Tile& t, const Chunk& x, const Span& span, float* scores, Softmax& s) {
    vf base[VECTORS];
    for (int v = span.c0; v < span.c1; ++v) base[v] = select(s.peak[v] == -INF, vf{}, s.peak[v]);
    for (int j = span.j0; j < span.j1; ++j)
        for (int v = span.c0; v < span.c1; ++v) {
            float* at = scores + j * t.width + v * W;
            if (x.holes && !t.key_filled(x.key + j)) {
                store(at, vf{});
                continue;
            }
            vf p = exp2(load(at) - base[v]);
            if (c.spans != nullptr) p *= soft_gate(c, t, x.key + j, v, nullptr);
            s.total[v] += p;
            if (c.row_word != nullptr) p = (vf)((vi)p & ~dropped(c, t, x.key + j, v));
            store(at, p);
        }
}

// How a query's result, of log-sum-exp ``lse`` and normalised by ``factor``, joins what earlier parts wrote as one
// softmax over all their keys: the new row is the result times ``factor`` and the old row times ``before``.
static void join(const Call& c, const Tile& t, int i, float lse, float* factor, float* before) {
    *before = 0;
    const int64_t row = t.row[i] < 0 && !c.in_place ? t.query + i : t.row[i];
    const bool none = t.row[i] < 0 || lse == -INF;
    if (none) *factor = 0;
    if (row < 0 || (none && c.merge)) return;  // what is there stays
    float* joint = c.lse + t.lane * c.query_rows + row;
    if (none) {
        float* out = c.out.of(t.batch, t.head) + row * c.out.step;
        std::fill(out, out + c.head_dim, 0.0f);
    } else if (c.merge && *joint != -INF) {
        const float there = *joint, most = std::max(lse, there);
        const float sum = most + std::log(std::exp(lse - most) + std::exp(there - most));
        *factor *= std::exp(lse - sum);
        *before = std::exp(there - sum);
        lse = sum;
    }
    *joint = lse;
}

static void write_rows(const Call& c, const Tile& t, const Softmax& s, const float* sums) {
    float peak[TILE], total[TILE], factor[TILE], before[TILE];
    for (int v = 0; v < t.vectors; ++v) {
        store(peak + v * W, s.peak[v]);
        store(total + v * W, s.total[v]);
    }
    for (int i = 0; i < t.rows; ++i) {
        const bool none = s.empty || total[i] == 0;
        factor[i] = 1 / (total[i] * (float)c.keep);
        join(c, t, i, none ? -INF : peak[i] * LN2 + std::log(total[i]), factor + i, before + i);
    }
    to_rows(t, sums, c.head_dim, factor, before, c.out.of(t.batch, t.head), c.out.step);
}

static void forward_tile(const Call& c, Tile& t, float* work) {
    const int64_t D = c.head_dim;
    float *queries = work, *sums = queries + D * TILE, *keys = sums + D * TILE, *values = keys + D * TILE;
    float* scores = values + D * TILE;
    float factor = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
    t.load_queries(c);
    to_columns(t, c.query.of(t.batch, t.head), c.query.step, D, factor, queries);
    Softmax s;
    for (int v = 0; v < t.vectors; ++v) s.peak[v] = splat(-INF), s.total[v] = vf{};
    walk(c, t, [&](const Chunk& x) {
        int64_t k_step, v_step;
        const float *K = key_rows(c, t, x, c.key, keys, &k_step), *V = key_rows(c, t, x, c.value, values, &v_step);
        for (int n = 0; n < x.spans; ++n) {
            const Span& p = x.span[n];
            product<false>(K + p.j0 * k_step, k_step, 1, queries + p.c0 * W, t.width, p.j1 - p.j0, D, p.c1 - p.c0,
                           scores + p.j0 * t.width + p.c0 * W, t.width);
            shape(c, t, x, p, scores, nullptr);
        }
        raise_peak(c, t, x, scores, s, sums);
        if (s.empty && x.banded) std::fill(sums, sums + D * t.width, 0.0f);
        for (int n = 0; n < x.spans; ++n) {
            const Span& p = x.span[n];
            weigh(c, t, x, p, scores, s);
            const float* weights = scores + p.j0 * t.width + p.c0 * W;
            if (s.empty && !x.banded)
                product<false>(V + p.j0 * v_step, 1, v_step, weights, t.width, D, p.j1 - p.j0, p.c1 - p.c0,
                               sums + p.c0 * W, t.width);
            else
                product<true>(V + p.j0 * v_step, 1, v_step, weights, t.width, D, p.j1 - p.j0, p.c1 - p.c0,
                              sums + p.c0 * W, t.width);
        }
        s.empty = false;
    });
    write_rows(c, t, s, sums);
}

// -- backward: from the log-sum-exp of the whole plan -----------------------------------------------------------------

struct Work {
    float *queries, *grads, *query_sums, *keys, *values, *query_rows, *grad_rows, *key_sums, *value_sums;
    float *scores, *upstream, *bend;
    vf lse[VECTORS], delta[VECTORS];

    static int64_t elements(const Call& c) { return TILE * (5 * c.head_dim + 4 * c.padded_dim + 3 * TILE); }

    Work(const Call& c, float* at) {
        for (float** x : {&queries, &grads, &query_sums, &keys, &values}) *x = at, at += TILE * c.head_dim;
        for (float** x : {&query_rows, &grad_rows, &key_sums, &value_sums}) *x = at, at += TILE * c.padded_dim;
        for (float** x : {&scores, &upstream, &bend}) *x = at, at += TILE * TILE;
    }
};

static void load_rows(const Call& c, const Tile& t, Work& w) {
    const int64_t D = c.head_dim, lane = t.lane * c.query_rows;
    const float *query = c.query.of(t.batch, t.head), *out = c.out.of(t.batch, t.head);
    const float* grad = c.grad_out.of(t.batch, t.head);
    to_columns(t, query, c.query.step, D, (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E), w.queries);
    to_columns(t, grad, c.grad_out.step, D, 1, w.grads);
    std::fill(w.query_sums, w.query_sums + D * t.width, 0.0f);
    std::fill(w.query_rows, w.query_rows + 2 * TILE * c.padded_dim, 0.0f);  // grad_rows too
    float lse[TILE], delta[TILE] = {};
    std::fill(lse, lse + TILE, INF);  // exp2(s - inf) is 0
    for (int i = 0; i < t.rows; ++i) {
        const int64_t row = t.row[i];
        if (row < 0 || c.lse[lane + row] == -INF) continue;
        const float *q = query + row * c.query.step, *g = grad + row * c.grad_out.step, *o = out + row * c.out.step;
        std::copy(q, q + D, w.query_rows + i * c.padded_dim);
        std::copy(g, g + D, w.grad_rows + i * c.padded_dim);
        lse[i] = c.lse[lane + row] * LOG2E;
        delta[i] = dot(g, o, D);
    }
    for (int v = 0; v < t.vectors; ++v) w.lse[v] = load(lse + v * W), w.delta[v] = load(delta + v * W);
}

// From shaped scores and grad_out @ value the probabilities as the values saw them and the scores' scaled gradient.
static void score_gradient(const Call& c, const Tile& t, const Chunk& x, const Span& span, const Work& w,
                           float* grad_bias, float* grad_spans) {
    const float scale = (float)c.scale, kept_factor = (float)(1 / c.keep);
    for (int j = span.j0; j < span.j1; ++j) {
        vf by_span = {};
        const bool filled = !x.holes || t.key_filled(x.key + j);
        for (int v = span.c0; v < span.c1; ++v) {
            int64_t at = j * t.width + v * W, slot = x.key + j;
            if (!filled) {
                store(w.scores + at, vf{});
                store(w.upstream + at, vf{});
                continue;
            }
            vf p = exp2(load(w.scores + at) - w.lse[v]), up = load(w.upstream + at), ungated = p, slope = {};
            if (c.spans != nullptr) p *= soft_gate(c, t, slot, v, &slope);
            vf seen = p;
            if (c.row_word != nullptr) {
                vi keep = ~dropped(c, t, slot, v);
                seen = (vf)((vi)(p * kept_factor) & keep);
                up = (vf)((vi)(up * kept_factor) & keep);
            }
            up -= w.delta[v];
            if (grad_spans != nullptr) by_span += ungated * up * slope;
            vf grad = p * up;
            if (grad_bias != nullptr) add_to_bias(bias_columns(c, t, slot, v), grad, grad_bias);
            if (c.softcap != 0) {
                vf bend = load(w.bend + at);
                grad *= 1.0f - bend * bend;
            }
            store(w.scores + at, seen);
            store(w.upstream + at, grad * scale);
        }
        if (grad_spans != nullptr && filled) grad_spans[t.key_row(c, x.key + j)] += lanes_sum(by_span);
    }
}

// Where a piece of a lane's gradients adds up.
struct KeySums {
    float *key, *value, *bias = nullptr, *spans = nullptr;

    KeySums(const Call& c, const Tile& t, int64_t piece) {
        const int64_t keys = ((piece * c.batch + t.batch) * c.kv_heads + t.key_head(c)) * c.key_rows * c.padded_dim;
        const int64_t lane = piece * c.batch * c.heads + t.lane;
        key = c.grad_key + keys;
        value = c.grad_value + keys;
        if (c.grad_bias != nullptr) bias = c.grad_bias + lane * c.bias_columns;
        if (c.grad_spans != nullptr) spans = c.grad_spans + lane * c.key_rows;
    }
};

// A span's gradients [keys, padded_dim]: where the keys' rows lie, or in ``buffer``.
static void add_key_product(const Call& c, const Tile& t, const Chunk& x, const Span& p, const float* scores,
                            const float* rows, float* buffer, float* grad) {
    const int64_t P = c.padded_dim, keys = p.j1 - p.j0;
    const bool listed = t.key_at != nullptr && c.in_place;
    const int queries = std::min(t.rows, p.c1 * W) - p.c0 * W;
    const float *weights = scores + p.j0 * t.width + p.c0 * W, *of = rows + p.c0 * W * P;
    if (!listed) {
        product<true>(weights, t.width, 1, of, P, keys, queries, P / W, grad + t.key_row(c, x.key + p.j0) * P, P);
        return;
    }
    product<false>(weights, t.width, 1, of, P, keys, queries, P / W, buffer, P);
    for (int j = 0; j < keys; ++j) {
        if (!t.key_filled(x.key + p.j0 + j)) continue;
        float* to = grad + t.key_at[x.key + p.j0 + j] * P;
        for (int64_t d = 0; d < P; d += W) store(to + d, load(to + d) + load(buffer + j * P + d));
    }
}

static void backward_tile(const Call& c, Tile& t, int64_t piece, float* work) {
    Work w(c, work);
    const int64_t D = c.head_dim;
    const KeySums s(c, t, piece);
    t.load_queries(c);
    load_rows(c, t, w);
    walk(c, t, [&](const Chunk& x) {
        int64_t k_step, v_step;
        const float *K = key_rows(c, t, x, c.key, w.keys, &k_step), *V = key_rows(c, t, x, c.value, w.values, &v_step);
        for (int n = 0; n < x.spans; ++n) {
            const Span& p = x.span[n];
            const int64_t count = p.j1 - p.j0, vectors = p.c1 - p.c0, at = p.j0 * t.width + p.c0 * W;
            const float *k = K + p.j0 * k_step, *v = V + p.j0 * v_step;
            product<false>(k, k_step, 1, w.queries + p.c0 * W, t.width, count, D, vectors, w.scores + at, t.width);
            shape(c, t, x, p, w.scores, w.bend);
            product<false>(v, v_step, 1, w.grads + p.c0 * W, t.width, count, D, vectors, w.upstream + at, t.width);
            score_gradient(c, t, x, p, w, s.bias, s.spans);
            product<true>(k, 1, k_step, w.upstream + at, t.width, D, count, vectors, w.query_sums + p.c0 * W, t.width);
            add_key_product(c, t, x, p, w.scores, w.grad_rows, w.value_sums, s.value);
            add_key_product(c, t, x, p, w.upstream, w.query_rows, w.key_sums, s.key);
        }
    });
    float one[TILE];
    std::fill(one, one + TILE, 1.0f);
    to_rows(t, w.query_sums, D, one, one, c.grad_query.of(t.batch, t.head), c.grad_query.step);
}

// The forward and the backward pass over the tiles of block lists and segments.
//
// Shapes as in tiles.h: scores [keys, width] of a chunk, sums as columns [head_dim, width]; VECTORS * W queries.
#pragma once

#include "units.h"

// -- forward: online softmax, the scores key by key in rows, so that every reduction runs along vectors ------------

struct Softmax {
    vf peak[VECTORS], total[VECTORS];
    bool empty = true;  // nothing has been added to the sums
};

// A peak that grew by less than 8 (256 times) stays: its sums need no new factor.
constexpr float SLACK = 8;

static void raise_peak(const Call& c, const Tile& t, const Chunk& x, float weigh_by, const float* scores, Softmax& s,
                       float* sums) {
    vf peak[VECTORS];
    for (int v = 0; v < t.vectors; ++v) peak[v] = splat(-INF);
    for (int n = 0; n < x.spans; ++n)
        for (int j = x.span[n].j0; j < x.span[n].j1; ++j)
            for (int v = x.span[n].c0; v < x.span[n].c1; ++v)
                peak[v] = larger(peak[v], load(scores + j * t.width + v * W));
    vi grown[VECTORS], some = {};
    for (int v = 0; v < t.vectors; ++v) {
        peak[v] *= weigh_by;
        some |= grown[v] = peak[v] > s.peak[v] + SLACK;
    }
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

// Scores to the weights of the values, two keys at a time.
template <class M>
static void weigh(const Call& c, const Tile& t, const Chunk& x, const Span& span, const M& m, Softmax& s) {
    vf base[VECTORS];
    for (int v = span.c0; v < span.c1; ++v) base[v] = select(s.peak[v] == -INF, vf{}, s.peak[v]);
    for (int j = span.j0; j < span.j1; j += 2)
        for (int v = span.c0; v < span.c1; ++v) {
            vf pair[2] = {};
            for (int n = 0; n < 2 && j + n < span.j1; ++n) {
                const int64_t slot = x.key + j + n;
                if (x.holes && !t.key_filled(slot)) continue;
                vf p = M::power(load(m.scores + (j + n) * t.width + v * W) * m.weigh_by - base[v]);
                if (c.spans != nullptr) p *= soft_gate(c, t, slot, v, nullptr);
                s.total[v] += p;
                if (c.row_word != nullptr) p = (vf)((vi)p & ~dropped(c, t, slot, v));
                pair[n] = p;
            }
            m.put_weights(t, j, v, pair);
        }
}

static void zero_row(const Call& c, const Tile& t, int64_t row) {
    const int64_t size = c.narrow ? sizeof(uint16_t) : sizeof(float);
    const int64_t first = t.batch * c.out.batch_step + t.head * c.out.head_step + row * c.out.step;
    std::memset((char*)c.out.data + first * size, 0, c.head_dim * size);
}

// How a tile's results, each of log-sum-exp ``lse`` and normalised by ``factor``, join what earlier parts wrote as one
// softmax over all their keys: a new row is the result times ``factor`` and the old row times ``before``. All [TILE].
static void join(const Call& c, const Tile& t, float* lse, float* factor, float* before) {
    float* joint = c.lse + t.lane * c.query_rows;
    int64_t row[TILE];
    float there[TILE];
    for (int i = 0; i < t.width; ++i) {
        row[i] = i >= t.rows ? -1 : t.row[i] < 0 && !c.in_place ? t.query + i : t.row[i];
        there[i] = c.merge && row[i] >= 0 ? joint[row[i]] : -INF;
        if (t.row[i] < 0) lse[i] = -INF;
    }
    for (int i = 0; i < t.width; i += W) {
        const vf own = load(lse + i), old = load(there + i), most = own < old ? old : own;  // NaN stays
        const vi none = own == -INF, alone = old == -INF;
        const vf a = exp2((own - most) * LOG2E), b = exp2((old - most) * LOG2E), sum = a + b;
        store(lse + i, select(alone, own, most + log2(sum) * LN2));
        store(factor + i, select(none, vf{}, load(factor + i) * select(alone, splat(1.0f), a / sum)));
        store(before + i, select(none | alone, vf{}, b / sum));
    }
    for (int i = 0; i < t.rows; ++i) {
        if (row[i] < 0) continue;
        const bool none = factor[i] == 0 && before[i] == 0;
        if (none && c.merge) continue;  // what is there stays
        if (none) zero_row(c, t, row[i]);
        joint[row[i]] = none ? -INF : lse[i];
    }
}

template <class E>
static void write_rows(const Call& c, const Tile& t, const Softmax& s, const float* sums) {
    float lse[TILE], factor[TILE], before[TILE];
    for (int v = 0; v < t.vectors; ++v) {
        const vf total = s.empty ? vf{} : s.total[v];
        store(lse + v * W, select(total == 0.0f, splat(-INF), (s.peak[v] + log2(total)) * LN2));
        store(factor + v * W, 1.0f / (total * (float)c.keep));
    }
    join(c, t, lse, factor, before);
    if (c.narrow)
        to_rows(t, sums, c.head_dim, factor, before, c.out.of<E>(t.batch, t.head), c.out.step);
    else
        to_rows(t, sums, c.head_dim, factor, before, c.out.of<float>(t.batch, t.head), c.out.step);
}

template <class M>
static void forward_tile(const Call& c, Tile& t, float* work) {
    M m(c, work);
    t.load_queries(c);
    m.load_queries(c, t);
    Softmax s;
    for (int v = 0; v < t.vectors; ++v) s.peak[v] = splat(-INF), s.total[v] = vf{};
    walk_asking(c, t, [&](const Chunk& x) {
        m.load_keys(c, t, x);
        for (int n = 0; n < x.spans; ++n) {
            m.score(t, x.span[n]);
            shape(c, t, x, x.span[n], m.shape_by, m.scores, nullptr);
        }
        raise_peak(c, t, x, m.weigh_by, m.scores, s, m.sums);
        if (s.empty && x.banded) std::fill(m.sums, m.sums + c.head_dim * t.width, 0.0f);
        for (int n = 0; n < x.spans; ++n) weigh(c, t, x, x.span[n], m, s);
        m.turn_values(x);
        for (int n = 0; n < x.spans; ++n) {
            if (s.empty && !x.banded)
                m.template add_values<false>(t, x.span[n]);
            else
                m.template add_values<true>(t, x.span[n]);
        }
        s.empty = false;
    });
    write_rows<typename M::Element>(c, t, s, m.sums);
}

// -- backward: from the log-sum-exp of the whole plan -----------------------------------------------------------------

// Per query, for all of a tile's chunks: the log-sum-exp in base 2, and the output's product with its gradient.
struct Results {
    vf lse[VECTORS], delta[VECTORS];

    // Leaves out the queries that have no key.
    template <class E>
    static Results load(const Call& c, Tile& t, E) {
        const int64_t lane = t.lane * c.query_rows;
        const E *out = c.out.of<E>(t.batch, t.head), *grad = c.grad_out.of<E>(t.batch, t.head);
        float lse[TILE], delta[TILE] = {};
        std::fill(lse, lse + TILE, INF);  // exp2(s - inf) is 0
        for (int i = 0; i < t.rows; ++i) {
            const int64_t row = t.row[i];
            if (row < 0 || c.lse[lane + row] == -INF) {
                t.row[i] = -1;
                continue;
            }
            lse[i] = c.lse[lane + row] * LOG2E;
            delta[i] = dot(grad + row * c.grad_out.step, out + row * c.out.step, c.head_dim);
        }
        Results found;
        for (int v = 0; v < t.vectors; ++v) found.lse[v] = ::load(lse + v * W), found.delta[v] = ::load(delta + v * W);
        return found;
    }
};

// From shaped scores and grad_out @ value the probabilities as the values saw them and the scores' scaled gradient.
template <class M>
static void score_gradient(const Call& c, const Tile& t, const Chunk& x, const Span& span, const Results& r, const M& m,
                           const Sums& s) {
    const float scale = (float)c.scale, kept_factor = (float)(1 / c.keep);
    for (int j = span.j0; j < span.j1; j += 2) {
        vf by_span[2] = {};
        for (int v = span.c0; v < span.c1; ++v) {
            vf seen[2] = {}, grad[2] = {};
            for (int n = 0; n < 2 && j + n < span.j1; ++n) {
                const int64_t at = (j + n) * t.width + v * W, slot = x.key + j + n;
                if (x.holes && !t.key_filled(slot)) continue;
                vf p = M::power(load(m.scores + at) * m.weigh_by - r.lse[v]), up = load(m.upstream + at), ungated = p;
                vf slope = {};
                if (c.spans != nullptr) p *= soft_gate(c, t, slot, v, &slope);
                seen[n] = p;
                if (c.row_word != nullptr) {
                    vi keep = ~dropped(c, t, slot, v);
                    seen[n] = (vf)((vi)(p * kept_factor) & keep);
                    up = (vf)((vi)(up * kept_factor) & keep);
                }
                up -= r.delta[v];
                if (s.spans != nullptr) by_span[n] += ungated * up * slope;
                vf of_score = p * up;
                if (s.bias != nullptr) add_to_bias(bias_columns(c, t, slot, v), of_score, s.bias);
                if (s.query_term != nullptr || s.key_term != nullptr) {
                    const vi i = load_int(t.position + v * W);
                    add_to_terms(c, i, positions(c, t, slot), of_score, s.query_term, s.key_term);
                }
                if (c.softcap != 0) {
                    vf bend = load(m.bend + at);
                    of_score *= 1.0f - bend * bend;
                }
                grad[n] = of_score * scale;
            }
            m.put_gradients(t, j, v, seen, grad);
        }
        for (int n = 0; s.spans != nullptr && n < 2 && j + n < span.j1; ++n)
            if (t.key_filled(x.key + j + n)) s.spans[t.key_row(c, x.key + j + n)] += lanes_sum(by_span[n]);
    }
}

template <class M>
static void backward_tile(const Call& c, Tile& t, const Sums& s, float* work) {
    typedef typename M::Element E;
    M m(c, work);
    t.load_queries(c);
    const Results r = Results::load(c, t, E{});
    m.load_queries(c, t);
    m.load_gradients(c, t);
    walk_asking(c, t, [&](const Chunk& x) {
        m.load_keys(c, t, x);
        for (int n = 0; n < x.spans; ++n) {
            const Span& p = x.span[n];
            m.score(t, p);
            shape(c, t, x, p, m.shape_by, m.scores, m.bend);
            m.lift(t, p);
            score_gradient(c, t, x, p, r, m, s);
        }
        m.turn_keys(x);
        for (int n = 0; n < x.spans; ++n) {
            const Span& p = x.span[n];
            m.add_queries(t, p);
            m.add_keys(c, t, x, p, s);
        }
    });
    write_query_gradients<E>(c, t, s, m.sums);
}

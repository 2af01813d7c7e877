// Both passes over a query's few keys, by elementwise products: fixed offsets, and segments of FEW keys at most.
//
// Shapes: pairs [offsets, TILE], queries along the vectors; sums [rows, head_dim]; rows as in tiles.h.
#pragma once

#include "passes.h"

constexpr int64_t FEW = 4;  // for as many, turning queries and sums to columns and back costs more than the products

// Whether a call's pairs are multiplied so.
static bool elementwise(const Call& c) {
    const bool all = c.left >= c.query_slots && c.right >= c.key_slots && !c.skip_diagonal;
    return c.offset_start != nullptr || (c.row_start == nullptr && c.key_segment <= FEW && all);
}

// A tile's pairs: the keys' rows (-1: no pair) and what options have there. The keys of one offset follow each other:
// they are read offset by offset, or by GROUP of them: 15 far streams at once (LogSparse, 16,384 tokens) would be too
// many.
struct Pairs {
    static constexpr int GROUP = 4;

    int64_t count;
    const int64_t* offsets;  // null for segments
    int32_t *row, *position, *word;
    float *span, *score, *upstream, *bend, *sums;

    static int64_t most(const Call& c) { return c.offset_start == nullptr ? FEW : c.most_offsets; }
    static int64_t elements(const Call& c) { return TILE * (7 * most(c) + c.head_dim); }

    template <class E>
    Pairs(const Call& c, const Tile& t, float* at, E element) {
        const int64_t head = c.offset_heads > 1 ? t.head : 0, room = TILE * most(c);
        offsets = c.offset_start == nullptr ? nullptr : c.offsets + c.offset_start[head];
        count = offsets == nullptr ? c.key_segment : c.offset_start[head + 1] - c.offset_start[head];
        for (int32_t** x : {&row, &position, &word}) *x = (int32_t*)at, at += room;
        for (float** x : {&span, &score, &upstream, &bend}) *x = at, at += room;
        sums = at;
        for (int64_t n = 0; n < count; ++n) find(c, t, n);
        products(c, t, c.query, c.key, score, element);
        for (int64_t n = 0; n < count; ++n)
            for (int v = 0; v < t.vectors; ++v) shape_scores(c, t, n * TILE + v * W, v);
    }

    void find(const Call& c, const Tile& t, int64_t n) {
        int32_t *of = row + n * TILE, *at = position + n * TILE;
        slots(c, t, n, of);
        for (int i = 0; i < t.width; ++i) {
            at[i] = of[i] < 0 ? -1 : (int32_t)t.key_position(c, of[i]);
            of[i] = at[i] < 0 ? -1 : (int32_t)t.key_row(c, of[i]);
        }
        const int64_t table = t.lane * c.key_rows;
        for (int i = 0; c.column_word != nullptr && i < t.width; ++i)
            word[n * TILE + i] = of[i] < 0 ? 0 : c.column_word[table + of[i]];
        for (int i = 0; c.spans != nullptr && i < t.width; ++i)
            span[n * TILE + i] = of[i] < 0 ? 0 : c.spans[table + of[i]];
    }

    // The key slot of each query's pair n, -1 for none.
    void slots(const Call& c, const Tile& t, int64_t n, int32_t* to) const {
        int64_t first = 0, stop = t.rows, slot = t.unit * c.key_segment + n;
        if (offsets != nullptr) {
            slot = t.query - offsets[n];
            first = std::max(c.begin, c.begin + offsets[n]) - t.query;
            stop = std::min<int64_t>(std::min(c.end, c.end + offsets[n]) - t.query, t.rows);
        } else if (slot >= c.key_slots) {
            stop = 0;
        }
        const int64_t step = offsets == nullptr ? 0 : 1;
        for (int i = 0; i < t.width; ++i)
            to[i] = i >= first && i < stop && t.row[i] >= 0 ? (int32_t)(slot + i * step) : -1;
    }

    template <class E>
    void products(const Call& c, const Tile& t, const Rows& of_queries, const Rows& of_keys, float* to, E) {
        const E *x = of_queries.of<E>(t.batch, t.head), *y = of_keys.of<E>(t.batch, t.key_head(c));
        for (int64_t n = 0; n < count; ++n)
            for (int i = 0; i < t.width; i += W) {
                vf lanes[W];
                for (int r = 0; r < W; ++r) {
                    const int32_t key = row[n * TILE + i + r];
                    lanes[r] = key < 0
                                   ? vf{}
                                   : dot_lanes(x + t.row[i + r] * of_queries.step, y + key * of_keys.step, c.head_dim);
                }
                store(to + n * TILE + i, lanes_sums(lanes));
            }
    }

    void shape_scores(const Call& c, const Tile& t, int64_t at, int v) {
        vi none = load_int(row + at) < 0;
        vf s = load(score + at) * (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
        if (c.softcap != 0) {
            s = tanh(s);
            store(bend + at, s);
            s *= (float)c.softcap * LOG2E;
        }
        if (c.bias != nullptr) s = add_bias(c, t, columns(c, t, at, v), s);
        if (has_terms(c)) s = add_terms(c, t, load_int(t.position + v * W), load_int(position + at), s);
        if (c.spans != nullptr) none |= gate(c, t, at, v, nullptr) <= 0.0f;
        store(score + at, select(none, splat(-INF), s));
    }

    vf gate(const Call& c, const Tile& t, int64_t at, int v, vf* slope) const {
        return soft_gate(c, load_int(t.position + v * W) - load_int(position + at), load(span + at), slope);
    }

    vi columns(const Call& c, const Tile& t, int64_t at, int v) const {
        return bias_columns(c, load_int(t.position + v * W), load_int(position + at));
    }

    vi drop(const Call& c, const Tile& t, int64_t at, int v) const {
        return dropped(c, (vu)load_int(t.word + v * W), (vu)load_int(word + at));
    }

    // Add to the sums the keys' rows of ``of``, each times its pair's weight and its query's factor; not of a query
    // whose factor is 0.
    template <class E>
    void add_rows(const Call& c, const Tile& t, const float* weight, const float* factor, const Rows& of, E) const {
        const E* first = of.of<E>(t.batch, t.key_head(c));
        for (int64_t n = 0; n < count; n += GROUP)
            for (int i = 0; i < t.rows; ++i) {
                const E* from[GROUP];
                float by[GROUP];
                int found = 0;
                for (int64_t at = n * TILE + i; factor[i] != 0 && at < std::min(n + GROUP, count) * TILE; at += TILE)
                    if (row[at] >= 0) from[found] = first + row[at] * of.step, by[found++] = weight[at] * factor[i];
                float* to = sums + i * c.head_dim;
                if (found == GROUP)
                    add_several<GROUP>(by, from, to, c.head_dim);
                else
                    for (int m = 0; m < found; ++m) add_scaled(by[m], from[m], to, c.head_dim);
            }
    }
};

// The queries' weights in place of their scores, not normalised; their log-sum-exp, and the factors that normalise.
static void weigh_pairs(const Call& c, const Tile& t, Pairs& p, float* lse, float* factor) {
    for (int v = 0; v < t.vectors; ++v) {
        vf peak = splat(-INF), total = {};
        for (int64_t n = 0; n < p.count; ++n) peak = larger(peak, load(p.score + n * TILE + v * W));
        const vf base = select(peak == -INF, vf{}, peak);
        for (int64_t n = 0; n < p.count; ++n) {
            const int64_t at = n * TILE + v * W;
            vf weight = exp2(load(p.score + at) - base);
            if (c.spans != nullptr) weight *= p.gate(c, t, at, v, nullptr);
            total += weight;
            if (c.row_word != nullptr) weight = (vf)((vi)weight & ~p.drop(c, t, at, v));
            store(p.score + at, weight);
        }
        store(lse + v * W, select(total == 0.0f, splat(-INF), (base + log2(total)) * LN2));
        store(factor + v * W, 1.0f / (total * (float)c.keep));
    }
}

// Add the sums [rows, head_dim] to rows times ``before``, and write them there.
template <class E>
static void write_sums(const Call& c, const Tile& t, const Pairs& p, const float* factor, const float* before, E* to,
                       int64_t step) {
    for (int i = 0; i < t.rows; ++i) {
        if (t.row[i] < 0 || (factor[i] == 0 && before[i] == 0)) continue;
        float* row = p.sums + i * c.head_dim;
        if (before[i] != 0) add_scaled(before[i], to + t.row[i] * step, row, c.head_dim);
        convert(row, to + t.row[i] * step, c.head_dim);
    }
}

template <class E>
static void forward_offsets(const Call& c, Tile& t, float* work) {
    t.load_queries(c);
    Pairs p(c, t, work, E{});
    float lse[TILE], factor[TILE], before[TILE];
    weigh_pairs(c, t, p, lse, factor);
    join(c, t, lse, factor, before);
    std::fill(p.sums, p.sums + t.rows * c.head_dim, 0.0f);
    p.add_rows(c, t, p.score, factor, c.value, E{});
    if (c.narrow)
        write_sums(c, t, p, factor, before, c.out.of<E>(t.batch, t.head), c.out.step);
    else
        write_sums(c, t, p, factor, before, c.out.of<float>(t.batch, t.head), c.out.step);
}

// From scores and ``upstream`` (grad_out @ value) the probabilities as the values saw them and the scores' gradient.
static void offsets_gradient(const Call& c, const Tile& t, Pairs& p, int64_t at, int v, vf lse, vf delta,
                             const Sums& s) {
    const float kept_factor = (float)(1 / c.keep);
    vf weight = exp2(load(p.score + at) - lse), up = load(p.upstream + at), ungated = weight, slope = {};
    if (c.spans != nullptr) weight *= p.gate(c, t, at, v, &slope);
    vf seen = weight;
    if (c.row_word != nullptr) {
        vi keep = ~p.drop(c, t, at, v);
        seen = (vf)((vi)(weight * kept_factor) & keep);
        up = (vf)((vi)(up * kept_factor) & keep);
    }
    up -= delta;
    vf grad = weight * up, by_span = ungated * up * slope;
    for (int lane = 0; s.spans != nullptr && lane < W; ++lane)
        if (p.row[at + lane] >= 0) s.spans[p.row[at + lane]] += by_span[lane];
    if (s.bias != nullptr) add_to_bias(p.columns(c, t, at, v), grad, s.bias);
    if (s.query_term != nullptr || s.key_term != nullptr)
        add_to_terms(c, load_int(t.position + v * W), load_int(p.position + at), grad, s.query_term, s.key_term);
    if (c.softcap != 0) {
        vf bend = load(p.bend + at);
        grad *= 1.0f - bend * bend;
    }
    store(p.score + at, seen);
    store(p.upstream + at, grad * (float)c.scale);
}

template <class E>
static void backward_offsets(const Call& c, Tile& t, const Sums& s, float* work) {
    const int64_t D = c.head_dim, P = c.padded_dim;
    t.load_queries(c);
    const Results r = Results::load(c, t, E{});
    Pairs p(c, t, work, E{});
    p.products(c, t, c.grad_out, c.value, p.upstream, E{});
    for (int64_t n = 0; n < p.count; ++n)
        for (int v = 0; v < t.vectors; ++v) offsets_gradient(c, t, p, n * TILE + v * W, v, r.lse[v], r.delta[v], s);
    float one[TILE], none[TILE] = {};
    std::fill(one, one + TILE, 1.0f);
    std::fill(p.sums, p.sums + t.rows * D, 0.0f);
    p.add_rows(c, t, p.upstream, one, c.key, E{});
    const E *query = c.query.of<E>(t.batch, t.head), *grad_out = c.grad_out.of<E>(t.batch, t.head);
    for (int64_t n = 0; n < p.count; ++n)
        for (int i = 0; i < t.rows; ++i) {
            const int64_t at = n * TILE + i, row = p.row[at];
            if (row < 0) continue;
            add_scaled(p.upstream[at], query + t.row[i] * c.query.step, s.key + row * P, D);
            add_scaled(p.score[at], grad_out + t.row[i] * c.grad_out.step, s.value + row * P, D);
        }
    if (s.query != nullptr)
        write_sums(c, t, p, one, one, s.query, D);
    else if (c.narrow)
        write_sums(c, t, p, one, none, c.grad_query.of<E>(t.batch, t.head), c.grad_query.step);
    else
        write_sums(c, t, p, one, one, c.grad_query.of<float>(t.batch, t.head), c.grad_query.step);
}

// Both passes over fixed offsets: a query's few keys along the vectors.
//
// Shapes: pairs [rows, room], room the offsets in whole vectors of W; sums [head_dim]; rows as in tiles.h.
#pragma once

#include "passes.h"

// A tile's pairs [rows, room], offsets along the vectors: the keys' slots (-1: no pair) and what options have there.
// The keys of one offset follow each other: they are read offset by offset, 15 far streams at once (LogSparse, 16,384
// tokens) would be too many.
struct Pairs {
    int64_t count, room;
    const int64_t* offsets;
    int64_t* slot;
    int32_t *position, *word;
    float *span, *score, *upstream, *bend, *sums;

    static int64_t elements(const Call& c) { return TILE * (8 * (c.most_offsets + W) + c.head_dim); }

    template <class E>
    Pairs(const Call& c, const Tile& t, float* at, E element) : room(ceil_div(c.most_offsets, W) * W) {
        const int64_t head = c.offset_heads > 1 ? t.head : 0;
        offsets = c.offsets + c.offset_start[head];
        count = c.offset_start[head + 1] - c.offset_start[head];
        slot = (int64_t*)at, at += 2 * TILE * room;
        position = (int32_t*)at, at += TILE * room;
        word = (int32_t*)at, at += TILE * room;
        for (float** x : {&span, &score, &upstream, &bend}) *x = at, at += TILE * room;
        sums = at;
        for (int i = 0; i < t.rows; ++i)
            for (int64_t n = 0; n < room; ++n) find(c, t, i, n);
        products(c, t, c.query, c.key, score, element);
        for (int i = 0; i < t.rows; ++i)
            for (int64_t first = i * room; first < (i + 1) * room; first += W) shape_scores(c, t, i, first);
    }

    void find(const Call& c, const Tile& t, int i, int64_t n) {
        const int64_t from = t.query + i, at = i * room + n;
        const bool asks = n < count && t.row[i] >= 0 && from >= c.begin && from < c.end;
        const int64_t to = asks ? from - offsets[n] : -1;
        slot[at] = asks && to >= c.begin && to < c.end && t.key_filled(to) ? to : -1;
        position[at] = slot[at] < 0 ? 0 : (int32_t)t.key_position(c, to);
        const int64_t entry = t.lane * c.key_rows + (slot[at] < 0 ? 0 : t.key_row(c, to));
        if (c.column_word != nullptr) word[at] = c.column_word[entry];
        if (c.spans != nullptr) span[at] = c.spans[entry];
    }

    // visit(query, place among the pairs, row of the key) for each pair, offset by offset.
    template <class Visit>
    void each(const Call& c, const Tile& t, Visit visit) const {
        for (int64_t n = 0; n < count; ++n)
            for (int i = 0; i < t.rows; ++i)
                if (slot[i * room + n] >= 0) visit(i, i * room + n, t.key_row(c, slot[i * room + n]));
    }

    template <class E>
    void products(const Call& c, const Tile& t, const Rows& of_queries, const Rows& of_keys, float* to, E) {
        const E *x = of_queries.of<E>(t.batch, t.head), *y = of_keys.of<E>(t.batch, t.key_head(c));
        std::fill(to, to + t.rows * room, 0.0f);
        each(c, t, [&](int i, int64_t at, int64_t row) {
            to[at] = dot(x + t.row[i] * of_queries.step, y + row * of_keys.step, c.head_dim);
        });
    }

    void shape_scores(const Call& c, const Tile& t, int i, int64_t first) {
        vi none;
        for (int lane = 0; lane < W; ++lane) none[lane] = slot[first + lane] < 0 ? -1 : 0;
        vf s = load(score + first) * (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
        if (c.softcap != 0) {
            s = tanh(s);
            store(bend + first, s);
            s *= (float)c.softcap * LOG2E;
        }
        if (c.bias != nullptr) s = add_bias(c, t, columns(c, t, i, first), s);
        if (c.spans != nullptr) none |= gate(c, t, i, first, nullptr) <= 0.0f;
        store(score + first, select(none, splat(-INF), s));
    }

    vf gate(const Call& c, const Tile& t, int i, int64_t first, vf* slope) const {
        return soft_gate(c, t.position[i] - load_int(position + first), load(span + first), slope);
    }

    vi columns(const Call& c, const Tile& t, int i, int64_t first) const {
        return bias_columns(c, splat_int(t.position[i]), load_int(position + first));
    }

    vi drop(const Call& c, const Tile& t, int i, int64_t first) const {
        return dropped(c, vu{} + (uint32_t)t.word[i], (vu)load_int(word + first));
    }
};

// A query's weights in place of its scores, not normalised; its log-sum-exp, and the factor that normalises.
static float weigh_row(const Call& c, const Tile& t, Pairs& p, int i, float* factor) {
    float peak = -INF;
    for (int64_t at = i * p.room; at < (i + 1) * p.room; ++at) peak = std::max(peak, p.score[at]);
    const float base = peak == -INF ? 0 : peak;
    vf total = {};
    for (int64_t first = i * p.room; first < (i + 1) * p.room; first += W) {
        vf weight = exp2(load(p.score + first) - base);
        if (c.spans != nullptr) weight *= p.gate(c, t, i, first, nullptr);
        total += weight;
        if (c.row_word != nullptr) weight = (vf)((vi)weight & ~p.drop(c, t, i, first));
        store(p.score + first, weight);
    }
    const float sum = lanes_sum(total);
    *factor = 1 / (sum * (float)c.keep);
    return sum == 0 ? -INF : base * LN2 + std::log(sum);
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
    const int64_t D = c.head_dim;
    t.load_queries(c);
    Pairs p(c, t, work, E{});
    float lse[TILE] = {}, factor[TILE] = {}, before[TILE];
    for (int i = 0; i < t.rows; ++i) lse[i] = weigh_row(c, t, p, i, factor + i);
    join(c, t, lse, factor, before);
    std::fill(p.sums, p.sums + t.rows * D, 0.0f);
    const E* values = c.value.of<E>(t.batch, t.key_head(c));
    p.each(c, t, [&](int i, int64_t at, int64_t row) {
        if (factor[i] != 0) add_scaled(p.score[at] * factor[i], values + row * c.value.step, p.sums + i * D, D);
    });
    if (c.narrow)
        write_sums(c, t, p, factor, before, c.out.of<E>(t.batch, t.head), c.out.step);
    else
        write_sums(c, t, p, factor, before, c.out.of<float>(t.batch, t.head), c.out.step);
}

// From scores and ``upstream`` (grad_out @ value) the probabilities as the values saw them and the scores' gradient.
static void offsets_gradient(const Call& c, const Tile& t, Pairs& p, int i, float lse, float delta, const Sums& s) {
    const float kept_factor = (float)(1 / c.keep);
    for (int64_t first = i * p.room; first < (i + 1) * p.room; first += W) {
        vf weight = exp2(load(p.score + first) - lse), up = load(p.upstream + first), ungated = weight, slope = {};
        if (c.spans != nullptr) weight *= p.gate(c, t, i, first, &slope);
        vf seen = weight;
        if (c.row_word != nullptr) {
            vi keep = ~p.drop(c, t, i, first);
            seen = (vf)((vi)(weight * kept_factor) & keep);
            up = (vf)((vi)(up * kept_factor) & keep);
        }
        up -= delta;
        vf grad = weight * up, by_span = ungated * up * slope;
        for (int lane = 0; s.spans != nullptr && lane < W; ++lane)
            if (p.slot[first + lane] >= 0) s.spans[t.key_row(c, p.slot[first + lane])] += by_span[lane];
        if (s.bias != nullptr) add_to_bias(p.columns(c, t, i, first), grad, s.bias);
        if (c.softcap != 0) {
            vf bend = load(p.bend + first);
            grad *= 1.0f - bend * bend;
        }
        store(p.score + first, seen);
        store(p.upstream + first, grad * (float)c.scale);
    }
}

template <class E>
static void backward_offsets(const Call& c, Tile& t, const Sums& s, float* work) {
    const int64_t D = c.head_dim, P = c.padded_dim, lane = t.lane * c.query_rows;
    t.load_queries(c);
    for (int i = 0; i < t.rows; ++i)
        if (t.row[i] >= 0 && c.lse[lane + t.row[i]] == -INF) t.row[i] = -1;
    Pairs p(c, t, work, E{});
    const E *query = c.query.of<E>(t.batch, t.head), *out = c.out.of<E>(t.batch, t.head);
    const E *grad_out = c.grad_out.of<E>(t.batch, t.head), *keys = c.key.of<E>(t.batch, t.key_head(c));
    p.products(c, t, c.grad_out, c.value, p.upstream, E{});
    for (int i = 0; i < t.rows; ++i) {
        if (t.row[i] < 0) continue;
        const float delta = dot(grad_out + t.row[i] * c.grad_out.step, out + t.row[i] * c.out.step, D);
        offsets_gradient(c, t, p, i, c.lse[lane + t.row[i]] * LOG2E, delta, s);
    }
    std::fill(p.sums, p.sums + t.rows * D, 0.0f);
    p.each(c, t, [&](int i, int64_t at, int64_t row) {
        add_scaled(p.upstream[at], keys + row * c.key.step, p.sums + i * D, D);
        add_scaled(p.upstream[at], query + t.row[i] * c.query.step, s.key + row * P, D);
        add_scaled(p.score[at], grad_out + t.row[i] * c.grad_out.step, s.value + row * P, D);
    });
    float one[TILE], none[TILE] = {};
    std::fill(one, one + TILE, 1.0f);
    if (s.query != nullptr)
        write_sums(c, t, p, one, one, s.query, D);
    else if (c.narrow)
        write_sums(c, t, p, one, none, c.grad_query.of<E>(t.batch, t.head), c.grad_query.step);
    else
        write_sums(c, t, p, one, one, c.grad_query.of<float>(t.batch, t.head), c.grad_query.step);
}

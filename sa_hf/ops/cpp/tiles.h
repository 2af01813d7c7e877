// Which tiles of scores a part has, and what the masks and options do to a tile.
//
// Shapes: a tile has up to TILE queries (``rows``; ``width`` in whole vectors of W) and meets chunks of up to TILE
// keys. Scores [keys, width], key by key, so that every reduction over queries' rows runs along vectors; queries,
// gradients and sums as columns [head_dim, width]; keys and values as rows [keys, head_dim], in gradients [keys,
// padded_dim].
#pragma once

#include "call.h"
#include "elements.h"

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to TILE queries of one lane. ``unit`` is the number of their block or segment, ``sub`` theirs in it.
struct Tile {
    int64_t lane, batch, head, query, unit, sub;
    int grain;                                // vectors come in so many, the keys of spans in 16 times that
    int rows, vectors, width;                 // width: vectors * W
    int64_t lowest = 0, highest = INT64_MAX;  // every query may read the key slots from lowest to highest
    const int64_t* key_at;                    // null, or the positions of the key slots
    int64_t row[TILE];                        // of each query; -1 for an empty slot
    int32_t low[TILE], high[TILE], position[TILE], word[TILE];  // where a call has them

    Tile(const Call& c, int64_t lane_, int64_t number, int grain_)
        : lane(lane_), batch(lane_ / c.heads), head(lane_ % c.heads), grain(grain_) {
        int64_t size = c.row_start ? c.block_q : c.query_segment;
        int64_t per_unit = ceil_div(std::min(size, c.query_slots), TILE);
        unit = number / per_unit;
        sub = number % per_unit;
        query = unit * size + sub * TILE;
        rows = (int)std::max<int64_t>(0, std::min({(int64_t)TILE, size - sub * TILE, c.query_slots - query}));
        vectors = (int)ceil_div(rows, grain * W) * grain;
        width = vectors * W;
    }

    void load_queries(const Call& c) {
        const int64_t *at = c.query_index.of(batch, head), table = lane * c.query_rows;
        const int32_t* range = c.key_range == nullptr ? nullptr : ranges(c);
        key_at = c.key_index.of(batch, head);
        for (int i = 0; i < width; ++i) {
            const int64_t used = std::min(i, rows - 1), slot = query + used;
            const int64_t found = at == nullptr ? slot + c.query_first : at[slot];
            row[i] = found < 0 ? -1 : c.in_place ? found : slot;
            position[i] = (int32_t)(found + c.query_offset);
            if (c.row_word != nullptr) word[i] = row[i] < 0 ? 0 : c.row_word[table + row[i]];
            if (range == nullptr) continue;
            lowest = std::max<int64_t>(lowest, low[i] = range[2 * used]);
            highest = std::min<int64_t>(highest, high[i] = range[2 * used + 1]);
        }
    }

    bool key_filled(int64_t slot) const { return key_at == nullptr || key_at[slot] >= 0; }

    int64_t key_position(const Call& c, int64_t slot) const {
        return key_at == nullptr ? slot + c.key_first : key_at[slot];
    }

    int64_t key_row(const Call& c, int64_t slot) const { return c.in_place ? key_position(c, slot) : slot; }

    int64_t key_head(const Call& c) const { return head / (c.heads / c.kv_heads); }

    static int64_t count(const Call& c) {  // of one lane
        int64_t size = c.row_start ? c.block_q : c.query_segment;
        return ceil_div(c.query_slots, size) * ceil_div(std::min(size, c.query_slots), TILE);
    }

    int64_t list(const Call& c) const {  // row of the block lists
        int64_t list = (c.list_batch > 1 ? batch : 0) * c.list_heads + (c.list_heads > 1 ? head : 0);
        return list * ceil_div(c.query_slots, c.block_q) + unit;
    }

    const int32_t* ranges(const Call& c) const {
        int64_t list = (c.range_batch > 1 ? batch : 0) * c.range_heads + (c.range_heads > 1 ? head : 0);
        return c.key_range + 2 * (list * c.query_slots + query);
    }

    int64_t weight(const Call& c) const {  // number of list entries
        return c.row_start ? c.row_start[list(c) + 1] - c.row_start[list(c)] : 1;
    }
};

// The scores of keys j0 .. j1 of a chunk with the query vectors c0 .. c1.
struct Span {
    int j0, j1, c0, c1;
};

// Up to TILE keys that a tile of queries reads.
struct Chunk {
    int64_t key, shift;  // the band holds query slot - key slot - shift
    int count;
    bool banded, ranged, diagonal, holes;  // diagonal: left out, and crosses the chunk; holes: empty slots
    const uint64_t* words;                 // element mask, or null
    int64_t word_step;
    int spans;
    Span span[TILE / 16];

    bool masked() const { return banded || ranged || diagonal || holes || words != nullptr; }
};

// Fill in what the band makes of a chunk; false where it leaves nothing.
static bool bound(const Call& c, const Tile& t, Chunk& x, bool test_band) {
    int64_t low = t.query - (x.key + x.count - 1) - x.shift, high = t.query + t.rows - 1 - x.key - x.shift;
    if (test_band && (low > c.left || high < -c.right)) return false;
    x.banded = test_band && (high > c.left || low < -c.right);
    x.diagonal = c.row_start == nullptr && c.skip_diagonal && low <= 0 && high >= 0;
    x.ranged = c.key_range != nullptr && (t.lowest > x.key || t.highest < x.key + x.count);
    x.holes = false;
    for (int j = 0; t.key_at != nullptr && j < x.count; ++j) x.holes |= t.key_at[x.key + j] < 0;
    x.spans = 0;
    if (!x.banded) {
        x.span[x.spans++] = {0, x.count, 0, t.vectors};
        return true;
    }
    const int g = t.grain;
    for (int j0 = 0; j0 < x.count; j0 += 16 * g) {
        int j1 = std::min(j0 + 16 * g, x.count), c0 = 0, c1 = t.vectors;
        int64_t first = t.query - x.key - x.shift - j0, last = first - (j1 - 1 - j0);  // query 0 less keys j0, j1 - 1
        while (c0 < c1 && first + (c0 + g) * W - 1 < -c.right) c0 += g;
        while (c1 > c0 && last + (c1 - g) * W > c.left) c1 -= g;
        if (c0 < c1) x.span[x.spans++] = {j0, j1, c0, c1};
    }
    return x.spans > 0;
}

template <class Visit>
static void walk_keys(const Call& c, const Tile& t, Chunk& x, int64_t begin, int64_t end, bool test_band, Visit visit) {
    const uint64_t* words = x.words;
    for (x.key = begin; x.key < end; x.key += TILE) {
        x.count = (int)std::min<int64_t>(TILE, end - x.key);
        if (words != nullptr) x.words = words + (x.key - begin) * x.word_step;
        if (bound(c, t, x, test_band)) visit((const Chunk&)x);
    }
    x.words = words;
}

template <class Visit>
static void walk(const Call& c, const Tile& t, Visit visit) {
    Chunk x = {};
    if (c.row_start == nullptr) {
        int64_t query_base = t.unit * c.query_segment, key_base = t.unit * c.key_segment, first = t.query - query_base;
        int64_t begin = std::max<int64_t>(0, first - c.left) / TILE * TILE;  // chunks that are whole until the last
        int64_t end = std::min({c.key_segment, c.key_slots - key_base, first + t.rows + c.right});
        x.shift = query_base - key_base;
        walk_keys(c, t, x, key_base + begin, key_base + end, true, visit);
        return;
    }
    int64_t entry = c.row_start[t.list(c)], stop = c.row_start[t.list(c) + 1];
    x.word_step = ceil_div(c.block_q, TILE);
    while (entry < stop) {
        int32_t kind = c.kind[entry];
        int64_t begin = c.columns[entry] * c.block_k, next = begin + c.block_k;
        for (++entry; kind < 0 && entry < stop && c.kind[entry] == kind; ++entry, next += c.block_k)
            if (c.columns[entry] * c.block_k != next) break;
        x.words = kind < 0 ? nullptr : c.masks + kind * c.block_k * x.word_step + t.sub;
        walk_keys(c, t, x, begin, std::min(next, c.key_slots), kind == -2, visit);
    }
}

// Ask for a row's memory before its turn, in the second-level cache.
static inline void ask(const Call& c, const Rows& rows, int64_t batch, int64_t head, int64_t row) {
    const int64_t size = c.element == FLOAT ? 4 : 2;
    const char* at =
        (const char*)rows.data + (batch * rows.batch_step + head * rows.head_step + row * rows.step) * size;
    for (int64_t byte = 0; byte < c.head_dim * size; byte += 64) __builtin_prefetch(at + byte, 0, 2);
}

// As walk. Keys and values that do not follow each other are asked for while the chunk in front of theirs is visited;
// of others the processor sees by itself what comes next.
template <class Visit>
static void walk_asking(const Call& c, const Tile& t, Visit visit) {
    if (t.key_at == nullptr || !c.in_place) return walk(c, t, visit);
    Chunk last;
    bool some = false;
    walk(c, t, [&](const Chunk& x) {
        for (int64_t slot = x.key; slot < x.key + x.count; ++slot) {
            if (!t.key_filled(slot)) continue;
            for (const Rows* rows : {&c.key, &c.value}) ask(c, *rows, t.batch, t.key_head(c), t.key_at[slot]);
        }
        if (some) visit((const Chunk&)last);
        last = x, some = true;
    });
    if (some) visit((const Chunk&)last);
}

// Which pairs of key j with the queries of vector v are kept: bits of -1.
static inline vi kept(const Call& c, const Tile& t, const Chunk& x, int j, int v) {
    int64_t slot = x.key + j;
    vi keep = splat_int(-1);
    if (x.banded || x.diagonal) {
        vi distance = lane_numbers() + (int32_t)(t.query + v * W - slot - x.shift);
        if (x.banded) {
            keep = distance <= (int32_t)std::min<int64_t>(c.left, INT32_MAX);
            keep &= distance >= (int32_t)-std::min<int64_t>(c.right, INT32_MAX);
        }
        if (x.diagonal) keep &= distance != 0;
    }
    if (x.words != nullptr) {
        int32_t bits = (int32_t)((x.words[j * x.word_step] >> (v * W)) & ((1 << W) - 1));
        keep &= ((splat_int(bits) >> lane_numbers()) & 1) != 0;
    }
    if (x.ranged) {
        keep &= (load_int(t.low + v * W) <= (int32_t)slot) & (load_int(t.high + v * W) > (int32_t)slot);
    }
    return keep;
}

// The soft gate of Expire-Span (equation 6 of the paper) of pairs, by their distance i - j, and its slope by the span.
static inline vf soft_gate(const Call& c, vi distance, vf span, vf* slope) {
    vf ramp = 1.0f + (span - __builtin_convertvector(distance, vf)) / (float)c.ramp;
    vi own = distance == 0;
    if (slope != nullptr) *slope = (vf)((vi)splat((float)(1 / c.ramp)) & (ramp > 0.0f) & (ramp < 1.0f) & ~own);
    return select(own, splat(1.0f), larger(smaller(ramp, splat(1.0f)), vf{}));
}

// Indices of pairs (i, j) into a head's distance biases, -1 for none.
static inline vi bias_columns(const Call& c, vi i, vi j) {
    const int32_t centre = (int32_t)((c.bias_columns + 1) / 2 - 1), extra = (int32_t)c.extra_tokens;
    vi distance = j - i;
    distance = distance > centre ? splat_int(centre) : distance;
    distance = distance < -centre ? splat_int(-centre) : distance;
    return extra == 0 ? distance + centre : (vi)((distance + centre) | (i < extra) | (j < extra));
}

static inline vf add_bias(const Call& c, const Tile& t, vi column, vf scores) {
    const float* table = c.bias + t.head * c.bias_columns;
    for (int lane = 0; lane < W; ++lane)
        if (column[lane] >= 0) scores[lane] += table[column[lane]];
    return scores;
}

static inline void add_to_bias(vi column, vf grad, float* table) {
    for (int lane = 0; lane < W; ++lane)
        if (column[lane] >= 0) table[column[lane]] += grad[lane];
}

static inline bool has_terms(const Call& c) { return c.query_term != nullptr || c.key_term != nullptr; }

// visit(pair, place in the query's term, place in the key's) for each pair (i, j) that has terms, of one lane.
template <class Visit>
static inline void each_term(const Call& c, vi i, vi j, Visit visit) {
    const int64_t far_query = c.query_distances / 2, far_key = c.key_distances / 2;
    for (int pair = 0; pair < W; ++pair) {
        const int64_t row = i[pair] - c.query_offset, distance = (int64_t)j[pair] - i[pair];
        if (row < 0 || i[pair] < c.extra_tokens || j[pair] < c.extra_tokens) continue;
        int64_t at = 0, to = 0;
        if (c.query_term != nullptr)
            at = row * c.query_width + c.query_buckets[std::clamp(distance, -far_query, far_query) + far_query];
        if (c.key_term != nullptr)
            to = j[pair] * c.key_width + c.key_buckets[std::clamp(distance, -far_key, far_key) + far_key];
        visit(pair, at, to);
    }
}

static inline vf add_terms(const Call& c, const Tile& t, vi i, vi j, vf scores) {
    const float* of_query = c.query_term + t.lane * c.term_queries * c.query_width;
    const float* of_key = c.key_term + t.lane * c.term_keys * c.key_width;
    each_term(c, i, j, [&](int pair, int64_t at, int64_t to) {
        if (c.query_term != nullptr) scores[pair] += of_query[at] * LOG2E;
        if (c.key_term != nullptr) scores[pair] += of_key[to] * LOG2E;
    });
    return scores;
}

static inline void add_to_terms(const Call& c, vi i, vi j, vf grad, float* of_query, float* of_key) {
    each_term(c, i, j, [&](int pair, int64_t at, int64_t to) {
        if (of_query != nullptr) of_query[at] += grad[pair];
        if (of_key != nullptr) of_key[to] += grad[pair];
    });
}

// -1 where dropout drops a pair (``ops.random.dropout_bits``).
static inline vi dropped(const Call& c, vu row_word, vu column_word) {
    vu value = (row_word ^ column_word) * (row_word | 1u);
    return (((vi)value >> 1) - (int32_t)c.dropout_threshold) >> 31;
}

// The same for key ``slot`` with the queries of vector v.
static inline vf soft_gate(const Call& c, const Tile& t, int64_t slot, int v, vf* slope) {
    vi distance = load_int(t.position + v * W) - (int32_t)t.key_position(c, slot);
    return soft_gate(c, distance, splat(c.spans[t.lane * c.key_rows + t.key_row(c, slot)]), slope);
}

// A key's position, for every query of a vector.
static inline vi positions(const Call& c, const Tile& t, int64_t slot) {
    return splat_int((int32_t)t.key_position(c, slot));
}

static inline vi bias_columns(const Call& c, const Tile& t, int64_t slot, int v) {
    return bias_columns(c, load_int(t.position + v * W), positions(c, t, slot));
}

static inline vi dropped(const Call& c, const Tile& t, int64_t slot, int v) {
    uint32_t word = (uint32_t)c.column_word[t.lane * c.key_rows + t.key_row(c, slot)];
    return dropped(c, (vu)load_int(t.word + v * W), vu{} + word);
}

// Whether the band alone bounds a chunk and holds all keys of a span for all queries of a vector.
static inline bool inside(const Call& c, const Tile& t, const Chunk& x, const Span& span, int v) {
    int64_t first = t.query + v * W - x.key - x.shift - span.j0, last = first - (span.j1 - 1 - span.j0);
    return !x.ranged && !x.diagonal && x.words == nullptr && first + W - 1 <= c.left && last >= -c.right;
}

// Whether a score is its product times a factor.
static inline bool plain(const Call& c) {
    return c.softcap == 0 && c.bias == nullptr && c.spans == nullptr && !has_terms(c);
}

// From products, each times ``factor`` (log2(e) times the scale, or over the softcap), the masked scores in base 2, in
// place; plain scores are masked alone where the factor is 1. ``bend`` may take the tanh.
static void shape(const Call& c, const Tile& t, const Chunk& x, const Span& span, float factor, float* scores,
                  float* bend) {
    const bool plain = ::plain(c) && factor == 1;
    if (plain && !x.masked()) return;
    for (int j = span.j0; j < span.j1; ++j) {
        int64_t slot = x.key + j;
        if (x.holes && !t.key_filled(slot)) {
            for (int v = span.c0; v < span.c1; ++v) store(scores + j * t.width + v * W, splat(-INF));
            continue;
        }
        for (int v = span.c0; v < span.c1; ++v) {
            if (plain && inside(c, t, x, span, v)) continue;
            float* at = scores + j * t.width + v * W;
            vf s = load(at) * factor;
            if (c.softcap != 0) {
                s = tanh(s);
                if (bend != nullptr) store(bend + j * t.width + v * W, s);
                s *= (float)c.softcap * LOG2E;
            }
            if (c.bias != nullptr) s = add_bias(c, t, bias_columns(c, t, slot, v), s);
            if (has_terms(c)) s = add_terms(c, t, load_int(t.position + v * W), positions(c, t, slot), s);
            vi keep = kept(c, t, x, j, v);
            if (c.spans != nullptr) keep &= soft_gate(c, t, slot, v, nullptr) > 0.0f;
            store(at, select(keep, s, splat(-INF)));
        }
    }
}

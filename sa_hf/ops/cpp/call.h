// What a call hands over to the kernels. Python reads the structs' fields from this file (call.py): one declaration a
// line. A pointer may be null where its comment says so.
#pragma once

#include <cstdint>

// The kinds of elements that rows have.
constexpr int64_t FLOAT = 0, BF16 = 1, FP16 = 2;

// Rows by batch, head and number; a row's elements follow each other.
struct Rows {
    void* data;
    int64_t batch_step, head_step, step;

    template <class E>
    E* of(int64_t batch, int64_t head) const {
        return (E*)data + batch * batch_step + head * head_step;
    }
};

// The positions of slots, -1 for an empty one; null: they follow each other. A step is 0 where lists are shared.
struct Index {
    const int64_t* data;
    int64_t batch_step, head_step;

    const int64_t* of(int64_t batch, int64_t head) const {
        return data == nullptr ? nullptr : data + batch * batch_step + head * head_step;
    }
};

// ``lanes`` is batch * heads. A slot's *row* in the tensors of its side is its position where the call is
// ``in_place``, else the slot itself.
struct Call {
    // Rows, [batch, heads | kv_heads, rows, head_dim], of the call's element; what is written may be of floats.
    Rows query, key, value;
    Rows out;  // forward: of floats unless ``narrow``
    // Backward; out and lse are then the whole plan's.
    Rows grad_out;
    Rows grad_query;              // of floats and added to, unless ``narrow`` or query_sums is there
    Rows grad_keys, grad_values;  // null, or of the call's element: a thread's key_sums and value_sums, lane by lane
    Index query_index, key_index;
    float* lse;         // [lanes, query_rows]
    float* key_sums;    // [pieces, batch, kv_heads, key_rows, padded_dim], added to; or [threads, key_rows, padded_dim]
    float* value_sums;  // the same
    float* query_sums;  // null, or [threads, query_rows, head_dim], where several parts add up to a narrow grad_query
    float* grad_bias;   // null, or [pieces, lanes, bias_columns], added to
    float* grad_spans;  // null, or [pieces, lanes, key_rows], added to
    float* grad_query_term;  // null, or as query_term, added to
    float* grad_key_term;    // null, or [pieces, lanes, term_keys, key_width], added to
    // Block lists as in BlockLayout; row_start is null for segments.
    const int64_t* row_start;
    const int32_t* columns;
    const int32_t* kind;
    const uint64_t* masks;     // [P, block_k, ceil(block_q / TILE)]: bit i of a word is query i
    const int32_t* key_range;  // null, or [range_batch, range_heads, query_slots, 2]
    // Fixed offsets as in OffsetsPart: those of head h lie from offset_start[h] on; offset_start is null for others.
    const int64_t* offset_start;
    const int64_t* offsets;
    int64_t offset_heads, most_offsets, begin, end;
    // Options.
    const int32_t* row_word;     // null, or [lanes, rows]: dropout
    const int32_t* column_word;  // the same
    const float* bias;           // null, or [heads, bias_columns], times log2(e)
    const float* spans;          // null, or [lanes, key_rows]
    // Terms: a row of numbers for each query, or key, by its position; which one a distance j - i has is in the column
    // of that distance, those beyond the ends as these.
    const float* query_term;       // null, or [lanes, term_queries, query_width]
    const float* key_term;         // null, or [lanes, term_keys, key_width]
    const int32_t* query_buckets;  // [query_distances]
    const int32_t* key_buckets;    // [key_distances]
    int64_t term_queries, term_keys, query_width, key_width, query_distances, key_distances;
    int64_t element, narrow;  // narrow: out (forward) or grad_query is of the call's element
    int64_t units;            // what multiplies 16-bit elements: 0 nothing, else as sa_hf_units says
    int64_t in_place, merge;  // merge: forward joins what out and lse have
    int64_t batch, heads, kv_heads, query_slots, key_slots, query_rows, key_rows, head_dim, padded_dim;
    int64_t query_first, key_first;  // position of slot 0 where there is no index
    int64_t query_offset;            // of the queries' positions among the keys', for bias, terms and spans
    int64_t list_batch, list_heads, block_q, block_k, range_batch, range_heads;
    int64_t query_segment, key_segment, skip_diagonal;
    int64_t left, right;  // of the band; FAR where unbounded
    int64_t bias_columns, extra_tokens, dropout_threshold, pieces, threads;
    double scale, softcap, ramp, keep;  // softcap 0: none; keep: 1 - dropout
};

// A step of decoding. What is read: runs of positions and listed ones. A position's *slot* is where the sequence has
// it, its *place* where the cache has that slot.
struct DecodeCall {
    Rows query;           // [batch, heads, queries, head_dim], of floats
    Rows key, value;      // of the call's element
    Rows out;             // [batch, heads, queries, value_dim], of floats
    const int64_t* rows;  // [num_rows, ROW]: batch, query, list, slot of position 0, position, first and end it reads
    const int64_t* run_start;  // [lists * list_heads + 1]
    const int64_t* runs;    // [runs, 3]: first, end, step; where ``relative``, distances back from the row's position
    const int64_t* index;   // null, or [index_batch, index_heads, queries, index_width]; -1 is empty
    const int64_t* order;   // null, or [batch, order_width]: the slots in the order of the positions
    const int64_t* kept;    // null, or [held]: the slot of each place, ascending
    const int64_t* labels;  // null, or by the steps below: of each place; rows then read the last ``most`` of theirs
    const int64_t* row_label;  // null, or [batch, heads, queries]
    const float* bias;         // null, or [heads, bias_columns]
    const float* spans;        // null, or by the steps below: of each place
    const float* sinks;        // null, or [heads]
    int64_t num_rows, heads, kv_heads, lanes, list_heads, queries, head_dim, value_dim, held, base;
    int64_t relative, skip_own, own_if_empty, index_batch, index_heads, index_width, unit, order_width;
    int64_t label_batch_step, label_head_step, most, span_batch_step, span_head_step, bias_columns;
    int64_t element, threads;
    double scale, softcap, ramp;  // softcap 0: none
};

// A choice of blocks; ``query`` and ``pooled``: [batch, heads | kv_heads, rows | blocks, depth], rows of floats.
struct ChoiceCall {
    Rows query, pooled;
    const int64_t* reach;  // [rows, 2]: the first eligible block and the one behind the last
    int64_t* out;          // [batch, heads / together, rows, most]
    int64_t batch, heads, kv_heads, rows, depth, together, most;  // together: query heads that make one choice
};

// A choice of clusters; ``query`` and ``key``: [batch, heads | kv_heads, rows, depth], rows of floats.
struct ClusterCall {
    Rows query, key;
    const float* centroids;  // [kv_heads, count, depth]
    const float* cosine;     // null, or [angle_batch, rows, turned]: of the angles by which the halves of the first
    const float* sine;       // ``turned`` elements were turned against each other, and are turned back
    int64_t* of_queries;     // [batch, heads, rows]
    int64_t* of_keys;        // [batch, kv_heads, rows]
    int64_t batch, heads, kv_heads, rows, depth, count, turned, angle_batch;
};

// The CPU kernels: what Python calls (kernels.py). Compiled at first use by build.py, as one unit.

#include "choices.h"
#include "decode.h"
#include "offsets.h"

// -- the calls: tiles go to whichever thread is free; no result depends on which one that is --------------------------

template <class M>
static void forward(const Call& c) {
    const int64_t per_lane = Tile::count(c), tiles = c.batch * c.heads * per_lane;
    // Rows of many more entries than the mean (those of global queries) first, else one thread ends up with them alone.
    int64_t lists = c.row_start ? c.list_batch * c.list_heads * ceil_div(c.query_slots, c.block_q) : 1;
    const int64_t heavy = c.row_start ? 4 * ceil_div(c.row_start[lists], lists) : INT64_MAX;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads((int)c.threads)
    {
        const Unit unit(c);
        float* work = buffer(std::max(M::elements(c), Pairs::elements(c)));
        for (int64_t x; (x = next++) < 2 * tiles;) {
            Tile t(c, x % tiles / per_lane, x % per_lane, M::GRAIN);
            if (t.rows > 0 && (t.weight(c) > heavy) == (x < tiles))
                (elementwise(c) ? forward_offsets<typename M::Element> : forward_tile<M>)(c, t, work);
        }
        free(work);
    }
}

// A lane's gradients from a thread's sums, [count, step] of floats.
template <class E>
static void write_lane(const float* sums, int64_t step, int64_t count, const Rows& to, int64_t lane, int64_t heads,
                       int64_t depth) {
    E* row = to.of<E>(lane / heads, lane % heads);
    for (int64_t n = 0; n < count; ++n) convert(sums + n * step, row + n * to.step, depth);
}

template <class M>
static void backward_lane(const Call* calls, int64_t count, int64_t lane, int64_t piece, int64_t own, float* work) {
    typedef typename M::Element E;
    const Sums s(*calls, lane, piece, own);
    const int64_t query_elements = calls->query_rows * calls->head_dim;
    if (s.query != nullptr) std::fill(s.query, s.query + query_elements, 0.0f);
    for (const Call* call = calls; call < calls + count; ++call)
        for (int64_t number = piece; number < Tile::count(*call); number += call->pieces) {
            Tile t(*call, lane, number, M::GRAIN);
            if (t.rows > 0) (elementwise(*call) ? backward_offsets<E> : backward_tile<M>)(*call, t, s, work);
        }
    if (s.query != nullptr)
        write_lane<E>(s.query, calls->head_dim, calls->query_rows, calls->grad_query, lane, calls->heads,
                      calls->head_dim);
}

template <class M>
static void backward(const Call* calls, int64_t count) {
    typedef typename M::Element E;
    const Call& c = *calls;
    const int64_t key_lanes = c.batch * c.kv_heads, group = c.heads / c.kv_heads, keys = c.key_rows * c.padded_dim;
    int64_t elements = M::elements(c);
    for (int64_t n = 0; n < count; ++n) elements = std::max(elements, Pairs::elements(calls[n]));
    std::atomic<int64_t> next{0}, threads{0};
#pragma omp parallel num_threads((int)c.threads)
    {
        const Unit unit(c);
        int64_t own = -1;
        float* work = buffer(elements);
        // One thread at a time has a key lane's piece: every gradient is summed in one order.
        for (int64_t x; (x = next++) < key_lanes * c.pieces;) {
            const int64_t key_lane = x / c.pieces, piece = x % c.pieces;
            if (own < 0) own = threads++;  // of those at work
            const Sums s(c, key_lane * group, piece, own);
            if (c.grad_keys.data != nullptr)
                for (float* sums : {s.key, s.value}) std::fill(sums, sums + keys, 0.0f);
            for (int64_t lane = key_lane * group; lane < (key_lane + 1) * group; ++lane)
                backward_lane<M>(calls, count, lane, piece, own, work);
            if (c.grad_keys.data == nullptr) continue;
            write_lane<E>(s.key, c.padded_dim, c.key_rows, c.grad_keys, key_lane, c.kv_heads, c.head_dim);
            write_lane<E>(s.value, c.padded_dim, c.key_rows, c.grad_values, key_lane, c.kv_heads, c.head_dim);
        }
        free(work);
    }
}

// run(operands) with those that serve a call.
template <class Run>
static void by_element(const Call& c, Run run) {
#if defined(SA_HF_PAIRS)
    if (c.element == BF16 && c.units != 0) return run((Paired*)nullptr);
#endif
    if (c.element == BF16)
        run((Widened<Bf16>*)nullptr);
    else if (c.element == FP16)
        run((Widened<Fp16>*)nullptr);
    else
        run((Widened<float>*)nullptr);
}

extern "C" void sa_hf_forward(const Call* call) {
    by_element(*call, [&](auto* operands) { forward<std::remove_pointer_t<decltype(operands)>>(*call); });
}

// The parts of a plan, one after the other for each lane.
extern "C" void sa_hf_backward(const Call* calls, int64_t count) {
    by_element(*calls, [&](auto* operands) { backward<std::remove_pointer_t<decltype(operands)>>(calls, count); });
}

extern "C" int sa_hf_decode(const DecodeCall* call) {
    switch (call->element) {
        case FLOAT:
            return decode<float>(*call);
        case BF16:
            return decode<Bf16>(*call);
        default:
            return decode<Fp16>(*call);
    }
}

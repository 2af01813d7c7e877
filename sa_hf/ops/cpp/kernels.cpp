// The CPU kernels: what Python calls (kernels.py). Compiled at first use by build.py, as one unit.

#include "decode.h"
#include "offsets.h"

// -- the calls: tiles go to whichever thread is free; no result depends on which one that is --------------------------

extern "C" void sa_hf_forward(const Call* call) {
    const Call& c = *call;
    const int64_t per_lane = Tile::count(c), tiles = c.batch * c.heads * per_lane;
    // Rows of many more entries than the mean (those of global queries) first, else one thread ends up with them alone.
    int64_t lists = c.row_start ? c.list_batch * c.list_heads * ceil_div(c.query_slots, c.block_q) : 1;
    const int64_t heavy = c.row_start ? 4 * ceil_div(c.row_start[lists], lists) : INT64_MAX;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads((int)c.threads)
    {
        float* work = buffer(std::max(TILE * (4 * c.head_dim + TILE), Pairs::elements(c)));
        for (int64_t x; (x = next++) < 2 * tiles;) {
            Tile t(c, x % tiles / per_lane, x % per_lane);
            if (t.rows > 0 && (t.weight(c) > heavy) == (x < tiles))
                (c.offset_start ? forward_offsets : forward_tile)(c, t, work);
        }
        free(work);
    }
}

extern "C" void sa_hf_backward(const Call* call) {
    const Call& c = *call;
    const int64_t per_lane = Tile::count(c), key_lanes = c.batch * c.kv_heads, group = c.heads / c.kv_heads;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads((int)c.threads)
    {
        float* work = buffer(std::max(Work::elements(c), Pairs::elements(c)));
        // One thread at a time has a key lane's piece: every gradient is summed in one order.
        for (int64_t x; (x = next++) < key_lanes * c.pieces;)
            for (int64_t lane = x / c.pieces * group; lane < (x / c.pieces + 1) * group; ++lane)
                for (int64_t number = x % c.pieces; number < per_lane; number += c.pieces) {
                    Tile t(c, lane, number);
                    if (t.rows > 0) (c.offset_start ? backward_offsets : backward_tile)(c, t, x % c.pieces, work);
                }
        free(work);
    }
}

extern "C" int sa_hf_decode(const DecodeCall* call) {
    switch (call->element) {
        case 0:
            return decode<0>(*call);
        case 1:
            return decode<1>(*call);
        default:
            return decode<2>(*call);
    }
}

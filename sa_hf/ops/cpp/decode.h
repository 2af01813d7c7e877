// A step of decoding: a few queries, each over keys of its own, which are read where they lie.
//
// Shapes: a lane's step has ``group`` query heads and meets its keys in chunks of CHUNK: query [group, head_dim],
// scores [group, CHUNK], acc [group, value_dim], both widths in whole vectors of W; peak and total [group].
#pragma once

#include "operands.h"

constexpr int ROW = 7, CHUNK = 128, MOST_SPLITS = 16;
// Multiplications of a call below which a second thread costs more than it takes over, and keys worth a split.
constexpr int64_t WORTH_A_THREAD = 1 << 17, WORTH_A_SPLIT = 512;

// The softmax of one row's heads of a lane, so far.
template <class T>
struct Step {
    const DecodeCall& c;
    const int64_t* row;
    const int64_t lane, group, first_head, key_head, split, splits;
    int64_t count = 0, chunk = 0, taken = 0, own_times = 0, near = -1;
    int* missing;
    float *query, *scores, *acc, *peak, *total;
    int64_t places[CHUNK];
    int32_t distance[CHUNK];
    float gate[CHUNK];

    static int64_t padded(int64_t depth) { return ceil_div(depth, W) * W; }
    static int64_t elements(const DecodeCall& c) {
        const int64_t group = c.heads / c.lanes;
        return group * (padded(c.head_dim) + CHUNK + padded(c.value_dim) + 2);
    }
    static int64_t result(const DecodeCall& c) { return c.heads / c.lanes * (padded(c.value_dim) + 2); }

    Step(const DecodeCall& call, int64_t number, int64_t at, int64_t part, int64_t parts, float* work, int* flag)
        : c(call),
          row(call.rows + number * ROW),
          lane(at),
          group(call.heads / call.lanes),
          first_head(at * group),
          key_head(first_head / (call.heads / call.kv_heads)),
          split(part),
          splits(parts),
          missing(flag) {
        acc = work;
        peak = acc + group * padded(c.value_dim);
        total = peak + group;
        query = total + group;
        scores = query + group * padded(c.head_dim);
        std::fill(acc, query, 0.0f);
        std::fill(peak, peak + group, -INF);
        const float factor = c.softcap != 0 ? (float)(c.scale / c.softcap) : (float)c.scale * LOG2E;
        for (int64_t g = 0; g < group; ++g) {
            const float* from = c.query.of<float>(row[0], first_head + g) + row[1] * c.query.step;
            float* to = query + g * padded(c.head_dim);
            for (int64_t d = 0; d < padded(c.head_dim); ++d) to[d] = d < c.head_dim ? from[d] * factor : 0;
        }
    }

    int64_t position() const { return row[4]; }

    // -- which keys ---------------------------------------------------------------------------------------------------

    int64_t place_of(int64_t at) {
        int64_t slot = row[3] + at;
        if (c.order != nullptr) slot = slot < c.order_width ? c.order[row[0] * c.order_width + slot] : -1;
        int64_t place = slot - c.base;
        if (c.kept != nullptr) {
            place = near + 1;
            if (place >= c.held || c.kept[place] != slot)
                place = std::lower_bound(c.kept, c.kept + c.held, slot) - c.kept;
            if (place < c.held && c.kept[place] != slot) place = -1;
            near = place;
        }
        if (place >= 0 && place < c.held) return place;
        // A cache drops a key whose spans have ended: no query here would give it weight.
        if (c.kept == nullptr || c.spans == nullptr) *missing = 1;
        return -1;
    }

    void push(int64_t at) {
        if (c.skip_own && at == position()) {
            ++own_times;
            return;
        }
        take(at, place_of(at));
    }

    void take(int64_t at, int64_t place) {
        if (place < 0) return;
        const int64_t back = position() - at;
        if (c.spans != nullptr) {
            // The soft gate of Expire-Span (equation 6 of the paper).
            float span = c.spans[row[0] * c.span_batch_step + first_head * c.span_head_step + place];
            float m = back == 0 ? 1.0f : std::min(1.0f, 1.0f + (span - (float)back) / (float)c.ramp);
            if (m <= 0) return;
            gate[count] = m;
        }
        places[count] = place;
        fetch(key_row(count), c.head_dim);
        distance[count] = (int32_t)back;
        ++taken;
        if (++count == CHUNK) flush();
    }

    void run() {
        const int64_t low = row[5], high = row[6], i = position();
        const int64_t list = row[2] * c.list_heads + lane * c.list_heads / c.lanes;
        for (int64_t r = c.run_start[list]; r < c.run_start[list + 1]; ++r) {
            int64_t a = c.runs[3 * r], b = c.runs[3 * r + 1], step = c.runs[3 * r + 2];
            if (c.relative) {
                for (int64_t d = a; d < b && i - d >= low; d += step)
                    if (i - d < high) push(i - d);
            } else {
                if (a < low) a += ceil_div(low - a, step) * step;
                for (b = std::min(b, high); a < b; a += step) push(a);
            }
        }
        if (c.index != nullptr) {
            const int64_t batch = c.index_batch > 1 ? row[0] : 0, head = lane * c.index_heads / c.lanes;
            const int64_t* listed = c.index + ((batch * c.index_heads + head) * c.queries + row[1]) * c.index_width;
            for (int64_t x = 0; x < c.index_width; ++x)
                if (listed[x] >= 0)
                    for (int64_t at = std::max(listed[x] * c.unit, low); at < std::min((listed[x] + 1) * c.unit, high);
                         ++at)
                        push(at);
        }
        if (c.labels != nullptr) run_labels(low);
        if (taken == 0)
            for (own_times = std::max(own_times, c.own_if_empty); own_times > 0; --own_times) take(i, place_of(i));
        if (count > 0) flush();
    }

    // The row's own key and the last ``most`` before it that have its label.
    void run_labels(int64_t low) {
        const int64_t own = place_of(position());
        if (own < 0) return;
        const int64_t* of = c.labels + row[0] * c.label_batch_step + key_head * c.label_head_step;
        const int64_t mine = c.row_label[(row[0] * c.heads + first_head) * c.queries + row[1]];
        take(position(), own);
        int64_t left = c.most;
        for (int64_t place = own - 1; place >= 0 && left > 0;) {
            const int64_t next = std::max<int64_t>(place - 16, -1);
            if (place - next == 16 && !holds(of + next + 1, mine)) place = next;  // most have none
            for (; place > next && left > 0; --place) {
                const int64_t at = (c.kept != nullptr ? c.kept[place] : place + c.base) - row[3];
                if (at < low) return;
                if (of[place] == mine) take(at, place), --left;
            }
        }
    }
    static bool holds(const int64_t* sixteen, int64_t label) {
        int64_t found = 0;
        for (int x = 0; x < 16; ++x) found |= sixteen[x] == label;
        return found != 0;
    }

    // -- their softmax ------------------------------------------------------------------------------------------------

    const T* key_row(int64_t j) const { return c.key.of<const T>(row[0], key_head) + places[j] * c.key.step; }
    const T* value_row(int64_t j) const { return c.value.of<const T>(row[0], key_head) + places[j] * c.value.step; }

    // Ask for a row before its turn: a cache's keys lie in no near memory, and a step reads each once.
    static void fetch(const T* row, int64_t depth) {
        for (const char* at = (const char*)row; at < (const char*)(row + depth); at += 64) __builtin_prefetch(at);
    }

    void flush() {
        const int64_t n = count, number = chunk++;
        count = 0;
        if (number % splits != split) return;
        products(n);
        for (int64_t g = 0; g < group; ++g) softmax(g, n);
        int64_t g = 0;
        for (; g + 4 <= group; g += 4) add_values<4>(g, n);
        if (g + 2 <= group) add_values<2>(g, n), g += 2;
        if (g < group) add_values<1>(g, n);
    }

    // Scores [group, CHUNK] of the chunk's keys.
    void products(int64_t n) {
        if (c.head_dim == 64)
            products_of<64>(n);
        else if (c.head_dim == 128)
            products_of<128>(n);
        else
            products_of<0>(n);
    }

    // DIM: the head_dim, or 0 where it is any.
    template <int DIM>
    void products_of(int64_t n) {
        const int64_t depth = padded(c.head_dim), whole = (DIM ? DIM : c.head_dim) / W * W;
        for (int64_t j0 = 0; j0 < n; j0 += W) {
            const T* keys[W];
            for (int j = 0; j < W; ++j) {
                keys[j] = key_row(std::min(j0 + j, n - 1));
                fetch(value_row(std::min(j0 + j, n - 1)), c.value_dim);
            }
            for (int64_t g = 0; g < group; ++g) {
                const float* q = query + g * depth;
                vf sum[W];
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) {
                    vf s = {};
#pragma GCC unroll 8
                    for (int64_t d = 0; d < whole; d += W) s += load(keys[j] + d) * load(q + d);
                    if (DIM == 0 && whole < c.head_dim)
                        s += load_part(keys[j] + whole, c.head_dim - whole) * load(q + whole);
                    sum[j] = s;
                }
                transpose_block(sum);
                for (int step = W / 2; step > 0; step /= 2)
                    for (int j = 0; j < step; ++j) sum[j] += sum[j + step];
                store(scores + g * CHUNK + j0, sum[0]);
            }
        }
    }

    void softmax(int64_t g, int64_t n) {
        float* s = scores + g * CHUNK;
        const int64_t end = padded(n);
        for (int64_t j = n; j < end; ++j) s[j] = -INF;
        if (c.softcap != 0)
            for (int64_t j = 0; j < end; j += W) {
                vf bent = tanh(load(s + j)) * ((float)c.softcap * LOG2E);
                for (int k = 0; k < W; ++k)
                    if (j + k < n) s[j + k] = bent[k];
            }
        if (c.bias != nullptr) {
            const float* table = c.bias + (first_head + g) * c.bias_columns;
            const int64_t centre = (c.bias_columns + 1) / 2 - 1;
            for (int64_t j = 0; j < n; ++j)
                s[j] += table[std::clamp<int64_t>(-distance[j], -centre, centre) + centre] * LOG2E;
        }
        vf most = splat(-INF);
        for (int64_t j = 0; j < end; j += W) most = larger(load(s + j), most);
        float high = peak[g];
        for (int k = 0; k < W; ++k) high = most[k] > high ? most[k] : high;
        const float shift = high == -INF ? 0.0f : high;
        const float decay = exp2(splat(peak[g] - shift))[0];
        vf sum = {};
        for (int64_t j = 0; j < end; j += W) {
            vf p = exp2(load(s + j) - shift);
            if (c.spans != nullptr) p *= load(gate + j);
            store(s + j, p);
        }
        if (c.spans != nullptr)
            for (int64_t j = n; j < end; ++j) s[j] = 0;
        for (int64_t j = 0; j < end; j += W) sum += load(s + j);
        total[g] = total[g] * decay + lanes_sum(sum);
        peak[g] = high;
        if (decay != 1.0f)
            for (int64_t d = 0; d < padded(c.value_dim); d += W) {
                float* at = acc + g * padded(c.value_dim) + d;
                store(at, load(at) * decay);
            }
    }

    template <int G>
    void add_values(int64_t g, int64_t n) {
        const int64_t depth = padded(c.value_dim), whole = c.value_dim / W * W;
        int64_t d = 0;
        for (; d + 4 * W <= whole; d += 4 * W) add_columns<G, 4>(g, n, d);
        for (; d < whole; d += W) add_columns<G, 1>(g, n, d);
        if (d < c.value_dim)
            for (int64_t j = 0; j < n; ++j) {
                vf v = load_part(value_row(j) + d, c.value_dim - d);
                for (int x = 0; x < G; ++x) {
                    float* at = acc + (g + x) * depth + d;
                    store(at, load(at) + v * scores[(g + x) * CHUNK + j]);
                }
            }
    }

    template <int G, int V>
    void add_columns(int64_t g, int64_t n, int64_t d) {
        const int64_t depth = padded(c.value_dim);
        vf sum[G][V];
        for (int x = 0; x < G; ++x)
            for (int v = 0; v < V; ++v) sum[x][v] = load(acc + (g + x) * depth + d + v * W);
        for (int64_t j = 0; j < n; ++j) {
            const T* from = value_row(j) + d;
            vf values[V];
            for (int v = 0; v < V; ++v) values[v] = load(from + v * W);
            for (int x = 0; x < G; ++x) {
                const float p = scores[(g + x) * CHUNK + j];
                for (int v = 0; v < V; ++v) sum[x][v] += values[v] * p;
            }
        }
        for (int x = 0; x < G; ++x)
            for (int v = 0; v < V; ++v) store(acc + (g + x) * depth + d + v * W, sum[x][v]);
    }

    // Join what another split has: acc, peak, total.
    void join(const float* other) {
        const int64_t depth = padded(c.value_dim);
        for (int64_t g = 0; g < group; ++g) {
            const float theirs = other[group * depth + g], high = std::max(peak[g], theirs);
            if (theirs == -INF && other[group * depth + group + g] == 0) continue;
            const float shift = high == -INF ? 0.0f : high;
            const float a = exp2(splat(peak[g] - shift))[0], b = exp2(splat(theirs - shift))[0];
            for (int64_t d = 0; d < depth; ++d) acc[g * depth + d] = acc[g * depth + d] * a + other[g * depth + d] * b;
            total[g] = total[g] * a + other[group * depth + group + g] * b;
            peak[g] = high;
        }
    }

    void write() const {
        for (int64_t g = 0; g < group; ++g) {
            float* to = c.out.of<float>(row[0], first_head + g) + row[1] * c.out.step;
            float sum = total[g];
            if (c.sinks != nullptr && sum != 0) sum += exp2(splat(c.sinks[first_head + g] * LOG2E - peak[g]))[0];
            const float factor = sum == 0 ? 0.0f : 1.0f / sum;
            for (int64_t d = 0; d < c.value_dim; ++d) to[d] = acc[g * padded(c.value_dim) + d] * factor;
        }
    }
};

static int64_t keys_at_most(const DecodeCall& c) {
    int64_t most = 0;
    for (int64_t r = 0; r < c.num_rows; ++r) {
        const int64_t* row = c.rows + r * ROW;
        const int64_t list = row[2] * c.list_heads;
        int64_t keys = c.index_width * c.unit + (c.labels != nullptr ? c.most + 1 : 0);
        for (int64_t x = c.run_start[list]; x < c.run_start[list + 1]; ++x) {
            int64_t a = c.runs[3 * x], b = c.runs[3 * x + 1];
            if (!c.relative) a = std::max(a, row[5]), b = std::min(b, row[6]);
            if (a < b) keys += ceil_div(b - a, c.runs[3 * x + 2]);
        }
        most = std::max(most, keys);
    }
    return most;
}

// 0, or 1 where a listed key is not in the cache.
template <class T>
static int decode(const DecodeCall& c) {
    typedef Step<T> S;
    const int64_t keys = keys_at_most(c), units = c.num_rows * c.lanes;
    const bool alone = c.threads == 1 || keys * units * (c.heads / c.lanes) * c.head_dim < WORTH_A_THREAD;
    int64_t splits = 1;
    if (!alone && units < 2 * c.threads)
        splits = std::max<int64_t>(
            1, std::min({ceil_div(2 * c.threads, units), keys / WORTH_A_SPLIT, (int64_t)MOST_SPLITS}));
    const int64_t size = ceil_div(S::elements(c), 16) * 16;
    float* parts = splits > 1 ? buffer(units * splits * S::result(c)) : nullptr;
    // Lanes that read the keys of one head one after the other, from the near memory of one core.
    const int64_t together = splits == 1 && units >= 2 * c.threads * c.lanes / c.kv_heads ? c.lanes / c.kv_heads : 1;
    std::atomic<int64_t> next{0};
    int missing = 0;
#pragma omp parallel num_threads((int)c.threads) if (!alone) reduction(| : missing)
    {
        float* work = buffer(size);
        int found = 0;
        for (int64_t first; (first = next.fetch_add(together)) < units * splits;)
            for (int64_t x = first; x < first + together; ++x) {
                S step(c, x / splits / c.lanes, x / splits % c.lanes, x % splits, splits, work, &found);
                step.run();
                if (splits == 1)
                    step.write();
                else
                    std::copy(work, work + S::result(c), parts + x * S::result(c));
            }
        missing |= found;
        free(work);
    }
    if (splits > 1) {
        float* work = buffer(size);
        for (int64_t u = 0; u < units; ++u) {
            S step(c, u / c.lanes, u % c.lanes, 0, 1, work, &missing);
            for (int64_t s = 0; s < splits; ++s) step.join(parts + (u * splits + s) * S::result(c));
            step.write();
        }
        free(work);
    }
    free(parts);
    return missing;
}

// What a step of decoding chooses by content: the centroid next to a vector, the blocks whose pooled keys fit a query.
//
// Shapes: query and key rows [depth]; pooled keys [blocks, depth]; centroids [kv_heads, count, depth]; what is chosen
// [batch, heads, rows] (clusters), with ``most`` of each (blocks).
#pragma once

#include <vector>

#include "call.h"
#include "vectors.h"

typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef double eight_wide __attribute__((vector_size(64)));

// Summed in fp64, as the choices of a whole forward are.
static double wide_product(const double* a, const float* b, int64_t depth) {
    eight_wide sums = {};
    int64_t d = 0;
    for (; d + 8 <= depth; d += 8) {
        eight_wide x;
        std::memcpy(&x, a + d, sizeof x);
        sums += x * __builtin_convertvector(*(const eight*)(b + d), eight_wide);
    }
    double sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    for (; d < depth; ++d) sum += a[d] * (double)b[d];
    return sum;
}

// A score and a block as one number: by the score as a float, equal ones the lower block first (``ranked`` in Python).
static int64_t ranked(double score, int64_t block) {
    float rounded = (float)score;
    rounded = (rounded < -__FLT_MAX__ ? -__FLT_MAX__ : rounded) + 0.0f;  // + 0: the two zeros are equal
    int32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits ^= (bits >> 31) & 0x7fffffff;
    return (int64_t)bits * ((int64_t)1 << 32) + (((int64_t)1 << 31) - 1 - block);
}

// The blocks of the highest scores, ascending; -1 behind them where there are fewer.
extern "C" void sa_hf_choose(const ChoiceCall* call) {
    const ChoiceCall& c = *call;
    const int64_t choosing = c.heads / c.together, group = c.heads / c.kv_heads;
    std::vector<double> vector(c.depth);
    std::vector<int64_t> scores;
    for (int64_t x = 0; x < c.batch * choosing * c.rows; ++x) {
        const int64_t row = x % c.rows, head = x / c.rows % choosing * c.together, batch = x / c.rows / choosing;
        const float* pooled = c.pooled.of<float>(batch, head / group);
        int64_t* out = c.out + x * c.most;
        std::fill(vector.begin(), vector.end(), 0.0);
        for (int64_t h = head; h < head + c.together; ++h) {
            const float* from = c.query.of<float>(batch, h) + row * c.query.step;
            for (int64_t d = 0; d < c.depth; ++d) vector[d] += (double)from[d];
        }
        scores.clear();
        for (int64_t block = c.reach[2 * row]; block < c.reach[2 * row + 1]; ++block)
            scores.push_back(ranked(wide_product(vector.data(), pooled + block * c.pooled.step, c.depth), block));
        const int64_t count = std::min<int64_t>(c.most, scores.size());
        if (count < (int64_t)scores.size())
            std::nth_element(scores.begin(), scores.begin() + count, scores.end(), std::greater<int64_t>());
        for (int64_t n = 0; n < c.most; ++n)
            out[n] = n < count ? ((int64_t)1 << 31) - 1 - (scores[n] & 0xffffffff) : -1;
        std::sort(out, out + count);
    }
}

static void turn_back(const ClusterCall& c, int64_t batch, int64_t row, const float* from, float* to) {
    std::copy(from, from + c.depth, to);
    if (c.cosine == nullptr) return;
    const int64_t at = ((c.angle_batch > 1 ? batch : 0) * c.rows + row) * c.turned, half = c.turned / 2;
    const float *x = c.cosine + at, *y = c.sine + at;
    for (int64_t d = 0, e = half; d < half; ++d, ++e) {
        const float low = from[d], high = from[e];
        to[d] = (low * x[d] + high * y[d]) / (x[d] * x[d] + y[d] * y[d]);
        to[e] = (high * x[e] - low * y[e]) / (x[e] * x[e] + y[e] * y[e]);
    }
}

static float product_of(const float* a, const float* b, int64_t depth) {
    vf sums = {};
    int64_t d = 0;
    for (; d + W <= depth; d += W) sums += load(a + d) * load(b + d);
    float sum = lanes_sum(sums);
    for (; d < depth; ++d) sum += a[d] * b[d];
    return sum;
}

// A centroid of length 1, less its mean: its product with a vector is, but for a factor, that with the vector's
// LayerNorm.
static void centred(const float* from, int64_t depth, float* to) {
    vf squares = {}, sums = {};
    int64_t d = 0;
    for (; d + W <= depth; d += W) {
        const vf x = load(from + d);
        squares += x * x;
        sums += x;
    }
    float square = lanes_sum(squares), sum = lanes_sum(sums);
    for (; d < depth; ++d) square += from[d] * from[d], sum += from[d];
    const float factor = 1.0f / std::max(std::sqrt(square), 1e-12f), mean = sum / (float)depth;
    for (d = 0; d < depth; ++d) to[d] = (from[d] - mean) * factor;
}

// The first of the centroids that are the nearest to the LayerNorm of each query and key.
extern "C" void sa_hf_nearest(const ClusterCall* call) {
    const ClusterCall& c = *call;
    const int64_t group = c.heads / c.kv_heads, total = c.batch * c.rows * (group + 1);
    std::vector<float> vectors(total * c.depth), unit(c.depth), most(total);
    std::vector<int64_t*> out(total);
    for (int64_t head = 0; head < c.kv_heads; ++head) {
        for (int64_t n = 0; n < total; ++n) {
            const int64_t of = n % (group + 1), row = n / (group + 1) % c.rows, batch = n / (group + 1) / c.rows;
            const int64_t own = of < group ? head * group + of : head;
            const Rows& rows = of < group ? c.query : c.key;
            turn_back(c, batch, row, rows.of<float>(batch, own) + row * rows.step, vectors.data() + n * c.depth);
            out[n] = of < group ? c.of_queries + (batch * c.heads + own) * c.rows + row
                                : c.of_keys + (batch * c.kv_heads + own) * c.rows + row;
            *out[n] = 0;
            most[n] = -INF;
        }
        for (int64_t k = 0; k < c.count; ++k) {
            centred(c.centroids + (head * c.count + k) * c.depth, c.depth, unit.data());
            for (int64_t n = 0; n < total; ++n) {
                const float score = product_of(vectors.data() + n * c.depth, unit.data(), c.depth);
                if (score > most[n]) most[n] = score, *out[n] = k;
            }
        }
    }
}

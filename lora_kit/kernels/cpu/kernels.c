/* What a CPU with AVX-512 bf16 computes here: attention inside packed examples, linear maps, norms, gated activations,
   cross-entropy and rotary positions, in bf16 with sums in fp32. kernels/cpu.py compiles this file and says what the
   arguments are.

   Products take their right side in pairs: `vdpbf16ps` multiplies two numbers of each lane and adds both, so what is
   summed over lies in pairs, [pairs][lanes][2]. Rows and columns are padded with zeros to multiples of STEP. No two
   tasks add to the same number and no order depends on the number of threads, so a replay has the same bits. */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#ifdef __clang__
EXPORT const char *const COMPILER = __VERSION__;
#else
EXPORT const char *const COMPILER = "gcc " __VERSION__;
#endif

typedef uint16_t bf16;
typedef __m512 floats; /* 16 lanes */

enum { LANES = 16, STEP = 32, ROWS = 8, TILE = 64 };
static const float HIDDEN = -1e30f, LOG2_E = 1.4426950408889634f;

#define UNROLLED _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

static long padded(long count) { return (count + STEP - 1) / STEP * STEP; }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

/* The first `count` lanes; all from 16 on. */
INLINE __mmask16 first(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

INLINE floats load(const bf16 *from, __mmask16 which) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16));
}

INLINE void store(bf16 *to, __mmask16 which, floats value) {
    _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(value));
}

INLINE floats rounded(floats value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value)), 16));
}

/* 2^x to 1e-7 of it, for x up to 127: by a polynomial between -1/2 and 1/2. */
INLINE floats power_of_2(floats x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200), x); /* in this order what is no number stays none */
    floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = x - whole;
    floats sum = _mm512_set1_ps(1.32764710e-3f);
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.67554160e-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.55071328e-2f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.40221197e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.93146967e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* ---- products ---- */

/* Add left [8][pairs][2] times right [pairs][32][2] to `sums`, 8 rows of 32, or of 16 that are not `wide`; rows and
   pairs of the left side are `left_row` and `left_pair` numbers apart, pairs of the right side `right_row` lanes. */
INLINE void multiply(floats sums[ROWS][2], const bf16 *left, long left_row, long left_pair, const bf16 *right,
                     long right_row, long pairs, int wide) {
    for (long pair = 0; pair < pairs; pair++) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(right + pair * right_row * 2);
        __m512bh high = (__m512bh)_mm512_loadu_si512(right + pair * right_row * 2 + 2 * LANES);
        UNROLLED for (int row = 0; row < ROWS; row++) {
            int both;
            memcpy(&both, left + row * left_row + pair * left_pair, sizeof both);
            __m512bh one = (__m512bh)_mm512_set1_epi32(both);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], one, low);
            if (wide) sums[row][1] = _mm512_dpbf16_ps(sums[row][1], one, high);
        }
    }
}

INLINE void clear(floats sums[ROWS][2]) {
    UNROLLED for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
}

/* Add a product to `sums` [rows][columns] in memory, whose rows are `width` numbers apart. */
static void add_product(float *sums, long width, const bf16 *left, long left_row, long left_pair, const bf16 *right,
                        long right_row, long rows, long columns, long pairs) {
    for (long column = 0; column < columns; column += STEP)
        for (long row = 0; row < rows; row += ROWS) {
            float *at = sums + row * width + column;
            floats part[ROWS][2];
            UNROLLED for (int r = 0; r < ROWS; r++) {
                part[r][0] = _mm512_loadu_ps(at + r * width);
                part[r][1] = _mm512_loadu_ps(at + r * width + LANES);
            }
            multiply(part, left + row * left_row, left_row, left_pair, right + column * 2, right_row, pairs, 1);
            UNROLLED for (int r = 0; r < ROWS; r++) {
                _mm512_storeu_ps(at + r * width, part[r][0]);
                _mm512_storeu_ps(at + r * width + LANES, part[r][1]);
            }
        }
}

/* Copy `count` rows of `width` numbers, `apart` from each other, into `target` [padded count][padded width]. */
static void copy_rows(bf16 *target, const bf16 *source, long apart, long count, long width) {
    long wide = padded(width);
    memset(target + count * wide, 0, (padded(count) - count) * wide * sizeof(bf16));
    for (long row = 0; row < count; row++) {
        memcpy(target + row * wide, source + row * apart, width * sizeof(bf16));
        memset(target + row * wide + width, 0, (wide - width) * sizeof(bf16));
    }
}

/* Put rows [rows][columns], `apart` numbers from each other, in pairs of rows, [rows / 2][padded columns][2]. */
static void pair_rows(bf16 *target, const bf16 *source, long apart, long rows, long columns) {
    long wide = padded(columns);
    for (long row = 0; row < rows; row += 2)
        for (long column = 0; column < wide; column += LANES) {
            const bf16 *at = source + row * apart + column;
            __mmask16 which = first(columns - column), other = row + 1 < rows ? which : 0;
            __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, at));
            __m512i two = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(other, at + apart));
            __m512i both = _mm512_or_si512(one, _mm512_slli_epi32(two, 16));
            _mm512_storeu_si512(target + row * wide + column * 2, both);
        }
}

/* Turn words of 32 bits, [rows][columns], into [columns][rows]; both are multiples of 16. Rows of the target and of the
   source are `apart` and `source_apart` words apart. */
static void transpose(void *target, long apart, const void *source, long source_apart, long rows, long columns) {
    for (long row = 0; row < rows; row += LANES)
        for (long column = 0; column < columns; column += LANES) {
            __m512i a[LANES], b[LANES];
            const int32_t *from = (const int32_t *)source + row * source_apart + column;
            int32_t *to = (int32_t *)target + column * apart + row;
            UNROLLED for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * source_apart);
            UNROLLED for (int i = 0; i < 16; i += 2) {
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            UNROLLED for (int i = 0; i < 16; i += 4) {
                a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
                a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
                a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
            }
            UNROLLED for (int i = 0; i < 4; i++) { /* a[4 r + i]: column 4 q + i of rows 4 r to 4 r + 3 in quarter q */
                __m512i even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
                __m512i odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
                __m512i even_2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
                __m512i odd_2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
                _mm512_storeu_si512(to + i * apart, _mm512_shuffle_i32x4(even, even_2, 0x88));
                _mm512_storeu_si512(to + (i + 4) * apart, _mm512_shuffle_i32x4(odd, odd_2, 0x88));
                _mm512_storeu_si512(to + (i + 8) * apart, _mm512_shuffle_i32x4(even, even_2, 0xdd));
                _mm512_storeu_si512(to + (i + 12) * apart, _mm512_shuffle_i32x4(odd, odd_2, 0xdd));
            }
        }
}

/* ---- attention ---- */

struct attention {
    const bf16 *query, *key, *value;
    bf16 *output;
    float *sums; /* [heads][length], of each row of scores: the logarithm, to base 2, of the sum of their powers */
    const int32_t *tiles; /* [examples][3]: begin, begin, end */
    long examples, length, heads, key_heads, width, window;
    float scale;
    const bf16 *gradient;
    bf16 *of_query, *of_key, *of_value;
};

/* Return which of the keys from `key` on the query sees, or, backwards, which of the queries from `query` on see. */
INLINE __mmask16 seen_by(long query, long key, long window) {
    __mmask16 seen = first(query - key + 1);
    return window ? seen & ~first(query - key - window + 1) : seen;
}

INLINE __mmask16 seeing(long query, long key, long window) {
    __mmask16 seen = ~first(key - query);
    return window ? seen & first(key + window - query) : seen;
}

static void *take(char **room, long bytes) {
    char *taken = *room;
    *room += (bytes + 63) / 64 * 64;
    return taken;
}

/* Return how many bytes a thread needs for examples of up to `longest` tokens. */
EXPORT long attention_room(long longest, long width) {
    long many = padded(longest), wide = padded(width);
    long of_example = many * wide * (9 * sizeof(bf16) + 4 * sizeof(float)) + many * 2 * sizeof(float);
    return of_example + TILE * (2 * wide + 2 * TILE) * sizeof(float);
}

/* Round `count` rows of sums, `scale` times each, into `target`, whose rows are `apart` numbers apart. */
static void put_rows(bf16 *target, long apart, const float *source, long count, long width, float scale) {
    for (long row = 0; row < count; row++)
        for (long i = 0; i < width; i += LANES) {
            floats sums = _mm512_loadu_ps(source + row * padded(width) + i);
            store(target + row * apart + i, first(width - i), sums * scale);
        }
}

/* Attend from the queries of all heads that share one head of keys, inside one example. */
static void attend_example(const struct attention *all, long begin, long count, long shared, char *room) {
    long many = padded(count), width = all->width, wide = padded(width), group = all->heads / all->key_heads;
    long row_of_keys = all->key_heads * width, row_of_queries = all->heads * width;
    bf16 *rows = take(&room, many * wide * 2), *keys = take(&room, many * wide * 2);
    bf16 *values = take(&room, many * wide * 2), *asking = take(&room, TILE * wide * 2);
    bf16 *shares = take(&room, TILE * TILE * 2);
    float *scores = take(&room, TILE * TILE * 4), *result = take(&room, TILE * wide * 4);
    const float scale = all->scale * LOG2_E;
    copy_rows(rows, all->key + begin * row_of_keys + shared * width, row_of_keys, count, width);
    transpose(keys, many, rows, wide / 2, many, wide / 2);
    copy_rows(rows, all->value + begin * row_of_keys + shared * width, row_of_keys, count, width);
    pair_rows(values, rows, wide, many, wide);
    for (long head = shared * group; head < (shared + 1) * group; head++)
        for (long query = 0; query < count; query += TILE) {
            long there = least(TILE, count - query), tall = padded(there);
            floats total[TILE];
            float top[TILE];
            const long at = (begin + query) * row_of_queries + head * width;
            copy_rows(asking, all->query + at, row_of_queries, there, width);
            memset(result, 0, tall * wide * sizeof(float));
            for (long row = 0; row < tall; row++) top[row] = HIDDEN, total[row] = _mm512_setzero_ps();
            long key = all->window ? most(0, query - all->window + 1) / STEP * STEP : 0;
            for (; key < query + tall; key += TILE) {
                long across = least(TILE, query + tall - key);
                memset(scores, 0, tall * TILE * sizeof(float));
                for (long row = 0; row < tall; row += STEP)
                    add_product(scores + row * TILE, TILE, asking + row * wide, wide, 2, keys + key * 2, many, STEP,
                                least(across, query + row + STEP - key), wide / 2);
                int whole = key + across - 1 <= query && (!all->window || query + tall - 1 - key < all->window);
                for (long row = 0; row < tall; row++) {
                    floats part[TILE / LANES], highest = _mm512_set1_ps(top[row]), sum = _mm512_setzero_ps();
                    UNROLLED for (int i = 0; i < TILE / LANES; i++) {
                        part[i] = _mm512_loadu_ps(scores + row * TILE + i * LANES) * scale;
                        __mmask16 seen = i * LANES >= across ? 0 : whole ? 0xffff
                            : seen_by(query + row, key + i * LANES, all->window);
                        part[i] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(HIDDEN), part[i]);
                        highest = _mm512_max_ps(highest, part[i]);
                    }
                    float now = _mm512_reduce_max_ps(highest);
                    UNROLLED for (int i = 0; i < TILE / LANES; i++) {
                        part[i] = power_of_2(part[i] - now);
                        sum += part[i];
                        store(shares + row * TILE + i * LANES, 0xffff, part[i]);
                    }
                    if (now > top[row]) {
                        floats before = power_of_2(_mm512_set1_ps(top[row] - now));
                        total[row] *= before;
                        for (float *one = result + row * wide; one < result + (row + 1) * wide; one += LANES)
                            _mm512_storeu_ps(one, _mm512_loadu_ps(one) * before);
                        top[row] = now;
                    }
                    total[row] += sum;
                }
                for (long row = 0; row < tall; row += STEP)
                    add_product(result + row * wide, wide, shares + row * TILE, TILE, 2, values + key * wide, wide, STEP,
                                wide, least(across, query + row + STEP - key) / 2);
            }
            for (long row = 0; row < there; row++) {
                float sum = _mm512_reduce_add_ps(total[row]);
                all->sums[head * all->length + begin + query + row] = top[row] + log2f(sum);
                put_rows(all->output + at + row * row_of_queries, 0, result + row * wide, 1, width, 1 / sum);
            }
        }
}

/* Go back through `attend_example`. Scores are computed with keys as rows, so that all five products find their sums'
   pairs without another transposition. */
static void attend_back_example(const struct attention *all, long begin, long count, long shared, char *room) {
    long many = padded(count), width = all->width, wide = padded(width), group = all->heads / all->key_heads;
    long row_of_keys = all->key_heads * width, row_of_queries = all->heads * width, size = many * wide;
    bf16 *keys = take(&room, size * 2), *values = take(&room, size * 2), *keys_across = take(&room, size * 2);
    bf16 *asking = take(&room, size * 2), *asking_across = take(&room, size * 2), *asking_pairs = take(&room, size * 2);
    bf16 *above = take(&room, size * 2), *above_across = take(&room, size * 2), *above_pairs = take(&room, size * 2);
    float *of_key = take(&room, size * 4), *of_value = take(&room, size * 4);
    float *of_query = take(&room, size * 4), *of_query_across = take(&room, size * 4);
    float *summed = take(&room, many * 4), *inside = take(&room, many * 4);
    bf16 *shares = take(&room, TILE * TILE * 2), *of_scores = take(&room, TILE * TILE * 2);
    bf16 *of_scores_pairs = take(&room, TILE * TILE * 2);
    const float scale = all->scale * LOG2_E;
    copy_rows(keys, all->key + begin * row_of_keys + shared * width, row_of_keys, count, width);
    copy_rows(values, all->value + begin * row_of_keys + shared * width, row_of_keys, count, width);
    pair_rows(above, keys, wide, many, wide);
    transpose(keys_across, many / 2, above, wide, many / 2, wide);
    memset(of_key, 0, size * sizeof(float));
    memset(of_value, 0, size * sizeof(float));
    for (long head = shared * group; head < (shared + 1) * group; head++) {
        const long at_head = begin * row_of_queries + head * width;
        copy_rows(asking, all->query + at_head, row_of_queries, count, width);
        copy_rows(above, all->gradient + at_head, row_of_queries, count, width);
        transpose(asking_across, many, asking, wide / 2, many, wide / 2);
        pair_rows(asking_pairs, asking, wide, many, wide);
        transpose(above_across, many, above, wide / 2, many, wide / 2);
        pair_rows(above_pairs, above, wide, many, wide);
        for (long row = 0; row < many; row++) {
            floats sum = _mm512_setzero_ps();
            for (long i = 0; i < width && row < count; i += LANES)
                sum += load(above + row * wide + i, 0xffff) *
                       load(all->output + at_head + row * row_of_queries + i, first(width - i));
            inside[row] = _mm512_reduce_add_ps(sum);
            summed[row] = row < count ? all->sums[head * all->length + begin + row] : -HIDDEN;
        }
        memset(of_query_across, 0, size * sizeof(float));
        for (long key = 0; key < many; key += TILE) {
            long tall = least(TILE, many - key), end = all->window ? least(many, key + tall + all->window - 1) : many;
            for (long query = key; query < end; query += TILE) {
                long across = least(TILE, many - query);
                int whole = query >= key + tall - 1 && (!all->window || query + across - 1 - key < all->window);
                for (long column = 0; column < across; column += STEP)
                    for (long row = 0; row < least(tall, query + column + STEP - key); row += ROWS) {
                        floats sums[ROWS][2], share[ROWS][2];
                        clear(sums);
                        multiply(sums, keys + (key + row) * wide, wide, 2, asking_across + (query + column) * 2, many,
                                 wide / 2, 1);
                        UNROLLED for (int r = 0; r < ROWS; r++)
                            UNROLLED for (int i = 0; i < 2; i++) {
                                long at = query + column + i * LANES;
                                __mmask16 seen = whole ? 0xffff : seeing(at, key + row + r, all->window);
                                floats one = power_of_2(sums[r][i] * scale - _mm512_loadu_ps(summed + at));
                                share[r][i] = _mm512_maskz_mov_ps(seen, one);
                                store(shares + (row + r) * TILE + column + i * LANES, 0xffff, share[r][i]);
                            }
                        clear(sums);
                        multiply(sums, values + (key + row) * wide, wide, 2, above_across + (query + column) * 2, many,
                                 wide / 2, 1);
                        UNROLLED for (int r = 0; r < ROWS; r++)
                            UNROLLED for (int i = 0; i < 2; i++) {
                                floats along = _mm512_loadu_ps(inside + query + column + i * LANES);
                                sums[r][i] = share[r][i] * (sums[r][i] - along);
                                store(of_scores + (row + r) * TILE + column + i * LANES, 0xffff, sums[r][i]);
                            }
                    }
                pair_rows(of_scores_pairs, of_scores, TILE, tall, TILE);
                for (long row = 0; row < tall; row += STEP) {
                    long from = most(0, key + row - query), at = (key + row) * wide, here = row * TILE + from;
                    add_product(of_value + at, wide, shares + here, TILE, 2, above_pairs + (query + from) * wide, wide,
                                STEP, wide, (across - from) / 2);
                    add_product(of_key + at, wide, of_scores + here, TILE, 2, asking_pairs + (query + from) * wide, wide,
                                STEP, wide, (across - from) / 2);
                }
                for (long column = 0; column < across; column += STEP)
                    add_product(of_query_across + query + column, many, keys_across + key, many, 2,
                                of_scores_pairs + column * 2, TILE, wide, STEP,
                                least(tall, query + column + STEP - key) / 2);
            }
        }
        transpose(of_query, wide, of_query_across, many, wide, many);
        put_rows(all->of_query + at_head, row_of_queries, of_query, count, width, all->scale);
    }
    put_rows(all->of_key + begin * row_of_keys + shared * width, row_of_keys, of_key, count, width, all->scale);
    put_rows(all->of_value + begin * row_of_keys + shared * width, row_of_keys, of_value, count, width, 1);
}

/* Attend inside every example, or go back; each thread has `room` bytes at `rooms`. */
EXPORT void attention(const struct attention *all, int back, char *rooms, long room, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < all->examples * all->key_heads; task++) {
        const int32_t *tile = all->tiles + task / all->key_heads * 3;
        char *own = rooms + omp_get_thread_num() * room;
        (back ? attend_back_example : attend_example)(all, tile[0], tile[2] - tile[0], task % all->key_heads, own);
    }
}

/* ---- linear maps ---- */

struct part {
    const bf16 *x, *weight; /* [rows][inner], whose rows are `apart` numbers apart; [columns][inner] if turned, else
                               [inner][columns] */
    long inner, apart, turned;
};

/* Pack 32 columns of a weight from `column` on in pairs, [inner / 2][32][2]; those that are not there are zeros. */
static void pack(bf16 *target, const struct part *part, long column, long columns) {
    long inner = part->inner, there = least(STEP, columns - column);
    if (!part->turned) {
        pair_rows(target, part->weight + column, columns, inner, there);
        return;
    }
    const bf16 *from = part->weight + column * inner;
    long of_all = there / LANES * LANES, whole = inner / 2 / LANES * LANES; /* lanes and pairs that `transpose` takes */
    transpose(target, STEP, from, inner / 2, of_all, whole);
    for (long i = 0; i < STEP; i++)
        for (long pair = i < of_all ? whole : 0; pair < inner / 2; pair++)
            for (int k = 0; k < 2; k++)
                target[(pair * STEP + i) * 2 + k] = i < there ? from[i * inner + 2 * pair + k] : 0;
}

enum { PACKED = 1 << 19, CHUNK = 64 }; /* bytes of a weight and rows of x that stay in the second cache */
enum { FEWEST = 128 }; /* rows of a task, if it has not all: for fewer, packing the weight again takes too long */

/* Return how many bytes a thread needs for sums of so many products. */
EXPORT long linear_room(long inner) { return most(PACKED, inner * STEP * sizeof(bf16)) + 64; }

/* output [rows][columns] = the sum of all parts' x times weight, and the bias if there is one; every inner is even and
   there are at least ROWS rows. Each thread has `room` bytes at `rooms`. */
EXPORT void linear(const struct part *parts, int count, const bf16 *bias, bf16 *output, long rows, long columns, char *rooms,
            long room, int threads) {
    long inner = 0;
    for (int i = 0; i < count; i++) inner += parts[i].inner;
    long panels = (columns + STEP - 1) / STEP, several = most(1, least(4, PACKED / (inner * STEP * 2)));
    several = most(1, least(several, panels * most(1, rows / FEWEST) / threads));
    long groups = (panels + several - 1) / several, splits = most(1, least(rows / FEWEST, 4 * threads / groups));
    long tall = ((rows + splits - 1) / splits + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < groups * splits; task++) {
        bf16 *packed = (bf16 *)(rooms + omp_get_thread_num() * room);
        long begin = task / groups * tall, end = least(rows, begin + tall), panel = task % groups * several;
        long last = least(panels, panel + several);
        if (begin >= end) continue;
        bf16 *to = packed;
        for (long one = panel; one < last; one++)
            for (int i = 0; i < count; to += parts[i++].inner * STEP) pack(to, parts + i, one * STEP, columns);
        for (long chunk = begin; chunk < end; chunk += CHUNK)
            for (long one = panel; one < last; one++)
                for (long row = chunk; row < least(end, chunk + CHUNK); row += ROWS) {
                    long at = row + ROWS <= rows ? row : rows - ROWS; /* the last rows are computed again */
                    const bf16 *right = packed + (one - panel) * inner * STEP;
                    floats sums[ROWS][2];
                    clear(sums);
                    for (int i = 0; i < count; right += parts[i++].inner * STEP) {
                        const bf16 *x = parts[i].x + at * parts[i].apart;
                        /* spelled out, so that each is compiled by itself */
                        if (columns - one * STEP > LANES)
                            multiply(sums, x, parts[i].apart, 2, right, STEP, parts[i].inner / 2, 1);
                        else
                            multiply(sums, x, parts[i].apart, 2, right, STEP, parts[i].inner / 2, 0);
                    }
                    UNROLLED for (int r = 0; r < ROWS; r++)
                        UNROLLED for (int i = 0; i < 2; i++) {
                            long column = one * STEP + i * LANES;
                            __mmask16 which = first(columns - column);
                            floats sum = sums[r][i];
                            if (bias) sum += load(bias + column, which);
                            store(output + (at + r) * columns + column, which, sum);
                        }
                }
    }
}

enum { ACROSS = 4 * STEP, ALONG = 2 * CHUNK }; /* columns, at most, and rows that `outer` takes together */

/* Return how many bytes a thread needs for `few` rows. */
EXPORT long outer_room(long few) {
    return ALONG * (ACROSS + padded(few)) * sizeof(bf16) + padded(few) * ACROSS * sizeof(float);
}

/* output [few][columns] = left' right, of left [rows][few] and right [rows][columns], whose rows are `left_apart` and
   `right_apart` numbers apart. Each thread has `room` bytes at `rooms`. */
EXPORT void outer(const bf16 *left, long left_apart, const bf16 *right, long right_apart, float *output, long rows, long few,
           long columns, char *rooms, long room, int threads) {
    long tall = padded(few), across = least(ACROSS, padded((columns + threads - 1) / threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long begin = 0; begin < columns; begin += across) {
        long there = least(across, columns - begin), wide = padded(there);
        char *own = rooms + omp_get_thread_num() * room;
        bf16 *pairs = take(&own, ALONG * wide * sizeof(bf16)), *left_pairs = take(&own, ALONG * tall * sizeof(bf16));
        float *sums = take(&own, tall * wide * sizeof(float));
        memset(sums, 0, tall * wide * sizeof(float));
        for (long chunk = 0; chunk < rows; chunk += ALONG) {
            long count = least(ALONG, rows - chunk);
            pair_rows(left_pairs, left + chunk * left_apart, left_apart, count, few);
            pair_rows(pairs, right + chunk * right_apart + begin, right_apart, count, there);
            add_product(sums, wide, left_pairs, 2, 2 * tall, pairs, wide, (few + ROWS - 1) / ROWS * ROWS, wide,
                        (count + 1) / 2);
        }
        for (long row = 0; row < few; row++)
            memcpy(output + row * columns + begin, sums + row * wide, there * sizeof(float));
    }
}

/* ---- norms ---- */

EXPORT void norm(const bf16 *x, const bf16 *weight, bf16 *output, float *inverse, long rows, long width, float epsilon,
          int gemma, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        floats sum = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES) {
            floats part = load(from + i, first(width - i));
            sum = _mm512_fmadd_ps(part, part, sum);
        }
        float of_row = inverse[row] = 1 / sqrtf(_mm512_reduce_add_ps(sum) / width + epsilon);
        for (long i = 0; i < width; i += LANES) {
            __mmask16 which = first(width - i);
            floats part = load(from + i, which) * of_row, weighing = load(weight + i, which);
            store(output + row * width + i, which, gemma ? part * (weighing + 1.0f) : rounded(part) * weighing);
        }
    }
}

EXPORT void norm_back(const bf16 *gradient, const bf16 *x, const bf16 *weight, const float *inverse, bf16 *output, long rows,
               long width, int gemma, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width, *down = gradient + row * width;
        floats sum = _mm512_setzero_ps();
        const float more = gemma ? 1 : 0, of_row = inverse[row];
        for (long i = 0; i < width; i += LANES) {
            floats above = load(down + i, first(width - i)) * (load(weight + i, first(width - i)) + more);
            sum = _mm512_fmadd_ps(above, load(from + i, first(width - i)) * of_row, sum);
        }
        float along = _mm512_reduce_add_ps(sum) / width;
        for (long i = 0; i < width; i += LANES) {
            floats above = load(down + i, first(width - i)) * (load(weight + i, first(width - i)) + more);
            floats normal = load(from + i, first(width - i)) * of_row;
            store(output + row * width + i, first(width - i), (above - normal * along) * of_row);
        }
    }
}

/* ---- gated activations ---- */

INLINE floats sigmoid(floats x) {
    floats below = 1.0f + power_of_2(_mm512_min_ps(x * -LOG2_E, _mm512_set1_ps(126)));
    floats part = _mm512_rcp14_ps(below); /* to 14 bits; one step of Newton's doubles them */
    return part * (2.0f - below * part);
}

INLINE floats activated(floats x, int tanh, floats *slope) {
    if (!tanh) {
        floats half = sigmoid(x);
        *slope = half * (1.0f + x * (1.0f - half));
        return x * half;
    }
    floats whole = 2.0f * sigmoid(2.0f * 0.7978845608028654f * (x + 0.044715f * x * x * x)) - 1.0f;
    floats rise = 0.7978845608028654f * (1.0f + 0.134145f * x * x);
    *slope = 0.5f * (1.0f + whole) + 0.5f * x * (1.0f - whole * whole) * rise;
    return 0.5f * x * (1.0f + whole);
}

/* output = act(gate) * up, of `count` numbers; gelu by its approximation with tanh instead of silu. */
EXPORT void gate(const bf16 *gates, const bf16 *ups, bf16 *output, long count, int tanh, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        __mmask16 which = first(count - i);
        floats slope;
        store(output + i, which, activated(load(gates + i, which), tanh, &slope) * load(ups + i, which));
    }
}

/* The gradients of gate and up from that of their product, which may be where one of them goes. */
EXPORT void gate_back(const bf16 *gradient, const bf16 *gates, const bf16 *ups, bf16 *of_gate, bf16 *of_up, long count,
               int tanh, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        __mmask16 which = first(count - i);
        floats slope, active = activated(load(gates + i, which), tanh, &slope), above = load(gradient + i, which);
        store(of_gate + i, which, above * load(ups + i, which) * slope);
        store(of_up + i, which, above * active);
    }
}

/* ---- cross-entropy ---- */

/* Put the logarithm of each row's probability of its label into `chosen`; turn logits into their loss's gradient. */
EXPORT void choose(bf16 *logits, const int64_t *labels, float *chosen, long rows, long width, int to_gradient, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        bf16 *at = logits + row * width;
        if (labels[row] < 0 || labels[row] >= width) {
            chosen[row] = NAN;
            continue;
        }
        floats highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES)
            highest = _mm512_mask_max_ps(highest, first(width - i), highest, load(at + i, first(width - i)));
        float top = _mm512_reduce_max_ps(highest);
        for (long i = 0; i < width; i += LANES) {
            floats share = power_of_2((load(at + i, first(width - i)) - top) * LOG2_E);
            sum = _mm512_mask_add_ps(sum, first(width - i), sum, share);
        }
        float total = _mm512_reduce_add_ps(sum), label = _mm512_reduce_add_ps(load(at + labels[row], 1));
        chosen[row] = label - top - logf(total);
        if (!to_gradient) continue;
        for (long i = 0; i < width; i += LANES)
            store(at + i, first(width - i), power_of_2((load(at + i, first(width - i)) - top) * LOG2_E) * (1 / total));
        store(at + labels[row], 1, _mm512_set1_ps(expm1f(chosen[row]))); /* p - 1, of a p near 1 too */
    }
}

/* ---- rotary positions ---- */

EXPORT void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *output, long length, long heads, long width,
            int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < length; row++)
        for (long i = 0; i < width / 2; i += LANES) {
            __mmask16 which = first(width / 2 - i);
            const bf16 *one = cos + row * width + i, *two = sin + row * width + i;
            floats cos_1 = load(one, which), cos_2 = load(one + width / 2, which);
            floats sin_1 = load(two, which), sin_2 = load(two + width / 2, which);
            for (long head = 0; head < heads; head++) {
                long at = (row * heads + head) * width + i;
                floats left = load(x + at, which), right = load(x + at + width / 2, which);
                store(output + at, which, left * cos_1 - right * sin_1);
                store(output + at + width / 2, which, right * cos_2 + left * sin_2);
            }
        }
}

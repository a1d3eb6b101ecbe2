/* Kernels for CPUs with AVX-512 bf16: attention inside packed examples, linear maps, RMS norms, gated activations,
   cross-entropy and rotary positions, in bf16 with sums in fp32. build.py compiles this file; ops.py checks the
   arguments and calls it.

   `vdpbf16ps` multiplies two adjacent bf16 of each 32-bit lane and adds both products to the lane's fp32 sum. The right
   operand of a product is therefore interleaved in pairs, [pairs][lanes][2] (the VNNI layout), along the dimension that
   is summed over. Rows and columns are padded with zeros to multiples of STEP. Each output is written by one task, in an
   order that does not depend on the number of threads, so a replay has the same bits. Strides count elements.

   On CPUs with AMX, products are computed in tiles: `tdpbf16ps` multiplies 16 rows of 16 pairs by 16 pairs of 16 columns,
   in the same layouts. It adds the first and the second numbers of 16 pairs separately, so its sums have other bits than
   those of `vdpbf16ps`; `use_tiles` says which instruction computes. */
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default"))) /* build.py reads the declarations of exported functions */
#define UNROLLED _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

#ifdef __clang__
EXPORT const char *const COMPILER = __VERSION__;
#else
EXPORT const char *const COMPILER = "gcc " __VERSION__;
#endif

typedef uint16_t bf16;
typedef __m512 floats; /* LANES fp32 values */

enum { LANES = 16, STEP = 32, ROWS = 8, TILE = 64 };
static const float MASKED = -1e30f, LOG2_E = 1.4426950408889634f;

static long padded(long count) { return (count + STEP - 1) / STEP * STEP; }
INLINE long minimum(long a, long b) { return a < b ? a : b; }
INLINE long maximum(long a, long b) { return a > b ? a : b; }

/* The mask of the first `count` lanes; of all lanes from 16 on. */
INLINE __mmask16 first_lanes(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

INLINE floats load(const bf16 *source, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source)), 16));
}

INLINE void store(bf16 *target, __mmask16 mask, floats value) {
    _mm256_mask_storeu_epi16(target, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

INLINE floats rounded_to_bf16(floats value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value)), 16));
}

/* 2^x with a relative error of 1e-7, for x up to 127: a polynomial between -1/2 and 1/2, scaled by the integer part.
   Numbers that round to zero, as those of masked scores do, are set to zero: CPUs need hundreds of cycles to round them. */
INLINE floats exp2_floats(floats x) {
    const floats least = _mm512_set1_ps(-150);
    __mmask16 not_zero = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ); /* set for NaN too, which stays NaN */
    x = _mm512_max_ps(least, x); /* of a NaN and a number, max returns its second operand */
    floats integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), fraction = x - integer;
    floats sum = _mm512_set1_ps(1.32764710e-3f);
    sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(9.67554160e-3f));
    sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(5.55071328e-2f));
    sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(2.40221197e-1f));
    sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(6.93146967e-1f));
    sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(not_zero, sum, integer);
}

/* Return the next `bytes` of a workspace, aligned to cache lines, and advance it. */
static void *allocate(char **workspace, long bytes) {
    char *allocated = *workspace;
    *workspace += (bytes + 63) / 64 * 64;
    return allocated;
}

/* ---- products ---- */

/* Add left [8][pairs][2] times right [pairs][32][2] to `sums`, 8 rows of 32 columns, or of 16 if not `wide`. */
INLINE void multiply(floats sums[ROWS][2], const bf16 *left, long row_stride, long pair_stride, const bf16 *right,
                     long right_columns, long pairs, int wide) {
    for (long pair = 0; pair < pairs; pair++) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(right + pair * right_columns * 2);
        __m512bh high = (__m512bh)_mm512_loadu_si512(right + pair * right_columns * 2 + 2 * LANES);
        UNROLLED for (int row = 0; row < ROWS; row++) {
            int both;
            memcpy(&both, left + row * row_stride + pair * pair_stride, sizeof both);
            __m512bh broadcast = (__m512bh)_mm512_set1_epi32(both);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], broadcast, low);
            if (wide) sums[row][1] = _mm512_dpbf16_ps(sums[row][1], broadcast, high);
        }
    }
}

INLINE void clear(floats sums[ROWS][2]) {
    UNROLLED for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
}

/* A part of a sum of products: the left matrix [STEP rows][depth]. */
struct factor {
    const bf16 *left;
    long stride, depth;
};

static int tiles; /* whether this process computes products in AMX tiles */

#if __GNUC__ >= 11 || __clang_major__ >= 12 /* clang defines __GNUC__ as 4, so its own version is compared */
#define WITH_TILES __attribute__((target("amx-tile,amx-bf16")))

/* Compute in tiles from now on if that is wanted and this CPU and system can; return whether they do. Linux gives a
   process the tiles' registers only if it asks. */
EXPORT int use_tiles(int wanted) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18 };
    unsigned a, b, c, d;
    tiles = wanted && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_BF16 && d & AMX_TILE &&
            syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0;
    return tiles;
}

/* Set up this thread's tiles, all of 16 rows of 64 bytes. */
WITH_TILES static void open_tiles(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (tiles) _tile_loadconfig(&config);
}

/* Clear this thread's tiles, so that the system does not have to save them at a switch of threads. */
WITH_TILES static void close_tiles(void) {
    if (tiles) _tile_release();
}

/* sums [32][32] = (add ? sums : 0) + the sum over all factors of left [32][depth] times right [depth][32].
   `right` holds a matrix [depth / 2][32][2] for each factor, one after the other; a depth is a multiple of STEP.
   Only the first 16 columns are computed if not `wide`. */
WITH_TILES static void multiply_tiles(float *sums, long sums_stride, int add, const struct factor *factors, int count,
                                      const bf16 *right, long right_columns, int wide) {
    const long right_bytes = right_columns * 2 * sizeof(bf16), sums_bytes = sums_stride * sizeof(float);
    __asm__ volatile("" ::: "memory"); /* compilers do not know that a tile load reads memory */
    if (add) {
        _tile_loadd(0, sums, sums_bytes);
        _tile_loadd(1, sums + LANES, sums_bytes);
        _tile_loadd(2, sums + LANES * sums_stride, sums_bytes);
        _tile_loadd(3, sums + LANES * sums_stride + LANES, sums_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (const struct factor *factor = factors; factor < factors + count; factor++) {
        const long left_bytes = factor->stride * sizeof(bf16);
        for (const bf16 *left = factor->left; left < factor->left + factor->depth; left += STEP) {
            _tile_loadd(6, right, right_bytes);
            _tile_loadd(4, left, left_bytes);
            _tile_loadd(5, left + LANES * factor->stride, left_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if (wide) {
                _tile_loadd(7, right + STEP, right_bytes);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            right += STEP * right_columns;
        }
    }
    _tile_stored(0, sums, sums_bytes);
    _tile_stored(1, sums + LANES, sums_bytes);
    _tile_stored(2, sums + LANES * sums_stride, sums_bytes);
    _tile_stored(3, sums + LANES * sums_stride + LANES, sums_bytes);
    __asm__ volatile("" ::: "memory");
}
#else
EXPORT int use_tiles(int wanted) { return 0; }
static void open_tiles(void) {}
static void close_tiles(void) {}
static void multiply_tiles(float *sums, long sums_stride, int add, const struct factor *factors, int count,
                           const bf16 *right, long right_columns, int wide) {}
#endif

INLINE void load_sums(floats sums[ROWS][2], const float *source, long stride) {
    UNROLLED for (int row = 0; row < ROWS; row++) {
        sums[row][0] = _mm512_loadu_ps(source + row * stride);
        sums[row][1] = _mm512_loadu_ps(source + row * stride + LANES);
    }
}

/* Set `sums` to rows `row` to `row` + 7 of left [32][depth] times right [depth / 2][32][2]. `block` [32][32] holds the
   product from the call with row 0 on, if tiles compute it. */
INLINE void product_rows(floats sums[ROWS][2], float *block, long row, const bf16 *left, long stride, const bf16 *right,
                         long right_columns, long depth) {
    if (tiles) {
        struct factor factor = {left, stride, depth};
        if (!row) multiply_tiles(block, STEP, 0, &factor, 1, right, right_columns, 1);
        load_sums(sums, block + row * STEP, STEP);
    } else {
        clear(sums);
        multiply(sums, left + row * stride, stride, 2, right, right_columns, depth / 2, 1);
    }
}

/* Add a product to `sums` [rows][columns] in memory, whose rows are `sums_stride` apart. For tiles `pair_stride` is 2 and
   all sizes are multiples of STEP. */
static void add_product(float *sums, long sums_stride, const bf16 *left, long row_stride, long pair_stride,
                        const bf16 *right, long right_columns, long rows, long columns, long pairs) {
    for (long column = 0; column < columns; column += STEP)
        for (long row = 0; row < rows; row += tiles ? STEP : ROWS) {
            float *target = sums + row * sums_stride + column;
            if (tiles) {
                struct factor factor = {left + row * row_stride, row_stride, 2 * pairs};
                multiply_tiles(target, sums_stride, 1, &factor, 1, right + column * 2, right_columns, 1);
                continue;
            }
            floats tile[ROWS][2];
            load_sums(tile, target, sums_stride);
            multiply(tile, left + row * row_stride, row_stride, pair_stride, right + column * 2, right_columns, pairs, 1);
            UNROLLED for (int r = 0; r < ROWS; r++) {
                _mm512_storeu_ps(target + r * sums_stride, tile[r][0]);
                _mm512_storeu_ps(target + r * sums_stride + LANES, tile[r][1]);
            }
        }
}

/* Copy rows [rows][columns] into `target` [padded rows][padded columns]. */
static void copy_padded(bf16 *target, const bf16 *source, long stride, long rows, long columns) {
    for (long row = 0; row < padded(rows); row++)
        for (long column = 0; column < columns; column += STEP, target += STEP) {
            __mmask32 mask = row >= rows ? 0 : columns - column >= STEP ? ~0u : (1u << (columns - column)) - 1;
            _mm512_storeu_si512(target, _mm512_maskz_loadu_epi16(mask, source + row * stride + column));
        }
}

/* Interleave 16 columns of a pair of rows. */
INLINE void interleave(bf16 *target, const bf16 *even_row, const bf16 *odd_row, __mmask16 mask, __mmask16 mask_odd) {
    __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even_row));
    __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_odd, odd_row));
    _mm512_storeu_si512(target, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}

/* Interleave pairs of rows: [rows][columns] becomes [rows / 2][padded columns][2]. */
static void interleave_rows(bf16 *target, const bf16 *source, long stride, long rows, long columns) {
    long padded_columns = padded(columns);
    for (long row = 0; row < rows; row += 2)
        for (long column = 0; column < padded_columns; column += LANES) {
            const bf16 *from = source + row * stride + column;
            __mmask16 mask = first_lanes(columns - column), mask_odd = row + 1 < rows ? mask : 0;
            interleave(target + row * padded_columns + column * 2, from, from + stride, mask, mask_odd);
        }
}

/* Transpose a matrix of 32-bit words from [rows][columns] to [columns][rows]. Both sizes are multiples of 16; strides
   count words. A word is two adjacent bf16 of a row, which stay together: bf16 [rows][2 * columns] become
   [columns][rows][2], the VNNI layout that `multiply` needs for its right operand. */
static void transpose(void *target, long stride, const void *source, long source_stride, long rows, long columns) {
    for (long row = 0; row < rows; row += LANES)
        for (long column = 0; column < columns; column += LANES) {
            __m512i a[LANES], b[LANES];
            const int32_t *from = (const int32_t *)source + row * source_stride + column;
            int32_t *to = (int32_t *)target + column * stride + row;
            UNROLLED for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * source_stride);
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
                _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(even, even_2, 0x88));
                _mm512_storeu_si512(to + (i + 4) * stride, _mm512_shuffle_i32x4(odd, odd_2, 0x88));
                _mm512_storeu_si512(to + (i + 8) * stride, _mm512_shuffle_i32x4(even, even_2, 0xdd));
                _mm512_storeu_si512(to + (i + 12) * stride, _mm512_shuffle_i32x4(odd, odd_2, 0xdd));
            }
        }
}

/* ---- attention ---- */

/* Query, key, value, output and their gradients are [length][heads or key_heads][head_dim]. */
struct attention {
    const bf16 *query, *key, *value;
    bf16 *output;
    float *logsumexp; /* [heads][length]: log2 of each row's sum of 2^score; scores are scaled by log2(e) */
    long length, heads, key_heads, head_dim, window;
    float scale;
    const bf16 *grad_output;
    bf16 *grad_query, *grad_key, *grad_value;
};

/* An example. If it forks, queries from `second` on, those of the second branch, do not see the keys from `shared` to
   `second`, those of the first branch; otherwise both are `count`. All are counted from `begin`. */
struct example {
    long begin, count, shared, second;
};

/* A mask of 16 keys, `key` and the following: its bit is set if the query sees the key. */
INLINE __mmask16 visible_keys(struct example of, long query, long key, long window) {
    __mmask16 seen = first_lanes(query - key + 1), shared = first_lanes(of.shared - key);
    if (query < of.second) return window ? seen & ~first_lanes(query - key - window + 1) : seen;
    __mmask16 rest = seen & ~first_lanes(of.second - key);
    if (window) {
        rest &= ~first_lanes(query - key - window + 1);
        shared &= ~first_lanes(query - (of.second - of.shared) - key - window + 1);
    }
    return rest | shared;
}

/* A mask of 16 queries, `query` and the following: its bit is set if the query sees the key. */
INLINE __mmask16 visible_queries(struct example of, long query, long key, long window) {
    __mmask16 seen = ~first_lanes(key - query), first = first_lanes(of.second - query), second = ~first;
    if (key >= of.shared && key < of.second) second = 0;
    if (window) {
        first &= first_lanes(key + window - query);
        second &= first_lanes(key + window - query + (key < of.shared ? of.second - of.shared : 0));
    }
    return seen & (first | second);
}

/* Whether no query of a tile sees a key of another tile, since they are in different branches. */
INLINE int apart(struct example of, long query, long key, long keys) {
    return query >= of.second && key >= of.shared && key + keys <= of.second;
}

/* Whether only causality and the window hide keys of a tile from queries of a tile: no fork lies between them. */
INLINE int not_forked(struct example of, long query, long queries, long key, long keys, long window) {
    return query + queries <= of.second || key >= of.second || (key + keys <= of.shared && !window);
}

/* Return the bytes of workspace that a thread needs for examples of at most `longest` tokens. */
EXPORT long attention_workspace(long longest, long head_dim) {
    long rows = padded(longest), columns = padded(head_dim);
    long of_example = rows * columns * (9 * sizeof(bf16) + 4 * sizeof(float)) + rows * 2 * sizeof(float);
    return of_example + TILE * (2 * columns + 2 * TILE) * sizeof(float) + 2 * STEP * STEP * sizeof(float);
}

/* Multiply rows of sums [rows][padded columns] by `scale` and store them, rounded, in `target`. */
static void store_rows(bf16 *target, long stride, const float *sums, long rows, long columns, float scale) {
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < columns; i += LANES) {
            floats part = _mm512_loadu_ps(sums + row * padded(columns) + i);
            store(target + row * stride + i, first_lanes(columns - i), part * scale);
        }
}

/* Attend inside one example, from all query heads that share one key head: flash attention in tiles of 64 x 64. */
static void attend(const struct attention *all, struct example of, long key_head, char *workspace) {
    const long begin = of.begin, count = of.count;
    long rows = padded(count), dim = all->head_dim, columns = padded(dim), group = all->heads / all->key_heads;
    long key_stride = all->key_heads * dim, query_stride = all->heads * dim;
    bf16 *copy = allocate(&workspace, rows * columns * 2), *keys = allocate(&workspace, rows * columns * 2);
    bf16 *values = allocate(&workspace, rows * columns * 2), *queries = allocate(&workspace, TILE * columns * 2);
    bf16 *probs = allocate(&workspace, TILE * TILE * 2);
    float *scores = allocate(&workspace, TILE * TILE * 4), *outputs = allocate(&workspace, TILE * columns * 4);
    const float scale = all->scale * LOG2_E;
    copy_padded(copy, all->key + begin * key_stride + key_head * dim, key_stride, count, dim);
    transpose(keys, rows, copy, columns / 2, rows, columns / 2);
    copy_padded(copy, all->value + begin * key_stride + key_head * dim, key_stride, count, dim);
    interleave_rows(values, copy, columns, rows, columns);
    for (long head = key_head * group; head < (key_head + 1) * group; head++)
        for (long query = 0; query < count; query += TILE) {
            long tile_rows = minimum(TILE, count - query), padded_rows = padded(tile_rows);
            floats row_sum[TILE];
            float row_max[TILE];
            const long offset = (begin + query) * query_stride + head * dim;
            copy_padded(queries, all->query + offset, query_stride, tile_rows, dim);
            memset(outputs, 0, padded_rows * columns * sizeof(float));
            for (long row = 0; row < padded_rows; row++) row_max[row] = MASKED, row_sum[row] = _mm512_setzero_ps();
            long jump = query + padded_rows > of.second ? of.second - of.shared : 0; /* over the first branch */
            long key = all->window ? maximum(0, query - jump - all->window + 1) / STEP * STEP : 0;
            for (; key < query + padded_rows; key += TILE) {
                long tile_keys = minimum(TILE, query + padded_rows - key);
                if (apart(of, query, key, tile_keys)) continue;
                memset(scores, 0, padded_rows * TILE * sizeof(float));
                for (long row = 0; row < padded_rows; row += STEP)
                    add_product(scores + row * TILE, TILE, queries + row * columns, columns, 2, keys + key * 2, rows,
                                STEP, minimum(tile_keys, query + row + STEP - key), columns / 2);
                int unmasked = key + tile_keys - 1 <= query &&
                               not_forked(of, query, padded_rows, key, tile_keys, all->window) &&
                               (!all->window || query + padded_rows - 1 - key < all->window);
                for (long row = 0; row < padded_rows; row++) {
                    floats part[TILE / LANES], highest = _mm512_set1_ps(row_max[row]), sum = _mm512_setzero_ps();
                    UNROLLED for (int i = 0; i < TILE / LANES; i++) {
                        part[i] = _mm512_loadu_ps(scores + row * TILE + i * LANES) * scale;
                        __mmask16 visible = i * LANES >= tile_keys ? 0 : unmasked ? 0xffff
                            : visible_keys(of, query + row, key + i * LANES, all->window);
                        part[i] = _mm512_mask_blend_ps(visible, _mm512_set1_ps(MASKED), part[i]);
                        highest = _mm512_max_ps(highest, part[i]);
                    }
                    float new_max = _mm512_reduce_max_ps(highest);
                    UNROLLED for (int i = 0; i < TILE / LANES; i++) {
                        part[i] = exp2_floats(part[i] - new_max);
                        sum += part[i];
                        store(probs + row * TILE + i * LANES, 0xffff, part[i]);
                    }
                    if (new_max > row_max[row]) { /* rescale the sums so far: they are relative to the old maximum */
                        floats rescale = exp2_floats(_mm512_set1_ps(row_max[row] - new_max));
                        row_sum[row] *= rescale;
                        for (float *at = outputs + row * columns; at < outputs + (row + 1) * columns; at += LANES)
                            _mm512_storeu_ps(at, _mm512_loadu_ps(at) * rescale);
                        row_max[row] = new_max;
                    }
                    row_sum[row] += sum;
                }
                for (long row = 0; row < padded_rows; row += STEP)
                    add_product(outputs + row * columns, columns, probs + row * TILE, TILE, 2, values + key * columns,
                                columns, STEP, columns, minimum(tile_keys, query + row + STEP - key) / 2);
            }
            for (long row = 0; row < tile_rows; row++) {
                float sum = _mm512_reduce_add_ps(row_sum[row]);
                all->logsumexp[head * all->length + begin + query + row] = row_max[row] + log2f(sum);
                store_rows(all->output + offset + row * query_stride, 0, outputs + row * columns, 1, dim, 1 / sum);
            }
        }
}

/* The backward pass of `attend`. Scores are computed with keys as rows, [keys][queries], so that the left operands of
   all five products have their pairs adjacent and no score has to be transposed. */
static void attend_backward(const struct attention *all, struct example of, long key_head, char *workspace) {
    const long begin = of.begin, count = of.count;
    long rows = padded(count), dim = all->head_dim, columns = padded(dim), group = all->heads / all->key_heads;
    long key_stride = all->key_heads * dim, query_stride = all->heads * dim, size = rows * columns;
    bf16 *keys = allocate(&workspace, size * 2), *values = allocate(&workspace, size * 2);
    bf16 *keys_transposed = allocate(&workspace, size * 2);
    bf16 *queries = allocate(&workspace, size * 2), *queries_transposed = allocate(&workspace, size * 2);
    bf16 *queries_interleaved = allocate(&workspace, size * 2);
    bf16 *grads = allocate(&workspace, size * 2), *grads_transposed = allocate(&workspace, size * 2);
    bf16 *grads_interleaved = allocate(&workspace, size * 2);
    float *grad_key = allocate(&workspace, size * 4), *grad_value = allocate(&workspace, size * 4);
    float *grad_query = allocate(&workspace, size * 4), *grad_query_transposed = allocate(&workspace, size * 4);
    float *logsumexp = allocate(&workspace, rows * 4), *delta = allocate(&workspace, rows * 4);
    bf16 *probs = allocate(&workspace, TILE * TILE * 2), *grad_scores = allocate(&workspace, TILE * TILE * 2);
    bf16 *grad_scores_interleaved = allocate(&workspace, TILE * TILE * 2);
    float *score_block = allocate(&workspace, STEP * STEP * 4), *grad_block = allocate(&workspace, STEP * STEP * 4);
    const floats scales = _mm512_set1_ps(all->scale * LOG2_E);
    copy_padded(keys, all->key + begin * key_stride + key_head * dim, key_stride, count, dim);
    copy_padded(values, all->value + begin * key_stride + key_head * dim, key_stride, count, dim);
    interleave_rows(grads, keys, columns, rows, columns); /* `grads` is free until the first head */
    transpose(keys_transposed, rows / 2, grads, columns, rows / 2, columns);
    memset(grad_key, 0, size * sizeof(float));
    memset(grad_value, 0, size * sizeof(float));
    for (long head = key_head * group; head < (key_head + 1) * group; head++) {
        const long offset = begin * query_stride + head * dim;
        copy_padded(queries, all->query + offset, query_stride, count, dim);
        copy_padded(grads, all->grad_output + offset, query_stride, count, dim);
        transpose(queries_transposed, rows, queries, columns / 2, rows, columns / 2);
        interleave_rows(queries_interleaved, queries, columns, rows, columns);
        transpose(grads_transposed, rows, grads, columns / 2, rows, columns / 2);
        interleave_rows(grads_interleaved, grads, columns, rows, columns);
        for (long row = 0; row < rows; row++) { /* delta: the sum of output times its gradient, for each row */
            floats sum = _mm512_setzero_ps();
            for (long i = 0; i < dim && row < count; i += LANES)
                sum = _mm512_fmadd_ps(load(grads + row * columns + i, 0xffff),
                                      load(all->output + offset + row * query_stride + i, first_lanes(dim - i)), sum);
            delta[row] = _mm512_reduce_add_ps(sum);
            logsumexp[row] = row < count ? all->logsumexp[head * all->length + begin + row] : -MASKED;
        }
        memset(grad_query_transposed, 0, size * sizeof(float));
        for (long key = 0; key < rows; key += TILE) {
            long tile_keys = minimum(TILE, rows - key);
            long jump = key < of.shared ? of.second - of.shared : 0; /* over the first branch */
            long end = all->window ? minimum(rows, key + tile_keys + jump + all->window - 1) : rows;
            for (long query = key; query < end; query += TILE) {
                if (apart(of, query, key, tile_keys)) break;
                long tile_queries = minimum(TILE, rows - query);
                int unmasked = query >= key + tile_keys - 1 &&
                               not_forked(of, query, tile_queries, key, tile_keys, all->window) &&
                               (!all->window || query + tile_queries - 1 - key < all->window);
                for (long column = 0; column < tile_queries; column += STEP)
                    for (long row = 0; row < minimum(tile_keys, query + column + STEP - key); row += ROWS) {
                        floats sums[ROWS][2], prob[ROWS][2];
                        const long block = row / STEP * STEP, in_block = row % STEP, left = (key + block) * columns;
                        const long right = (query + column) * 2;
                        product_rows(sums, score_block, in_block, keys + left, columns, queries_transposed + right, rows,
                                     columns);
                        UNROLLED for (int r = 0; r < ROWS; r++)
                            UNROLLED for (int i = 0; i < 2; i++) {
                                long first = query + column + i * LANES;
                                __mmask16 visible = unmasked ? 0xffff : visible_queries(of, first, key + row + r, all->window);
                                floats row_logsumexp = _mm512_loadu_ps(logsumexp + first);
                                floats power = exp2_floats(_mm512_fmsub_ps(sums[r][i], scales, row_logsumexp));
                                prob[r][i] = _mm512_maskz_mov_ps(visible, power);
                                store(probs + (row + r) * TILE + column + i * LANES, 0xffff, prob[r][i]);
                            }
                        product_rows(sums, grad_block, in_block, values + left, columns, grads_transposed + right, rows,
                                     columns);
                        UNROLLED for (int r = 0; r < ROWS; r++)
                            UNROLLED for (int i = 0; i < 2; i++) {
                                floats delta_part = _mm512_loadu_ps(delta + query + column + i * LANES);
                                sums[r][i] = prob[r][i] * (sums[r][i] - delta_part);
                                store(grad_scores + (row + r) * TILE + column + i * LANES, 0xffff, sums[r][i]);
                            }
                    }
                interleave_rows(grad_scores_interleaved, grad_scores, TILE, tile_keys, TILE);
                for (long row = 0; row < tile_keys; row += STEP) {
                    long from = maximum(0, key + row - query), target = (key + row) * columns;
                    long left = row * TILE + from, right = (query + from) * columns, pairs = (tile_queries - from) / 2;
                    add_product(grad_value + target, columns, probs + left, TILE, 2, grads_interleaved + right, columns,
                                STEP, columns, pairs);
                    add_product(grad_key + target, columns, grad_scores + left, TILE, 2, queries_interleaved + right,
                                columns, STEP, columns, pairs);
                }
                for (long column = 0; column < tile_queries; column += STEP)
                    add_product(grad_query_transposed + query + column, rows, keys_transposed + key, rows, 2,
                                grad_scores_interleaved + column * 2, TILE, columns, STEP,
                                minimum(tile_keys, query + column + STEP - key) / 2);
            }
        }
        transpose(grad_query, columns, grad_query_transposed, rows, columns, rows);
        store_rows(all->grad_query + offset, query_stride, grad_query, count, dim, all->scale);
    }
    store_rows(all->grad_key + begin * key_stride + key_head * dim, key_stride, grad_key, count, dim, all->scale);
    store_rows(all->grad_value + begin * key_stride + key_head * dim, key_stride, grad_value, count, dim, 1);
}

INLINE void for_each_example(const struct attention *all,
                             void (*compute)(const struct attention *, struct example, long, char *),
                             const int32_t *spans, long examples, char *workspaces, long workspace, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < examples * all->key_heads; task++) {
        const int32_t *span = spans + task / all->key_heads * 4;
        struct example of = {span[0], span[1] - span[0], span[2] - span[0], span[3] - span[0]};
        char *own = workspaces + omp_get_thread_num() * workspace;
        open_tiles();
        compute(all, of, task % all->key_heads, own);
        close_tiles();
    }
}

/* Attend inside every example. A row of `spans` [examples][4] is the begin and the end of an example, the end of what its
   branches share, and the begin of the rest of its second branch. Each thread has `workspace` bytes of `workspaces`. */
EXPORT void attention(const bf16 *query, const bf16 *key, const bf16 *value, bf16 *output, float *logsumexp,
                      const int32_t *spans, long examples, long length, long heads, long key_heads, long head_dim,
                      long window, float scale, char *workspaces, long workspace, int threads) {
    struct attention all = {query, key, value, output, logsumexp, length, heads, key_heads, head_dim, window, scale,
                            NULL, NULL, NULL, NULL};
    for_each_example(&all, attend, spans, examples, workspaces, workspace, threads);
}

EXPORT void attention_backward(const bf16 *grad_output, const bf16 *query, const bf16 *key, const bf16 *value,
                               bf16 *output, float *logsumexp, bf16 *grad_query, bf16 *grad_key, bf16 *grad_value,
                               const int32_t *spans, long examples, long length, long heads, long key_heads,
                               long head_dim, long window, float scale, char *workspaces, long workspace, int threads) {
    struct attention all = {query, key, value, output, logsumexp, length, heads, key_heads, head_dim, window, scale,
                            grad_output, grad_query, grad_key, grad_value};
    for_each_example(&all, attend_backward, spans, examples, workspaces, workspace, threads);
}

/* ---- linear maps ---- */

enum { PANEL_BYTES = 1 << 19, CHUNK = 64 }; /* PANEL_BYTES of packed weight and CHUNK rows of x stay in the L2 cache */
enum { SPLIT_ROWS = 128 }; /* fewest rows per task if several tasks pack the same panel, so that packing is worth its time */
enum { TILES_BYTES = 5 << 18, TILES_PANELS = 8, TILES_MOST_PANELS = 16 }; /* sizes for AMX tiles; CPUs with AMX have 2 MiB of L2 */

/* The arguments of `linear`. */
struct linear {
    const bf16 *const *x;
    const long *x_stride;
    const bf16 *const *weight;
    const long *inner;
    const int *transposed;
    int count;
    const bf16 *bias;
    bf16 *output;
    long rows, columns;
};

/* How the tasks of `linear` divide a product: `groups` of `together` panels, `splits` of `task_rows` rows, and for tiles
   `passes` over those, which sum `depth` numbers each. A panel is 32 columns. */
struct division {
    long panels, together, groups, splits, task_rows, passes, depth;
};

/* The columns `begin` to `end` of a product's x, and the same rows of its weight. */
struct piece {
    int product;
    long begin, end;
};

static long ceiling(long count, long divisor) { return (count + divisor - 1) / divisor; }

/* A pass of tiles has as many packed weights as fit the cache. With many summands there are several passes, whose sums
   stay in the cache too; one pass with fewer columns would read x more often. */
static struct division divide(const long *inner, int count, long rows, long columns, int threads) {
    struct division to = {.panels = ceiling(columns, STEP), .passes = 1};
    long total = 0;
    for (int i = 0; i < count; i++) total += padded(inner[i]);
    to.depth = total;
    if (!tiles || rows < STEP) {
        to.together = maximum(1, minimum(4, PANEL_BYTES / (total * STEP * 2)));
        to.together = maximum(1, minimum(to.together, to.panels * maximum(1, rows / SPLIT_ROWS) / threads));
        to.groups = ceiling(to.panels, to.together);
        to.splits = maximum(1, minimum(rows / SPLIT_ROWS, 4 * threads / to.groups));
        to.task_rows = ceiling(ceiling(rows, to.splits), ROWS) * ROWS;
        return to;
    }
    to.together = minimum(TILES_MOST_PANELS, maximum(TILES_PANELS, TILES_BYTES / (total * STEP * 2)));
    to.groups = ceiling(to.panels, to.together);
    if (to.groups > 1) to.groups = ceiling(to.groups, threads) * threads;
    to.together = ceiling(to.panels, to.groups);
    to.passes = ceiling(total, TILES_BYTES / (to.together * STEP * 2) / STEP * STEP);
    to.depth = padded(ceiling(total, to.passes));
    to.splits = maximum(1, minimum(rows / SPLIT_ROWS, ceiling(2 * threads, to.groups)));
    const long most_rows = TILES_BYTES / (to.together * STEP * sizeof(float)) / STEP * STEP; /* whose sums fit */
    if (to.passes > 1) to.splits = maximum(to.splits, ceiling(rows, most_rows));
    to.task_rows = padded(ceiling(rows, to.splits));
    return to;
}

/* Copy the panels `first` to `last` of a weight in the VNNI layout [padded depth / 2][32][2], padded with zeros; panels are
   `panel_size` apart. The weight is [columns][inner] if `transposed`, as nn.Linear keeps it, else [inner][columns]. */
static void pack(bf16 *target, long panel_size, const struct linear *all, struct piece piece, long first, long last) {
    const bf16 *weight = all->weight[piece.product];
    long columns = all->columns, inner = all->inner[piece.product], depth = piece.end - piece.begin;
    for (long pair = 0; pair < padded(depth) / 2 && !all->transposed[piece.product]; pair++)
        for (long panel = first; panel < last; panel++)
            for (long i = 0; i < STEP; i += LANES) {
                const bf16 *from = weight + (piece.begin + 2 * pair) * columns + panel * STEP + i;
                _mm_prefetch(from + 16 * columns, _MM_HINT_T0); /* rows are too far apart for the hardware to prefetch */
                _mm_prefetch(from + 17 * columns, _MM_HINT_T0);
                __mmask16 mask = 2 * pair < depth ? first_lanes(columns - panel * STEP - i) : 0;
                interleave(target + (panel - first) * panel_size + (pair * STEP + i) * 2, from, from + columns, mask, mask);
            }
    for (long panel = first; panel < last && all->transposed[piece.product]; panel++, target += panel_size) {
        const bf16 *from = weight + panel * STEP * inner + piece.begin;
        long panel_columns = minimum(STEP, columns - panel * STEP), pairs = depth / 2;
        long in_blocks = panel_columns / LANES * LANES, pairs_in_blocks = pairs / LANES * LANES;
        transpose(target, STEP, from, inner / 2, in_blocks, pairs_in_blocks);
        for (long i = 0; i < STEP; i++)
            for (long pair = i < in_blocks ? pairs_in_blocks : 0; pair < padded(depth) / 2; pair++)
                for (int k = 0; k < 2; k++)
                    target[(pair * STEP + i) * 2 + k] = i < panel_columns && pair < pairs ? from[i * inner + 2 * pair + k] : 0;
    }
}

/* Round sums of 8 rows and 32 columns from `row` and `column` on, plus the bias, and store them in the output. */
INLINE void store_sums(const struct linear *all, floats sums[ROWS][2], long row, long column) {
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int i = 0; i < 2; i++) {
            long first = column + i * LANES;
            __mmask16 mask = first_lanes(all->columns - first);
            floats sum = sums[r][i];
            if (all->bias) sum += load(all->bias + first, mask);
            store(all->output + (row + r) * all->columns + first, mask, sum);
        }
}

/* Compute the output of 64 rows from `chunk` on, at most up to row `end`, and one panel. */
static void linear_chunk(const struct linear *all, const bf16 *packed, long chunk, long end, long column) {
    for (long row = chunk; row < minimum(end, chunk + CHUNK); row += ROWS) {
        long from = minimum(row, all->rows - ROWS); /* the last rows are computed twice */
        const bf16 *right = packed;
        floats sums[ROWS][2];
        clear(sums);
        for (int i = 0; i < all->count; right += padded(all->inner[i++]) * STEP) {
            const bf16 *left = all->x[i] + from * all->x_stride[i];
            if (all->columns - column > LANES) /* two calls, so that `wide` is a constant in each */
                multiply(sums, left, all->x_stride[i], 2, right, STEP, all->inner[i] / 2, 1);
            else
                multiply(sums, left, all->x_stride[i], 2, right, STEP, all->inner[i] / 2, 0);
        }
        store_sums(all, sums, from, column);
    }
}

/* Set `factors` for 32 rows from `row` on; return the number of factors. If a piece's depth is no multiple of STEP, its
   last columns are copied to `ends` [pieces][32][32] and padded with zeros. */
static int factors_of(const struct linear *all, const struct piece *pieces, int count, long row, bf16 *ends,
                      struct factor *factors) {
    int found = 0;
    for (int i = 0; i < count; i++, ends += STEP * STEP) {
        long stride = all->x_stride[pieces[i].product], depth = pieces[i].end - pieces[i].begin;
        long complete = depth / STEP * STEP;
        const bf16 *left = all->x[pieces[i].product] + row * stride + pieces[i].begin;
        if (complete) factors[found++] = (struct factor){left, stride, complete};
        if (complete == depth) continue;
        copy_padded(ends, left + complete, stride, STEP, depth - complete);
        factors[found++] = (struct factor){ends, STEP, STEP};
    }
    return found;
}

/* Set the pieces of all products' inner dimensions, one after the other and padded, that lie in [begin, end); return
   their number. */
static int pieces_of(const struct linear *all, long begin, long end, struct piece *pieces) {
    int found = 0;
    for (int i = 0; i < all->count; begin -= padded(all->inner[i]), end -= padded(all->inner[i]), i++) {
        struct piece piece = {i, maximum(0, begin), minimum(all->inner[i], end)};
        if (piece.begin < piece.end) pieces[found++] = piece;
    }
    return found;
}

/* Return the bytes of workspace that a thread needs for `count` products whose inner sizes add up to `inner`. */
EXPORT long linear_workspace(long inner, int count) {
    long bytes = maximum(PANEL_BYTES, (inner + count * STEP) * STEP * sizeof(bf16)) + 64;
    return tiles ? maximum(bytes, 2 * TILES_BYTES + count * STEP * STEP * sizeof(bf16) + 64) : bytes;
}

/* output [rows][columns] = the sum of `count` products x [rows][inner] times weight, plus the bias unless it is NULL.
   Every inner is even and there are at least ROWS rows. */
EXPORT void linear(const bf16 *const *x, const long *x_stride, const bf16 *const *weight, const long *inner,
                   const int *transposed, int count, const bf16 *bias, bf16 *output, long rows, long columns,
                   char *workspaces, long workspace, int threads) {
    const struct linear all = {x, x_stride, weight, inner, transposed, count, bias, output, rows, columns};
    const struct division to = divide(inner, count, rows, columns, threads);
    const int in_tiles = tiles && rows >= STEP;
    long total = 0; /* summands of an output, with padding */
    for (int i = 0; i < count; i++) total += padded(inner[i]);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < to.groups * to.splits; task++) {
        long begin = task / to.groups * to.task_rows, end = minimum(rows, begin + to.task_rows);
        long first = task % to.groups * to.together, last = minimum(to.panels, first + to.together);
        if (begin >= end || first >= last) continue;
        char *own = workspaces + omp_get_thread_num() * workspace;
        bf16 *ends = in_tiles ? allocate(&own, count * STEP * STEP * sizeof(bf16)) : NULL;
        float *blocks = in_tiles ? allocate(&own, TILES_BYTES) : NULL;
        bf16 *packed = allocate(&own, 0);
        struct piece pieces[count];
        struct factor factors[2 * count];
        open_tiles();
        for (long pass = 0; pass < to.passes; pass++) {
            const long low = pass * to.depth, high = minimum(total, low + to.depth);
            int found = pieces_of(&all, low, high, pieces);
            bf16 *target = packed;
            for (int i = 0; i < found; target += padded(pieces[i].end - pieces[i].begin) * STEP, i++)
                pack(target, (high - low) * STEP, &all, pieces[i], first, last);
            if (!in_tiles) {
                for (long chunk = begin; chunk < end; chunk += CHUNK)
                    for (long panel = first; panel < last; panel++)
                        linear_chunk(&all, packed + (panel - first) * total * STEP, chunk, end, panel * STEP);
                continue;
            }
            for (long chunk = begin; chunk < end; chunk += STEP) {
                const long row = minimum(chunk, rows - STEP); /* the last rows are computed twice */
                int factor_count = factors_of(&all, pieces, found, row, ends, factors);
                for (long panel = first; panel < last; panel++) {
                    long place = to.passes > 1 ? (chunk - begin) / STEP * to.together + panel - first : 0;
                    float *block = blocks + place * STEP * STEP;
                    const bf16 *right = packed + (panel - first) * (high - low) * STEP;
                    multiply_tiles(block, STEP, low > 0, factors, factor_count, right, STEP, columns - panel * STEP > LANES);
                    for (long r = 0; r < STEP && high == total; r += ROWS) {
                        floats part[ROWS][2];
                        load_sums(part, block + r * STEP, STEP);
                        store_sums(&all, part, row + r, panel * STEP);
                    }
                }
            }
        }
        close_tiles();
    }
}

enum { BLOCK_ROWS = 2 * CHUNK }; /* most rows that a task multiplies at once */

/* Return the most columns that a task multiplies at once. */
static long block_columns(void) { return tiles ? 16 * STEP : 4 * STEP; }

/* Return the bytes of workspace that a thread needs for a gradient of `outputs` rows. */
EXPORT long weight_gradient_workspace(long outputs) {
    long rows = padded(outputs), columns = block_columns();
    return BLOCK_ROWS * (columns + 2 * rows) * sizeof(bf16) + rows * columns * sizeof(float);
}

/* gradient [outputs][inputs] = transposed left times right, for left [rows][outputs] and right [rows][inputs]. */
EXPORT void weight_gradient(const bf16 *left, long left_stride, const bf16 *right, long right_stride, float *gradient,
                            long rows, long outputs, long inputs, char *workspaces, long workspace, int threads) {
    long padded_outputs = padded(outputs), block = minimum(block_columns(), padded((inputs + threads - 1) / threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long begin = 0; begin < inputs; begin += block) {
        long columns = minimum(block, inputs - begin), padded_columns = padded(columns);
        char *own = workspaces + omp_get_thread_num() * workspace;
        bf16 *right_pairs = allocate(&own, BLOCK_ROWS * padded_columns * sizeof(bf16));
        bf16 *left_pairs = allocate(&own, BLOCK_ROWS * padded_outputs * sizeof(bf16));
        bf16 *left_rows = allocate(&own, tiles ? BLOCK_ROWS * padded_outputs * sizeof(bf16) : 0);
        float *sums = allocate(&own, padded_outputs * padded_columns * sizeof(float));
        open_tiles();
        memset(sums, 0, padded_outputs * padded_columns * sizeof(float));
        for (long chunk = 0; chunk < rows; chunk += BLOCK_ROWS) {
            long count = minimum(BLOCK_ROWS, rows - chunk);
            interleave_rows(left_pairs, left + chunk * left_stride, left_stride, count, outputs);
            interleave_rows(right_pairs, right + chunk * right_stride + begin, right_stride, count, columns);
            if (tiles) {
                long done = (count + 1) / 2 * 2, missing = padded(count) - done; /* rows of zeros up to a multiple of 32 */
                memset(left_pairs + done * padded_outputs, 0, missing * padded_outputs * sizeof(bf16));
                memset(right_pairs + done * padded_columns, 0, missing * padded_columns * sizeof(bf16));
                transpose(left_rows, BLOCK_ROWS / 2, left_pairs, padded_outputs, padded(count) / 2, padded_outputs);
                add_product(sums, padded_columns, left_rows, BLOCK_ROWS, 2, right_pairs, padded_columns, padded_outputs,
                            padded_columns, padded(count) / 2);
                continue;
            }
            add_product(sums, padded_columns, left_pairs, 2, 2 * padded_outputs, right_pairs, padded_columns,
                        (outputs + ROWS - 1) / ROWS * ROWS, padded_columns, (count + 1) / 2);
        }
        close_tiles();
        for (long row = 0; row < outputs; row++)
            memcpy(gradient + row * inputs + begin, sums + row * padded_columns, columns * sizeof(float));
    }
}

/* ---- RMS norms ---- */

EXPORT void rms_norm(const bf16 *x, const bf16 *weight, bf16 *output, float *inverse_rms, long rows, long width,
                     float epsilon, int gemma, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        floats squares = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES) {
            floats part = load(from + i, first_lanes(width - i));
            squares = _mm512_fmadd_ps(part, part, squares);
        }
        float inverse = inverse_rms[row] = 1 / sqrtf(_mm512_reduce_add_ps(squares) / width + epsilon);
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first_lanes(width - i);
            floats normalized = load(from + i, mask) * inverse, gain = load(weight + i, mask);
            floats result = gemma ? normalized * (gain + 1.0f) : rounded_to_bf16(normalized) * gain;
            store(output + row * width + i, mask, result);
        }
    }
}

EXPORT void rms_norm_backward(const bf16 *grad_output, const bf16 *x, const bf16 *weight, const float *inverse_rms,
                              bf16 *grad_x, long rows, long width, int gemma, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width, *grad = grad_output + row * width;
        floats sum = _mm512_setzero_ps();
        const float offset = gemma ? 1 : 0, inverse = inverse_rms[row];
        /* with the mask in a variable gcc 12 makes this function three times as slow */
        for (long i = 0; i < width; i += LANES) {
            floats grad_normalized = load(grad + i, first_lanes(width - i)) * (load(weight + i, first_lanes(width - i)) + offset);
            sum = _mm512_fmadd_ps(grad_normalized, load(from + i, first_lanes(width - i)) * inverse, sum);
        }
        floats means = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (long i = 0; i < width; i += LANES) {
            floats grad_normalized = load(grad + i, first_lanes(width - i)) * (load(weight + i, first_lanes(width - i)) + offset);
            floats normalized = load(from + i, first_lanes(width - i)) * inverse;
            store(grad_x + row * width + i, first_lanes(width - i), _mm512_fnmadd_ps(normalized, means, grad_normalized) * inverse);
        }
    }
}

/* ---- gated activations ---- */

INLINE floats sigmoid(floats x) {
    floats denominator = 1.0f + exp2_floats(_mm512_min_ps(x * -LOG2_E, _mm512_set1_ps(126)));
    floats estimate = _mm512_rcp14_ps(denominator); /* exact to 14 bits; one Newton step doubles this number of bits */
    return estimate * _mm512_fnmadd_ps(denominator, estimate, _mm512_set1_ps(2));
}

/* SiLU, or the approximation of GELU with tanh, and its derivative. */
INLINE floats activation(floats x, int tanh, floats *derivative) {
    const floats ones = _mm512_set1_ps(1);
    if (!tanh) {
        floats gate = sigmoid(x);
        *derivative = gate * _mm512_fmadd_ps(x, 1.0f - gate, ones);
        return x * gate;
    }
    floats inner = 2.0f * 0.7978845608028654f * _mm512_fmadd_ps(0.044715f * x * x, x, x);
    floats tanh_x = _mm512_fmsub_ps(_mm512_set1_ps(2), sigmoid(inner), ones);
    floats inner_derivative = 0.7978845608028654f * _mm512_fmadd_ps(0.134145f * x, x, ones);
    floats tanh_derivative = 0.5f * x * _mm512_fnmadd_ps(tanh_x, tanh_x, ones);
    *derivative = _mm512_fmadd_ps(tanh_derivative, inner_derivative, 0.5f * (1.0f + tanh_x));
    return 0.5f * x * (1.0f + tanh_x);
}

/* output = activation(gate) * up, of `count` numbers. */
EXPORT void gated(const bf16 *gate, const bf16 *up, bf16 *output, long count, int tanh, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        __mmask16 mask = first_lanes(count - i);
        floats derivative;
        store(output + i, mask, activation(load(gate + i, mask), tanh, &derivative) * load(up + i, mask));
    }
}

/* The gradients of gate and up; `grad_gate` may be the memory of `grad_output`. */
EXPORT void gated_backward(const bf16 *grad_output, const bf16 *gate, const bf16 *up, bf16 *grad_gate, bf16 *grad_up,
                           long count, int tanh, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        __mmask16 mask = first_lanes(count - i);
        floats derivative, active = activation(load(gate + i, mask), tanh, &derivative);
        floats grad = load(grad_output + i, mask);
        store(grad_gate + i, mask, grad * load(up + i, mask) * derivative);
        store(grad_up + i, mask, grad * active);
    }
}

/* ---- cross-entropy ---- */

/* Write the log-probability of each row's label, NaN for a label outside [0, vocabulary). If `to_gradient`, replace
   the logits by the gradient of the summed cross-entropy: probabilities, minus one at the label. */
EXPORT void label_log_probs(bf16 *logits, const int64_t *labels, float *log_probs, long rows, long vocabulary,
                            int to_gradient, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        bf16 *at = logits + row * vocabulary;
        long label = labels[row];
        if (label < 0 || label >= vocabulary) {
            log_probs[row] = NAN;
            continue;
        }
        floats highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (long i = 0; i < vocabulary; i += LANES) {
            __mmask16 mask = first_lanes(vocabulary - i);
            highest = _mm512_mask_max_ps(highest, mask, highest, load(at + i, mask));
        }
        float max = _mm512_reduce_max_ps(highest);
        for (long i = 0; i < vocabulary; i += LANES) {
            __mmask16 mask = first_lanes(vocabulary - i);
            sum = _mm512_mask_add_ps(sum, mask, sum, exp2_floats((load(at + i, mask) - max) * LOG2_E));
        }
        float total = _mm512_reduce_add_ps(sum), logit = _mm512_reduce_add_ps(load(at + label, 1));
        log_probs[row] = logit - max - logf(total);
        if (!to_gradient) continue;
        for (long i = 0; i < vocabulary; i += LANES) {
            __mmask16 mask = first_lanes(vocabulary - i);
            store(at + i, mask, exp2_floats((load(at + i, mask) - max) * LOG2_E) * (1 / total));
        }
        store(at + label, 1, _mm512_set1_ps(expm1f(log_probs[row]))); /* p - 1, accurate where p is near 1 */
    }
}

/* ---- rotary positions ---- */

/* output = x cos + rotate_half(x) sin, of x [length][heads][head_dim] and angles [length][head_dim]. */
EXPORT void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *output, long length, long heads,
                   long head_dim, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < length; row++)
        for (long i = 0; i < head_dim / 2; i += LANES) {
            __mmask16 mask = first_lanes(head_dim / 2 - i);
            const bf16 *cos_row = cos + row * head_dim + i, *sin_row = sin + row * head_dim + i;
            floats cos_1 = load(cos_row, mask), cos_2 = load(cos_row + head_dim / 2, mask);
            floats sin_1 = load(sin_row, mask), sin_2 = load(sin_row + head_dim / 2, mask);
            for (long head = 0; head < heads; head++) {
                long at = (row * heads + head) * head_dim + i;
                floats left = load(x + at, mask), right = load(x + at + head_dim / 2, mask);
                store(output + at, mask, left * cos_1 - right * sin_1);
                store(output + at + head_dim / 2, mask, right * cos_2 + left * sin_2);
            }
        }
}

/* Follows the Huffman codes of JPEGs without computing pixels, to find damage that decoders paint gray (ITU T.81).
 * Baseline, extended and progressive frames of 8 bits; other files are not examined. */

#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../on_threads.h"

enum { FINE, ODD, SHORT, INVALID, EXTRA, RESTART, MISSING }; /* verdicts, numbered in damage.py */
enum { LOOK = 9, FAST = 12, MAX_PIXELS = 1 << 28, MAX_SCANS = 100 };

/* Same layout as _REQUEST in damage.py. */
typedef struct {
    const uint8_t *data;
    int64_t size;
    int32_t verdict, scan; /* the number of the damaged scan, from 1 */
    int32_t whole;         /* whether that scan holds the whole picture */
    float done;            /* fraction of that scan before the damage */
} Request;

typedef struct {
    uint16_t look[1 << LOOK]; /* length << 8 | symbol of the codes of up to LOOK bits; 0: longer */
    int32_t last[17], shift[17]; /* by length: the largest code, -1 if none; index of its symbol less the code */
    uint8_t symbols[256];
    uint16_t fast[1 << FAST]; /* see `combine` */
    int known, combined;
} Table;

typedef struct {
    int id, h, v, quantization, table[2];
    int64_t width, height; /* in blocks */
    uint64_t *nonzero;     /* of progressive files, by block: which coefficients are not zero so far */
    int8_t precision[64];  /* lowest bit coded so far, -1: none */
} Component;

typedef struct {
    const uint8_t *at, *stop; /* data up to the next marker, without the zeros behind bytes of 0xFF; then 8 zeros */
    uint64_t bits;            /* from the highest bit on; those behind `count` are zero or equal to what follows */
    int count, fake;          /* bits in there; how many of them are zeros behind the data */
    int marker;               /* where the data ended: a marker, or -1 for the end of the file */
    const uint8_t *next;      /* there */
} Bits;

typedef struct {
    Bits bits;
    const uint8_t *end; /* of the file */
    uint8_t *clean;     /* for `Bits` */
    Table tables[2][4]; /* DC, AC */
    Component parts[4];
    int count, progressive, interval, hmax, vmax;
    int quantizations; /* bits of the quantization tables that are defined */
    int64_t width, height;
    int from, to, high, low, run; /* of the scan; blocks left of an end-of-band run */
} Jpeg;

static inline uint64_t eight(const uint8_t *at) {
    uint64_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap64(bytes) : bytes;
}

static void fill(Bits *b) {
    if (b->count > 56) return;
    if (b->stop - b->at >= 8) {
        b->bits |= eight(b->at) >> b->count;
        b->at += (63 - b->count) >> 3;
        b->count |= 56;
        return;
    }
    while (b->count <= 56) {
        if (b->at < b->stop) b->bits |= (uint64_t)*b->at++ << (56 - b->count);
        else b->fake += 8;
        b->count += 8;
    }
}

static inline uint32_t take(Bits *b, int count) {
    if (!count) return 0;
    if (b->count < count) fill(b);
    uint32_t value = (uint32_t)(b->bits >> (64 - count));
    b->bits <<= count;
    b->count -= count;
    return value;
}

/* A symbol, or -1 for bits that are no code. */
static inline int decode(Bits *b, const Table *table) {
    if (b->count < 16) fill(b);
    uint16_t found = table->look[b->bits >> (64 - LOOK)];
    int length = found >> 8;
    if (__builtin_expect(length, 1)) {
        b->bits <<= length;
        b->count -= length;
        return found & 0xFF;
    }
    for (length = LOOK + 1; length <= 16; length++) {
        int32_t code = (int32_t)(b->bits >> (64 - length));
        if (code <= table->last[length]) {
            take(b, length);
            return table->symbols[(code + table->shift[length]) & 0xFF];
        }
    }
    return -1;
}

static int exhausted(const Bits *b) { return b->count < b->fake; }

static int number(const uint8_t *at) { return at[0] << 8 | at[1]; }

static int define(Jpeg *jpeg, const uint8_t *at, const uint8_t *end) {
    while (at + 17 <= end) {
        if ((*at >> 4) > 1 || (*at & 15) > 3) return 0;
        Table *table = &jpeg->tables[*at >> 4][*at & 15];
        const uint8_t *counts = at;
        int total = 0, code = 0;
        for (int n = 1; n <= 16; n++) total += counts[n];
        at += 17;
        if (total > 256 || at + total > end) return 0;
        memset(table, 0, sizeof *table);
        memcpy(table->symbols, at, (size_t)total);
        for (int n = 1, index = 0; n <= 16; n++, code <<= 1) {
            table->shift[n] = index - code;
            for (int k = 0; k < counts[n]; k++, code++, index++) {
                if (code >= 1 << n) return 0;
                if (n <= LOOK)
                    for (int low = 0; low < 1 << (LOOK - n); low++)
                        table->look[(code << (LOOK - n)) + low] = (uint16_t)(n << 8 | table->symbols[index]);
            }
            table->last[n] = counts[n] ? code - 1 : -1;
        }
        table->known = 1;
        at += total;
    }
    return at == end;
}

static int define_quantization(Jpeg *jpeg, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        if (*at >> 4 > 1 || (*at & 15) > 3) return 0;
        jpeg->quantizations |= 1 << (*at & 15);
        at += *at >> 4 ? 129 : 65;
    }
    return at == end;
}

/* Look up a DC code, or as many AC codes at once as FAST bits hold, with the bits behind each. Entries: bits, END at the
 * end of a block, coefficients << COEFFICIENTS; 0 if not even one fits. */
enum { BITS = 15, END = 16, COEFFICIENTS = 5 };

static void combine(Table *table, int ac) {
    uint16_t one[1 << FAST];
    for (int n = 0; n < 1 << FAST; n++) {
        uint16_t found = table->look[n >> (FAST - LOOK)];
        int run = (found & 0xFF) >> 4, size = found & 15, bits = (found >> 8) + size;
        int end = ac && !size && run != 15;
        one[n] = !found || bits > FAST || (run && !ac) ? 0 : (uint16_t)(bits | (end ? END : (run + 1) << COEFFICIENTS));
    }
    for (int n = 0; n < 1 << FAST; n++) {
        uint16_t all = one[n], next;
        while (ac && all && !(all & END)) {
            next = one[n << (all & BITS) & ((1 << FAST) - 1)];
            if (!next || (all & BITS) + (next & BITS) > FAST) break;
            all += next;
        }
        table->fast[n] = all;
    }
    table->combined = 1;
}

static int frame(Jpeg *jpeg, const uint8_t *at, const uint8_t *end, int progressive) {
    if (jpeg->count || end - at < 6 || at[0] != 8) return 0;
    jpeg->height = number(at + 1);
    jpeg->width = number(at + 3);
    jpeg->count = at[5];
    jpeg->progressive = progressive;
    if (jpeg->count < 1 || jpeg->count > 4 || end - at < 6 + 3 * jpeg->count) return 0;
    if (!jpeg->height || !jpeg->width || jpeg->height * jpeg->width > MAX_PIXELS) return 0;
    for (int n = 0; n < jpeg->count; n++) {
        Component *part = &jpeg->parts[n];
        part->id = at[6 + 3 * n], part->h = at[7 + 3 * n] >> 4, part->v = at[7 + 3 * n] & 15;
        part->quantization = at[8 + 3 * n];
        if (part->h < 1 || part->h > 4 || part->v < 1 || part->v > 4 || part->quantization > 3) return 0;
        if (part->h > jpeg->hmax) jpeg->hmax = part->h;
        if (part->v > jpeg->vmax) jpeg->vmax = part->v;
        memset(part->precision, -1, sizeof part->precision);
    }
    for (int n = 0; n < jpeg->count; n++) {
        Component *part = &jpeg->parts[n];
        part->width = ((jpeg->width * part->h + jpeg->hmax - 1) / jpeg->hmax + 7) / 8;
        part->height = ((jpeg->height * part->v + jpeg->vmax - 1) / jpeg->vmax + 7) / 8;
        if (progressive) {
            part->nonzero = calloc((size_t)(part->width * part->height), sizeof *part->nonzero);
            if (!part->nonzero) return 0;
        }
    }
    return 1;
}

/* The blocks of one kind of scan each: 0 if the codes are invalid. */

static int sequential(Jpeg *jpeg, const Component *part) {
    Bits *b = &jpeg->bits;
    const Table *dc = &jpeg->tables[0][part->table[0]], *ac = &jpeg->tables[1][part->table[1]];
    const uint8_t *stop = b->stop;
    for (int k = 0; k < 64;) {
        uint64_t bits = b->bits; /* in registers */
        const uint8_t *at = b->at;
        int count = b->count, end = 0;
        while (stop - at >= 8) {
            bits |= eight(at) >> count;
            at += (63 - count) >> 3;
            count |= 56;
            for (int n = 0; n < 56 / FAST; n++) {
                uint16_t found = (k ? ac : dc)->fast[bits >> (64 - FAST)];
                int last = k + (found >> COEFFICIENTS);
                if (!found || last > 63) goto one;
                bits <<= found & BITS;
                count -= found & BITS;
                k = last;
                if ((end = found & END)) goto one;
            }
        }
    one: /* that does not fit, or near the end of the block or of the data */
        b->bits = bits, b->at = at, b->count = count;
        if (end) return 1;
        int symbol = decode(b, k ? ac : dc), run = k ? symbol >> 4 : 0, size = k ? symbol & 15 : symbol;
        if (symbol < 0 || size > 15) return 0;
        if (k && !size && run != 15) return 1;
        k += run + 1;
        if (k > 64) return 0;
        take(b, size);
    }
    return 1;
}

static int direct(Jpeg *jpeg, const Component *part) {
    if (jpeg->high) {
        take(&jpeg->bits, 1);
        return 1;
    }
    int size = decode(&jpeg->bits, &jpeg->tables[0][part->table[0]]);
    if (size < 0 || size > 15) return 0;
    take(&jpeg->bits, size);
    return 1;
}

static int band(Jpeg *jpeg, const Component *part, uint64_t *nonzero) {
    Bits *b = &jpeg->bits;
    const Table *ac = &jpeg->tables[1][part->table[1]];
    for (int k = jpeg->from; k <= jpeg->to && !jpeg->run;) {
        int symbol = decode(b, ac);
        if (symbol < 0) return 0;
        int run = symbol >> 4, size = symbol & 15;
        if (!size && run != 15) {
            jpeg->run = (1 << run) + (int)take(b, run);
            break;
        }
        k += run;
        if (k > jpeg->to) return 0;
        if (size) *nonzero |= 1ull << k;
        take(b, size);
        k++;
    }
    if (jpeg->run) jpeg->run--;
    return 1;
}

static int refinement(Jpeg *jpeg, const Component *part, uint64_t *nonzero) {
    Bits *b = &jpeg->bits;
    const Table *ac = &jpeg->tables[1][part->table[1]];
    int k = jpeg->from;
    while (!jpeg->run && k <= jpeg->to) {
        int symbol = decode(b, ac);
        if (symbol < 0 || (symbol & 15) > 1) return 0;
        int run = symbol >> 4, fresh = symbol & 15;
        if (!fresh && run != 15) {
            jpeg->run = (1 << run) + (int)take(b, run);
            break;
        }
        take(b, fresh); /* its sign */
        for (; k <= jpeg->to; k++) {
            if (*nonzero >> k & 1) take(b, 1);
            else if (--run < 0) break;
        }
        if (fresh && k > jpeg->to) return 0;
        if (fresh) *nonzero |= 1ull << k;
        k++;
    }
    if (jpeg->run) {
        for (; k <= jpeg->to; k++)
            if (*nonzero >> k & 1) take(b, 1);
        jpeg->run--;
    }
    return 1;
}

static int block(Jpeg *jpeg, const Component *part, int64_t index) {
    if (!jpeg->progressive) return sequential(jpeg, part);
    if (jpeg->from == 0) return direct(jpeg, part);
    return jpeg->high ? refinement(jpeg, part, part->nonzero + index) : band(jpeg, part, part->nonzero + index);
}

/* Go to the marker that must follow: FINE, ODD by zeros or ones, or EXTRA data are in between. */
static int to_marker(Bits *b) {
    int found = FINE;
    take(b, b->count & 7);
    for (fill(b); b->count > b->fake; fill(b)) {
        uint32_t byte = take(b, 8);
        if (byte && byte != 0xFF) return EXTRA;
        found = ODD;
    }
    return found;
}

/* Begin to read the data at `at`. */
static void reset(Jpeg *jpeg, const uint8_t *at) {
    Bits *b = &jpeg->bits;
    uint8_t *to = jpeg->clean;
    b->at = to;
    b->bits = 0;
    b->count = b->fake = 0;
    for (;;) {
        const uint8_t *found = at < jpeg->end ? memchr(at, 0xFF, (size_t)(jpeg->end - at)) : NULL;
        const uint8_t *behind = found ? found : jpeg->end;
        if (behind > at) memcpy(to, at, (size_t)(behind - at));
        to += behind - at;
        b->next = behind;
        while (behind < jpeg->end && *behind == 0xFF) behind++; /* fill bytes */
        b->marker = behind < jpeg->end ? *behind : -1;
        if (b->marker) break;
        *to++ = 0xFF;
        at = behind + 1;
    }
    memset(to, 0, 8);
    b->stop = to;
}

/* The byte behind a marker at or after `at`, which only fill bytes may precede. */
static const uint8_t *behind_marker(const uint8_t *at, const uint8_t *end) {
    while (at < end && *at == 0xFF) at++;
    return at < end ? at + 1 : end;
}

static int scan(Jpeg *jpeg, const uint8_t *at, const uint8_t *end, Request *request) {
    int count = end - at < 1 ? 0 : at[0];
    if (!jpeg->count || count < 1 || count > 4 || end - at < 4 + 2 * count) return -1;
    Component *chosen[4];
    int order = FINE;
    for (int n = 0; n < count; n++) {
        chosen[n] = NULL;
        for (int p = 0; p < jpeg->count; p++)
            if (jpeg->parts[p].id == at[1 + 2 * n]) chosen[n] = &jpeg->parts[p];
        if (!chosen[n] || (at[2 + 2 * n] >> 4) > 3 || (at[2 + 2 * n] & 15) > 3) return -1;
        if (!(jpeg->quantizations >> chosen[n]->quantization & 1)) return -1;
        chosen[n]->table[0] = at[2 + 2 * n] >> 4;
        chosen[n]->table[1] = at[2 + 2 * n] & 15;
    }
    at += 1 + 2 * count;
    jpeg->from = 0, jpeg->to = 63, jpeg->high = jpeg->low = jpeg->run = 0;
    if (jpeg->progressive) {
        jpeg->from = at[0], jpeg->to = at[1], jpeg->high = at[2] >> 4, jpeg->low = at[2] & 15;
        if (jpeg->from > jpeg->to || jpeg->to > 63 || (jpeg->from == 0) != (jpeg->to == 0)) return -1;
        if (jpeg->from && count > 1) return -1;
    }
    for (int n = 0; n < count; n++) {
        int dc = jpeg->from == 0 && !jpeg->high, ac = jpeg->to > 0;
        if (dc && !jpeg->tables[0][chosen[n]->table[0]].known) return -1;
        if (ac && !jpeg->tables[1][chosen[n]->table[1]].known) return -1;
        for (int k = jpeg->from; k <= jpeg->to; k++)
            if (jpeg->high != (chosen[n]->precision[k] < 0 ? 0 : chosen[n]->precision[k])) order = INVALID;
        memset(chosen[n]->precision + jpeg->from, jpeg->low, (size_t)(jpeg->to - jpeg->from + 1));
    }
    for (int n = 0; n < count && !jpeg->progressive; n++)
        for (int ac = 0; ac < 2; ac++) {
            Table *table = &jpeg->tables[ac][chosen[n]->table[ac]];
            if (!table->combined) combine(table, ac);
        }
    int64_t across = chosen[0]->width, down = chosen[0]->height;
    if (count > 1) {
        across = (jpeg->width + 8 * jpeg->hmax - 1) / (8 * jpeg->hmax);
        down = (jpeg->height + 8 * jpeg->vmax - 1) / (8 * jpeg->vmax);
    }
    int64_t units = across * down;
    int padded = FINE, gap;
    if (++request->scan > MAX_SCANS) return -1;
    request->whole = !jpeg->progressive && count == jpeg->count;
    if (order) return order;
    reset(jpeg, end);
    for (int64_t unit = 0; unit < units; unit++) {
        request->done = (float)unit / (float)units;
        if (jpeg->interval && unit && unit % jpeg->interval == 0) {
            if ((gap = to_marker(&jpeg->bits)) == EXTRA) return EXTRA;
            padded |= gap;
            if (jpeg->bits.marker != 0xD0 + (int)((unit / jpeg->interval - 1) & 7)) return RESTART;
            reset(jpeg, behind_marker(jpeg->bits.next, jpeg->end));
            jpeg->run = 0;
        }
        int fine = 1;
        if (count == 1) fine = block(jpeg, chosen[0], unit);
        else
            for (int n = 0; n < count && fine; n++)
                for (int k = chosen[n]->h * chosen[n]->v; k > 0 && fine; k--) fine = block(jpeg, chosen[n], 0);
        if (exhausted(&jpeg->bits)) return SHORT;
        if (!fine) return INVALID;
    }
    request->done = 1;
    gap = to_marker(&jpeg->bits);
    return gap == EXTRA ? EXTRA : gap | padded;
}

/* ODD also if the file cannot be examined: decoders then say what is wrong. */
static int examine(Jpeg *jpeg, Request *request) {
    const uint8_t *at = request->data + 2, *end = request->data + request->size;
    int odd = FINE;
    jpeg->end = end;
    while (end - at >= 2) {
        if (*at != 0xFF) {
            if (request->scan && *at) return EXTRA;
            odd = ODD;
            at++;
            continue;
        }
        int marker = at[1];
        if (marker == 0xFF) {
            at++;
            continue;
        }
        if (marker == 0xD9) {
            for (int n = 0; n < jpeg->count && request->scan; n++)
                for (int k = 0; k < 64; k++)
                    if (jpeg->parts[n].precision[k]) return MISSING;
            return odd;
        }
        at += 2;
        if (marker == 0 || marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7)) continue;
        if (marker == 0xD8) return request->scan ? SHORT : ODD;
        int broken = request->scan ? SHORT : ODD; /* a file that ends before its first scan is no image */
        if (end - at < 2) return broken;
        const uint8_t *next = at + number(at);
        at += 2;
        if (next < at || next > end) return broken;
        if (marker == 0xC4) {
            if (!define(jpeg, at, next)) return broken;
        } else if (marker == 0xDB) {
            if (!define_quantization(jpeg, at, next)) return ODD;
        } else if (marker >= 0xC0 && marker <= 0xC2) {
            if (!frame(jpeg, at, next, marker == 0xC2)) return ODD;
        } else if (marker >= 0xC0 && marker <= 0xCF) {
            return ODD;
        } else if (marker == 0xDD && next - at >= 2) {
            jpeg->interval = number(at);
        } else if (marker == 0xDA) {
            int verdict = scan(jpeg, at, next, request);
            if (verdict < 0) return ODD;
            if (verdict > ODD) return verdict;
            if (verdict == ODD) odd = ODD;
            next = jpeg->bits.next;
        }
        at = next;
    }
    return request->scan ? SHORT : ODD;
}

static void check(Request *request) {
    Jpeg *jpeg = calloc(1, sizeof *jpeg);
    request->verdict = FINE;
    request->scan = request->whole = 0;
    request->done = 0;
    if (jpeg) jpeg->clean = malloc((size_t)request->size + 8);
    if (!jpeg || !jpeg->clean) {
        free(jpeg);
        return;
    }
    if (request->size > 4 && request->data[0] == 0xFF && request->data[1] == 0xD8)
        request->verdict = examine(jpeg, request);
    for (int n = 0; n < 4; n++) free(jpeg->parts[n].nonzero);
    free(jpeg->clean);
    free(jpeg);
}

typedef struct {
    Request *requests;
    int64_t count;
    atomic_llong next;
} Queue;

static void *work(void *argument) {
    Queue *queue = argument;
    for (long long n; (n = atomic_fetch_add(&queue->next, 1)) < queue->count;) check(queue->requests + n);
    return NULL;
}

/* Examine all files; the calling thread is one of `threads`. */
void examine_jpegs(Request *requests, int64_t count, int64_t threads) {
    Queue queue = {.requests = requests, .count = count};
    on_threads(work, &queue, count, threads);
}

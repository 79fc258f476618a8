/* JSON text, checked and skipped: what `_scan.c` reads a body with.
 *
 * As strict as RFC 8259, and a little more: no half of a surrogate pair, no depth beyond DEPTH_MAX.
 * No recursion (a bit for each level says array or object), no allocation, no copy. Every function
 * takes where to begin and returns where it ended, or NULL once the fault is noted.
 *
 * A `bytes` object ends with an octet 0 that belongs to it and that no JSON text may hold, so
 * reading octet by octet stops there without a comparison of addresses; only wide loads compare.
 */
#ifndef PROXY_CORE_JSON_H
#define PROXY_CORE_JSON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) && !defined(SCAN_PORTABLE)
#define SCAN_WIDE
#include <emmintrin.h>
#endif

typedef uint8_t octet;

/* MEDIA_WEIGHT_BYTES as in `media.py`: shorter strings weigh what they are long. */
enum { DEPTH_MAX = 512, MEDIA_WEIGHT_BYTES = 4096 };

typedef struct Media Media; /* in `_media.h`, and of no concern here */

typedef struct {
    const octet *end;   /* of the text */
    const octet *fault; /* where it is not JSON, and why */
    const char *reason;
    int escaped; /* a string that was skipped held a backslash */
    const octet *begin; /* of the text */
    Media *media;       /* where long strings that are data are noted; NULL: nowhere */
} Text;

static void note_long_string(Text *json, const octet *start, const octet *end);


/* A name to look for, and its size, for a table of such. */
#define NAME(text) {text, sizeof text - 1}

static const octet *refuse(Text *json, const octet *at, const char *reason) {
    json->fault = at;
    json->reason = reason;
    return NULL;
}

static inline int is_space(octet c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

static inline const octet *skip_space(const octet *at) {
    while (is_space(*at))
        at++;
    return at;
}

/* --- strings ------------------------------------------------------------------------------- */

#ifdef SCAN_WIDE
/* The octets of 16 that are a quote, a backslash, and a control octet or not ASCII. */
typedef struct {
    __m128i text, quote, backslash, odd;
} Wide;

static inline Wide load(const octet *at) {
    __m128i text = _mm_loadu_si128((const __m128i *)at);
    return (Wide){
        .text = text,
        .quote = _mm_cmpeq_epi8(text, _mm_set1_epi8('"')),
        .backslash = _mm_cmpeq_epi8(text, _mm_set1_epi8('\\')),
        .odd = _mm_cmplt_epi8(text, _mm_set1_epi8(0x20)), /* signed: >= 0x80 are negative */
    };
}

static inline __m128i stops(Wide wide) {
    return _mm_or_si128(_mm_or_si128(wide.quote, wide.backslash), wide.odd);
}

static inline uint64_t bits(__m128i marks) { return (unsigned)_mm_movemask_epi8(marks); }

static inline uint64_t bits_of_64(__m128i a, __m128i b, __m128i c, __m128i d) {
    return bits(a) | bits(b) << 16 | bits(c) << 32 | bits(d) << 48;
}

/* Marks the octets that a backslash escapes: those after an odd number of them. The addition
 * carries through every run of backslashes that begins at an odd place, which tells the parity of
 * its end from the place alone. No run reaches into the block; the last octet's may reach out. */
static inline uint64_t escaped_of_64(uint64_t backslash) {
    const uint64_t even = UINT64_C(0x5555555555555555);
    uint64_t after = backslash << 1;
    uint64_t odd_starts = backslash & ~even & ~after;
    uint64_t parity = (odd_starts + backslash) << 1;
    return (even ^ parity) & after;
}

static inline __m128i short_escapes(Wide wide) {
    __m128i n = _mm_cmpeq_epi8(wide.text, _mm_set1_epi8('n'));
    __m128i r = _mm_cmpeq_epi8(wide.text, _mm_set1_epi8('r'));
    __m128i t = _mm_cmpeq_epi8(wide.text, _mm_set1_epi8('t'));
    return _mm_or_si128(_mm_or_si128(_mm_or_si128(wide.quote, wide.backslash), n),
                        _mm_or_si128(r, t));
}

enum { STAY_BLOCKS = 8 };

/* Skip plain text and the usual escapes: returns the first octet that needs a look. Escapes stand
 * where nobody can predict, and a branch mispredicted costs more than all marks of a block; so
 * where there was one lately, the marks are worked out without asking whether there is another. */
static inline const octet *skip_plain(Text *json, const octet *at) {
    if (json->end - at >= 16) {
        uint64_t found = bits(stops(load(at))); /* names and roles end here */
        if (found)
            return at + __builtin_ctzll(found);
        at += 16;
    }
    for (unsigned stay = 0; json->end - at >= 64; at += 64) {
        Wide a = load(at), b = load(at + 16), c = load(at + 32), d = load(at + 48);
        if (stay || bits(_mm_or_si128(_mm_or_si128(stops(a), stops(b)),
                              _mm_or_si128(stops(c), stops(d))))) {
            uint64_t backslash = bits_of_64(a.backslash, b.backslash, c.backslash, d.backslash);
            uint64_t stop = bits_of_64(_mm_or_si128(a.quote, a.odd), _mm_or_si128(b.quote, b.odd),
                                       _mm_or_si128(c.quote, c.odd), _mm_or_si128(d.quote, d.odd));
            uint64_t usual = bits_of_64(short_escapes(a), short_escapes(b), short_escapes(c),
                                        short_escapes(d));
            uint64_t escaped = escaped_of_64(backslash);
            stop = (stop & ~escaped) | (escaped & ~usual);
            json->escaped |= (backslash & ((stop & -stop) - 1)) != 0; /* none beyond the string */
            if (stop) {
                int place = __builtin_ctzll(stop);
                return at + place - (escaped >> place & 1); /* an escape begins at its backslash */
            }
            if (backslash & ~escaped & UINT64_C(1) << 63)
                return at + 63;
            stay = backslash ? STAY_BLOCKS : stay - (stay > 0);
        }
    }
    for (; json->end - at >= 16; at += 16) {
        uint64_t found = bits(stops(load(at)));
        if (found)
            return at + __builtin_ctzll(found);
    }
    while (*at >= 0x20 && *at < 0x80 && *at != '"' && *at != '\\')
        at++;
    return at;
}
#else
/* Skip plain text: returns the first octet that needs a look. */
static inline const octet *skip_plain(Text *json, const octet *at) {
    const uint64_t ones = UINT64_C(0x0101010101010101);
    while (json->end - at >= 8) {
        uint64_t text, quote, backslash;
        memcpy(&text, at, sizeof text);
        quote = text ^ ones * '"';
        backslash = text ^ ones * '\\';
        if (((text - ones * 0x20) | (quote - ones) | (backslash - ones) | text) & ones << 7)
            break;
        at += 8;
    }
    while (*at >= 0x20 && *at < 0x80 && *at != '"' && *at != '\\')
        at++;
    return at;
}
#endif

/* Skip octets that are not ASCII, or return NULL where they are not UTF-8 (RFC 3629 §4). */
static const octet *skip_utf8(const octet *at) {
    do {
        if (*at < 0xE0) {
            if (*at < 0xC2 || (at[1] & 0xC0) != 0x80)
                return NULL;
            at += 2;
        } else if (*at < 0xF0) {
            if ((at[1] & 0xC0) != 0x80 || (at[2] & 0xC0) != 0x80)
                return NULL;
            if ((*at == 0xE0 && at[1] < 0xA0) || (*at == 0xED && at[1] >= 0xA0))
                return NULL; /* too long a form; half of a surrogate pair */
            at += 3;
        } else {
            if (*at > 0xF4 || (at[1] & 0xC0) != 0x80 || (at[2] & 0xC0) != 0x80 ||
                (at[3] & 0xC0) != 0x80)
                return NULL;
            if ((*at == 0xF0 && at[1] < 0x90) || (*at == 0xF4 && at[1] >= 0x90))
                return NULL; /* too long a form; beyond U+10FFFF */
            at += 4;
        }
    } while (*at >= 0x80);
    return at;
}

static inline int is_digit(octet c) { return c >= '0' && c <= '9'; }

static const octet HEX[256] = {['0' ... '9'] = 1, ['A' ... 'F'] = 1, ['a' ... 'f'] = 1};

static inline int are_hex(const octet *at) {
    return HEX[at[0]] && HEX[at[1]] && HEX[at[2]] && HEX[at[3]];
}

/* Skip a backslash and what it escapes, or return NULL. Half of a surrogate pair is no text
 * (RFC 8259 §8.2 leaves it to the reader), and msgspec refuses it, too. */
static inline const octet *skip_escape(const octet *at) {
    switch (at[1]) {
    case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
        return at + 2;
    case 'u':
        if (!are_hex(at + 2))
            return NULL;
        if ((at[2] | 0x20) != 'd' || at[3] < '8')
            return at + 6;
        if ((at[3] | 0x20) >= 'c' || at[6] != '\\' || at[7] != 'u' || !are_hex(at + 8) ||
            (at[8] | 0x20) != 'd' || (at[9] | 0x20) < 'c')
            return NULL;
        return at + 12;
    }
    return NULL;
}

/* `at` is the octet after the opening quote; returns the one after the closing quote. */
static const octet *skip_string(Text *json, const octet *at) {
    const octet *next;
    for (;;) {
        at = skip_plain(json, at);
        if (*at == '"')
            return at + 1;
        if (*at == '\\') {
            json->escaped = 1;
            do { /* text written in ASCII alone is one escape after another */
                next = skip_escape(at);
                if (next == NULL)
                    return refuse(json, at, "an escape that is none");
                at = next;
            } while (*at == '\\');
        } else if (*at >= 0x80) {
            next = skip_utf8(at);
            if (next == NULL)
                return refuse(json, at, "text that is not UTF-8");
            at = next;
        } else {
            return refuse(json, at, at == json->end ? "the text ends within a string"
                                                    : "a control character in a string");
        }
    }
}

/* --- values -------------------------------------------------------------------------------- */

static inline const octet *skip_digits(const octet *at) {
    while (is_digit(*at))
        at++;
    return at;
}

static const octet *skip_number(Text *json, const octet *at) {
    const octet *start = at;
    at += *at == '-';
    if (!is_digit(*at))
        return refuse(json, start, "a value that is none");
    at = *at == '0' ? at + 1 : skip_digits(at);
    if (*at == '.') {
        if (!is_digit(*++at))
            return refuse(json, start, "a number without digits after its point");
        at = skip_digits(at);
    }
    if (*at == 'e' || *at == 'E') {
        at++;
        at += *at == '+' || *at == '-';
        if (!is_digit(*at))
            return refuse(json, start, "a number without digits in its exponent");
        at = skip_digits(at);
    }
    return at;
}

static inline const octet *skip_word(Text *json, const octet *at, const char *word) {
    const octet *start = at;
    for (; *word; word++, at++)
        if (*at != (octet)*word)
            return refuse(json, start, "a value that is none");
    return at;
}

/* As `skip_string`, for one that is a value. */
static inline const octet *skip_text(Text *json, const octet *at) {
    const octet *end = skip_string(json, at);
    if (end != NULL && end - at > MEDIA_WEIGHT_BYTES && json->media != NULL)
        note_long_string(json, at, end - 1);
    return end;
}

/* Skip a value that holds no others; `at` is its first octet. */
static inline const octet *skip_scalar(Text *json, const octet *at) {
    switch (*at) {
    case '"': return skip_text(json, at + 1);
    case 't': return skip_word(json, at, "true");
    case 'f': return skip_word(json, at, "false");
    case 'n': return skip_word(json, at, "null");
    default: return skip_number(json, at);
    }
}

/* Skip a member's name and its colon; returns the first octet of the value. */
static inline const octet *skip_name(Text *json, const octet *at) {
    if (*at != '"')
        return refuse(json, at, "a member without a name in quotes");
    at = skip_string(json, at + 1);
    if (at == NULL)
        return NULL;
    at = skip_space(at);
    if (*at != ':')
        return refuse(json, at, "a name without a colon");
    return skip_space(at + 1);
}

/* Skip any value of so many levels; `at` is its first octet. */
static const octet *skip_levels(Text *json, const octet *at, unsigned depth_max) {
    uint64_t objects[DEPTH_MAX / 64]; /* a bit for each level: it is an object */
    unsigned depth = 0;
    int in_object = 0;
    for (;;) {
        if (*at == '{' || *at == '[') {
            if (depth == depth_max)
                return refuse(json, at, "values within values, too deep");
            in_object = *at == '{';
            uint64_t bit = UINT64_C(1) << depth % 64;
            objects[depth / 64] = in_object ? (depth % 64 ? objects[depth / 64] : 0) | bit
                                            : (depth % 64 ? objects[depth / 64] & ~bit : 0);
            depth++;
            at = skip_space(at + 1);
            if (*at != (in_object ? '}' : ']')) {
                if (in_object && (at = skip_name(json, at)) == NULL)
                    return NULL;
                continue;
            }
        } else if ((at = skip_scalar(json, at)) == NULL) {
            return NULL;
        } else if (depth) {
            at = skip_space(at);
        }
        while (depth && *at == (in_object ? '}' : ']')) {
            at++;
            if (--depth) {
                in_object = objects[(depth - 1) / 64] >> (depth - 1) % 64 & 1;
                at = skip_space(at);
            }
        }
        if (!depth)
            return at;
        if (*at != ',')
            return refuse(json, at, "neither a comma nor the end of what is open");
        at = skip_space(at + 1);
        if (in_object && (at = skip_name(json, at)) == NULL)
            return NULL;
    }
}

/* Skip any value; `at` is its first octet. */
static inline const octet *skip_value(Text *json, const octet *at) {
    return skip_levels(json, at, DEPTH_MAX);
}

#endif

/* The usage at the end of an answer: what `_scan.c` reads the counts with.
 *
 * As `usage.read_usage`, which says why a search is enough.
 */
#ifndef PROXY_CORE_USAGE_H
#define PROXY_CORE_USAGE_H

#include "_json.h"

enum { PROMPT, COMPLETION, PROMPT_DETAILS, INPUT, OUTPUT, INPUT_DETAILS, CACHE_READ, COUNTS };

static const struct {
    const char *text;
    size_t size;
} COUNT_OF[COUNTS] = {
    NAME("prompt_tokens"), NAME("completion_tokens"), NAME("prompt_tokens_details"),
    NAME("input_tokens"),  NAME("output_tokens"),     NAME("input_tokens_details"),
    NAME("cache_read_input_tokens"),
};

enum { ABSENT = -1, ODD = -2, COUNT_DIGITS_MAX = 12 };

/* Returns the count, ABSENT for null, or ODD for what Python must judge. */
static long long count_of(const octet *at, const octet *end) {
    long long count = 0;
    if (end - at == 4 && memcmp(at, "null", 4) == 0)
        return ABSENT;
    if (end - at > COUNT_DIGITS_MAX)
        return ODD;
    for (; at < end; at++) {
        if (!is_digit(*at))
            return ODD;
        count = 10 * count + (*at - '0');
    }
    return count;
}

/* Read the members of the object that `at` opens: counts of these names. Returns its end, or NULL
 * for what Python must judge. With no names it is a details object, whose one count is cached. */
static const octet *read_counts(Text *json, const octet *at, long long *counts, int details) {
    at = skip_space(at + 1);
    if (*at == '}')
        return at + 1;
    for (;;) {
        const octet *key = at + 1, *value, *key_end;
        json->escaped = 0;
        if ((value = skip_name(json, at)) == NULL || json->escaped)
            return NULL;
        for (key_end = value - 1; *key_end != '"'; key_end--)
            ;
        size_t size = (size_t)(key_end - key);
        int name = COUNTS;
        if (details) {
            name = size == 13 && memcmp(key, "cached_tokens", 13) == 0 ? 0 : COUNTS;
        } else {
            for (name = 0; name < COUNTS; name++)
                if (COUNT_OF[name].size == size && memcmp(COUNT_OF[name].text, key, size) == 0)
                    break;
        }
        if (!details && (name == PROMPT_DETAILS || name == INPUT_DETAILS) && *value == '{') {
            long long cached = ABSENT;
            at = read_counts(json, value, &cached, 1);
            counts[name] = cached == ABSENT ? ODD : cached; /* there, and without the count: rare */
        } else {
            at = skip_value(json, value);
            if (at != NULL && name < COUNTS)
                counts[name] = count_of(value, at);
            if (!details && (name == PROMPT_DETAILS || name == INPUT_DETAILS) && *value != 'n')
                return NULL; /* neither an object nor null */
        }
        if (at == NULL || (name < COUNTS && counts[name] == ODD))
            return NULL;
        at = skip_space(at);
        if (*at == '}')
            return at + 1;
        if (*at != ',')
            return NULL;
        at = skip_space(at + 1);
    }
}

/* Returns the object that is the value of the last `"usage"`, or NULL. */
static const octet *find_usage(const octet *tail, const octet *end) {
    const octet *quote, *at;
    while ((quote = memrchr(tail, '"', (size_t)(end - tail))) != NULL) {
        if (quote - tail >= 6 && memcmp(quote - 6, "\"usage", 6) == 0) {
            at = skip_space(quote + 1);
            if (*at == ':' && *(at = skip_space(at + 1)) == '{')
                return at;
        }
        end = quote;
    }
    return NULL;
}

#endif

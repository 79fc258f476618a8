/* Strings that are data, pictures and sound: `media.py` says which, and why. Only strings that are
 * long come here, and of each only its name and its beginning are looked at. */
#ifndef PROXY_CORE_MEDIA_H
#define PROXY_CORE_MEDIA_H

#include "_json.h"

/* As `limits.MEDIA_REGIONS_MAX` and the patterns in `media.py`. */
enum { REGIONS_MAX = 64, LEAD_MAX = 128, RUN = 2048, NAME_SPACE_MAX = 40 };

typedef struct {
    const octet *start, *end; /* within the quotes */
    size_t octets, strings;   /* of data: one string, or of the last region all that came later */
} Region;

struct Media {
    size_t count;
    Region regions[REGIONS_MAX];
};

static const octet BASE64[256] = {
    ['A' ... 'Z'] = 1, ['a' ... 'z'] = 1, ['0' ... '9'] = 1,
    ['+'] = 1, ['/'] = 1, ['\\'] = 1, ['_'] = 1, ['-'] = 1,
};

static const struct {
    const char *text;
    size_t size;
} MEDIA_NAMES[] = {
    NAME("\"url\""),   NAME("\"data\""),  NAME("\"image_url\""), NAME("\"file_data\""),
    NAME("\"image\""), NAME("\"audio\""), NAME("\"video\""),     NAME("\"image_embeds\""),
};

/* `at` is behind the space. Before a value there is always something that is none. */
static const octet *back_over_space(const octet *at) {
    for (int left = NAME_SPACE_MAX; left && is_space(at[-1]); left--)
        at--;
    return at;
}

/* Whether the value that begins at `at` has a name under which data comes. */
static int is_named_media(const octet *begin, const octet *at) {
    at = back_over_space(at);
    if (*--at != ':')
        return 0;
    at = back_over_space(at);
    for (size_t i = 0; i < sizeof MEDIA_NAMES / sizeof *MEDIA_NAMES; i++) {
        size_t size = MEDIA_NAMES[i].size;
        if ((size_t)(at - begin) > size && memcmp(at - size, MEDIA_NAMES[i].text, size) == 0)
            return at[-1 - (ptrdiff_t)size] != '\\';
    }
    return 0;
}

/* Whether a string of MEDIA_WEIGHT_BYTES or more begins as data does. */
static int begins_as_media(const octet *at) {
    if (memcmp(at, "data:", 5) == 0) {
        const octet *lead_stop = at + LEAD_MAX;
        while (*at != ',') {
            if (*at == '"' || ++at == lead_stop)
                return 0;
        }
        at++;
    }
    for (const octet *stop = at + RUN; at < stop; at++)
        if (!BASE64[*at])
            return 0;
    return 1;
}

static void note_long_string(Text *json, const octet *start, const octet *end) {
    Media *media = json->media;
    if (!is_named_media(json->begin, start - 1) || !begins_as_media(start))
        return;
    size_t octets = (size_t)(end - start);
    if (media->count < REGIONS_MAX) {
        media->regions[media->count++] = (Region){start, end, octets, 1};
    } else {
        Region *last = &media->regions[REGIONS_MAX - 1];
        last->end = end;
        last->octets += octets;
        last->strings++;
    }
}

#endif

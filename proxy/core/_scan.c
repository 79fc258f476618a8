/* The body scan in C: one pass over a JSON body that checks all of it and finds what routing needs.
 *
 * It is what `proxy/core/scan.py` does through msgspec, with the same verdicts: that module stays
 * the law, and runs wherever this one is not built. A body whose *values* are unusual (a model that
 * is not a string, an escape in a key or in a name of ours) is handed back to it, so only the
 * common form is read here and every judgement of types is made in one place.
 *
 * No recursion (a bit for each level says array or object), no allocation but the result, no copy.
 * A `bytes` object ends with an octet 0 that belongs to it and that no JSON text may hold, so
 * reading octet by octet stops there without a comparison of addresses; only wide loads compare.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) && !defined(SCAN_PORTABLE)
#define SCAN_WIDE
#include <emmintrin.h>
#endif

typedef uint8_t octet;

enum { DEPTH_MAX = 512, MODEL_KEPT_BYTES_MAX = 256 };

/* Names of the members that are ours: texts first, then the flag, then the parts of a prompt. */
enum { TEXTS = 6, STREAM = TEXTS, PARTS = STREAM + 1, NAMES = PARTS + 9 };

#define NAME(text) {text, sizeof text - 1}
static const struct {
    const char *text;
    size_t size;
} NAME_OF[NAMES] = {
    NAME("model"),     NAME("service_tier"), NAME("prompt_cache_key"), NAME("session_id"),
    NAME("cache_salt"), NAME("lora_path"),   NAME("stream"),           NAME("messages"),
    NAME("prompt"),    NAME("tools"),        NAME("system"),           NAME("instructions"),
    NAME("query"),     NAME("input"),        NAME("documents"),        NAME("text_1"),
};

typedef struct {
    const octet *start, *end; /* of the value, as it stands in the body; NULL: not given */
} Span;

typedef struct {
    const octet *end;   /* of the body */
    const octet *fault; /* where it is not JSON, and why */
    const char *reason;
    int escaped;        /* a string that was skipped held a backslash */
    int unusual;        /* values for the Python path to judge */
    Span found[NAMES];
} Scan;

static const octet *refuse(Scan *scan, const octet *at, const char *reason) {
    scan->fault = at;
    scan->reason = reason;
    return NULL;
}

static inline const octet *skip_space(const octet *at) {
    while (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')
        at++;
    return at;
}

/* --- strings ------------------------------------------------------------------------------- */

#ifdef SCAN_WIDE
enum { WIDE = 16 };

/* A bit for each of 16 octets that ends plain text: quote, backslash, control, or not ASCII. */
static inline unsigned stops(const octet *at) {
    __m128i text = _mm_loadu_si128((const __m128i *)at);
    __m128i stop = _mm_cmplt_epi8(text, _mm_set1_epi8(0x20)); /* signed: >= 0x80 are negative */
    stop = _mm_or_si128(stop, _mm_cmpeq_epi8(text, _mm_set1_epi8('"')));
    stop = _mm_or_si128(stop, _mm_cmpeq_epi8(text, _mm_set1_epi8('\\')));
    return (unsigned)_mm_movemask_epi8(stop);
}
#else
enum { WIDE = 8 };

/* Not 0 if one of 8 octets ends plain text. */
static inline uint64_t stops(const octet *at) {
    const uint64_t ones = UINT64_C(0x0101010101010101), highs = ones << 7;
    uint64_t text, quote, backslash;
    memcpy(&text, at, sizeof text);
    quote = text ^ ones * '"';
    backslash = text ^ ones * '\\';
    return ((text - ones * 0x20) | (quote - ones) | (backslash - ones) | text) & highs;
}
#endif

/* Skip text that needs no look: returns the first octet that does. */
static inline const octet *skip_plain(const octet *at, const octet *end) {
    while (end - at >= WIDE) {
#ifdef SCAN_WIDE
        unsigned found = stops(at);
        if (found)
            return at + __builtin_ctz(found);
#else
        if (stops(at))
            break;
#endif
        at += WIDE;
    }
    while (*at >= 0x20 && *at < 0x80 && *at != '"' && *at != '\\')
        at++;
    return at;
}

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
static const octet *skip_string(Scan *scan, const octet *at) {
    const octet *next;
    for (;;) {
        at = skip_plain(at, scan->end);
        if (*at == '"')
            return at + 1;
        if (*at == '\\') {
            scan->escaped = 1;
            next = skip_escape(at);
            if (next == NULL)
                return refuse(scan, at, "an escape that is none");
        } else if (*at >= 0x80) {
            next = skip_utf8(at);
            if (next == NULL)
                return refuse(scan, at, "text that is not UTF-8");
        } else {
            return refuse(scan, at, at == scan->end ? "the text ends within a string"
                                                    : "a control character in a string");
        }
        at = next;
    }
}

/* --- values -------------------------------------------------------------------------------- */

static const octet *skip_number(Scan *scan, const octet *at) {
    const octet *start = at;
    at += *at == '-';
    if (*at == '0')
        at++;
    else if (is_digit(*at))
        while (is_digit(*at))
            at++;
    else
        return refuse(scan, start, "a value that is none");
    if (*at == '.') {
        if (!is_digit(*++at))
            return refuse(scan, start, "a number without digits after its point");
        while (is_digit(*at))
            at++;
    }
    if (*at == 'e' || *at == 'E') {
        at++;
        at += *at == '+' || *at == '-';
        if (!is_digit(*at))
            return refuse(scan, start, "a number without digits in its exponent");
        while (is_digit(*at))
            at++;
    }
    return at;
}

static inline const octet *skip_word(Scan *scan, const octet *at, const char *word) {
    const octet *start = at;
    for (; *word; word++, at++)
        if (*at != (octet)*word)
            return refuse(scan, start, "a value that is none");
    return at;
}

/* Skip a value that holds no others; `at` is its first octet. */
static inline const octet *skip_scalar(Scan *scan, const octet *at) {
    switch (*at) {
    case '"': return skip_string(scan, at + 1);
    case 't': return skip_word(scan, at, "true");
    case 'f': return skip_word(scan, at, "false");
    case 'n': return skip_word(scan, at, "null");
    default: return skip_number(scan, at);
    }
}

/* Skip a member's name and its colon; returns the first octet of the value. */
static inline const octet *skip_name(Scan *scan, const octet *at) {
    if (*at != '"')
        return refuse(scan, at, "a member without a name in quotes");
    at = skip_string(scan, at + 1);
    if (at == NULL)
        return NULL;
    at = skip_space(at);
    if (*at != ':')
        return refuse(scan, at, "a name without a colon");
    return skip_space(at + 1);
}

/* Skip any value of a member of the body; `at` is its first octet. */
static const octet *skip_value(Scan *scan, const octet *at) {
    uint64_t objects[DEPTH_MAX / 64]; /* a bit for each level: it is an object */
    unsigned depth = 0;
    int in_object = 0;
    for (;;) {
        if (*at == '{' || *at == '[') {
            if (depth == DEPTH_MAX)
                return refuse(scan, at, "values within values, too deep");
            in_object = *at == '{';
            uint64_t bit = UINT64_C(1) << depth % 64;
            objects[depth / 64] = in_object ? (depth % 64 ? objects[depth / 64] : 0) | bit
                                            : (depth % 64 ? objects[depth / 64] & ~bit : 0);
            depth++;
            at = skip_space(at + 1);
            if (*at != (in_object ? '}' : ']')) {
                if (in_object && (at = skip_name(scan, at)) == NULL)
                    return NULL;
                continue;
            }
        } else if ((at = skip_scalar(scan, at)) == NULL) {
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
            return refuse(scan, at, "neither a comma nor the end of what is open");
        at = skip_space(at + 1);
        if (in_object && (at = skip_name(scan, at)) == NULL)
            return NULL;
    }
}

/* --- the body ------------------------------------------------------------------------------ */

static inline int which_name(const octet *text, size_t size) {
    for (int name = 0; name < NAMES; name++)
        if (NAME_OF[name].size == size && memcmp(NAME_OF[name].text, text, size) == 0)
            return name;
    return NAMES;
}

/* Whether the value is of the form in which `name` is read here. */
static int is_usual(int name, const octet *value, int escaped) {
    if (name >= PARTS)
        return 1;
    if (*value == '"')
        return name != STREAM && !escaped;
    if (name == STREAM)
        return *value == 't' || *value == 'f' || *value == 'n';
    return *value == 'n' && name != 0;
}

static const octet *scan_member(Scan *scan, const octet *at) {
    const octet *key = at + 1, *value;
    scan->escaped = 0;
    value = skip_name(scan, at);
    if (value == NULL)
        return NULL;
    if (scan->escaped)
        scan->unusual = 1; /* such a name may be one of ours */
    const octet *key_end = value - 1;
    while (*key_end != '"')
        key_end--;
    int name = which_name(key, (size_t)(key_end - key));
    scan->escaped = 0;
    at = skip_value(scan, value);
    if (at == NULL || name == NAMES)
        return at;
    if (!is_usual(name, value, scan->escaped))
        scan->unusual = 1;
    scan->found[name].start = value; /* the last of several counts */
    scan->found[name].end = at;
    return at;
}

/* Returns the end of the body, or NULL. A body that is no object is unusual, and left unread. */
static const octet *scan_object(Scan *scan, const octet *at) {
    at = skip_space(at);
    if (*at != '{') {
        scan->unusual = 1;
        return at;
    }
    at = skip_space(at + 1);
    if (*at != '}') {
        for (;;) {
            at = scan_member(scan, at);
            if (at == NULL)
                return NULL;
            at = skip_space(at);
            if (*at != ',')
                break;
            at = skip_space(at + 1);
        }
        if (*at != '}')
            return refuse(scan, at, "neither a comma nor the end of the object");
    }
    at = skip_space(at + 1);
    return at == scan->end ? at : refuse(scan, at, "more after the object");
}

/* --- for Python ---------------------------------------------------------------------------- */

static PyObject *last_model; /* nearly always the same: one object, whose hash is known */

static PyObject *text_of(Span span) {
    if (span.start == NULL || *span.start == 'n')
        return Py_NewRef(Py_None);
    return PyUnicode_DecodeUTF8((const char *)span.start + 1, span.end - span.start - 2, NULL);
}

static PyObject *model_of(Span span) {
    Py_ssize_t size, kept_size;
    if (span.start == NULL)
        return PyUnicode_New(0, 0);
    size = span.end - span.start - 2;
    if (last_model != NULL) {
        const char *kept = PyUnicode_AsUTF8AndSize(last_model, &kept_size);
        if (kept == NULL)
            return NULL;
        if (kept_size == size && memcmp(kept, span.start + 1, (size_t)size) == 0)
            return Py_NewRef(last_model);
    }
    PyObject *model = text_of(span);
    if (model != NULL && size <= MODEL_KEPT_BYTES_MAX)
        Py_XSETREF(last_model, Py_NewRef(model));
    return model;
}

static PyObject *stream_of(Span span) {
    if (span.start == NULL || *span.start == 'n')
        return Py_NewRef(Py_None);
    return PyBool_FromLong(*span.start == 't');
}

static PyObject *spans_of(const Scan *scan, const octet *body) {
    PyObject *spans = PyTuple_New(2 * (NAMES - PARTS));
    if (spans == NULL)
        return NULL;
    for (int i = 0; i < 2 * (NAMES - PARTS); i++) {
        const Span *span = &scan->found[PARTS + i / 2];
        const octet *edge = i % 2 ? span->end : span->start;
        PyObject *number = PyLong_FromSsize_t(edge == NULL ? 0 : edge - body);
        if (number == NULL) {
            Py_DECREF(spans);
            return NULL;
        }
        PyTuple_SET_ITEM(spans, i, number);
    }
    return spans;
}

static PyObject *scan(PyObject *module, PyObject *argument) {
    (void)module;
    if (!PyBytes_CheckExact(argument)) {
        PyErr_SetString(PyExc_TypeError, "the body must be bytes");
        return NULL;
    }
    const octet *body = (const octet *)PyBytes_AS_STRING(argument);
    Scan scan = {.end = body + PyBytes_GET_SIZE(argument)};
    if (scan_object(&scan, body) == NULL) {
        PyErr_Format(PyExc_ValueError, "%s (byte %zd)", scan.reason, scan.fault - body);
        return NULL;
    }
    if (scan.unusual)
        Py_RETURN_NONE;
    PyObject *result = PyTuple_New(TEXTS + 2);
    if (result == NULL)
        return NULL;
    for (int i = 0; i < TEXTS + 2; i++) {
        PyObject *item = i == 0        ? model_of(scan.found[0])
                         : i < TEXTS   ? text_of(scan.found[i])
                         : i == STREAM ? stream_of(scan.found[STREAM])
                                       : spans_of(&scan, body);
        if (item == NULL) {
            Py_DECREF(result);
            return NULL;
        }
        PyTuple_SET_ITEM(result, i, item);
    }
    return result;
}

static PyMethodDef METHODS[] = {
    {"scan", scan, METH_O, "Return what routing needs of a body, or None: read it in Python."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, .m_name = "_scan", .m_size = -1, .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__scan(void) { return PyModule_Create(&MODULE); }

/* The body scan in C: one pass over a JSON body that checks all of it and finds what routing needs.
 *
 * It is what `scan.py` does through msgspec, with the same verdicts: that module stays the law, and
 * runs wherever this one is not built. A body whose *values* are unusual (a model that is not a
 * string, an escape in a key or in a name of ours) is handed back to it, so only the usual form is
 * read here, and every judgement of types is made in one place. `opener_end` is the same for the
 * search in `prefix.py`, `usage` for the counts at an answer's end in `usage.py` (`_usage.h`).
 *
 * `scan_body`, translated, on one core of an AMD EPYC, msgspec -> this, processor time:
 *   chat of 0.7 KB 0.59 -> 0.41 us, 21 KB 6.4 -> 3.0 us, 172 KB 49 -> 21 us (64 such bodies in turn,
 *   too many for the branch predictor to learn: 70 -> 22 us), plain text of 16 MB 4.6 -> 0.8 ms;
 *   the opener: 0.7 KB 1.1 -> 0.1 us, 21 KB 3.2 -> 0.4 us; the usage of an answer 2.4 -> 0.3 us.
 */
#define _GNU_SOURCE /* memrchr */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_json.h"
#include "_media.h"
#include "_usage.h"

enum { MODEL_KEPT_BYTES_MAX = 256, OUTPUT_TOKENS_MAX = 1000000000 };

/* Names of the members that are ours: texts, the flag, the numbers, then the parts of a prompt. */
enum { TEXTS = 7, STREAM = TEXTS, COUNTED = STREAM + 1, CHOICES = COUNTED + 3 };
enum { PARTS = CHOICES + 1, NAMES = PARTS + 11, FIELDS = TEXTS + 6 };
enum { MESSAGES_PART = PARTS, INPUT_PART = PARTS + 6 };

static const struct {
    const char *text;
    size_t size;
} NAME_OF[NAMES] = {
    NAME("model"),     NAME("service_tier"), NAME("prompt_cache_key"), NAME("session_id"),
    NAME("cache_salt"), NAME("lora_path"),   NAME("previous_response_id"),
    NAME("stream"),    NAME("max_tokens"),   NAME("max_completion_tokens"),
    NAME("max_output_tokens"),               NAME("n"),
    NAME("messages"),     NAME("prompt"),           NAME("tools"),
    NAME("system"),    NAME("instructions"), NAME("query"),            NAME("input"),
    NAME("documents"), NAME("text_1"),       NAME("input_ids"),        NAME("session_params"),
};

typedef struct {
    const octet *start, *end; /* of the value, as it stands in the body; NULL: not given */
} Span;

/* Where the last elements of an array end: as many as `limits.CHAIN_BOUNDARIES_MAX` says. */
enum { ENDS_MAX = 9, RING = 16 };

typedef struct {
    const octet *ring[RING]; /* the end of element n at n % RING */
    size_t count;            /* of all elements */
} Ends;

typedef struct {
    Text json;
    int unusual; /* values for the Python path to judge */
    Span found[NAMES];
    Ends messages, input;
    Media *media; /* of each part that was found */
} Scan;

/* --- the body ------------------------------------------------------------------------------ */

static inline int which_name(const octet *text, size_t size) {
    for (int name = 0; name < NAMES; name++)
        if (NAME_OF[name].size == size && memcmp(NAME_OF[name].text, text, size) == 0)
            return name;
    return NAMES;
}

/* Whether the value is of the form in which `name` is read here. */
static int is_usual(int name, const octet *value, const octet *end, int escaped) {
    if (name >= PARTS)
        return 1;
    if (name >= COUNTED)
        return count_of(value, end) != ODD;
    if (*value == '"')
        return name != STREAM && !escaped;
    if (name == STREAM)
        return *value == 't' || *value == 'f' || *value == 'n';
    return *value == 'n' && name != 0;
}

/* Skip an array, and note where its elements end. */
static const octet *skip_array(Text *json, const octet *at, Ends *ends) {
    at = skip_space(at + 1);
    if (*at == ']')
        return at + 1;
    for (;;) {
        at = *at == '{' || *at == '[' ? skip_levels(json, at, DEPTH_MAX - 1)
                                      : skip_scalar(json, at);
        if (at == NULL)
            return NULL;
        ends->ring[ends->count++ % RING] = at;
        at = skip_space(at);
        if (*at == ']')
            return at + 1;
        if (*at != ',')
            return refuse(json, at, "neither a comma nor the end of what is open");
        at = skip_space(at + 1);
    }
}

/* Skip the value of a member of this name. */
static const octet *scan_value(Scan *scan, int name, const octet *at) {
    if (name != MESSAGES_PART && name != INPUT_PART)
        return skip_value(&scan->json, at);
    Ends *ends = name == MESSAGES_PART ? &scan->messages : &scan->input;
    ends->count = 0;
    return *at == '[' ? skip_array(&scan->json, at, ends) : skip_value(&scan->json, at);
}

static const octet *scan_member(Scan *scan, const octet *at) {
    const octet *key = at + 1, *value;
    scan->json.escaped = 0;
    value = skip_name(&scan->json, at);
    if (value == NULL)
        return NULL;
    if (scan->json.escaped)
        scan->unusual = 1; /* such a name may be one of ours */
    const octet *key_end = value - 1;
    while (*key_end != '"')
        key_end--;
    int name = which_name(key, (size_t)(key_end - key));
    scan->json.escaped = 0;
    scan->json.media = NULL;
    if (name >= PARTS && name < NAMES) {
        scan->json.media = &scan->media[name - PARTS];
        scan->json.media->count = 0;
    }
    at = scan_value(scan, name, value);
    if (at == NULL || name == NAMES)
        return at;
    if (!is_usual(name, value, at, scan->json.escaped))
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
            return refuse(&scan->json, at, "neither a comma nor the end of the object");
    }
    at = skip_space(at + 1);
    return at == scan->json.end ? at : refuse(&scan->json, at, "more after the object");
}

/* --- the opener ---------------------------------------------------------------------------- */

/* As `prefix._opener_end`, which says why a search is enough; `begin` and `stop` bound it. */

/* Whether the word that begins at `at` is the value of a member named `role`. */
static int is_role(const octet *begin, const octet *at) {
    const octet *lowest = at - begin > 40 ? at - 40 : begin; /* bounds the space between */
    while (at > lowest && is_space(at[-1]))
        at--;
    if (at == lowest || *--at != ':')
        return 0;
    while (at > lowest && is_space(at[-1]))
        at--;
    return at - lowest >= 6 && memcmp(at - 6, "\"role\"", 6) == 0 &&
           !(at - lowest >= 7 && at[-7] == '\\');
}

static const octet *find_user(const octet *begin, const octet *stop) {
    const octet *at = begin;
    while (stop - at >= 6) {
#ifdef SCAN_WIDE
        if (stop - at >= 17) { /* two octets of the word tell it from the quotes of a text */
            __m128i first = _mm_loadu_si128((const __m128i *)at);
            __m128i second = _mm_loadu_si128((const __m128i *)(at + 1));
            uint64_t found = bits(_mm_and_si128(_mm_cmpeq_epi8(first, _mm_set1_epi8('"')),
                                                _mm_cmpeq_epi8(second, _mm_set1_epi8('u'))));
            if (!found) {
                at += 16;
                continue;
            }
            at += __builtin_ctzll(found);
            if (stop - at < 6)
                break;
        }
#endif
        if (memcmp(at, "\"user\"", 6) == 0 && is_role(begin, at))
            return at + 6;
        at++;
    }
    return NULL;
}

/* `at` is the octet after the opening quote; returns the one after the closing quote, or NULL. */
static const octet *string_end(const octet *at, const octet *stop) {
    while (at < stop) {
#ifdef SCAN_WIDE
        if (stop - at >= 16) {
            __m128i text = _mm_loadu_si128((const __m128i *)at);
            uint64_t found = bits(_mm_or_si128(_mm_cmpeq_epi8(text, _mm_set1_epi8('"')),
                                               _mm_cmpeq_epi8(text, _mm_set1_epi8('\\'))));
            if (!found) {
                at += 16;
                continue;
            }
            at += __builtin_ctzll(found);
        }
#endif
        if (*at == '"')
            return at + 1;
        at += *at == '\\' ? 2 : 1;
    }
    return NULL;
}

/* Returns the end of the object that `at` is within, between two members; or NULL. */
static const octet *object_end(const octet *at, const octet *stop) {
    int depth = 1;
    while (at < stop) {
        octet next = *at++;
        if (next == '"') {
            at = string_end(at, stop);
            if (at == NULL)
                return NULL;
        } else if (next == '{' || next == '[') {
            depth++;
        } else if ((next == '}' || next == ']') && --depth == 0) {
            return at;
        }
    }
    return NULL;
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

static long long number_of(Span span) {
    long long count = span.start == NULL ? ABSENT : count_of(span.start, span.end);
    return count < 0 ? 0 : count < OUTPUT_TOKENS_MAX ? count : OUTPUT_TOKENS_MAX;
}

/* How many tokens the answer may have; `scan._output_tokens` is the law. */
static PyObject *output_tokens_of(const Scan *scan) {
    long long most = 0, choices = number_of(scan->found[CHOICES]);
    for (int name = COUNTED; name < CHOICES; name++) {
        long long count = number_of(scan->found[name]);
        most = count > most ? count : most;
    }
    most *= choices > 1 ? choices : 1; /* at most 10 to the 18th */
    return PyLong_FromLongLong(most < OUTPUT_TOKENS_MAX ? most : OUTPUT_TOKENS_MAX);
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

static PyObject *ends_of(const Ends *ends, const octet *body) {
    size_t kept = ends->count < ENDS_MAX ? ends->count : ENDS_MAX;
    PyObject *numbers = PyTuple_New((Py_ssize_t)kept);
    for (size_t i = 0; numbers != NULL && i < kept; i++) {
        const octet *end = ends->ring[(ends->count - kept + i) % RING];
        PyObject *number = PyLong_FromSsize_t(end - body);
        if (number == NULL)
            Py_CLEAR(numbers);
        else
            PyTuple_SET_ITEM(numbers, (Py_ssize_t)i, number);
    }
    return numbers;
}

/* Four numbers for each region of data, in the order of the parts: see `media.py`. */
static PyObject *media_of(const Scan *scan, const octet *body) {
    Py_ssize_t count = 0;
    for (int name = PARTS; name < NAMES; name++)
        if (scan->found[name].start != NULL)
            count += (Py_ssize_t)scan->media[name - PARTS].count;
    PyObject *numbers = PyTuple_New(4 * count);
    if (count == 0)
        return numbers;
    Py_ssize_t at = 0;
    for (int name = PARTS; numbers != NULL && name < NAMES; name++) {
        const Media *media = &scan->media[name - PARTS];
        for (size_t i = 0; scan->found[name].start != NULL && i < media->count; i++) {
            const Region *region = &media->regions[i];
            size_t number[4] = {(size_t)(region->start - body), (size_t)(region->end - body),
                                region->octets, region->strings};
            for (int field = 0; field < 4; field++) {
                PyObject *item = PyLong_FromSize_t(number[field]);
                if (item == NULL) {
                    Py_DECREF(numbers);
                    return NULL;
                }
                PyTuple_SET_ITEM(numbers, at++, item);
            }
        }
    }
    return numbers;
}

static PyObject *scan(PyObject *module, PyObject *argument) {
    (void)module;
    if (!PyBytes_CheckExact(argument)) {
        PyErr_SetString(PyExc_TypeError, "the body must be bytes");
        return NULL;
    }
    const octet *body = (const octet *)PyBytes_AS_STRING(argument);
    Media media[NAMES - PARTS]; /* 22 KB, not cleared: its use begins with a part's */
    Scan scan = {
        .json.begin = body, .json.end = body + PyBytes_GET_SIZE(argument), .media = media,
    };
    if (scan_object(&scan, body) == NULL) {
        PyErr_Format(PyExc_ValueError, "%s (byte %zd)", scan.json.reason, scan.json.fault - body);
        return NULL;
    }
    if (scan.unusual)
        Py_RETURN_NONE;
    PyObject *result = PyTuple_New(FIELDS);
    if (result == NULL)
        return NULL;
    for (int i = 0; i < FIELDS; i++) {
        PyObject *item = i == 0            ? model_of(scan.found[0])
                         : i < TEXTS       ? text_of(scan.found[i])
                         : i == STREAM     ? stream_of(scan.found[STREAM])
                         : i == STREAM + 1 ? spans_of(&scan, body)
                         : i == STREAM + 2 ? ends_of(&scan.messages, body)
                         : i == STREAM + 3 ? ends_of(&scan.input, body)
                         : i == STREAM + 4 ? media_of(&scan, body)
                                           : output_tokens_of(&scan);
        if (item == NULL) {
            Py_DECREF(result);
            return NULL;
        }
        PyTuple_SET_ITEM(result, i, item);
    }
    return result;
}

static PyObject *opener_end(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    Py_ssize_t number[4]; /* begin, end, how far to search, how long an opener may be */
    (void)module;
    if (count != 5 || !PyBytes_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "wanted: bytes and four numbers");
        return NULL;
    }
    for (int i = 0; i < 4; i++) {
        number[i] = PyLong_AsSsize_t(arguments[1 + i]);
        if (number[i] == -1 && PyErr_Occurred())
            return NULL;
    }
    Py_ssize_t begin = number[0], end = number[1], search_max = number[2], longest = number[3];
    if (begin < 0 || end < begin || end > PyBytes_GET_SIZE(arguments[0]) || search_max < 0 ||
        longest < 0) {
        PyErr_SetString(PyExc_ValueError, "a place outside the octets");
        return NULL;
    }
    const octet *octets = (const octet *)PyBytes_AS_STRING(arguments[0]);
    const octet *stop = octets + (end - begin < search_max ? end : begin + search_max);
    const octet *found = find_user(octets + begin, stop);
    if (found == NULL)
        return PyLong_FromSsize_t(begin + longest);
    Py_ssize_t after = found - octets;
    stop = octets + (end - after < longest ? end : after + longest);
    const octet *closed = object_end(found, stop);
    return PyLong_FromSsize_t(closed == NULL ? after + longest : closed - octets);
}

static PyObject *usage(PyObject *module, PyObject *argument) {
    long long counts[COUNTS], prompt, output, cached;
    (void)module;
    if (!PyBytes_CheckExact(argument)) {
        PyErr_SetString(PyExc_TypeError, "the tail must be bytes");
        return NULL;
    }
    const octet *tail = (const octet *)PyBytes_AS_STRING(argument);
    Text json = {.end = tail + PyBytes_GET_SIZE(argument)};
    const octet *object = find_usage(tail, json.end);
    for (int i = 0; i < COUNTS; i++)
        counts[i] = ABSENT;
    if (object == NULL || read_counts(&json, object, counts, 0) == NULL)
        Py_RETURN_NONE;
    prompt = counts[PROMPT] >= 0 ? counts[PROMPT] : counts[INPUT];
    output = counts[COMPLETION] >= 0 ? counts[COMPLETION] : counts[OUTPUT];
    cached = counts[PROMPT_DETAILS] >= 0  ? counts[PROMPT_DETAILS]
             : counts[INPUT_DETAILS] >= 0 ? counts[INPUT_DETAILS]
                                          : counts[CACHE_READ];
    if (prompt < 0)
        Py_RETURN_NONE;
    return Py_BuildValue("LLL", prompt, output < 0 ? 0 : output, cached);
}

static PyMethodDef METHODS[] = {
    {"opener_end", (PyCFunction)(void (*)(void))opener_end, METH_FASTCALL,
     "Return where the opener among messages ends."},
    {"scan", scan, METH_O, "Return what routing needs of a body, or None: read it in Python."},
    {"usage", usage, METH_O, "Return the last usage in a tail, or None: read it in Python."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, .m_name = "_scan", .m_size = -1, .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__scan(void) { return PyModule_Create(&MODULE); }

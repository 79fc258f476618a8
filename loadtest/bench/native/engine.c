/* A mock engine: several replicas of an OpenAI-compatible server in one process, cheap enough not
 * to be what is measured.
 *
 *     engine REPLICAS
 *
 * listens on so many free ports of 127.0.0.1, prints them in one line, and ends when its standard
 * input does. HTTP/1.1 with keep-alive; a body may come by content-length or chunked.
 *
 *     POST anything   a chat completion of some 350 octets; a stream of EVENTS events of some 200
 *                     octets if the body holds "stream":true, one written each PACE ms, or all of
 *                     them at once, each by a write of its own as engines do
 *     GET /control?events=N&pace_ms=M    how streams are from now on; not passed through a proxy,
 *                     because a proxy may drop body fields that it does not know
 *     GET /counts     requests taken by each replica, bodies' octets, answers that went to nobody
 *     GET /v1/models and what else routers ask before they take a server in
 *
 * A write that does not fit waits in the connection for room; that is the only buffer of an answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { REPLICAS_MAX = 16, HEAD_MAX = 16384, READ_MAX = 1 << 18, READY_MAX = 256, CARRY = 16 };

static const char MODEL[] = "demo";
static const char STREAM_MARK[] = "\"stream\":true";
static const char SPACED_STREAM_MARK[] = "\"stream\": true";

/* Where the reading of a request stands. */
enum state { IN_HEAD, IN_BODY, IN_CHUNK_SIZE, IN_CHUNK, IN_CHUNK_END, IN_TRAILER, ANSWERING };

struct connection {
    int fd;
    int replica;
    enum state state;
    int is_post, streamed, wants_close;
    char path[256];
    uint64_t left;     /* octets of the body, or of the chunk, to come */
    uint64_t line_len; /* octets of a trailer line so far */
    size_t head_len;
    char head[HEAD_MAX]; /* the head; behind it what came of the next request while answering */
    char carry[CARRY];   /* the end of the body so far: a mark may be cut in two */
    size_t carry_len;
    /* the stream under way */
    int events_left;
    int64_t pace_ns, due_ns;
    struct connection *next_due; /* in the queue of its pace */
    int queued, closing;
    /* what could not be written yet */
    char *out;
    size_t out_len, out_sent, out_room;
};

static int epoll_fd, timer_fd;
static int listeners[REPLICAS_MAX], ports[REPLICAS_MAX], replicas;
static uint64_t requests_of[REPLICAS_MAX], body_octets, abandoned;
static int stream_events = 100;
static int64_t stream_pace_ns = 0;
static struct connection *first_due, *last_due; /* all of one pace: a queue is in order */
static char buffer[READ_MAX];
static char date_line[64];
static int64_t date_s;
static char event_chunk[512];
static size_t event_chunk_len;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static const char *date(void)
{
    time_t now = time(NULL);
    if (now != date_s) {
        struct tm tm;
        date_s = now;
        strftime(date_line, sizeof date_line, "date: %a, %d %b %Y %H:%M:%S GMT\r\n",
                 gmtime_r(&now, &tm));
    }
    return date_line;
}

/* --- connections ----------------------------------------------------------------------------- */

static void watch(struct connection *c, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e) < 0)
        fail("epoll_ctl");
}

/* Close; the memory waits if the queue of paced streams still points to it. */
static void drop(struct connection *c)
{
    if (c->closing)
        return;
    if (c->state == ANSWERING)
        abandoned++;
    close(c->fd);
    free(c->out);
    c->out = NULL;
    c->closing = 1;
    if (!c->queued)
        free(c);
}

/* Write, and keep what does not fit. Returns 0 if the connection is gone. */
static int write_out(struct connection *c, const char *data, size_t len)
{
    ssize_t n = 0;
    if (c->out_len == 0) {
        n = send(c->fd, data, len, MSG_NOSIGNAL);
        if (n == (ssize_t)len)
            return 1;
        if (n < 0 && errno != EAGAIN) {
            drop(c);
            return 0;
        }
        if (n < 0)
            n = 0;
    }
    size_t rest = len - (size_t)n;
    if (c->out_len + rest > c->out_room) {
        c->out_room = (c->out_len + rest) * 2;
        c->out = realloc(c->out, c->out_room);
        if (!c->out)
            fail("realloc");
    }
    memcpy(c->out + c->out_len, data + n, rest);
    c->out_len += rest;
    watch(c, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    return 1;
}

/* --- answers --------------------------------------------------------------------------------- */

static int read_more(struct connection *c);

/* The answer is complete: the next request may be in the head's buffer already. */
static int end_answer(struct connection *c)
{
    c->state = IN_HEAD;
    if (c->wants_close && c->out_len == 0) {
        drop(c);
        return 0;
    }
    return c->head_len ? read_more(c) : 1;
}

static int answer(struct connection *c, int status, const char *type, const char *body, size_t len)
{
    char text[4096];
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 %d %s\r\n%sserver: uvicorn\r\ncontent-length: %zu\r\n"
                     "content-type: %s\r\n\r\n%.*s",
                     status, status == 200 ? "OK" : "Not Found", date(), len, type, (int)len, body);
    return write_out(c, text, (size_t)n) && end_answer(c);
}

static int answer_json(struct connection *c, int status, const char *format, ...)
{
    char body[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(body, sizeof body, format, args);
    va_end(args);
    return answer(c, status, "application/json", body, (size_t)n);
}

static int answer_chat(struct connection *c)
{
    return answer_json(
        c, 200,
        "{\"id\":\"chatcmpl-5f3c2a7be1d94f0c\",\"object\":\"chat.completion\",\"created\":1764158400,"
        "\"model\":\"%s\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
        "\"It is the second one.\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
        "\"system_fingerprint\":\"engine-%02d\","
        "\"usage\":{\"prompt_tokens\":412,\"completion_tokens\":7,\"total_tokens\":419}}",
        MODEL, c->replica);
}

/* Write the next event, and after the last one the end. Returns 0 if the connection is gone. */
static int write_event(struct connection *c)
{
    static const char done[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    if (!write_out(c, event_chunk, event_chunk_len))
        return 0;
    if (--c->events_left > 0)
        return 1;
    return write_out(c, done, sizeof done - 1) && end_answer(c);
}

static void enqueue(struct connection *c)
{
    c->queued = 1;
    c->next_due = NULL;
    if (last_due)
        last_due->next_due = c;
    else
        first_due = c;
    last_due = c;
}

/* Of a burst, write until the socket is full; the rest comes when there is room. */
static int continue_burst(struct connection *c)
{
    while (c->state == ANSWERING && c->events_left > 0 && c->out_len == 0)
        if (!write_event(c))
            return 0;
    return 1;
}

static int start_stream(struct connection *c)
{
    char head[512];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 200 OK\r\n%sserver: uvicorn\r\ncontent-type: text/event-stream; "
                     "charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
                     date());
    c->events_left = stream_events;
    c->pace_ns = stream_pace_ns;
    if (!write_out(c, head, (size_t)n))
        return 0;
    if (c->pace_ns == 0)
        return continue_burst(c);
    if (!write_event(c))
        return 0;
    if (c->state == ANSWERING) {
        c->due_ns = now_ns() + c->pace_ns;
        enqueue(c);
    }
    return 1;
}

static int answer_control(struct connection *c)
{
    const char *events = strstr(c->path, "events="), *pace = strstr(c->path, "pace_ms=");
    if (events)
        stream_events = atoi(events + 7) > 0 ? atoi(events + 7) : 1;
    if (pace)
        stream_pace_ns = atoll(pace + 8) * 1000000LL;
    return answer_json(c, 200, "{\"events\":%d,\"pace_ms\":%lld}", stream_events,
                       (long long)(stream_pace_ns / 1000000));
}

static int answer_counts(struct connection *c)
{
    char list[REPLICAS_MAX * 24] = "";
    for (int i = 0; i < replicas; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%llu", i ? "," : "",
                 (unsigned long long)requests_of[i]);
    return answer_json(c, 200, "{\"requests\":[%s],\"body_octets\":%llu,\"abandoned\":%llu}", list,
                       (unsigned long long)body_octets, (unsigned long long)abandoned);
}

/* What routers ask of a server before they take it in. */
static int answer_get(struct connection *c)
{
    const char *path = c->path;
    if (!strncmp(path, "/control?", 9))
        return answer_control(c);
    if (!strcmp(path, "/counts"))
        return answer_counts(c);
    if (!strcmp(path, "/v1/models"))
        return answer_json(c, 200,
                           "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\","
                           "\"created\":1764158400,\"owned_by\":\"bench\",\"root\":\"%s\","
                           "\"max_model_len\":131072}]}",
                           MODEL, MODEL);
    if (!strcmp(path, "/get_server_info") || !strcmp(path, "/server_info") ||
        !strcmp(path, "/get_model_info") || !strcmp(path, "/model_info"))
        return answer_json(c, 200,
                           "{\"model_id\":\"%s\",\"model_path\":\"%s\",\"served_model_name\":\"%s\","
                           "\"tokenizer_path\":\"%s\",\"is_generation\":true,\"tp_size\":1,"
                           "\"dp_size\":1,\"version\":\"0.5.6\",\"max_total_num_tokens\":1000000}",
                           MODEL, MODEL, MODEL, MODEL);
    if (!strcmp(path, "/version"))
        return answer_json(c, 200, "{\"version\":\"0.11.2\"}");
    if (!strncmp(path, "/health", 7))
        return answer(c, 200, "text/plain", "", 0);
    if (!strcmp(path, "/metrics"))
        return answer(c, 200, "text/plain; version=0.0.4", "", 0);
    return answer_json(c, 404, "{\"detail\":\"Not Found\"}");
}

static int take_request(struct connection *c)
{
    c->state = ANSWERING;
    if (!c->is_post)
        return answer_get(c);
    requests_of[c->replica]++;
    return c->streamed ? start_stream(c) : answer_chat(c);
}

/* --- requests -------------------------------------------------------------------------------- */

static int read_head(struct connection *c, size_t len)
{
    char *line = c->head, *end = c->head + len;
    uint64_t length = 0;
    int chunked = 0;
    c->is_post = !strncmp(line, "POST ", 5);
    c->streamed = c->wants_close = 0;
    c->carry_len = 0;
    char *path = memchr(line, ' ', len);
    char *path_end = path ? memchr(path + 1, ' ', (size_t)(end - path - 1)) : NULL;
    if (!path_end || path_end - path - 1 >= (long)sizeof c->path)
        return 0;
    memcpy(c->path, path + 1, (size_t)(path_end - path - 1));
    c->path[path_end - path - 1] = 0;
    while ((line = memchr(line, '\n', (size_t)(end - line))) && ++line < end) {
        if (!strncasecmp(line, "content-length:", 15))
            length = strtoull(line + 15, NULL, 10);
        else if (!strncasecmp(line, "transfer-encoding:", 18))
            chunked = 1;
        else if (!strncasecmp(line, "connection: close", 17))
            c->wants_close = 1;
        else if (!strncasecmp(line, "expect:", 7))
            return 0; /* no client of the benchmark says so, and no rival should */
    }
    c->left = length;
    c->state = chunked ? IN_CHUNK_SIZE : IN_BODY;
    return 1;
}

static int has_mark(const char *data, size_t len)
{
    return memmem(data, len, STREAM_MARK, sizeof STREAM_MARK - 1) != NULL ||
           memmem(data, len, SPACED_STREAM_MARK, sizeof SPACED_STREAM_MARK - 1) != NULL;
}

/* Look for "stream":true. In a prompt's text the quotes are escaped, so it is not mistaken. */
static void scan_body(struct connection *c, const char *data, size_t len)
{
    body_octets += len;
    if (!c->streamed && c->carry_len) {
        char seam[2 * CARRY];
        size_t n = len < CARRY ? len : CARRY;
        memcpy(seam, c->carry, c->carry_len);
        memcpy(seam + c->carry_len, data, n);
        c->streamed = has_mark(seam, c->carry_len + n);
    }
    if (!c->streamed)
        c->streamed = has_mark(data, len);
    if (len >= CARRY) {
        memcpy(c->carry, data + len - CARRY, CARRY);
        c->carry_len = CARRY;
    } else {
        size_t keep = c->carry_len + len > CARRY ? CARRY - len : c->carry_len;
        memmove(c->carry, c->carry + c->carry_len - keep, keep);
        memcpy(c->carry + keep, data, len);
        c->carry_len = keep + len;
    }
}

/* Take one octet of a chunk's framing. Returns 0 if it is malformed. */
static int take_framing(struct connection *c, char octet)
{
    if (c->state == IN_CHUNK_SIZE) {
        int digit = octet >= '0' && octet <= '9'   ? octet - '0'
                    : octet >= 'a' && octet <= 'f' ? octet - 'a' + 10
                    : octet >= 'A' && octet <= 'F' ? octet - 'A' + 10
                                                   : -1;
        if (digit >= 0)
            c->left = c->left * 16 + (uint64_t)digit;
        else if (octet == '\n') {
            c->state = c->left ? IN_CHUNK : IN_TRAILER;
            c->line_len = 0;
        } else if (octet != '\r')
            return 0;
    } else if (c->state == IN_CHUNK_END) {
        if (octet == '\n') {
            c->state = IN_CHUNK_SIZE;
            c->left = 0;
        }
    } else { /* IN_TRAILER: an empty line ends it */
        if (octet == '\n' && c->line_len == 0)
            return 2;
        c->line_len = octet == '\n' ? 0 : c->line_len + (octet != '\r');
    }
    return 1;
}

/* Take octets of a body. Returns how many; `*complete` says whether it ended; -1 malformed. */
static ssize_t take_body(struct connection *c, const char *data, size_t len, int *complete)
{
    size_t at = 0;
    *complete = 0;
    for (;;) {
        if (c->state == IN_BODY && c->left == 0) {
            *complete = 1;
            return (ssize_t)at;
        }
        if (at == len)
            return (ssize_t)at;
        if (c->state == IN_BODY || c->state == IN_CHUNK) {
            size_t n = len - at < c->left ? len - at : (size_t)c->left;
            scan_body(c, data + at, n);
            at += n;
            c->left -= n;
            if (c->state == IN_CHUNK && c->left == 0)
                c->state = IN_CHUNK_END;
            continue;
        }
        int took = take_framing(c, data[at++]);
        if (took == 0)
            return -1;
        if (took == 2) {
            *complete = 1;
            return (ssize_t)at;
        }
    }
}

/* Take what was read: heads are gathered in the connection, bodies are looked at and let go. */
static int take(struct connection *c, const char *data, size_t len)
{
    while (len) {
        if (c->state == ANSWERING || c->state == IN_HEAD) {
            /* Only what belongs to the head is kept; the body is read where it lies. */
            size_t n = len < HEAD_MAX - c->head_len ? len : HEAD_MAX - c->head_len;
            size_t before = c->head_len;
            if (n == 0) {
                drop(c);
                return 0;
            }
            memcpy(c->head + before, data, n);
            c->head_len += n;
            if (c->state == ANSWERING) {
                data += n, len -= n; /* pipelined: it waits */
                continue;
            }
            char *end = memmem(c->head, c->head_len, "\r\n\r\n", 4);
            if (!end) {
                data += n, len -= n;
                continue;
            }
            size_t head_len = (size_t)(end - c->head) + 4;
            data += head_len - before, len -= head_len - before;
            c->head_len = 0;
            if (!read_head(c, head_len)) {
                drop(c);
                return 0;
            }
        }
        int complete;
        ssize_t n = take_body(c, data, len, &complete);
        if (n < 0) {
            drop(c);
            return 0;
        }
        data += n, len -= (size_t)n;
        if (complete && !take_request(c))
            return 0;
    }
    if (c->state == IN_BODY && c->left == 0)
        return take_request(c);
    return 1;
}

/* Take again what had waited behind the request before. */
static int read_more(struct connection *c)
{
    char waiting[HEAD_MAX];
    size_t len = c->head_len;
    memcpy(waiting, c->head, len);
    c->head_len = 0;
    return take(c, waiting, len);
}

/* --- the loop -------------------------------------------------------------------------------- */

static void readable(struct connection *c)
{
    /* Once a turn: a long body must not keep the others waiting. */
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN))
        drop(c);
    else if (n > 0)
        take(c, buffer, (size_t)n);
}

static void writable(struct connection *c)
{
    ssize_t n = send(c->fd, c->out + c->out_sent, c->out_len - c->out_sent, MSG_NOSIGNAL);
    if (n < 0) {
        if (errno != EAGAIN)
            drop(c);
        return;
    }
    c->out_sent += (size_t)n;
    if (c->out_sent < c->out_len)
        return;
    c->out_sent = c->out_len = 0;
    watch(c, EPOLLIN | EPOLLRDHUP);
    if (c->state == IN_HEAD && c->wants_close)
        drop(c);
    else if (c->state == ANSWERING && c->pace_ns == 0)
        continue_burst(c);
}

/* Write the events that are due; each is due a pace after it was due before, not after now. */
static void write_due(void)
{
    int64_t now = now_ns();
    while (first_due && first_due->due_ns <= now) {
        struct connection *c = first_due;
        first_due = c->next_due;
        if (!first_due)
            last_due = NULL;
        c->queued = 0;
        if (c->closing) {
            free(c);
            continue;
        }
        c->due_ns += c->pace_ns;
        if (write_event(c) && c->state == ANSWERING && c->events_left > 0 && !c->queued)
            enqueue(c);
    }
    if (!first_due)
        return;
    struct itimerspec when = {.it_value = {first_due->due_ns / 1000000000LL,
                                           first_due->due_ns % 1000000000LL}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static void accept_all(int replica)
{
    int one = 1, fd;
    while ((fd = accept4(listeners[replica], NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c)
            fail("calloc");
        c->fd = fd;
        c->replica = replica;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
    if (errno != EAGAIN && errno != ECONNABORTED)
        fail("accept");
}

static void listen_all(void)
{
    for (int i = 0; i < replicas; i++) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t len = sizeof a;
        listeners[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (listeners[i] < 0 || bind(listeners[i], (struct sockaddr *)&a, sizeof a) < 0 ||
            listen(listeners[i], 4096) < 0 ||
            getsockname(listeners[i], (struct sockaddr *)&a, &len) < 0)
            fail("listen");
        ports[i] = ntohs(a.sin_port);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listeners[i]};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listeners[i], &e);
        printf("%d%c", ports[i], i + 1 < replicas ? ' ' : '\n');
    }
    fflush(stdout);
}

int main(int argc, char **argv)
{
    replicas = argc > 1 ? atoi(argv[1]) : 0;
    if (replicas < 1 || replicas > REPLICAS_MAX) {
        fprintf(stderr, "usage: engine REPLICAS (1 to %d)\n", REPLICAS_MAX);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    char event[400];
    int n = snprintf(event, sizeof event,
                     "data: {\"id\":\"chatcmpl-5f3c2a7be1d94f0c\",\"object\":\"chat.completion.chunk\""
                     ",\"created\":1764158400,\"model\":\"%s\",\"choices\":[{\"index\":0,\"delta\":"
                     "{\"content\":\" word\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
                     MODEL);
    event_chunk_len =
        (size_t)snprintf(event_chunk, sizeof event_chunk, "%x\r\n%s\r\n", (unsigned)n, event);

    epoll_fd = epoll_create1(0);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &timer_fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
    e.data.ptr = NULL; /* standard input */
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &e) < 0 && errno != EPERM)
        fail("standard input");
    listen_all();

    struct epoll_event ready[READY_MAX];
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, READY_MAX, -1);
        if (count < 0 && errno != EINTR)
            fail("epoll_wait");
        for (int i = 0; i < count; i++) {
            void *who = ready[i].data.ptr;
            if (!who) {
                if (read(0, buffer, sizeof buffer) <= 0)
                    return 0;
            } else if (who == &timer_fd) {
                if (read(timer_fd, buffer, 8) < 0 && errno != EAGAIN)
                    fail("timerfd");
            } else if ((int *)who >= listeners && (int *)who < listeners + REPLICAS_MAX) {
                accept_all((int)((int *)who - listeners));
            } else if (ready[i].events & EPOLLOUT) {
                writable(who);
            } else {
                readable(who);
            }
        }
        write_due();
    }
}

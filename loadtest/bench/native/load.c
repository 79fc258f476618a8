/* A load generator of one thread, cheap enough not to be what is measured.
 *
 *     load port=N bodies=FILE [name=number ...]
 *
 * FILE holds whole requests, each behind its length (32 bits, little-endian); they are sent in turn.
 * Eight at signs in a request are a place for a number that no other request has, so that no two
 * prompts are the same.
 *
 *     connections=16   keep-alive connections, used in turn, made at their first use
 *     concurrency=0    requests in flight at most; 0: as many as connections
 *     requests=0       stop after so many; 0: after `seconds`
 *     seconds=0        begin no request later than this
 *     rate=0           requests a second, begun when the clock says so and timed from then, however
 *                      late the answers before; 0: the next one begins when one has ended
 *     events=0         what each stream must bring before its [DONE]; 0: answers are JSON
 *     upload=FILE      one more connection that sends the first request of FILE again and again, as
 *                      fast as a link of 1 Gbit/s would; its times are not counted
 *     tag=0            the first of the numbers
 *     hold=0           1: stay connected afterwards until standard input ends
 *     placement=0      1: say which replica answered each request of FILE last
 *     timeout_s=30     no answer for so long is an error
 *
 * `ready` and how many are under way is printed when all requests are begun and each of them has had
 * an octet of its answer; one line of JSON at the end. Each answer is checked: status 200, whole by its framing, and
 * the engine's words or the number of events.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    HEAD_MAX = 8192,
    KEPT_MAX = 2048, /* of an answer's body, to look into */
    READ_MAX = 1 << 18,
    WRITE_MAX = 1 << 18,
    UPLOAD_OCTETS_PER_MS = 125000,
    READY_MAX = 256,
    ERRORS_MAX = 100, /* then there is nothing to measure */
    KINDS = 8
};

struct request {
    char *octets;
    size_t len;
    char *tag; /* where the number goes; NULL: nowhere */
    int replica;
};

enum framing { BY_LENGTH, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };

struct connection {
    int fd; /* -1: not connected */
    int busy, is_upload, wants_write, first_seen;
    struct request *request;
    size_t sent;
    int64_t begun_ns, first_ns, heard_ns;
    /* the answer so far */
    char head[HEAD_MAX];
    size_t head_len;
    int in_body, status, says_close;
    enum framing framing;
    uint64_t left, line_len, events;
    char last;
    char kept[KEPT_MAX];
    size_t kept_len;
};

struct times {
    int64_t *ns;
    size_t count, room;
};

static struct {
    long port, connections, concurrency, requests, events, tag, hold, placement, timeout_s;
    double seconds, rate;
    const char *bodies, *upload;
} option = {.connections = 16, .timeout_s = 30};

static int epoll_fd, timer_fd;
static struct request *requests, *uploads;
static size_t request_count, upload_count, next_request;
static struct connection *connections;
static struct connection **idle; /* a ring: the longest idle one is used first */
static size_t idle_first, idle_count;
static long started, ended, in_flight, without_octet, upload_ends, reconnects, tag;
static uint64_t events_seen, octets_seen;
static int64_t start_ns, last_end_ns;
static struct times latency, first_octet;
static struct { char name[32]; long count; } errors[KINDS];
static long error_count;
static int stdin_ended, ready_said;
static char buffer[READ_MAX];

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

static void count_error(const char *name)
{
    int i = 0;
    while (i < KINDS - 1 && errors[i].count && strcmp(errors[i].name, name))
        i++;
    snprintf(errors[i].name, sizeof errors[i].name, "%s", name);
    errors[i].count++;
    error_count++;
}

static void note(struct times *times, int64_t ns)
{
    if (times->count == times->room) {
        times->room = times->room ? times->room * 2 : 4096;
        times->ns = realloc(times->ns, times->room * sizeof *times->ns);
        if (!times->ns)
            fail("realloc");
    }
    times->ns[times->count++] = ns;
}

/* --- requests -------------------------------------------------------------------------------- */

static struct request *read_requests(const char *path, size_t *count)
{
    int fd = open(path, O_RDONLY);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) < 0)
        fail(path);
    /* Private and writable: the numbers are written into it. */
    char *data = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        fail("mmap");
    struct request *list = NULL;
    size_t at = 0;
    for (*count = 0; at + 4 <= (size_t)info.st_size; ++*count) {
        uint32_t len;
        memcpy(&len, data + at, 4);
        list = realloc(list, (*count + 1) * sizeof *list);
        if (!list || at + 4 + len > (size_t)info.st_size) {
            fprintf(stderr, "%s: cut short\n", path);
            exit(1);
        }
        char *octets = data + at + 4;
        list[*count] = (struct request){octets, len, memmem(octets, len, "@@@@@@@@", 8), -1};
        at += 4 + len;
    }
    if (*count == 0) {
        fprintf(stderr, "%s: no requests\n", path);
        exit(1);
    }
    return list;
}

/* A request that another connection is still sending may get a new number meanwhile; it stays as
 * long and as valid as it was. */
static void write_tag(struct request *r)
{
    static const char digits[] = "0123456789abcdef";
    if (!r->tag)
        return;
    unsigned long value = (unsigned long)tag++;
    for (int i = 7; i >= 0; i--, value >>= 4)
        r->tag[i] = digits[value & 15];
}

/* --- connections ----------------------------------------------------------------------------- */

static void release(struct connection *c)
{
    idle[(idle_first + idle_count++) % (size_t)option.connections] = c;
}

static void disconnect(struct connection *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

static int connect_it(struct connection *c)
{
    int one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET,
                            .sin_port = htons((uint16_t)option.port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0)
        fail("socket");
    if (connect(c->fd, (struct sockaddr *)&a, sizeof a) < 0) {
        disconnect(c);
        return 0;
    }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
    c->wants_write = 0;
    return 1;
}

static void finished(struct connection *c, const char *error)
{
    int64_t now = now_ns();
    c->busy = 0;
    if (error)
        count_error(error);
    if (error || c->says_close)
        disconnect(c);
    if (c->is_upload) {
        upload_ends += error == NULL;
        return;
    }
    if (!c->first_seen)
        without_octet--;
    if (!error) {
        note(&latency, now - c->begun_ns);
        note(&first_octet, c->first_ns - c->begun_ns);
    }
    last_end_ns = now;
    in_flight--;
    ended++;
    release(c);
}

/* How much an upload may send by now. */
static size_t upload_allowance(const struct connection *c)
{
    size_t allowed = (size_t)((now_ns() - c->begun_ns) / 1000000 + 1) * UPLOAD_OCTETS_PER_MS;
    return allowed > c->sent ? allowed - c->sent : 0;
}

static void send_more(struct connection *c)
{
    size_t n = c->request->len - c->sent;
    if (c->is_upload && n > upload_allowance(c))
        n = upload_allowance(c);
    if (n == 0)
        return; /* the next millisecond lets an upload go on */
    ssize_t sent = send(c->fd, c->request->octets + c->sent, n < WRITE_MAX ? n : WRITE_MAX,
                        MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
        finished(c, "reset while sending");
        return;
    }
    if (sent > 0)
        c->sent += (size_t)sent;
    int wants_write = c->sent < c->request->len && !c->is_upload;
    if (wants_write != c->wants_write) {
        struct epoll_event e = {.events = EPOLLIN | (wants_write ? EPOLLOUT : 0), .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
        c->wants_write = wants_write;
    }
}

static void begin(struct connection *c, struct request *r, int64_t begun_ns)
{
    c->request = r;
    c->sent = c->head_len = c->kept_len = 0;
    c->in_body = c->says_close = c->first_seen = 0;
    c->events = 0;
    c->last = 0;
    c->busy = 1;
    c->begun_ns = begun_ns;
    c->heard_ns = now_ns();
    if (!c->is_upload) {
        started++;
        in_flight++;
        without_octet++;
    }
    write_tag(r);
    if (c->fd < 0 && !connect_it(c))
        finished(c, "refused");
    else
        send_more(c);
}

/* --- answers --------------------------------------------------------------------------------- */

static const char *read_head(struct connection *c, size_t len)
{
    char *line = c->head, *end = c->head + len;
    int framed = 0;
    c->status = len > 12 ? atoi(c->head + 9) : 0;
    c->left = 0;
    c->framing = BY_LENGTH;
    while ((line = memchr(line, '\n', (size_t)(end - line))) && ++line < end) {
        if (!strncasecmp(line, "content-length:", 15)) {
            c->left = strtoull(line + 15, NULL, 10);
            framed = 1;
        } else if (!strncasecmp(line, "transfer-encoding:", 18)) {
            c->framing = CHUNK_SIZE;
            framed = 1;
        } else if (!strncasecmp(line, "connection: close", 17)) {
            c->says_close = 1;
        }
    }
    c->in_body = 1;
    return framed ? NULL : "answer without framing";
}

/* Count events by the empty lines that end them. */
static void look_at(struct connection *c, const char *data, size_t len)
{
    if (!c->first_seen) {
        c->first_seen = 1;
        c->first_ns = now_ns();
        without_octet -= !c->is_upload;
    }
    octets_seen += len;
    if (option.events && !c->is_upload) {
        if (c->last == '\n' && data[0] == '\n')
            c->events++;
        const char *at = data, *end = data + len;
        while ((at = memmem(at, (size_t)(end - at), "\n\n", 2)))
            c->events++, at += 2;
        /* Of three in a row the third would begin a pair: engines send none. */
        c->last = len > 1 && data[len - 1] == '\n' && data[len - 2] == '\n' ? 0 : data[len - 1];
        return;
    }
    size_t n = len < KEPT_MAX - c->kept_len ? len : KEPT_MAX - c->kept_len;
    memcpy(c->kept + c->kept_len, data, n);
    c->kept_len += n;
}

static void complete(struct connection *c)
{
    char text[32];
    const char *error = NULL;
    if (c->status != 200) {
        snprintf(text, sizeof text, "status %d", c->status);
        error = text;
    } else if (option.events && !c->is_upload) {
        events_seen += c->events;
        if ((long)c->events != option.events + 1)
            error = "wrong number of events";
    } else {
        char *name = memmem(c->kept, c->kept_len, "\"engine-", 8);
        if (!name || name + 10 > c->kept + c->kept_len)
            error = "not the engine's answer";
        else
            c->request->replica = atoi(name + 8);
    }
    if (!error && c->sent < c->request->len)
        error = "answered early";
    finished(c, error);
}

/* Take one octet of a chunk's framing. Returns 1 when the body is complete, -1 if malformed. */
static int take_framing(struct connection *c, char octet)
{
    if (c->framing == CHUNK_SIZE) {
        int digit = octet >= '0' && octet <= '9'   ? octet - '0'
                    : octet >= 'a' && octet <= 'f' ? octet - 'a' + 10
                    : octet >= 'A' && octet <= 'F' ? octet - 'A' + 10
                                                   : -1;
        if (digit >= 0)
            c->left = c->left * 16 + (uint64_t)digit;
        else if (octet == '\n') {
            c->framing = c->left ? CHUNK : TRAILER;
            c->line_len = 0;
        } else if (octet != '\r' && octet != ' ')
            return -1;
    } else if (c->framing == CHUNK_END) {
        if (octet == '\n') {
            c->framing = CHUNK_SIZE;
            c->left = 0;
        }
    } else {
        if (octet == '\n' && c->line_len == 0)
            return 1;
        c->line_len = octet == '\n' ? 0 : c->line_len + (octet != '\r');
    }
    return 0;
}

static void take(struct connection *c, const char *data, size_t len)
{
    c->heard_ns = now_ns();
    if (!c->in_body) {
        size_t before = c->head_len, n = len < HEAD_MAX - before ? len : HEAD_MAX - before;
        memcpy(c->head + before, data, n);
        c->head_len += n;
        char *end = memmem(c->head, c->head_len, "\r\n\r\n", 4);
        if (!end) {
            if (c->head_len == HEAD_MAX)
                finished(c, "head too long");
            return;
        }
        size_t head_len = (size_t)(end - c->head) + 4;
        const char *error = read_head(c, head_len);
        if (error) {
            finished(c, error);
            return;
        }
        data += head_len - before, len -= head_len - before;
    }
    while (c->busy) {
        if (c->framing == BY_LENGTH && c->left == 0) {
            complete(c);
            break;
        }
        if (len == 0)
            return;
        if (c->framing == BY_LENGTH || c->framing == CHUNK) {
            size_t n = len < c->left ? len : (size_t)c->left;
            look_at(c, data, n);
            data += n, len -= n;
            c->left -= n;
            if (c->framing == CHUNK && c->left == 0)
                c->framing = CHUNK_END;
            continue;
        }
        int took = take_framing(c, *data++);
        len--;
        if (took < 0)
            finished(c, "malformed chunk");
        else if (took > 0)
            complete(c);
    }
    if (len && c->fd >= 0) {
        count_error("octets after the answer");
        disconnect(c);
    }
}

static void readable(struct connection *c)
{
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n > 0 && c->busy) {
        take(c, buffer, (size_t)n);
    } else if (n > 0) {
        count_error("octets unasked for");
        disconnect(c);
    } else if (n == 0 || errno != EAGAIN) {
        if (c->busy) {
            finished(c, c->head_len ? "truncated" : "closed without answer");
        } else {
            disconnect(c); /* idle connections may be closed */
            reconnects++;
        }
    }
}

/* --- the loop -------------------------------------------------------------------------------- */

static int64_t due_ns(void)
{
    return option.rate > 0 ? start_ns + (int64_t)((double)started / option.rate * 1e9) : 0;
}

static int all_begun(int64_t now)
{
    if (option.requests && started >= option.requests)
        return 1;
    int64_t at = option.rate > 0 ? due_ns() : now;
    return option.seconds > 0 && at - start_ns >= (int64_t)(option.seconds * 1e9);
}

/* Begin what is due, as far as connections are free. */
static void begin_due(void)
{
    for (;;) {
        int64_t now = now_ns();
        if (error_count >= ERRORS_MAX || all_begun(now) || !idle_count ||
            in_flight >= option.concurrency || due_ns() > now)
            return;
        struct connection *c = idle[idle_first];
        idle_first = (idle_first + 1) % (size_t)option.connections;
        idle_count--;
        begin(c, &requests[next_request++ % request_count], option.rate > 0 ? due_ns() : now);
    }
}

static void wind_clock(int64_t now)
{
    struct itimerspec when = {0};
    if (option.rate > 0 && !all_begun(now)) {
        int64_t due = due_ns();
        when.it_value.tv_sec = due / 1000000000LL;
        when.it_value.tv_nsec = due % 1000000000LL;
        timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
    }
}

static void time_out(int64_t now)
{
    static int64_t last_ns;
    if (now - last_ns < 1000000000LL)
        return;
    last_ns = now;
    for (long i = 0; i <= option.connections; i++) {
        struct connection *c = &connections[i];
        if (c->busy && now - c->heard_ns > option.timeout_s * 1000000000LL)
            finished(c, "timeout");
    }
}

static void turn(int wait_ms)
{
    struct epoll_event ready[READY_MAX];
    int count = epoll_wait(epoll_fd, ready, READY_MAX, wait_ms);
    if (count < 0 && errno != EINTR)
        fail("epoll_wait");
    for (int i = 0; i < count; i++) {
        struct connection *c = ready[i].data.ptr;
        if (!c) {
            stdin_ended = read(0, buffer, sizeof buffer) <= 0;
        } else if ((void *)c == &timer_fd) {
            if (read(timer_fd, buffer, 8) < 0 && errno != EAGAIN)
                fail("timerfd");
        } else {
            if (c->fd >= 0 && c->busy && ready[i].events & EPOLLOUT)
                send_more(c);
            if (c->fd >= 0 && ready[i].events & ~(uint32_t)EPOLLOUT)
                readable(c);
        }
    }
}

static void run(void)
{
    struct connection *upload = option.upload ? &connections[option.connections] : NULL;
    start_ns = now_ns();
    for (;;) {
        int64_t now = now_ns();
        int over = all_begun(now) && in_flight == 0;
        begin_due();
        if (upload && !upload->busy && !over && error_count < ERRORS_MAX)
            begin(upload, &uploads[0], now);
        over = (all_begun(now) || error_count >= ERRORS_MAX) && in_flight == 0;
        if (!ready_said && all_begun(now) && without_octet == 0) {
            ready_said = 1;
            printf("ready %ld\n", in_flight);
            fflush(stdout);
        }
        if (over && !(upload && upload->busy) && (!option.hold || stdin_ended))
            return;
        wind_clock(now);
        time_out(now);
        int uploading = upload && upload->busy && upload->sent < upload->request->len;
        turn(uploading ? 1 : 500);
        if (uploading && upload->busy)
            send_more(upload);
    }
}

/* --- what is said at the end ------------------------------------------------------------------ */

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static double quantile_us(const struct times *times, double share)
{
    if (times->count == 0)
        return 0;
    size_t at = (size_t)(share * (double)(times->count - 1) + 0.5);
    return (double)times->ns[at] / 1000;
}

static void print_times(const char *name, struct times *times)
{
    if (times->count)
        qsort(times->ns, times->count, sizeof *times->ns, compare);
    printf("\"%s\":{\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f},", name,
           quantile_us(times, 0.5), quantile_us(times, 0.9), quantile_us(times, 0.99),
           quantile_us(times, 0.999), quantile_us(times, 1));
}

static void print_report(void)
{
    long open = 0;
    double seconds = (double)(last_end_ns - start_ns) / 1e9;
    for (long i = 0; i < option.connections; i++)
        open += connections[i].fd >= 0;
    printf("{\"requests\":%ld,\"seconds\":%.6f,\"rps\":%.1f,\"events\":%llu,\"octets\":%llu,"
           "\"uploads\":%ld,\"reconnects\":%ld,\"open\":%ld,",
           ended, seconds, seconds > 0 ? (double)ended / seconds : 0,
           (unsigned long long)events_seen, (unsigned long long)octets_seen, upload_ends,
           reconnects, open);
    print_times("latency_us", &latency);
    print_times("first_us", &first_octet);
    if (option.placement) {
        printf("\"placement\":[");
        for (size_t i = 0; i < request_count; i++)
            printf("%s%d", i ? "," : "", requests[i].replica);
        printf("],");
    }
    printf("\"errors\":{");
    for (int i = 0; i < KINDS && errors[i].count; i++)
        printf("%s\"%s\":%ld", i ? "," : "", errors[i].name, errors[i].count);
    printf("}}\n");
}

static void read_option(char *text)
{
    static const struct { const char *name; long *value; } numbers[] = {
        {"port", &option.port},           {"connections", &option.connections},
        {"concurrency", &option.concurrency}, {"requests", &option.requests},
        {"events", &option.events},       {"tag", &option.tag},
        {"hold", &option.hold},           {"placement", &option.placement},
        {"timeout_s", &option.timeout_s},
    };
    char *value = strchr(text, '=');
    if (value) {
        *value++ = 0;
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
            if (!strcmp(text, numbers[i].name)) {
                *numbers[i].value = atol(value);
                return;
            }
        if (!strcmp(text, "seconds")) { option.seconds = atof(value); return; }
        if (!strcmp(text, "rate")) { option.rate = atof(value); return; }
        if (!strcmp(text, "bodies")) { option.bodies = value; return; }
        if (!strcmp(text, "upload")) { option.upload = value; return; }
    }
    fprintf(stderr, "load: unknown option %s\n", text);
    exit(2);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        read_option(argv[i]);
    if (!option.port || !option.bodies || option.connections < 1 ||
        (!option.requests && option.seconds <= 0)) {
        fprintf(stderr, "usage: load port=N bodies=FILE requests=N|seconds=S [name=value ...]\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (!option.concurrency)
        option.concurrency = option.connections;
    tag = option.tag;
    requests = read_requests(option.bodies, &request_count);
    if (option.upload)
        uploads = read_requests(option.upload, &upload_count);

    size_t count = (size_t)option.connections;
    connections = calloc(count + 1, sizeof *connections); /* the last one uploads */
    idle = calloc(count, sizeof *idle);
    if (!connections || !idle)
        fail("calloc");
    for (size_t i = 0; i <= count; i++)
        connections[i].fd = -1;
    for (size_t i = 0; i < count; i++)
        release(&connections[i]);
    connections[count].is_upload = 1;

    epoll_fd = epoll_create1(0);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &timer_fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
    if (option.hold) {
        e.data.ptr = NULL; /* standard input */
        if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &e) < 0)
            fail("standard input");
    }
    run();
    print_report();
    return 0;
}

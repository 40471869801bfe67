/* Publishes events at an even pace over raw sockets, at a small price: `publish.py`, which says what it does.
 *
 *     publish SPEC
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BURST 256
#define WAITING 65536
#define FULL_NS 1000000LL
#define LAST_ANSWERS_NS 2000000000LL
/* Answers are only counted, so they need not wake this process one by one. */
#define ANSWERS_NS 10000000LL

typedef struct {
    int fd;
    char *out;
    size_t waiting, room;
    char rest[64]; /* one byte short of an answer, so that none counts twice */
    size_t kept;
} Connection;

typedef struct {
    int64_t at, count;
} Write;

static struct pollfd *polled; /* the connections, and standard input at the end */
static Connection *connections;
static int connected;
static char **targets;
static int64_t *seqs;
static int target_count;
static char answer[64], *text;
static size_t answer_size;
static double rate;
static int64_t tick, sent, answered;
static Write *writes; /* when each was made, and how many events had gone out with it */
static size_t written, room;

static int64_t ns_of(clockid_t clock) {
    struct timespec at;
    clock_gettime(clock, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void die(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static size_t from_hex(const char *line, char *bytes) {
    size_t size = strcspn(line, " \n") / 2;
    for (size_t i = 0; i < size; i++) {
        unsigned byte;
        sscanf(line + 2 * i, "%2x", &byte);
        bytes[i] = (char)byte;
    }
    bytes[size] = 0;
    return size;
}

static void read_spec(const char *path, int *port) {
    FILE *file = fopen(path, "r");
    if (!file) die("no specification");
    double seconds;
    int size;
    char hex[2 * sizeof answer];
    if (fscanf(file, "%d %lf %lf %d %d %127s\n", port, &rate, &seconds, &connected, &size, hex) != 6) die("no head");
    if (strlen(hex) / 2 >= sizeof answer) die("a long answer");
    answer_size = from_hex(hex, answer);
    tick = (int64_t)(seconds * 1e9);
    text = memset(calloc((size_t)size + 1, 1), 'x', (size_t)size);
    char *line = NULL;
    size_t capacity = 0;
    for (ssize_t got; (got = getline(&line, &capacity, file)) > 0; target_count++) {
        targets = realloc(targets, ((size_t)target_count + 1) * sizeof *targets);
        targets[target_count] = malloc((size_t)got);
        from_hex(line, targets[target_count]);
    }
    fclose(file);
    if (!target_count) die("no targets");
    rate *= target_count;
    seqs = calloc((size_t)target_count, sizeof *seqs);
}

static void open_all(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((uint16_t)port);
    connections = calloc((size_t)connected, sizeof *connections);
    polled = calloc((size_t)connected + 1, sizeof *polled);
    for (int i = 0; i < connected; i++) {
        int fd = connections[i].fd = socket(AF_INET, SOCK_STREAM, 0), small = WAITING, yes = 1;
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) die("the server takes no connection");
        fcntl(fd, F_SETFL, O_NONBLOCK);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        polled[i].fd = fd;
    }
    polled[connected] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
}

static void add(Connection *one, const char *bytes, size_t size) {
    if (one->waiting + size > one->room) one->out = realloc(one->out, one->room = 2 * (one->waiting + size));
    memcpy(one->out + one->waiting, bytes, size);
    one->waiting += size;
}

static void addf(Connection *one, const char *format, ...) {
    char number[32];
    va_list values;
    va_start(values, format);
    int size = vsnprintf(number, sizeof number, format, values);
    va_end(values);
    add(one, number, (size_t)size);
}

static void flush(Connection *one) {
    if (!one->waiting) return;
    ssize_t n = send(one->fd, one->out, one->waiting, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) die("the server closed the publisher's connection");
    one->waiting -= (size_t)n;
    memmove(one->out, one->out + n, one->waiting);
}

static void count_answers(Connection *one) {
    static char buffer[64 + 262144];
    for (;;) {
        memcpy(buffer, one->rest, one->kept);
        ssize_t n = recv(one->fd, buffer + one->kept, sizeof buffer - one->kept, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) die("the server closed the publisher's connection");
        char *at = buffer, *end = buffer + one->kept + n, *found;
        for (; (found = memmem(at, (size_t)(end - at), answer, answer_size)); answered++) at = found + answer_size;
        one->kept = (size_t)(end - at) < answer_size ? (size_t)(end - at) : answer_size - 1;
        memcpy(one->rest, end - one->kept, one->kept);
    }
}

static void publish(int64_t until) {
    int64_t t = ns_of(CLOCK_MONOTONIC), at = ns_of(CLOCK_REALTIME) / 1000000;
    for (; sent < until; sent++) {
        int index = (int)(sent % target_count);
        /* A target keeps its connection, so its events stay in order. */
        Connection *one = &connections[index % connected];
        long seq = (long)++seqs[index];
        static char event[65536];
        int size = snprintf(event, sizeof event, "{\"seq\":%ld,\"type\":\"content\",\"at\":%ld,\"t\":%ld,\"text\":\"%s\"}",
                            seq, (long)at, (long)t, text);
        if (size >= (int)sizeof event) die("a long event");
        const char *from = targets[index], *hole;
        for (; (hole = strchr(from, '@')); ) {
            add(one, from, (size_t)(hole - from));
            if (!strncmp(hole, "@event#@", 8)) addf(one, "%d", size), from = hole + 8;
            else if (!strncmp(hole, "@event@", 7)) add(one, event, (size_t)size), from = hole + 7;
            else if (!strncmp(hole, "@seq#@", 6)) addf(one, "%d", snprintf(NULL, 0, "%ld", seq)), from = hole + 6;
            else if (!strncmp(hole, "@seq@", 5)) addf(one, "%ld", seq), from = hole + 5;
            else add(one, "@", 1), from = hole + 1;
        }
        add(one, from, strlen(from));
    }
    if (written == room) writes = realloc(writes, (room = room ? 2 * room : 65536) * sizeof *writes);
    writes[written++] = (Write){t, until};
    for (int i = 0; i < connected; i++) flush(&connections[i]);
}

/* Until then, or until standard input says something: whether it does. */
static int wait_until(int64_t until) {
    static int64_t next_answers;
    for (;;) {
        for (int i = 0; i < connected; i++) polled[i].events = connections[i].waiting ? POLLOUT : 0;
        int64_t left = until - ns_of(CLOCK_MONOTONIC);
        struct timespec timeout = {.tv_nsec = 0};
        if (left > 0) timeout = (struct timespec){.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        ppoll(polled, (nfds_t)connected + 1, &timeout, NULL);
        for (int i = 0; i < connected; i++) if (polled[i].revents) flush(&connections[i]);
        int64_t now = ns_of(CLOCK_MONOTONIC);
        if (now >= next_answers) {
            for (int i = 0; i < connected; i++) count_answers(&connections[i]);
            next_answers = now + ANSWERS_NS;
        }
        if (polled[connected].revents) return 1;
        if (now >= until) return 0;
    }
}

static void run(void) {
    int64_t begun = ns_of(CLOCK_MONOTONIC), after = 0;
    do {
        int64_t now = ns_of(CLOCK_MONOTONIC), due = (int64_t)((double)(now - begun) / 1e9 * rate);
        size_t waiting = 0;
        for (int i = 0; i < connected; i++) waiting += connections[i].waiting;
        if (due > sent && waiting < WAITING) publish(due < sent + BURST ? due : sent + BURST);
        after = begun + (int64_t)((double)(sent + 1) / rate * 1e9);
        if (after < now + tick) after = now + tick;
        /* A server that takes no more is not asked again and again at the others' cost. */
        if (waiting >= WAITING && after < now + FULL_NS) after = now + FULL_NS;
    } while (!wait_until(after));
}

/* How many events had gone out before. */
static int64_t sent_before(int64_t when) {
    int64_t count = 0;
    for (size_t i = 0; i < written && writes[i].at < when; i++) count = writes[i].count;
    return count;
}

int main(int argc, char **argv) {
    int port;
    long from, to;
    if (argc != 2) die("usage: publish SPEC");
    /* Sleeps end when they should: a millisecond's twentieth is the kernel's default. */
    prctl(PR_SET_TIMERSLACK, 1UL);
    setvbuf(stdin, NULL, _IONBF, 0);
    read_spec(argv[1], &port);
    open_all(port);
    puts("ready");
    fflush(stdout);
    char line[64];
    if (!fgets(line, sizeof line, stdin)) return 0;
    run();
    if (!fgets(line, sizeof line, stdin) || sscanf(line, "stop %ld %ld", &from, &to) != 2) return 0;
    int64_t deadline = ns_of(CLOCK_MONOTONIC) + LAST_ANSWERS_NS;
    while (answered < sent && ns_of(CLOCK_MONOTONIC) < deadline) {
        for (int i = 0; i < connected; i++) {
            flush(&connections[i]);
            count_answers(&connections[i]);
        }
        usleep(1000);
    }
    printf("{\"sent\":%ld,\"answered\":%ld,\"published\":%ld}\n", (long)sent, (long)answered,
           (long)(sent_before(to) - sent_before(from)));
    return 0;
}

/* A load client for server-sent events that is not the bottleneck.
 *
 *     sseload HOST PORT REQUESTS CONNECTIONS WARMUP_S MEASURE_S GRACE_S CONNECTS_PER_S
 *
 * Opens CONNECTIONS streams; the n-th sends the n-th line of REQUESTS, modulo: a path, or anything
 * else as it stands, such as Redis's `SUBSCRIBE a b`. Says `open N` on stderr, reads for WARMUP_S,
 * says `measure`, measures for MEASURE_S, says `measured`, and reads for GRACE_S more.
 *
 * An event counts where `"t":<nanoseconds>` stands in it, the publisher's CLOCK_MONOTONIC; a server
 * must not cut that in two by a chunk's head. Latency is the time at the read minus `t`, of what
 * arrives within the window; `delivered` is what was published within it and arrived at all.
 * Prints one JSON line; its own CPU time tells whether it was the limit.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CARRY 64             /* the longest piece of `"t":<20 digits>` that a read can cut */
#define READ_SIZE 65536
#define OPEN_LIMIT_S 60LL    /* streams that have no answer by then never get one */
#define BUCKETS 4096         /* logarithmic, 64 per doubling, from 1 us */

struct stream {
    int fd;
    int state;               /* 0 connecting, 1 header, 2 body, 3 ended */
    int carried;
    char carry[CARRY];
};

static uint64_t buckets[BUCKETS];
static uint64_t events, delivered, bytes, opened, ended, refused;
static int64_t measure_from, measure_to;

static int64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static int bucket_of(int64_t us) {
    if (us < 64) return us < 0 ? 0 : (int)us;
    int shift = 63 - __builtin_clzll((uint64_t)us) - 6;
    int b = 64 + shift * 64 + (int)((us >> shift) - 64);
    return b < BUCKETS ? b : BUCKETS - 1;
}

static double value_of(int b) {
    if (b < 64) return b;
    int shift = (b - 64) / 64;
    return (double)((uint64_t)((b - 64) % 64 + 64) << shift);
}

static double quantile(double q) {
    uint64_t wanted = (uint64_t)(q * (double)events), seen = 0;
    for (int b = 0; b < BUCKETS; b++) {
        seen += buckets[b];
        if (seen > wanted) return value_of(b);
    }
    return 0;
}

static void scan(struct stream *s, char *data, int length, int64_t at) {
    char *p = data, *end = data + length;
    while ((p = memmem(p, (size_t)(end - p), "\"t\":", 4)) != NULL) {
        char *digits = p + 4, *q = digits;
        int64_t t = 0;
        while (q < end && *q >= '0' && *q <= '9') t = t * 10 + (*q++ - '0');
        if (q == end) break; /* may go on in the next read */
        if (measure_from && q > digits) {
            if (t >= measure_from && t < measure_to) delivered++;
            if (at >= measure_from && at < measure_to) {
                events++;
                buckets[bucket_of((at - t) / 1000)]++;
            }
        }
        p = q;
    }
    /* Kept for the next read: a number that may go on, or the last bytes, which may begin a key. */
    char *from = p != NULL ? p : end - (end - data < 3 ? end - data : 3);
    s->carried = (int)(end - from);
    if (s->carried > CARRY) s->carried = 0;
    memcpy(s->carry, from, (size_t)s->carried);
}

static double cpu_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static char **read_lines(const char *path, size_t *count) {
    FILE *file = fopen(path, "r");
    if (!file) { perror(path); exit(2); }
    char **lines = NULL, *line = NULL;
    size_t capacity = 0;
    ssize_t got;
    while ((got = getline(&line, &capacity, file)) > 0) {
        if (line[got - 1] == '\n') line[got - 1] = 0;
        lines = realloc(lines, (*count + 1) * sizeof *lines);
        lines[(*count)++] = strdup(line);
    }
    fclose(file);
    if (*count == 0) { fprintf(stderr, "no requests\n"); exit(2); }
    return lines;
}

static int send_request(int fd, const char *line, const char *host, const char *port) {
    static char request[CARRY + READ_SIZE];
    int length = line[0] == '/'
        ? snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: %s:%s\r\nAccept: text/event-stream\r\n\r\n",
                   line, host, port)
        : snprintf(request, sizeof request, "%s\r\n", line);
    return length < (int)sizeof request && write(fd, request, (size_t)length) == length;
}

int main(int argc, char **argv) {
    if (argc != 9) {
        fprintf(stderr, "usage: sseload HOST PORT REQUESTS CONNECTIONS WARMUP_S MEASURE_S GRACE_S CONNECTS_PER_S\n");
        return 2;
    }
    int count = atoi(argv[4]);
    double warmup = atof(argv[5]), measure = atof(argv[6]), grace = atof(argv[7]), rate = atof(argv[8]);
    size_t lines = 0;
    char **requests = read_lines(argv[3], &lines);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    inet_pton(AF_INET, argv[1], &address.sin_addr);
    struct stream *streams = calloc((size_t)count, sizeof *streams);
    int epoll = epoll_create1(0);
    static char buffer[CARRY + READ_SIZE];
    struct epoll_event ready[512];
    int64_t start = now_ns();
    int next = 0, phase = 0; /* 0 opening, 1 warm-up, 2 measuring, 3 grace */
    double cpu = 0;
    for (;;) {
        int64_t t = now_ns();
        while (next < count && (double)(t - start) / 1e9 * rate >= next) {
            struct stream *s = &streams[next];
            s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
            if (s->fd < 0) { perror("socket"); return 1; }
            connect(s->fd, (struct sockaddr *)&address, sizeof address);
            struct epoll_event e = {.events = EPOLLOUT, .data.u32 = (uint32_t)next};
            epoll_ctl(epoll, EPOLL_CTL_ADD, s->fd, &e);
            next++;
        }
        if (phase == 0 && ((next == count && opened + refused + ended >= (uint64_t)count) ||
                           t - start > OPEN_LIMIT_S * 1000000000)) {
            phase = 1;
            measure_from = t + (int64_t)(warmup * 1e9);
            measure_to = measure_from + (int64_t)(measure * 1e9);
            fprintf(stderr, "open %lu\n", opened);
        } else if (phase == 1 && t >= measure_from) {
            phase = 2;
            cpu = cpu_seconds();
            fprintf(stderr, "measure\n");
        } else if (phase == 2 && t >= measure_to) {
            phase = 3;
            cpu = cpu_seconds() - cpu;
            fprintf(stderr, "measured\n");
        } else if (phase == 3 && t >= measure_to + (int64_t)(grace * 1e9)) {
            break;
        }
        int n = epoll_wait(epoll, ready, 512, next < count ? 1 : 10);
        for (int i = 0; i < n; i++) {
            struct stream *s = &streams[ready[i].data.u32];
            if (s->state == 0) {
                int error = 0;
                socklen_t size = sizeof error;
                getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size);
                const char *line = requests[ready[i].data.u32 % lines];
                if (error || !send_request(s->fd, line, argv[1], argv[2])) {
                    refused++;
                    s->state = 3;
                    close(s->fd);
                    continue;
                }
                s->state = 1;
                struct epoll_event e = {.events = EPOLLIN, .data.u32 = ready[i].data.u32};
                epoll_ctl(epoll, EPOLL_CTL_MOD, s->fd, &e);
                continue;
            }
            memcpy(buffer, s->carry, (size_t)s->carried);
            ssize_t r = read(s->fd, buffer + s->carried, READ_SIZE);
            if (r < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (r <= 0) {
                if (s->state == 1) refused++; else { ended++; opened--; }
                s->state = 3;
                close(s->fd);
                continue;
            }
            if (s->state == 1) {
                if (requests[ready[i].data.u32 % lines][0] == '/' && memmem(buffer, (size_t)r, " 200 ", 5) == NULL) {
                    refused++;
                    s->state = 3;
                    close(s->fd);
                    continue;
                }
                s->state = 2;
                opened++;
            }
            if (phase == 2) bytes += (uint64_t)r;
            scan(s, buffer, (int)r + s->carried, now_ns());
        }
    }
    printf("{\"open\":%lu,\"refused\":%lu,\"ended\":%lu,\"events\":%lu,\"delivered\":%lu,\"read_bytes\":%lu,"
           "\"from_ns\":%ld,\"to_ns\":%ld,\"p50_us\":%.0f,\"p90_us\":%.0f,\"p99_us\":%.0f,\"p999_us\":%.0f,"
           "\"client_cpu_s\":%.3f}\n",
           opened, refused, ended, events, delivered, bytes, (long)measure_from, (long)measure_to, quantile(.5),
           quantile(.9), quantile(.99), quantile(.999), cpu);
    return 0;
}

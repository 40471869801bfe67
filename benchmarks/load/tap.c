/* Reads many sockets at once and notes when the provider's stamps, `t=<ns>;`, arrive: a browser, or a follower of Redis.
 *
 *   tap FILE
 *
 * Standard input is a list of connections, one a line, `<number> <port> <bytes to send, in hexadecimal>`; its end is the
 * end of the measurement. FILE then holds, per stamp, three native 64-bit integers: the connection's number, the
 * stamp, and the arrival (ns of CLOCK_MONOTONIC); and last, with number -1, the count of `~` and of bytes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 65536
#define KEEP 32 /* a stamp may be cut in two by the end of a read */

typedef struct { long long number; size_t kept; char tail[KEEP]; } Tap;
typedef struct { long long number, stamp, arrival; } Seen;

static Tap *taps[MOST];
static int poll_fd;
static Seen *seen;
static size_t known, room;
static long long marks, bytes;

static long long now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void note(long long number, long long stamp, long long arrival) {
    if (known == room) seen = realloc(seen, (room = room ? room * 2 : 65536) * sizeof(Seen));
    seen[known++] = (Seen){number, stamp, arrival};
}

static void open_tap(char *line) {
    char *rest;
    long long number = strtoll(line, &rest, 10);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((int)strtol(rest, &rest, 10));
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || fd >= MOST || connect(fd, (struct sockaddr *)&address, sizeof address)) {
        perror("connect");
        exit(1);
    }
    while (*rest == ' ') rest++;
    size_t n = strcspn(rest, "\n") / 2;
    char *request = malloc(n + 1);
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        sscanf(rest + 2 * i, "%2x", &byte);
        request[i] = (char)byte;
    }
    if (send(fd, request, n, MSG_NOSIGNAL) != (ssize_t)n) exit(1);
    free(request);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    taps[fd] = calloc(1, sizeof(Tap));
    taps[fd]->number = number;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void listen_to(int fd) {
    static char buffer[1 << 20];
    Tap *tap = taps[fd];
    for (;;) {
        memcpy(buffer, tap->tail, tap->kept);
        ssize_t n = recv(fd, buffer + tap->kept, sizeof buffer - tap->kept - 1, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            close(fd);
            free(tap);
            taps[fd] = NULL;
            return;
        }
        long long arrival = now_ns();
        char *at = buffer, *end = buffer + tap->kept + n, *fresh = buffer + tap->kept;
        *end = 0;
        bytes += n;
        for (char *mark = fresh; (mark = memchr(mark, '~', end - mark)); mark++) marks++;
        char *from = end - (end - buffer < KEEP ? end - buffer : KEEP);
        while ((at = memmem(at, end - at, "~t=", 3))) {
            char *stop = memchr(at, ';', end - at);
            if (!stop) break; /* its rest is still to come */
            note(tap->number, strtoll(at + 3, NULL, 10), arrival);
            at = stop;
            if (from < at) from = at; /* not to be seen again */
        }
        tap->kept = end - from;
        memcpy(tap->tail, from, tap->kept);
        if (fresh + n < buffer + sizeof buffer - 1) return;
    }
}

int main(int count, char **arguments) {
    static char input[1 << 20];
    size_t have = 0;
    if (count != 2) return 2;
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    poll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = 0}, events[1024];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, 0, &event);
    for (;;) {
        int n = epoll_wait(poll_fd, events, 1024, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd) {
                if (taps[events[i].data.fd]) listen_to(events[i].data.fd);
                continue;
            }
            ssize_t got = read(0, input + have, sizeof input - have - 1);
            if (got <= 0) goto end;
            have += got;
            input[have] = 0;
            char *line = input, *stop;
            for (; (stop = strchr(line, '\n')); line = stop + 1) open_tap(line);
            memmove(input, line, have = strlen(line));
        }
    }
end:;
    note(-1, marks, bytes);
    FILE *file = fopen(arguments[1], "wb");
    if (!file || fwrite(seen, sizeof(Seen), known, file) != known || fclose(file)) return 1;
    return 0;
}

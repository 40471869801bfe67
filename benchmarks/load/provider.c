/* A scripted OpenAI-compatible provider: many streams of chat.completion.chunk at an exact pace, on little CPU.
 *
 *   provider RATE TOKENS EVERY
 *
 * RATE tokens a second and stream; TOKENS an answer (0: until GET /_finish); every EVERY-th token carries the time
 * it was due, `t=<ns of CLOCK_MONOTONIC>;`. Each token holds exactly one `~`, so that it can be counted wherever
 * it arrives. `[[tokens:N]]` and `[[rate:N]]` in the request override the first two. Prints its port. It answers:
 *
 *   POST …/chat/completions   role chunk, content deltas, finish_reason, usage, [DONE]; one HTTP chunk per frame
 *   GET  /_stats              {"active": …, "tokens": …, "stamps": …, "asked": …}
 *   GET  /_finish             every stream says its end now
 *
 * A stream that is not read fast enough waits in memory here: the stamp is when the token was due, so that lag shows.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 4096 /* of one millisecond: the wheel goes round in four seconds */
#define MOST 65536 /* file descriptors */
#define REQUEST 1048576
#define STREAMING "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"

typedef struct Stream {
    int fd, live, watching;
    long long due, gap; /* ns */
    long sent, length;
    struct Stream *next; /* in the same slot */
    struct Stream **back;
    char *in; size_t have, room;
    char *out; size_t from, to, size;
} Stream;

static Stream *streams[MOST], *wheel[SLOTS];
static int poll_fd;
static long rate, tokens, every, active, total, stamps, asked;
static long long hand; /* the wheel's millisecond */

static long long now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void unlink_slot(Stream *s) {
    if (!s->back) return;
    *s->back = s->next;
    if (s->next) s->next->back = s->back;
    s->back = NULL;
}

static void schedule(Stream *s) {
    long long tick = s->due / 1000000;
    if (tick <= hand) tick = hand + 1;
    if (tick > hand + SLOTS - 1) tick = hand + SLOTS - 1; /* looked at again there */
    Stream **slot = &wheel[tick % SLOTS];
    s->next = *slot;
    if (s->next) s->next->back = &s->next;
    *slot = s;
    s->back = slot;
}

static void drop(Stream *s) {
    unlink_slot(s);
    if (s->live) active--;
    streams[s->fd] = NULL;
    close(s->fd);
    free(s->in);
    free(s->out);
    free(s);
}

/* 0 when the connection is gone. */
static int flush(Stream *s) {
    while (s->from < s->to) {
        ssize_t n = send(s->fd, s->out + s->from, s->to - s->from, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) return 0;
            if (!s->watching) {
                struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.fd = s->fd};
                epoll_ctl(poll_fd, EPOLL_CTL_MOD, s->fd, &event);
                s->watching = 1;
            }
            return 1;
        }
        s->from += n;
    }
    s->from = s->to = 0;
    if (s->watching) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = s->fd};
        epoll_ctl(poll_fd, EPOLL_CTL_MOD, s->fd, &event);
        s->watching = 0;
    }
    return 1;
}

static void put(Stream *s, const char *data, size_t n) {
    if (s->to + n > s->size) {
        memmove(s->out, s->out + s->from, s->to - s->from);
        s->to -= s->from;
        s->from = 0;
        while (s->to + n > s->size) s->size = s->size ? s->size * 2 : 2048;
        s->out = realloc(s->out, s->size);
    }
    memcpy(s->out + s->to, data, n);
    s->to += n;
}

static void frame(Stream *s, const char *delta, const char *finish, const char *rest) {
    char body[1024], head[16];
    int n = snprintf(body, sizeof body,
        "data: {\"id\":\"chatcmpl-%08d\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,"
        "\"model\":\"scripted\",\"service_tier\":\"default\",\"system_fingerprint\":\"fp_0\",\"choices\":["
        "{\"index\":0,\"delta\":{%s},\"logprobs\":null,\"finish_reason\":%s}],\"usage\":null}\n\n%s",
        s->fd, delta, finish, rest);
    put(s, head, snprintf(head, sizeof head, "%x\r\n", n));
    put(s, body, n);
    put(s, "\r\n", 2);
}

static void say(Stream *s) {
    char delta[96];
    if (s->sent % every == 0) {
        snprintf(delta, sizeof delta, "\"content\":\"~t=%lld;\"", s->due);
        stamps++;
    } else
        snprintf(delta, sizeof delta, "\"content\":\"~%c%c \"", 'a' + (int)(s->sent % 26), 'a' + (int)(s->sent / 26 % 26));
    frame(s, delta, "null", "");
    s->sent++;
    total++;
}

static void end(Stream *s) {
    char rest[768];
    snprintf(rest, sizeof rest,
        "data: {\"id\":\"chatcmpl-%08d\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"scripted\","
        "\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":%ld,\"total_tokens\":%ld}}\n\ndata: [DONE]\n\n",
        s->fd, s->sent, s->sent + 9);
    frame(s, "", "\"stop\"", rest);
    put(s, "0\r\n\r\n", 5);
    unlink_slot(s);
    s->live = 0;
    active--;
}

static void json(Stream *s, const char *body) {
    char head[160];
    put(s, head, snprintf(head, sizeof head,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", strlen(body)));
    put(s, body, strlen(body));
}

static long option(const char *body, const char *name, long fallback) {
    const char *found = strstr(body, name);
    return found ? atol(found + strlen(name)) : fallback;
}

static void answer(Stream *s, const char *request) {
    char body[256];
    if (!strncmp(request, "GET /_stats", 11)) {
        snprintf(body, sizeof body, "{\"active\":%ld,\"tokens\":%ld,\"stamps\":%ld,\"asked\":%ld}", active, total, stamps, asked);
        json(s, body);
    } else if (!strncmp(request, "GET /_finish", 12)) {
        for (int fd = 0; fd < MOST; fd++)
            if (streams[fd] && streams[fd]->live) {
                end(streams[fd]);
                if (!flush(streams[fd])) drop(streams[fd]);
            }
        json(s, "{}");
    } else if (!strncmp(request, "POST ", 5)) {
        put(s, STREAMING, sizeof STREAMING - 1);
        s->live = 1;
        s->sent = 0;
        s->length = option(request, "[[tokens:", tokens);
        s->gap = 1000000000LL / option(request, "[[rate:", rate);
        s->due = now_ns();
        active++;
        asked++;
        frame(s, "\"role\":\"assistant\",\"content\":\"\",\"refusal\":null", "null", "");
        say(s);
        s->due += s->gap;
        schedule(s);
    } else
        json(s, "{\"object\":\"list\",\"data\":[{\"id\":\"scripted\",\"object\":\"model\"}]}");
}

/* 0 when the connection is gone. */
static int readable(Stream *s) {
    for (;;) {
        if (s->room - s->have < 4096) {
            if (s->room >= REQUEST) return 0;
            s->room = s->room ? s->room * 2 : 8192;
            s->in = realloc(s->in, s->room + 1);
        }
        ssize_t n = recv(s->fd, s->in + s->have, s->room - s->have, 0);
        if (n == 0) return 0;
        if (n < 0) {
            if (errno != EAGAIN) return 0;
            break;
        }
        s->have += n;
    }
    while (!s->live && s->have) {
        s->in[s->have] = 0;
        char *head = strstr(s->in, "\r\n\r\n");
        if (!head) break;
        char *length = strcasestr(s->in, "\r\ncontent-length:");
        size_t whole = head + 4 - s->in + (length && length < head ? strtoul(length + 17, NULL, 10) : 0);
        if (s->have < whole) break;
        char kept = s->in[whole];
        s->in[whole] = 0;
        answer(s, s->in);
        s->in[whole] = kept;
        memmove(s->in, s->in + whole, s->have -= whole);
    }
    return flush(s);
}

static void turn(void) {
    long long now = now_ns();
    while (hand < now / 1000000) {
        hand++;
        Stream *s = wheel[hand % SLOTS], *next;
        wheel[hand % SLOTS] = NULL;
        if (s) s->back = NULL;
        for (; s; s = next) {
            next = s->next;
            if (next) next->back = NULL;
            s->back = NULL;
            for (; s->due <= now && s->live; s->due += s->gap) {
                if (s->length && s->sent >= s->length) end(s);
                else say(s);
            }
            if (s->live) schedule(s);
            if (!flush(s)) drop(s);
        }
    }
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    rate = atol(arguments[1]);
    tokens = atol(arguments[2]);
    every = atol(arguments[3]);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) return 1;
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    poll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[1024];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &event);
    hand = now_ns() / 1000000;
    for (;;) {
        int n = epoll_wait(poll_fd, events, 1024, active ? 1 : 100);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (fd >= MOST) { close(fd); continue; }
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    streams[fd] = calloc(1, sizeof(Stream));
                    streams[fd]->fd = fd;
                    event = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                    epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event);
                }
                continue;
            }
            Stream *s = streams[fd];
            if (!s) continue;
            if ((events[i].events & EPOLLOUT) && !flush(s)) drop(s);
            else if ((events[i].events & ~EPOLLOUT) && !readable(s)) drop(s);
        }
        turn();
    }
}

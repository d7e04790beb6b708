// Loaded with LD_PRELOAD: counts the calls with which a process changes files in one folder, and
// makes the call of a given number, or every one from there on, go wrong. See bench/campaign.py.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL, READONLY, FAIL_ONCE };  // TEAR: killed with half of the data written

static char folder[PATH_MAX];
static int kind = COUNT;
static long at = 0, calls = 0;

void fault_arm(const char *path, int what, long number) {
    snprintf(folder, sizeof folder, "%s/", path);
    kind = what, at = number, calls = 0;
}

long fault_calls(void) { return calls; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int path_matters(const char *path) {
    char whole[2 * PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return !strncmp(path, folder, strlen(folder));
    if (!getcwd(whole, PATH_MAX)) return 0;
    strcat(whole, "/");
    return !strncmp(whole, folder, strlen(folder));
}

static int file_matters(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path_matters(path);
}

// What becomes of a call that matters: 0 nothing, 1 half of its data is written before the end,
// -1 it fails with errno. takes_room: whether the call fails where a disk is full.
static int fate(int takes_room) {
    long number = ++calls;
    if (kind == COUNT || number < at) return 0;
    if (kind == KILL) raise(SIGKILL);
    if (kind == TEAR) return 1;
    if (kind == FULL && takes_room) return errno = ENOSPC, -1;
    if (kind == READONLY) return errno = EROFS, -1;
    if (kind == FAIL_ONCE && number == at) return errno = EIO, -1;
    return 0;
}

#define SIMPLE(type, name, matters, room, parameters, arguments)        \
    type name parameters {                                              \
        if (matters) {                                                  \
            int end = fate(room);                                       \
            if (end > 0) raise(SIGKILL);                                \
            if (end < 0) return -1;                                     \
        }                                                               \
        return REAL(name) arguments;                                    \
    }

SIMPLE(int, rename, path_matters(b), 0, (const char *a, const char *b), (a, b))
SIMPLE(int, renameat, path_matters(b), 0, (int i, const char *a, int j, const char *b), (i, a, j, b))
SIMPLE(int, link, path_matters(b), 1, (const char *a, const char *b), (a, b))
SIMPLE(int, linkat, path_matters(b), 1,
       (int i, const char *a, int j, const char *b, int f), (i, a, j, b, f))
SIMPLE(int, unlink, path_matters(a), 0, (const char *a), (a))
SIMPLE(int, unlinkat, path_matters(a), 0, (int i, const char *a, int f), (i, a, f))
SIMPLE(int, rmdir, path_matters(a), 0, (const char *a), (a))
SIMPLE(int, mkdir, path_matters(a), 1, (const char *a, mode_t m), (a, m))
SIMPLE(int, chmod, path_matters(a), 0, (const char *a, mode_t m), (a, m))
SIMPLE(int, fsync, file_matters(fd), 1, (int fd), (fd))
SIMPLE(int, fdatasync, file_matters(fd), 1, (int fd), (fd))
SIMPLE(int, ftruncate, file_matters(fd), 1, (int fd, off_t n), (fd, n))
SIMPLE(int, ftruncate64, file_matters(fd), 1, (int fd, off64_t n), (fd, n))
SIMPLE(ssize_t, sendfile, file_matters(o), 1, (int o, int i, off_t *p, size_t n), (o, i, p, n))
SIMPLE(ssize_t, sendfile64, file_matters(o), 1, (int o, int i, off64_t *p, size_t n), (o, i, p, n))
SIMPLE(ssize_t, writev, file_matters(fd), 1, (int fd, const struct iovec *v, int n), (fd, v, n))

#define DATA(name, offset_parameter, offset_argument)                                       \
    ssize_t name(int fd, const void *data, size_t n offset_parameter) {                     \
        if (file_matters(fd)) {                                                             \
            int end = fate(1);                                                              \
            if (end < 0) return -1;                                                         \
            if (end > 0) REAL(name)(fd, data, n / 2 offset_argument), raise(SIGKILL);       \
        }                                                                                   \
        return REAL(name)(fd, data, n offset_argument);                                     \
    }
#define COMMA_OFFSET , off64_t offset
#define COMMA_VALUE , offset
#define NONE
DATA(write, NONE, NONE)
DATA(pwrite64, COMMA_OFFSET, COMMA_VALUE)

size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
    if (file_matters(fileno(file))) {
        int end = fate(1);
        if (end < 0) return 0;
        if (end > 0) REAL(fwrite)(data, size, n / 2, file), fflush(file), raise(SIGKILL);
    }
    return REAL(fwrite)(data, size, n, file);
}

#define OPEN(name, parameters, arguments)                                                   \
    int name(parameters const char *path, int flags, ...) {                                 \
        va_list rest;                                                                       \
        va_start(rest, flags);                                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;             \
        va_end(rest);                                                                       \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) && path_matters(path)) {        \
            int end = fate(flags & O_CREAT);                                                \
            if (end > 0) raise(SIGKILL);                                                    \
            if (end < 0) return -1;                                                         \
        }                                                                                   \
        return REAL(name)(arguments path, flags, mode);                                     \
    }
#define FOLDER_PARAMETER int at_folder,
#define FOLDER_ARGUMENT at_folder,
OPEN(open, NONE, NONE)
OPEN(open64, NONE, NONE)
OPEN(openat, FOLDER_PARAMETER, FOLDER_ARGUMENT)
OPEN(openat64, FOLDER_PARAMETER, FOLDER_ARGUMENT)

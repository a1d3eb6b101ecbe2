/* Preloaded (LD_PRELOAD) into the processes of a test: another clock, failing reads, syncs and renames, and a record of
 * every write.
 *
 * FAULTS_SHIM names the control file, which the test changes while the processes run. FAULTS_RECORD names a file that
 * gets a line "JOB PATH" before every write, rename and deletion of a path that contains the control's `match`; JOB is
 * the value of FAULTS_JOB.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock;                       /* nanoseconds that the wall clock is wrong */
    int32_t read, sync, folder_sync, rename; /* the errno with which such a call fails for a path with `match`; 0: none */
    char match[104];                     /* a part of a path */
};

#define NEXT(function) \
    static __typeof__(&function) next; \
    if (!next) next = (__typeof__(&function))dlsym(RTLD_NEXT, #function)

static struct control *control(void) {
    static struct control *map;
    const char *path = map ? NULL : getenv("FAULTS_SHIM");
    if (path) {
        int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
        void *found = mmap(NULL, sizeof(struct control), PROT_READ, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        if (found != MAP_FAILED) map = found;
    }
    return map;
}

static int matches(const char *path) {
    struct control *c = control();
    return c && c->match[0] && strstr(path, c->match);
}

static int path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length >= 0;
}

static void record(const char *path) {
    static int file = -1;
    const char *to = getenv("FAULTS_RECORD"), *job = getenv("FAULTS_JOB");
    if (!to || !job || !matches(path)) return;
    int before = errno;
    if (file < 0) {
        int opened = syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_APPEND | O_CLOEXEC);
        file = fcntl(opened, F_DUPFD_CLOEXEC, 700);
        close(opened);
    }
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", job, path);
    if (file >= 0) syscall(SYS_write, file, line, (size_t)length);
    errno = before;
}

static void record_file(int file) {
    char path[PATH_MAX];
    if (control() && file > 2 && getenv("FAULTS_RECORD") && path_of(file, path)) record(path);
}

static int fails(int file, int number) {
    char path[PATH_MAX];
    if (!number || !path_of(file, path) || !matches(path)) return 0;
    errno = number;
    return 1;
}

ssize_t read(int file, void *to, size_t size) {
    NEXT(read);
    return control() && fails(file, control()->read) ? -1 : next(file, to, size);
}

ssize_t pread64(int file, void *to, size_t size, off64_t at) {
    NEXT(pread64);
    return control() && fails(file, control()->read) ? -1 : next(file, to, size, at);
}

ssize_t write(int file, const void *from, size_t size) {
    NEXT(write);
    record_file(file);
    return next(file, from, size);
}

ssize_t writev(int file, const struct iovec *from, int count) {
    NEXT(writev);
    record_file(file);
    return next(file, from, count);
}

int ftruncate64(int file, off64_t size) {
    NEXT(ftruncate64);
    record_file(file);
    return next(file, size);
}

int fsync(int file) {
    NEXT(fsync);
    struct stat found;
    int folder = control() && !fstat(file, &found) && S_ISDIR(found.st_mode);
    return control() && fails(file, folder ? control()->folder_sync : control()->sync) ? -1 : next(file);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    record(to);
    if (control() && control()->rename && matches(to)) {
        errno = control()->rename;
        return -1;
    }
    return next(from, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags) {
    NEXT(renameat2);
    record(to);
    return next(from_folder, from, to_folder, to, flags);
}

int unlink(const char *path) {
    NEXT(unlink);
    record(path);
    return next(path);
}

int clock_gettime(clockid_t which, struct timespec *now) {
    NEXT(clock_gettime);
    int result = next(which, now);
    if ((which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE) && control() && control()->clock) {
        int64_t moved = now->tv_sec * 1000000000LL + now->tv_nsec + control()->clock;
        now->tv_sec = moved / 1000000000LL;
        now->tv_nsec = moved % 1000000000LL;
    }
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

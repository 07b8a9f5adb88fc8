#include "process.h"

#include <dirent.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Waits up to |timeout| ms for the end of a process, which a pidfd reports for anyone's
 * child; also with SIGCHLD ignored. */
static bool ends_within(pid_t pid, int timeout) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) {
        return true; /* not even a zombie */
    }
    struct pollfd ended = {.fd = fd, .events = POLLIN};
    int count = poll(&ended, 1, timeout);
    close(fd);
    return count == 1;
}

bool process_runs(pid_t pid) {
    return !ends_within(pid, 0);
}

bool process_wait_gone(pid_t pid) {
    return ends_within(pid, PROCESS_DEADLINE_MS);
}

long process_memory(pid_t pid, const char *field) {
    char path[64];
    char line[256];
    long size = -1;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "r");
    while (file != NULL && size < 0 && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, field, strlen(field)) == 0) {
            (void)sscanf(line + strlen(field), "%ld", &size);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return size;
}

int process_descriptors(pid_t pid) {
    char path[64];
    int count = -2; /* "." and ".." */
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    if (directory == NULL) {
        return -1;
    }
    while (readdir(directory) != NULL) {
        count++;
    }
    closedir(directory);
    return count;
}

bool process_wait_descriptors(pid_t pid, int count) {
    for (int waited = 0; waited < PROCESS_DEADLINE_MS; waited++) {
        if (process_descriptors(pid) == count) {
            return true;
        }
        (void)poll(NULL, 0, 1); /* nothing tells when a process closes something */
    }
    return false;
}

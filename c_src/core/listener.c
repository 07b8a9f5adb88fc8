/*
 * Whose listener is at a local port? L1.
 *
 * One question to the kernel, and at most one walk through the descriptors of a family of
 * processes. What can't be read makes the answer UNKNOWN, never OTHER.
 */
#include "listener.h"
#include "sock_diag.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GENERATIONS_MAX 8

/* ---- processes ---- */

/* Whether |process| has the socket open; UNKNOWN: may not be asked, or is gone, which is
 * how it looks, too, when /proc hides it (hidepid=2). */
static enum listener_owner look_at_descriptors(pid_t process, uint32_t inode) {
    char path[64];
    char wanted[32];
    enum listener_owner owner = LISTENER_OTHER;
    const struct dirent *entry;
    snprintf(path, sizeof path, "/proc/%ld/fd", (long)process);
    int length = snprintf(wanted, sizeof wanted, "socket:[%lu]", (unsigned long)inode);
    DIR *descriptors = opendir(path);
    if (descriptors == NULL) {
        return LISTENER_UNKNOWN;
    }
    while (owner == LISTENER_OTHER && (entry = readdir(descriptors)) != NULL) {
        char target[sizeof wanted];
        ssize_t size =
            readlinkat(dirfd(descriptors), entry->d_name, target, sizeof target);
        if (size == length && memcmp(target, wanted, (size_t)size) == 0) {
            owner = LISTENER_FAMILY;
        } else if (size < 0 && (errno == EACCES || errno == EPERM)) {
            owner = LISTENER_UNKNOWN; /* of root the list may be read, but not these */
        }
    }
    closedir(descriptors);
    return owner;
}

static enum listener_owner look_at_children(pid_t parent, uint32_t inode, int generation);

/* The children that one thread of a process has made: /proc/PID/task/TID/children. When
 * one of them ends while the list is read, others may be missing in it, see proc(5). That
 * one is then in it and gone, which makes the answer UNKNOWN, if all is read before. */
static enum listener_owner look_at_list(const char *path, uint32_t inode,
                                        int generation) {
    FILE *list = fopen(path, "re");
    if (list == NULL) { /* the thread has ended, or kernels without such lists */
        return LISTENER_UNKNOWN;
    }
    char all[4096];
    setvbuf(list, all, _IOFBF, sizeof all);
    enum listener_owner owner = LISTENER_OTHER;
    char word[32];
    while (owner != LISTENER_FAMILY && fscanf(list, "%31s", word) == 1) {
        pid_t child = (pid_t)strtol(word, NULL, 10);
        enum listener_owner found = look_at_descriptors(child, inode);
        if (found == LISTENER_OTHER) {
            found = look_at_children(child, inode, generation + 1);
        }
        owner = found != LISTENER_OTHER ? found : owner;
    }
    fclose(list);
    return owner;
}

static enum listener_owner look_at_children(pid_t parent, uint32_t inode,
                                            int generation) {
    char path[64];
    enum listener_owner owner = LISTENER_OTHER;
    const struct dirent *entry;
    snprintf(path, sizeof path, "/proc/%ld/task", (long)parent);
    if (generation == GENERATIONS_MAX) {
        return LISTENER_UNKNOWN;
    }
    DIR *threads = opendir(path);
    if (threads == NULL) {
        return LISTENER_UNKNOWN;
    }
    while (owner != LISTENER_FAMILY && (entry = readdir(threads)) != NULL) {
        if (entry->d_name[0] != '.') {
            char list[sizeof path + sizeof entry->d_name + sizeof "//children"];
            snprintf(list, sizeof list, "%s/%s/children", path, entry->d_name);
            enum listener_owner found = look_at_list(list, inode, generation);
            owner = found != LISTENER_OTHER ? found : owner;
        }
    }
    closedir(threads);
    return owner;
}

/* 0: unknown. */
static pid_t parent_of(pid_t process) {
    char path[64];
    char stat[512];
    snprintf(path, sizeof path, "/proc/%ld/stat", (long)process);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        return 0;
    }
    ssize_t size = read(file, stat, sizeof stat - 1);
    close(file);
    stat[size > 0 ? size : 0] = '\0';
    /* "PID (NAME) S PPID ...": NAME may contain anything, S is one character. */
    const char *after_name = strrchr(stat, ')');
    return after_name != NULL && strlen(after_name) > 4
               ? (pid_t)strtol(after_name + 4, NULL, 10)
               : 0;
}

/* ---- interface ---- */

static int find_listener(const struct sock_address *address, struct inet_diag_msg *out) {
    const struct sock_end end = sock_end_of(address);
    return sock_diag_find(&end, NULL, 1U << TCP_LISTEN, out);
}

enum listener_owner listener_owner(const struct sock_address *address, pid_t process,
                                   uint32_t *known) {
    struct inet_diag_msg listener;
    int error = find_listener(address, &listener);
    if (error != 0) {
        return error == -ENOENT ? LISTENER_NOBODY : LISTENER_UNKNOWN;
    }
    uint32_t inode = listener.idiag_inode;
    if (inode == *known && inode != 0) {
        return LISTENER_FAMILY;
    }
    enum listener_owner owner = look_at_descriptors(process, inode);
    if (owner == LISTENER_OTHER) {
        pid_t parent = parent_of(process);
        owner = parent > 1 ? look_at_children(parent, inode, 0) : LISTENER_UNKNOWN;
    }
    if (owner == LISTENER_FAMILY) {
        *known = inode;
    }
    return owner;
}

int listener_user(const struct sock_address *address, uid_t *out) {
    struct inet_diag_msg listener;
    int error = find_listener(address, &listener);
    if (error == 0) {
        *out = listener.idiag_uid;
    }
    return error;
}

enum listener_owner listener_descendant(uint32_t inode, pid_t process) {
    return look_at_children(process, inode, 0);
}

bool listener_has_connections(const struct sock_address *address) {
    const struct sock_end end = sock_end_of(address);
    return sock_diag_find_port(&end, 1U << TCP_ESTABLISHED) != -ENOENT;
}

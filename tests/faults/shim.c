/* A process's wall clock and name look-up, bent from outside while it runs; loaded by LD_PRELOAD.
 *
 * The file named by FAULTS_SHIM is mapped and read at every call:
 *   int64  nanoseconds that the wall clock is ahead (behind: negative)
 *   int32  names that end in ".test": 0 they are 127.0.0.1, 1 there is no answer (EAI_AGAIN)
 *   int32  milliseconds that such a look-up takes
 *   int64  look-ups that were made
 * Steady clocks (CLOCK_MONOTONIC) are left alone, as on a machine whose clock is set.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netdb.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <dlfcn.h>

struct state {
  volatile int64_t ahead_ns;
  volatile int32_t names_gone;
  volatile int32_t look_up_ms;
  volatile int64_t look_ups;
};

static struct state nothing;
static struct state *state = &nothing;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("FAULTS_SHIM");
  int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *place = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (place != MAP_FAILED) state = place;
}

static int is_wall(clockid_t id) {
  return id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE;
}

int clock_gettime(clockid_t id, struct timespec *out) {
  int code = (int)syscall(SYS_clock_gettime, id, out);
  if (code == 0 && is_wall(id)) {
    int64_t ns = (int64_t)out->tv_sec * 1000000000 + out->tv_nsec + state->ahead_ns;
    out->tv_sec = ns / 1000000000;
    out->tv_nsec = ns % 1000000000;
  }
  return code;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
  struct timespec now;
  (void)zone;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  out->tv_sec = now.tv_sec;
  out->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **result) {
  static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "getaddrinfo");
  size_t length = node ? strlen(node) : 0;
  if (length < 5 || strcmp(node + length - 5, ".test")) return real(node, service, hints, result);
  __sync_fetch_and_add(&state->look_ups, 1);
  int32_t ms = state->look_up_ms;
  struct timespec wait = {ms / 1000, (ms % 1000) * 1000000L};
  while (ms && nanosleep(&wait, &wait)) {
  }
  return state->names_gone ? EAI_AGAIN : real("127.0.0.1", service, hints, result);
}

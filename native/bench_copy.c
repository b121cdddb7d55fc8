/* What bench state compares a migration with: the same bytes over a Unix socket into fresh memory, with the same checksum, and nothing else. */
#define _GNU_SOURCE
#include "bench.h"
#include "migrate.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct copy {
	uint8_t *memory;
	uint64_t size;
	uint32_t piece;
	int fd;
	int64_t error;
};

static int all(int fd, uint8_t *data, uint64_t size, int out)
{
	while (size) {
		ssize_t n = out ? send(fd, data, size, MSG_NOSIGNAL) : recv(fd, data, size, MSG_WAITALL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EPIPE;
		data += n;
		size -= n;
	}
	return 0;
}

static void *receiver(void *argument)
{
	struct copy *copy = argument;

	for (uint64_t at = 0; at < copy->size && !copy->error; at += copy->piece) {
		uint64_t n = copy->size - at < copy->piece ? copy->size - at : copy->piece;
		uint32_t sum;

		copy->error = all(copy->fd, (uint8_t *)&sum, sizeof(sum), 0);
		if (!copy->error)
			copy->error = all(copy->fd, copy->memory + at, n, 0);
		if (!copy->error && pykvm_crc32c(0, copy->memory + at, n) != sum)
			copy->error = -EBADMSG;
	}
	if (copy->error)
		shutdown(copy->fd, SHUT_RDWR);
	return NULL;
}

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

int64_t pykvm_bench_copy(uint64_t source, uint64_t size, uint32_t piece)
{
	struct copy copy = { .size = size, .piece = piece };
	uint8_t *from = (uint8_t *)(uintptr_t)source;
	int64_t began, took, error = 0;
	pthread_t thread;
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -errno;
	copy.memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (copy.memory == MAP_FAILED) {
		error = -errno;
		goto out;
	}
	copy.fd = pair[1];
	began = now();
	error = -pthread_create(&thread, NULL, receiver, &copy);
	if (!error) {
		for (uint64_t at = 0; at < size && !error; at += piece) {
			uint64_t n = size - at < piece ? size - at : piece;
			uint32_t sum = pykvm_crc32c(0, from + at, n);

			error = all(pair[0], (uint8_t *)&sum, sizeof(sum), 1);
			if (!error)
				error = all(pair[0], from + at, n, 1);
		}
		if (error)
			shutdown(pair[0], SHUT_RDWR);
		pthread_join(thread, NULL);
		error = copy.error ? copy.error : error;
	}
	took = now() - began;
	munmap(copy.memory, size);
out:
	close(pair[0]);
	close(pair[1]);
	return error ? error : took;
}

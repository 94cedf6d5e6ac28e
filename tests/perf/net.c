// net: moves bytes over TCP and says how long that took, in a pod, on the host or as a VM's init.
//
//   net sink PORT                takes what each connection sends, and says so at its end by a byte
//   net echo PORT                sends back each byte that comes
//   net send ADDRESS PORT BYTES  sends so many bytes to a sink; prints nanoseconds
//   net many ADDRESS PORT BYTES  the same, by eight connections at once
//   net ask ADDRESS PORT COUNT   one byte to an echo and back, so many times; prints nanoseconds
//
// As init it gives eth0 the address that stands behind net= on the kernel's command line (a /24),
// and serves: echo at port 1, sink at port 2.
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char bytes[256 << 10];

static void end(const char *why)
{
	perror(why);
	exit(1);
}

static struct sockaddr_in at(const char *address, const char *port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
	if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
		end(address);
	return to;
}

static void quick(int fd)
{
	int on = 1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// Serves connections, each by a process of its own, for ever.
static void serve(const char *port, int echo)
{
	struct sockaddr_in here = at("0.0.0.0", port);
	int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	signal(SIGCHLD, SIG_IGN);
	if (bind(listener, (void *)&here, sizeof here) || listen(listener, 8))
		end("listen");
	for (;;) {
		ssize_t count;
		int fd = accept(listener, NULL, NULL);
		if (fd < 0)
			end("accept");
		if (fork()) {
			close(fd);
			continue;
		}
		quick(fd);
		while ((count = read(fd, bytes, sizeof bytes)) > 0)
			if (echo && write(fd, bytes, count) != count)
				break;
		if (!echo && write(fd, "", 1) != 1)
			perror("answer");
		exit(0);
	}
}

static int dial(const char *address, const char *port)
{
	struct sockaddr_in there = at(address, port);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(fd, (void *)&there, sizeof there))
		end("connect");
	quick(fd);
	return fd;
}

static void transfer(int fd, long long left)
{
	while (left > 0) {
		size_t part = left < (long long)sizeof bytes ? left : sizeof bytes;
		ssize_t count = write(fd, bytes, part);
		if (count <= 0)
			end("write");
		left -= count;
	}
	shutdown(fd, SHUT_WR);
	if (read(fd, bytes, 1) != 1)
		end("answer");
}

static int many(const char *address, const char *port, long long left)
{
	long long begun = now();
	for (int i = 0; i < 8; i++)
		if (!fork()) {
			transfer(dial(address, port), left / 8);
			exit(0);
		}
	for (int status; wait(&status) > 0;)
		if (status)
			return 1;
	printf("%lld\n", now() - begun);
	return 0;
}

static void ask(int fd, long long count)
{
	while (count-- > 0)
		if (write(fd, "", 1) != 1 || read(fd, bytes, 1) != 1)
			end("ask");
}

// The first steps of a VM: its interface, and both services.
static void boot(void)
{
	static char line[4096], address[16];
	struct ifreq set = { .ifr_name = "eth0" };
	struct sockaddr_in *to = (void *)&set.ifr_addr;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	FILE *file;
	mount("proc", "/proc", "proc", 0, NULL);
	file = fopen("/proc/cmdline", "r");
	if (!file || !fgets(line, sizeof line, file) || !strstr(line, "net="))
		end("net=");
	sscanf(strstr(line, "net="), "net=%15[0-9.]", address);
	*to = at(address, "0");
	if (ioctl(fd, SIOCSIFADDR, &set))
		end("address");
	*to = at("255.255.255.0", "0");
	ioctl(fd, SIOCSIFNETMASK, &set);
	set.ifr_flags = IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &set))
		end("up");
	printf("READY\n");
	fflush(stdout);
	if (fork())
		serve("1", 1);
	serve("2", 0);
}

int main(int given, char **words)
{
	if (getpid() == 1 && given == 1)
		boot();
	if (given == 3)
		serve(words[2], !strcmp(words[1], "echo"));
	if (given != 5) {
		fprintf(stderr, "usage: net sink|echo PORT, net send|many|ask ADDRESS PORT COUNT\n");
		return 2;
	}
	if (!strcmp(words[1], "many"))
		return many(words[2], words[3], atoll(words[4]));
	int fd = dial(words[2], words[3]);
	int asks = !strcmp(words[1], "ask");
	// The first exchange wakes what sleeps; of a sink only the connection does.
	if (asks)
		ask(fd, 10);
	long long begun = now(), count = atoll(words[4]);
	if (asks)
		ask(fd, count);
	else
		transfer(fd, count);
	printf("%lld\n", now() - begun);
	return 0;
}

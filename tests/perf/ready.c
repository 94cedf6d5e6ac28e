/* PID 1 of the guest whose start is measured: says READY on the console and resets the machine.
 * With the argument "hold" (from the kernel's command line) it stays instead, to be looked at. */
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

int main(int count, char **arguments)
{
	static const char ready[] = "READY\n";
	mount("dev", "/dev", "devtmpfs", 0, 0);
	int console = open("/dev/console", O_RDWR);
	if (console < 0 || write(console, ready, sizeof ready - 1) < 0)
		return 1;
	tcdrain(console);
	if (count > 1 && !strcmp(arguments[1], "hold"))
		for (;;)
			pause();
	sync();
	reboot(RB_AUTOBOOT);
	return 1;
}

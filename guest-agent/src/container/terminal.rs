//! A process's terminal: a pair of pseudo-terminals (pty(7)) of the container's own devpts. The
//! stage makes it, in the container's mount namespace; the agent gets the master.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use serde::{Deserialize, Serialize};

use crate::mount::{self, Attributes, Missing, NO_EXEC, NO_SUID, Root};

/// What makes terminals in a container.
const MULTIPLEXER: &str = "/dev/pts/ptmx";
/// File system type of devpts, linux/magic.h.
const DEVPTS: i64 = 0x1cd1;
/// Major and minor number of the multiplexer, Documentation/admin-guide/devices.txt.
const PTMX: (u32, u32) = (5, 2);

/// A terminal's size in characters. Zero means unknown, as ioctl_tty(2) has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    columns: u16,
    rows: u16,
}

impl Size {
    /// Takes numbers up to 65535.
    pub fn new(columns: u32, rows: u32) -> Result<Self, String> {
        let number = |count: u32| {
            u16::try_from(count).map_err(|_| format!("a terminal has no {count} columns or rows"))
        };
        Ok(Self {
            columns: number(columns)?,
            rows: number(rows)?,
        })
    }

    /// Gives a terminal this size; its foreground processes are told.
    pub fn apply(self, terminal: BorrowedFd<'_>) -> io::Result<()> {
        let size = Winsize {
            ws_row: self.rows,
            ws_col: self.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(terminal, size)?)
    }
}

/// Both ends of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The agent's.
    pub master: OwnedFd,
    /// The process's.
    pub slave: OwnedFd,
}

impl Terminal {
    /// Makes a terminal for this process, the leader of a session without one, and makes it the
    /// session's.
    pub fn open(size: Size) -> io::Result<Self> {
        // Whatever the container has put there must not hold the stage up.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let master = rustix::fs::open(MULTIPLEXER, flags, Mode::empty())
            .map_err(|error| io::Error::other(format!("{MULTIPLEXER}: {error}")))?;
        let device = rustix::fs::fstat(&master)?.st_rdev;
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        if device != PTMX || rustix::fs::fstatfs(&master)?.f_type != DEVPTS {
            let what = format!("{MULTIPLEXER} is not the multiplexer of a devpts");
            return Err(io::Error::other(what));
        }
        rustix::pty::unlockpt(&master)?;
        // Not by its path, which is the container's.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        size.apply(slave.as_fd())?;
        rustix::process::ioctl_tiocsctty(&slave)?;
        Ok(Self { master, slave })
    }

    /// Shows it as the container's console. config-linux.md "Default Devices": "`/dev/console` is
    /// set up if `terminal` is enabled in the config by bind mounting the pseudoterminal pty to
    /// `/dev/console`."
    pub fn show_as_console(&self) -> io::Result<()> {
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let target = Root::new(root).find_or_make("/dev/console", Missing::File)?;
        let copy = mount::bind_descriptor(self.slave.as_fd(), false)?;
        let quiet = Attributes {
            set: NO_EXEC | NO_SUID,
            clear: 0,
        };
        mount::change(copy.as_fd(), quiet, false)?;
        mount::attach(copy.as_fd(), target.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_beyond_the_kernels_numbers_is_refused() {
        assert!(Size::new(80, 25).is_ok() && Size::new(0, 65_535).is_ok());
        assert!(Size::new(65_536, 25).is_err());
    }
}

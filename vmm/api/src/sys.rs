//! Starting a process with descriptors of our choice.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io::{Error, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::null_mut;

/// Runs `program`, without arguments and environment, in a session of its own. It inherits the
/// standard three and `files`, each under the number that comes with it; these numbers are below
/// the files' own. Returns its process id.
///
/// Nothing of this process is copied for that, however large it is: the child borrows its memory
/// until it executes the program (posix_spawn(3)).
pub fn spawn(program: &CStr, files: &[(OwnedFd, i32)]) -> Result<i32> {
    let mut attributes = Attributes::new()?;
    let mut actions = Actions::new()?;
    for (file, number) in files {
        actions.inherit(file, *number)?;
    }
    let arguments = [program.as_ptr().cast_mut(), null_mut()];
    let environment = [null_mut()];
    let mut pid = 0;
    // SAFETY: all pointers are to values that live to the end of the call; the arrays end with a
    // null pointer.
    check(unsafe {
        libc::posix_spawn(
            &mut pid,
            program.as_ptr(),
            actions.0.as_ptr(),
            attributes.0.as_mut_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
        )
    })?;
    Ok(pid)
}

struct Attributes(MaybeUninit<libc::posix_spawnattr_t>);

impl Attributes {
    /// A new session; no signal blocked, and those that Rust programs ignore as usual.
    fn new() -> Result<Self> {
        let mut this = Self(MaybeUninit::uninit());
        let mut none = MaybeUninit::uninit();
        let mut usual = MaybeUninit::uninit();
        let flags = libc::POSIX_SPAWN_SETSID
            | libc::POSIX_SPAWN_SETSIGMASK as i16
            | libc::POSIX_SPAWN_SETSIGDEF as i16;
        // SAFETY: init makes the value whole before anything else reads it, and if it fails the
        // value is forgotten without a drop. The signal sets are filled before they are used.
        unsafe {
            if let Err(error) = check(libc::posix_spawnattr_init(this.0.as_mut_ptr())) {
                std::mem::forget(this);
                return Err(error);
            }
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigemptyset(usual.as_mut_ptr());
            libc::sigaddset(usual.as_mut_ptr(), libc::SIGPIPE);
            check(libc::posix_spawnattr_setsigmask(
                this.0.as_mut_ptr(),
                none.as_ptr(),
            ))?;
            check(libc::posix_spawnattr_setsigdefault(
                this.0.as_mut_ptr(),
                usual.as_ptr(),
            ))?;
            check(libc::posix_spawnattr_setflags(this.0.as_mut_ptr(), flags))?;
        }
        Ok(this)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: a value that is dropped was made whole.
        unsafe {
            libc::posix_spawnattr_destroy(self.0.as_mut_ptr());
        }
    }
}

struct Actions(MaybeUninit<libc::posix_spawn_file_actions_t>);

impl Actions {
    fn new() -> Result<Self> {
        let mut this = Self(MaybeUninit::uninit());
        // SAFETY: as for the attributes.
        match check(unsafe { libc::posix_spawn_file_actions_init(this.0.as_mut_ptr()) }) {
            Ok(()) => Ok(this),
            Err(error) => {
                std::mem::forget(this);
                Err(error)
            }
        }
    }

    fn inherit(&mut self, file: &OwnedFd, number: i32) -> Result<()> {
        let from = file.as_raw_fd();
        // SAFETY: the value was made whole; numbers are copied into it.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(self.0.as_mut_ptr(), from, number) })
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: a value that is dropped was made whole.
        unsafe {
            libc::posix_spawn_file_actions_destroy(self.0.as_mut_ptr());
        }
    }
}

/// These calls return their error.
fn check(error: i32) -> Result<()> {
    if error == 0 {
        Ok(())
    } else {
        Err(Error::from_raw_os_error(error))
    }
}

//! System calls that rustix does not offer, or offers as unsafe only.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// Turns the -1 of a system call into its error.
fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// One instruction of a classic BPF program.
pub type Instruction = libc::sock_filter;

/// Splits a process that has one thread only. `None` in the child.
///
/// The stage calls it, never the agent itself: see [`crate::container::stage`].
pub fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the caller has a single thread, so no lock of another one is lost in the child.
    let pid = unsafe { libc::fork() };
    Ok(match checked(pid.into())? {
        0 => None,
        _ => Some(pid),
    })
}

/// unshare(2) of `CLONE_NEW*` flags.
pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: only namespace flags come here; they change no memory and no descriptor.
    checked(unsafe { libc::unshare(flags) }.into()).map(drop)
}

/// setns(2) into the namespaces of a pidfd, or of a namespace's own descriptor.
pub fn enter(descriptor: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: a plain call on a descriptor that lives until it returns.
    checked(unsafe { libc::setns(descriptor.as_raw_fd(), flags) }.into()).map(drop)
}

/// Strings as execve(2) takes them.
pub struct Strings {
    /// What the pointers point into.
    _strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl Strings {
    /// Those that hold no NUL.
    pub fn new(strings: &[String]) -> Self {
        let strings: Vec<CString> = strings
            .iter()
            .filter_map(|string| CString::new(string.as_str()).ok())
            .collect();
        let pointers = strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Self {
            _strings: strings,
            pointers,
        }
    }
}

/// execve(2), with no other system call. Comes back only with an error.
pub fn execute(path: &CStr, arguments: &Strings, environment: &Strings) -> io::Error {
    // SAFETY: both arrays end with a null pointer and, as the strings they point into, outlive
    // the call.
    unsafe {
        libc::execve(
            path.as_ptr(),
            arguments.pointers.as_ptr(),
            environment.pointers.as_ptr(),
        )
    };
    io::Error::last_os_error()
}

/// Marks every descriptor from `first` on to be closed by execve(2).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: sets a flag; no descriptor is closed now.
    checked(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

/// Has the event loop watch a descriptor.
pub fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor moves in, so it stays the same and open as long as it is watched.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

/// Has all threads of this process allocate from one heap, made before the first of them. With one
/// for each, as is usual, what lives long is spread over all, and none of them can shrink. Large
/// pieces are mapped by themselves always, and so given back: left alone, the allocator takes the
/// first that is freed as a reason to have the next ones of that size on the heap (mallopt(3)).
pub fn use_one_heap() {
    // SAFETY: sets numbers of the allocator's; no other thread is there to use them meanwhile.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Blocks SIGCHLD in this and all later threads and returns a descriptor that tells of it.
pub fn watch_children() -> io::Result<OwnedFd> {
    // SAFETY: `set` is initialised by sigemptyset before use; the descriptor is new and ours.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        checked(libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()).into())?;
        let descriptor = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        checked(descriptor.into())?;
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

/// Gives every signal its default action and an empty mask, as a new program expects.
pub fn reset_signals() {
    // SAFETY: SIG_DFL installs no code; `set` is initialised by sigemptyset.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Sends a signal to the process of a pidfd.
pub fn signal_process(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a plain call; a null siginfo is allowed.
    checked(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// kill(2); a negative `pid` is a process group.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: a plain call.
    checked(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// mount_setattr(2) on the mount `mount` names, with all below it when `recursive`.
/// `propagation` is 0 or one of `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`.
pub fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation,
        userns_fd: 0,
    };
    change_mount(mount, recursive, attributes)
}

/// Has a mount that is not in place yet show the ids of a user namespace: what belongs to 0 on the
/// file system belongs to the namespace's root.
pub fn map_mount_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user_namespace.as_raw_fd()).unwrap_or(u64::MAX),
    };
    change_mount(mount, false, attributes)
}

/// Has what this thread makes belong to others, without losing a capability by it.
pub fn make_files_of(user: u32, group: u32) -> io::Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: plain calls; the ids are this thread's own.
    unsafe {
        checked(libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0).into())?;
        // They answer the old ids, also when they fail.
        libc::setfsuid(user);
        libc::setfsgid(group);
    }
    Ok(())
}

/// Has this thread, and no other, act as `user`.
pub fn act_as(user: u32) -> io::Result<()> {
    const SAME: libc::c_long = -1;
    // SAFETY: a plain call; not the library's, which would change all threads.
    checked(unsafe { libc::syscall(libc::SYS_setresuid, SAME, libc::c_long::from(user), SAME) })
        .map(drop)
}

fn change_mount(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attributes` and the empty path outlive the call; its size is given.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &attributes,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// Puts a seccomp filter with `SECCOMP_FILTER_FLAG_*` over this process and all it will start.
/// Needs CAP_SYS_ADMIN or no_new_privs.
pub fn install_filter(program: &[Instruction], flags: u32) -> io::Result<()> {
    let length =
        u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter` and writes nothing.
    checked(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &program,
        )
    })
    .map(drop)
}

/// A new stream socket of AF_VSOCK whose connect to `port` of `cid` has begun: it is writable
/// once that is over, see [`connect_error`].
pub fn begin_vsock_connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the descriptor is new and ours; the address is zeroed plain data of its own size.
    unsafe {
        let descriptor = libc::socket(libc::AF_VSOCK, kind, 0);
        checked(descriptor.into())?;
        let socket = OwnedFd::from_raw_fd(descriptor);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = cid;
        address.svm_port = port;
        let result = libc::connect(
            descriptor,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        );
        match checked(result.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(socket),
        }
    }
}

/// Lets a mounted ext4 fill `blocks` blocks of its device (EXT4_IOC_RESIZE_FS).
pub fn grow_ext4(root: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // _IOW('f', 16, __u64)
    const RESIZE: libc::c_ulong = 0x4008_6610;
    // SAFETY: the request reads one u64.
    checked(unsafe { libc::ioctl(root.as_raw_fd(), RESIZE, &blocks) }.into()).map(drop)
}

/// Makes a directory, and what will be made in it, count for quota project `project`.
pub fn set_project(directory: BorrowedFd<'_>, project: u32) -> io::Result<()> {
    // _IOW('X', 32, struct fsxattr)
    const SET_ATTRIBUTES: libc::c_ulong = 0x401c_5820;
    const INHERIT: u32 = 0x200;
    /// `struct fsxattr` of include/uapi/linux/fs.h.
    #[repr(C)]
    struct Attributes {
        flags: u32,
        extent_size: u32,
        extents: u32,
        project: u32,
        copy_extent_size: u32,
        padding: [u8; 8],
    }
    let attributes = Attributes {
        flags: INHERIT,
        extent_size: 0,
        extents: 0,
        project,
        copy_extent_size: 0,
        padding: [0; 8],
    };
    // SAFETY: the request reads one structure of this shape.
    let set = unsafe { libc::ioctl(directory.as_raw_fd(), SET_ATTRIBUTES, &attributes) };
    checked(set.into()).map(drop)
}

/// The bytes and inodes of quota project `project` on the file system of `directory`.
pub fn project_usage(directory: BorrowedFd<'_>, project: u32) -> io::Result<(u64, u64)> {
    // QCMD(Q_GETQUOTA, PRJQUOTA)
    const GET: libc::c_uint = 0x8000_0702;
    /// `struct if_dqblk` of include/uapi/linux/quota.h.
    #[repr(C)]
    #[derive(Default)]
    struct Quota {
        block_limits: [u64; 2],
        bytes: u64,
        inode_limits: [u64; 2],
        inodes: u64,
        times: [u64; 2],
        valid: u32,
    }
    let mut quota = Quota::default();
    // SAFETY: the call writes one structure of this shape.
    let got = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            directory.as_raw_fd(),
            GET,
            project,
            &mut quota,
        )
    };
    checked(got).map(|_| (quota.bytes, quota.inodes))
}

/// Feeds `entropy` (at most 512 bytes) to the random generator and makes it use it at once.
pub fn feed_random(device: BorrowedFd<'_>, entropy: &[u8]) -> io::Result<()> {
    const ADD: libc::c_ulong = 0x4008_5203;
    const RESEED: libc::c_ulong = 0x5207;
    const MOST: usize = 512;
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        length: libc::c_int,
        bytes: [u8; MOST],
    }
    let mut pool = Pool {
        bits: 0,
        length: 0,
        bytes: [0; MOST],
    };
    for (to, from) in pool.bytes.iter_mut().zip(entropy) {
        *to = *from;
        pool.length += 1;
        pool.bits += 8;
    }
    // SAFETY: `pool` has the layout of rand_pool_info with `length` valid bytes behind it.
    unsafe {
        checked(libc::ioctl(device.as_raw_fd(), ADD, &pool).into())?;
        checked(libc::ioctl(device.as_raw_fd(), RESEED).into())?;
    }
    Ok(())
}

/// Lets the kernel take ended children: nobody waits for them.
pub fn ignore_children() {
    // SAFETY: SIG_IGN installs no code.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Waits for a signal.
pub fn sleep_for_ever() {
    // SAFETY: a plain call.
    unsafe { libc::pause() };
}

/// Closes every descriptor from `first` on. Only for a process that uses none of them any more.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the caller owns no descriptor that it will use or close again.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Loads a BPF program of type CGROUP_DEVICE, its instructions as in struct bpf_insn, and attaches it
/// to a cgroup, beside those of the groups above: all of them must allow an access. It goes with the
/// group.
pub fn attach_device_program(group: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    const LOAD: libc::c_int = 5;
    const ATTACH: libc::c_int = 8;
    const CGROUP_DEVICE_PROGRAM: u32 = 15;
    const CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    // The first members of union bpf_attr for each command; the kernel takes the rest as zero.
    #[repr(C)]
    struct Load {
        kind: u32,
        length: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    #[repr(C)]
    struct Attach {
        target: libc::c_int,
        program: libc::c_int,
        kind: u32,
        flags: u32,
    }
    let license = c"Apache-2.0";
    let load = Load {
        kind: CGROUP_DEVICE_PROGRAM,
        length: u32::try_from(program.len())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: program and license outlive the call, which copies them; the size is the struct's. The
    // descriptor is new and ours.
    let program = unsafe {
        let program = libc::syscall(libc::SYS_bpf, LOAD, &raw const load, size_of::<Load>());
        OwnedFd::from_raw_fd(checked(program)? as libc::c_int)
    };
    let attach = Attach {
        target: group.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: both descriptors live until the call returns; the size is the struct's.
    checked(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    })
    .map(drop)
}

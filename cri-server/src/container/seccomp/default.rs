//! The default list: what the container engines' default profile allows, as of 2026.
//!
//! Everything that is not on it fails with EPERM. It has what programs use and leaves out what acts
//! on the kernel as a whole, what has no use within a container, and what has been a way out of
//! containers. What a capability permits is on it for those who may get that capability.
//!
//! To be held against moby's and containerd's profile when the guest's kernel gets new calls.

use std::collections::HashSet;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};

use crate::container::spec::SpecError;

/// On the list for everybody. Names of 32-bit programs' calls are there too.
const ALWAYS: &[&str] = &[
    // Files: open, read and write.
    "close close_range copy_file_range creat dup dup2 dup3 fadvise64 fadvise64_64 fallocate fcntl \
     fcntl64 fdatasync flock fsync ftruncate ftruncate64 ioctl _llseek lseek open openat openat2 \
     pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv sendfile sendfile64 \
     splice sync sync_file_range syncfs tee truncate truncate64 vmsplice write writev cachestat",
    // Files: names, owners and times.
    "access chdir chmod chown chown32 faccessat faccessat2 fchdir fchmod fchmodat fchmodat2 fchown \
     fchown32 fchownat fstat fstat64 fstatat64 fstatfs fstatfs64 futimesat getcwd getdents \
     getdents64 lchown lchown32 link linkat listmount lstat lstat64 mkdir mkdirat mknod mknodat \
     name_to_handle_at newfstatat readlink readlinkat rename renameat renameat2 rmdir stat stat64 \
     statfs statfs64 statmount statx symlink symlinkat umask unlink unlinkat utime utimensat \
     utimensat_time64 utimes",
    // Files: extended attributes, notification, landlock.
    "fanotify_mark fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat \
     inotify_add_watch inotify_init inotify_init1 inotify_rm_watch landlock_add_rule \
     landlock_create_ruleset landlock_restrict_self lgetxattr listxattr listxattrat llistxattr \
     lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat",
    // Waiting on many descriptors, and asynchronous input and output. Not io_uring: its rings make
    // calls that no filter sees.
    "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
     epoll_wait_old eventfd eventfd2 io_cancel io_destroy io_getevents io_pgetevents \
     io_pgetevents_time64 io_setup io_submit _newselect poll ppoll ppoll_time64 pselect6 \
     pselect6_time64 select signalfd signalfd4",
    // Pipes, sockets (socket itself is below) and System V and POSIX IPC.
    "accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr \
     mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 \
     mq_unlink msgctl msgget msgrcv msgsnd pipe pipe2 recv recvfrom recvmmsg recvmmsg_time64 \
     recvmsg semctl semget semop semtimedop semtimedop_time64 send sendmmsg sendmsg sendto \
     setsockopt shmat shmctl shmdt shmget shutdown socketcall socketpair",
    // Memory. Not userfaultfd and the calls that move pages of others.
    "brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 \
     mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free \
     pkey_mprotect process_mrelease remap_file_pages",
    // Processes and threads; clone and clone3 are below.
    "arch_prctl execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait \
     futex_waitv futex_wake get_robust_list get_thread_area getcpu getpgid getpgrp getpid getppid \
     getsid gettid modify_ldt pidfd_open prctl ptrace process_vm_readv process_vm_writev \
     restart_syscall rseq seccomp set_robust_list set_thread_area set_tid_address setpgid setsid \
     uretprobe vfork wait4 waitid waitpid",
    // Signals.
    "kill pause pidfd_send_signal rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo \
     rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo \
     sigaltstack sigprocmask sigreturn tgkill tkill",
    // Users and groups: whoever lacks the capability fails by that.
    "capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 \
     getresgid getresgid32 getresuid getresuid32 getuid getuid32 setfsgid setfsgid32 setfsuid \
     setfsuid32 setgid setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 \
     setresuid setresuid32 setreuid setreuid32 setuid setuid32",
    // Limits, priorities and scheduling.
    "getpriority getrlimit getrusage ioprio_get ioprio_set prlimit64 sched_get_priority_max \
     sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler \
     sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr \
     sched_setparam sched_setscheduler sched_yield setpriority setrlimit ugetrlimit",
    // Clocks and timers. Setting the clock by adjtimex needs CAP_SYS_TIME, reading does not.
    "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
     clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep \
     setitimer time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 \
     timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 \
     timerfd_settime timerfd_settime64 times",
    // The system.
    "getrandom sysinfo uname",
];

/// On the list for those whose bounding set has the capability.
const WITH: [(Capability, &str); 14] = [
    (Capability::DacReadSearch, "open_by_handle_at"),
    // Mounting, namespaces (with all of clone and clone3) and what else this one is needed for.
    (
        Capability::SysAdmin,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie \
         lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog \
         umount umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (
        Capability::SysModule,
        "delete_module finit_module init_module",
    ),
    (Capability::SysPacct, "acct"),
    (
        Capability::SysPtrace,
        "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",
    ),
    (Capability::SysRawio, "ioperm iopl"),
    (
        Capability::SysTime,
        "clock_settime clock_settime64 settimeofday stime",
    ),
    (Capability::SysTtyConfig, "vhangup"),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (Capability::Syslog, "syslog"),
    (Capability::Bpf, "bpf"),
    (Capability::Perfmon, "perf_event_open"),
];

/// Address families from 12 on that sockets may have; below that all may. Left out are those
/// nobody has had a use for since (DECnet, IrDA, …), AF_ALG (38), which is the kernel's
/// cryptography, and AF_VSOCK (40), which is the way to the host.
const FAMILIES: [u64; 25] = [
    13, 14, 15, 16, 17, 18, 21, 22, 24, 26, 27, 28, 29, 30, 31, 32, 33, 35, 36, 39, 41, 42, 43, 44,
    45,
];

/// personality(2): PER_LINUX, PER_LINUX32, each also with UNAME26, and "only ask". Others switch
/// off protections such as the random layout of memory.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// CLONE_NEW* of mount, cgroup, UTS, IPC, user, PID and network namespaces.
const NAMESPACES: u64 = 0x7e02_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The profile for a container with this bounding set.
pub fn profile(bounding: &HashSet<Capability>) -> Result<LinuxSeccomp, SpecError> {
    let mut rules = vec![allow(&ALWAYS.join(" "))];
    let granted = WITH.iter().filter(|(needed, _)| bounding.contains(needed));
    rules.extend(granted.map(|(_, names)| allow(names)));

    let condition = LinuxSeccompArgBuilder::default;
    let below = condition()
        .op(LinuxSeccompOperator::ScmpCmpLt)
        .value(12_u64);
    rules.push(when("socket", below)?);
    for family in FAMILIES {
        rules.push(when("socket", condition().value(family))?);
    }
    for personality in PERSONALITIES {
        rules.push(when("personality", condition().value(personality))?);
    }
    if !bounding.contains(&Capability::SysAdmin) {
        // Of clone the flags are an argument.
        let none = condition()
            .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
            .value(NAMESPACES)
            .value_two(0_u64);
        rules.push(when("clone", none)?);
        // Of clone3 they lie in memory, which a filter does not see. C libraries fall back to clone
        // when there is no clone3, but not when it is forbidden.
        let mut missing = LinuxSyscall::default();
        missing
            .set_names(vec!["clone3".to_owned()])
            .set_action(LinuxSeccompAction::ScmpActErrno)
            .set_errno_ret(Some(ENOSYS));
        rules.push(missing);
    }

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(vec![
            Arch::ScmpArchX86_64,
            Arch::ScmpArchX86,
            Arch::ScmpArchX32,
        ]))
        .set_syscalls(Some(rules));
    Ok(profile)
}

fn allow(names: &str) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.split_whitespace().map(str::to_owned).collect())
        .set_action(LinuxSeccompAction::ScmpActAllow);
    rule
}

/// Allows a call by its first argument, which is compared for equality unless said otherwise.
fn when(name: &str, condition: LinuxSeccompArgBuilder) -> Result<LinuxSyscall, SpecError> {
    let condition = condition.build().map_err(|error| SpecError::Invalid {
        field: super::FIELD,
        reason: error.to_string(),
    })?;
    let mut rule = allow(name);
    rule.set_args(Some(vec![condition]));
    Ok(rule)
}

//! The agent called anew, to become a process of a container.
//!
//! A process of a container is not forked off the agent, which has threads, but is a new call of
//! its program with one thread. In order:
//! 1. receive the plan; join the cgroup; join or make the PID namespace;
//! 2. fork: the first process tells the child's number and ends, so that the child falls to
//!    PID 1, which is the agent;
//! 3. the child makes or joins the other namespaces, makes the root, enters the pod's user
//!    namespace, takes on user, limits and capabilities, says that it is ready and waits;
//! 4. when told to, it puts the filters on and execs the program; a failure is told, a success
//!    closes the socket.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::CapabilitySet;

use crate::container::message::{self, Message};
use crate::container::plan::{Place, Plan, Program};
use crate::container::seccomp::{self, Filter};
use crate::container::terminal::Terminal;
use crate::container::{capability, rootfs, user};
use crate::sys;

/// Why a process does not come to be, as a sentence.
#[derive(Debug, thiserror::Error)]
enum StageError {
    #[error("cannot {what}: {source}")]
    Step { what: String, source: io::Error },
    #[error(transparent)]
    Tree(#[from] rootfs::TreeError),
    #[error("{0}")]
    Program(String),
    /// fork(2): EAGAIN.
    #[error(
        "there is no room for another process: the container, or its pod, has as many as its \
         pids.max allows"
    )]
    Full,
    #[error("the agent is gone")]
    Alone,
}

fn step<T, E: Into<io::Error>>(what: &str, done: Result<T, E>) -> Result<T, StageError> {
    done.map_err(|source| StageError::Step {
        what: what.to_owned(),
        source: source.into(),
    })
}

/// Exit status of a process whose program never ran.
const NEVER_RAN: u8 = 128;

/// Soft and hard limit of descriptors where none is told: Linux's own.
const DESCRIPTORS: (u64, u64) = (1024, 4096);

/// The stage's `main`. Standard input is the socket to the agent.
pub fn main() -> ExitCode {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    if let Err(error) = run(socket.as_fd()) {
        let failed = match error {
            StageError::Full => Message::Full(error.to_string()),
            other => Message::Failed(other.to_string()),
        };
        let _ = message::send(socket.as_fd(), &failed, &[]);
        return ExitCode::from(NEVER_RAN);
    }
    ExitCode::SUCCESS
}

/// Descriptors that come with the plan.
struct Given {
    plan: Plan,
    /// `None`: a terminal is to be made.
    pipes: Option<[OwnedFd; 3]>,
    /// The user namespace to end in, and those of network, IPC and host name to join.
    apart: Option<[OwnedFd; 4]>,
    /// A PID namespace or a process to join.
    other: Option<OwnedFd>,
}

fn run(socket: BorrowedFd<'_>) -> Result<(), StageError> {
    // Nobody who shares the PID namespace may look into this process before its exec.
    step(
        "hide the process's memory",
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;
    let given = receive(socket)?;
    let program = &given.plan.program;
    step(
        "set oom_score_adj",
        fs::write(
            "/proc/self/oom_score_adj",
            program.oom_score_adj.to_string(),
        ),
    )?;
    let procs = format!("{}/cgroup.procs", given.plan.cgroup);
    step("join the container's cgroup", fs::write(procs, "0"))?;
    if let Some([_, network, ipc, uts]) = &given.apart {
        for (namespace, kind) in [
            (network, libc::CLONE_NEWNET),
            (ipc, libc::CLONE_NEWIPC),
            (uts, libc::CLONE_NEWUTS),
        ] {
            let joined = sys::enter(namespace.as_fd(), kind);
            step("join the pod's namespaces", joined)?;
        }
    }
    let other = given.other.as_ref().map(AsFd::as_fd);
    match (&given.plan.place, other) {
        (
            Place::New {
                shared_pids: false, ..
            },
            _,
        ) => {
            step("make a PID namespace", sys::unshare(libc::CLONE_NEWPID))?;
        }
        (Place::New { .. }, Some(namespace)) => {
            step(
                "join the PID namespace",
                sys::enter(namespace, libc::CLONE_NEWPID),
            )?;
        }
        (Place::Beside, Some(process)) => {
            let all = libc::CLONE_NEWNS | libc::CLONE_NEWPID;
            step("join the container's namespaces", sys::enter(process, all))?;
            // The group is this process's own, below the container's: seen from inside it is the
            // root as the container's own processes see theirs.
            step(
                "make a cgroup namespace",
                sys::unshare(libc::CLONE_NEWCGROUP),
            )?;
        }
        (_, None) => return Err(StageError::Program("a descriptor is missing".into())),
    }
    match message::fork_and_tell(socket) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Err(StageError::Full),
        forked => {
            if step("fork", forked)? {
                become_process(socket, given)?;
            }
        }
    }
    Ok(())
}

fn receive(socket: BorrowedFd<'_>) -> Result<Given, StageError> {
    let (message, descriptors) =
        step("receive the plan", message::receive(socket))?.ok_or(StageError::Alone)?;
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        descriptors
            .next()
            .ok_or_else(|| StageError::Program("a descriptor is missing".into()))
    };
    if message != Message::Plan {
        return Err(StageError::Program("the agent sent no plan".into()));
    }
    let mut json = Vec::new();
    step(
        "read the plan",
        fs::File::from(next()?).read_to_end(&mut json),
    )?;
    let plan: Plan = step(
        "read the plan",
        serde_json::from_slice(&json).map_err(io::Error::from),
    )?;
    let pipes = match plan.program.terminal {
        None => Some([next()?, next()?, next()?]),
        Some(_) => None,
    };
    let apart = match plan.mapping {
        Some(_) => Some([next()?, next()?, next()?, next()?]),
        None => None,
    };
    Ok(Given {
        plan,
        pipes,
        apart,
        other: descriptors.next(),
    })
}

fn become_process(socket: BorrowedFd<'_>, given: Given) -> Result<(), StageError> {
    let Given {
        plan,
        pipes,
        apart,
        other,
    } = given;
    let program = &plan.program;
    drop(other);
    let users = apart.as_ref().map(|[users, ..]| users.as_fd());
    step("begin a session", rustix::process::setsid())?;
    if let Place::New { tree, .. } = &plan.place {
        let own = libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP;
        step("make namespaces", sys::unshare(own))?;
        if let Some(mapping) = &plan.mapping {
            let made = sys::make_files_of(mapping.user(0), mapping.group(0));
            step("make files of the container's root", made)?;
        }
        rootfs::enter(tree, &program.directory, users)?;
    }
    enter_directory(&program.directory)?;
    let terminal = match program.terminal {
        Some(size) => Some(step("open a terminal", Terminal::open(size))?),
        None => None,
    };
    if let (Some(terminal), Place::New { .. }) = (&terminal, &plan.place) {
        step("make /dev/console", terminal.show_as_console())?;
    }
    match (&terminal, &pipes) {
        (Some(terminal), _) => take_stdio([&terminal.slave; 3], &plan)?,
        (None, Some([stdin, stdout, stderr])) => take_stdio([stdin, stdout, stderr], &plan)?,
        (None, None) => return Err(StageError::Program("a descriptor is missing".into())),
    }
    // The agent has its own, which it has raised.
    let (soft, hard) = DESCRIPTORS;
    limit(Resource::Nofile as u32, soft, hard)?;
    for (resource, soft, hard) in &program.limits {
        limit(*resource, *soft, *hard)?;
    }
    // For a process that is told none.
    let home = user::home("/", program.uid).unwrap_or_else(|| "/".into());
    if let Some(users) = users {
        // Last of the namespaces: what is made until here needs the guest's root. Those of mounts
        // and cgroups once more, so that they are the user namespace's and its root may use them.
        let mut again = libc::CLONE_NEWCGROUP;
        if let Place::New { .. } = &plan.place {
            again |= libc::CLONE_NEWNS;
        }
        let entered = sys::enter(users, libc::CLONE_NEWUSER).and_then(|()| sys::unshare(again));
        step("enter the pod's user namespace", entered)?;
    }
    drop(apart);
    take_user(program)?;
    let master: Vec<_> = terminal.iter().map(|both| both.master.as_fd()).collect();
    step(
        "send that it is ready",
        message::send(socket, &Message::Ready, &master),
    )?;
    drop(terminal);
    match step("wait for the start", message::receive(socket))? {
        Some((Message::Go, _)) => {}
        _ => return Err(StageError::Alone),
    }
    // The socket is one of these: that it closes is how the agent learns of success.
    step("mark descriptors", sys::close_on_exec_from(3))?;
    sys::reset_signals();
    Err(execute(program, home, plan.filter.as_ref()))
}

/// A directory outside the root (reached through a descriptor left open, say) is refused:
/// getcwd(2) shows such a one with a prefix.
fn enter_directory(directory: &str) -> Result<(), StageError> {
    let what = format!("enter the working directory {directory}");
    step(&what, rustix::process::chdir(directory))?;
    let here = step(&what, rustix::process::getcwd(Vec::new()))?;
    if here.as_bytes().first() != Some(&b'/') {
        return Err(StageError::Program(format!(
            "the working directory {directory} lies outside the container's root"
        )));
    }
    Ok(())
}

/// Pipes and terminal become the user's own, so that it can open /dev/stdout again. A terminal
/// keeps its group, which is the devpts's choice.
fn take_stdio(stdio: [&OwnedFd; 3], plan: &Plan) -> Result<(), StageError> {
    let program = &plan.program;
    let (uid, gid) = match &plan.mapping {
        Some(mapping) => (mapping.user(program.uid), mapping.group(program.gid)),
        None => (program.uid, program.gid),
    };
    let owner = Some(Uid::from_raw(uid));
    for end in stdio {
        let kind = step("look at stdio", rustix::fs::fstat(end))?.st_mode;
        let group = match rustix::fs::FileType::from_raw_mode(kind) {
            rustix::fs::FileType::Fifo => Some(Gid::from_raw(gid)),
            _ if program.terminal.is_some() => None,
            // /dev/null, which is everybody's.
            _ => continue,
        };
        let given = rustix::fs::fchown(end, owner, group);
        step("give stdio to the user", given)?;
    }
    let [stdin, stdout, stderr] = stdio;
    step("set stdin", rustix::stdio::dup2_stdin(stdin))?;
    step("set stdout", rustix::stdio::dup2_stdout(stdout))?;
    step("set stderr", rustix::stdio::dup2_stderr(stderr))
}

fn limit(resource: u32, soft: u64, hard: u64) -> Result<(), StageError> {
    const ALL: [Resource; 16] = [
        Resource::Cpu,
        Resource::Fsize,
        Resource::Data,
        Resource::Stack,
        Resource::Core,
        Resource::Rss,
        Resource::Nproc,
        Resource::Nofile,
        Resource::Memlock,
        Resource::As,
        Resource::Locks,
        Resource::Sigpending,
        Resource::Msgqueue,
        Resource::Nice,
        Resource::Rtprio,
        Resource::Rttime,
    ];
    let Some(known) = ALL.get(resource as usize) else {
        return Err(StageError::Program(format!("no resource limit {resource}")));
    };
    let value = |number: u64| (number != u64::MAX).then_some(number);
    let limit = Rlimit {
        current: value(soft),
        maximum: value(hard),
    };
    step(
        &format!("set the limit {known:?}"),
        rustix::process::setrlimit(*known, limit),
    )
}

fn take_user(program: &Program) -> Result<(), StageError> {
    step(
        "bound the capabilities",
        capability::bound(&program.capabilities),
    )?;
    step(
        "keep capabilities",
        rustix::thread::set_keep_capabilities(true),
    )?;
    let groups: Vec<Gid> = program
        .groups
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(program.uid), Gid::from_raw(program.gid));
    step("set the groups", rustix::thread::set_thread_groups(&groups))?;
    step(
        "set the group",
        rustix::thread::set_thread_res_gid(gid, gid, gid),
    )?;
    step(
        "set the user",
        rustix::thread::set_thread_res_uid(uid, uid, uid),
    )?;
    // To put a filter on, either is needed.
    let mut besides = CapabilitySet::SYS_ADMIN;
    if program.no_new_privileges {
        step("set no_new_privs", rustix::thread::set_no_new_privs(true))?;
        besides = CapabilitySet::empty();
    }
    step(
        "set the capabilities",
        capability::take(&program.capabilities, besides),
    )?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(program.umask));
    Ok(())
}

/// Comes back only with the reason of a failure.
///
/// The filters come last: a profile need not allow what the stage does, only what the program does.
/// (Where it forbids sendmsg(2), a failure is not told, and the program ends with 128.)
fn execute(program: &Program, home: String, filter: Option<&Filter>) -> StageError {
    let mut environment = program.environment.clone();
    if !environment
        .iter()
        .any(|variable| variable.starts_with("HOME="))
    {
        environment.push(format!("HOME={home}"));
    }
    let Some(name) = program.arguments.first() else {
        return StageError::Program("no program is named".into());
    };
    let arguments = sys::Strings::new(&program.arguments);
    let environment = sys::Strings::new(&environment);
    let candidates: Vec<(String, CString)> = candidates(name, &program.environment)
        .into_iter()
        .filter_map(|path| Some((path.clone(), CString::new(path).ok()?)))
        .collect();
    if let Err(error) = step("put the seccomp filter on", seccomp::install(filter)) {
        return error;
    }
    let mut worst = None;
    for (path, spelled) in &candidates {
        let error = sys::execute(spelled, &arguments, &environment);
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            // As execvp(3): one that may not be run does not hide a later one that may.
            Some(libc::EACCES) => worst = Some((path, error)),
            _ => return StageError::Program(format!("cannot execute {path}: {error}")),
        }
    }
    StageError::Program(match worst {
        Some((path, error)) => format!("cannot execute {path}: {error}"),
        None if name.contains('/') => {
            format!(
                "cannot execute {name}: {}",
                io::Error::from_raw_os_error(libc::ENOENT)
            )
        }
        None => format!("cannot execute {name}: executable file not found in $PATH"),
    })
}

/// Paths to try for a program, in the order of `PATH`.
fn candidates(name: &str, environment: &[String]) -> Vec<String> {
    const DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    environment
        .iter()
        .rev()
        .find_map(|variable| variable.strip_prefix("PATH="))
        .unwrap_or(DEFAULT)
        .split(':')
        .map(|directory| match directory {
            "" => format!("./{name}"),
            directory => format!("{directory}/{name}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_looked_for_in_the_containers_path() {
        let environment = ["PATH=/a:/b".to_owned(), "X=1".to_owned()];
        assert_eq!(candidates("sh", &environment), ["/a/sh", "/b/sh"]);
        assert_eq!(candidates("./sh", &environment), ["./sh"]);
        assert_eq!(candidates("sh", &[]).last().unwrap(), "/bin/sh");
    }
}

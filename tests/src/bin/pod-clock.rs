//! Measures how a pod starts: this project's server beside Debian's containerd with runc, with the
//! same image, calls and client.
//!
//! `pod-clock RUNS`, where the end-to-end tests could run. Prints one JSON object of nanoseconds at
//! the end, and nothing before: output would disturb the clock.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::log::{self, Stream};
use bulkhead_tests::node::BASE;
use bulkhead_tests::request::{Pod, shell, sleeper};
use bulkhead_tests::server::{Runtime, Server, phase};
use bulkhead_tests::{Cri, Node};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// The servers by their names in the figures.
const RUNTIMES: [(&str, Runtime); 2] = [
    ("bulkhead", Runtime::Bulkhead),
    ("reference", Runtime::Reference),
];

/// How long a container's first word is awaited.
const WORD_LIMIT: Duration = Duration::from_secs(60);

/// Commands of which the mean is taken.
const EXECS: u32 = 5;

/// Moments of one start by their names, nanoseconds after the first call.
type Moments = BTreeMap<&'static str, u64>;

fn main() -> Result<()> {
    println!("{}", measure()?);
    Ok(())
}

fn measure() -> Result<serde_json::Value> {
    let runs = std::env::args().nth(1).context("usage: pod-clock RUNS")?;
    let runs: u32 = runs.parse().context("RUNS is not a number")?;
    let node = Node::open("pod-clock")?;
    let mut servers = Vec::new();
    for (name, runtime) in RUNTIMES {
        let mut plan = node.plan(name);
        plan.runtime = runtime;
        servers.push((name, runtime, plan.start()?));
    }

    let mut figures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for run in 0..=runs {
        // Both in turn, so that a change of the machine's speed meets both alike.
        for (name, runtime, server) in &servers {
            let moments = start(&node, server, *runtime, &format!("{name}-{run}"))
                .with_context(|| format!("{name}, whose log ends:\n{}", server.log_tail()))?;
            // The first run fills caches.
            if run > 0 {
                for (moment, time) in moments {
                    figures
                        .entry(format!("{name} {moment}"))
                        .or_default()
                        .push(time);
                }
            }
        }
    }
    for (_, _, server) in servers {
        server.stop()?;
    }
    Ok(serde_json::to_value(figures)?)
}

/// Starts a pod whose container says a word, and removes it.
fn start(node: &Node, server: &Server, runtime: Runtime, name: &str) -> Result<Moments> {
    let image = node.image_on(&server.cri, BASE)?;
    let config = node.pod_config(name)?;
    let container = shell("first", &image, "echo READY");
    let word = FirstByte::watch(Path::new(&config.log_directory), &container.log_path)?;
    let logged = server.log_length();

    let begun = Instant::now();
    let mut moments = Moments::new();
    let pod = Pod::run(&server.cri, config)?;
    moments.insert("sandbox", nanoseconds(begun.elapsed())?);
    let id = pod.create(&container)?;
    moments.insert("created", nanoseconds(begun.elapsed())?);
    let (started, said) = thread::scope(|scope| {
        let said = scope.spawn(|| word.wait());
        let started = server.cri.start(&id).map(|()| Instant::now());
        (started, said.join())
    });
    let started = started.context("StartContainer")?;
    let said = said.map_err(|_| anyhow::anyhow!("the wait for the first byte panicked"))??;
    moments.insert("started", nanoseconds(started - begun)?);
    moments.insert("first byte", nanoseconds(said - begun)?);

    if runtime == Runtime::Bulkhead {
        let log = server.log_since(logged);
        for name in ["host", "guest", "prepare"] {
            moments.insert(name, phase(&log, name)?);
        }
    }
    expect_word(&server.cri, &pod, &id, &word.log)?;
    moments.extend(further(&server.cri, &pod, &image)?);
    server.remove_pods()?;
    Ok(moments)
}

/// What else is asked of a pod that runs: a second container of the same image, and commands in it.
fn further(cri: &Cri, pod: &Pod<'_>, image: &str) -> Result<Moments> {
    let begun = Instant::now();
    let id = pod.create(&sleeper("second", image))?;
    cri.start(&id)?;
    let second = nanoseconds(begun.elapsed())?;
    let run = || -> Result<()> {
        let reply = cri.exec_for(&id, &["/bin/true"], 0)?;
        ensure!(reply.exit_code == 0, "true: {reply:?}");
        Ok(())
    };
    // The first reads the program from the image.
    run()?;
    let begun = Instant::now();
    for _ in 0..EXECS {
        run()?;
    }
    let exec = nanoseconds(begun.elapsed() / EXECS)?;
    Ok(Moments::from([
        ("second container", second),
        ("exec", exec),
    ]))
}

fn expect_word(cri: &Cri, pod: &Pod<'_>, container: &str, log: &Path) -> Result<()> {
    cri.wait(container)?;
    let said = log::text(&log::read(log)?, Stream::Stdout);
    ensure!(said == "READY\n", "pod {} said {said:?}", pod.id);
    Ok(())
}

/// Waits for the first byte of a log, without looking again and again.
struct FirstByte {
    changes: OwnedFd,
    log: PathBuf,
}

impl FirstByte {
    /// Begins to watch `directory`, in which `log` will be made.
    fn watch(directory: &Path, log: &str) -> Result<Self> {
        let changes = inotify::init(CreateFlags::CLOEXEC)?;
        inotify::add_watch(
            &changes,
            directory,
            WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::MOVED_TO,
        )?;
        Ok(Self {
            changes,
            log: directory.join(log),
        })
    }

    /// When the byte was there.
    fn wait(&self) -> Result<Instant> {
        let limit = Timespec::try_from(WORD_LIMIT)?;
        let mut events = [0; 4096];
        loop {
            if fs::metadata(&self.log).is_ok_and(|log| log.len() > 0) {
                return Ok(Instant::now());
            }
            let mut wanted = [PollFd::new(&self.changes, PollFlags::IN)];
            if poll(&mut wanted, Some(&limit))? == 0 {
                bail!("no output in {} after {WORD_LIMIT:?}", self.log.display());
            }
            // Which file it was does not matter.
            rustix::io::read(&self.changes, &mut events)?;
        }
    }
}

fn nanoseconds(time: Duration) -> Result<u64> {
    Ok(u64::try_from(time.as_nanos())?)
}

//! One run of the bed: the processes on the host, their files, and their end.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::setup::Parts;
use super::{Clock, Job, Outcome};
use crate::process;

/// How often the host looks whether the machine still runs.
const LOOK: Duration = Duration::from_millis(20);

/// How much of the console a failure shows, lines.
const CONSOLE_TAIL: usize = 40;

/// Runs `job` on a machine made of `parts`.
pub fn run(job: &Job, parts: &Parts) -> Result<Outcome> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let transcript: Box<dyn Write + Send> = match &job.transcript {
        Some(path) => Box::new(
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
        ),
        None => Box::new(io::sink()),
    };
    let shown: Box<dyn Write + Send> = if job.shown {
        Box::new(io::stdout())
    } else {
        Box::new(io::sink())
    };
    let desk = Desk::new()?;
    fs::write(
        desk.file("initramfs"),
        parts.initramfs(&script(job)?, &settings(job, parts)?)?,
    )?;

    let mut server = Running::start(&mut virtiofsd(parts, &desk)?)?;
    let socket = desk.file("virtiofsd");
    let ready = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        if let Some(status) = server.0.try_wait()? {
            bail!(
                "virtiofsd ended at once ({status}):\n{}",
                desk.tail("virtiofsd.log")
            );
        }
        if Instant::now() > ready {
            bail!(
                "virtiofsd does not come up:\n{}",
                desk.tail("virtiofsd.log")
            );
        }
        thread::sleep(LOOK);
    }

    let mut machine = Running::start(
        qemu(job, parts, &desk)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    )?;
    let output = machine.0.stdout.take();
    let output = output.map(|from| thread::spawn(|| copy(from, shown, transcript)));
    let errors = machine.0.stderr.take();
    let errors = errors.map(|from| thread::spawn(|| copy(from, io::stderr(), io::sink())));

    let end = Instant::now() + job.time_limit;
    let trouble = loop {
        if machine.0.try_wait()?.is_some() {
            break None;
        }
        if interrupted.load(Ordering::Relaxed) {
            break Some("interrupted".to_owned());
        }
        if Instant::now() > end {
            break Some(format!(
                "time limit of {} s reached",
                job.time_limit.as_secs()
            ));
        }
        thread::sleep(LOOK);
    };
    drop(machine);
    for stream in [output, errors].into_iter().flatten() {
        let _ = stream.join();
    }
    let told = |why: &str| {
        format!(
            "{why}; the end of its console:\n{}{}",
            desk.tail("console"),
            desk.tail("virtiofsd.log")
        )
    };
    if let Some(trouble) = trouble {
        return Ok(Outcome::Failed(told(&trouble)));
    }
    let status = fs::read_to_string(desk.file("status")).unwrap_or_default();
    let Ok(status) = status.trim().parse::<u8>() else {
        let why = "the machine went down before the command ended";
        return Ok(Outcome::Down(told(why)));
    };
    if let Some(directory) = &job.results {
        fs::create_dir_all(directory)?;
        process::capture(
            Command::new("tar")
                .arg("-xf")
                .arg(desk.file("results"))
                .arg("-C")
                .arg(directory),
        )?;
    }
    Ok(Outcome::Exited(status))
}

/// The files of one run, in a directory that goes with it.
struct Desk(PathBuf);

impl Desk {
    fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("bulkhead-bed.{}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The last lines of a file, or nothing.
    fn tail(&self, name: &str) -> String {
        let bytes = fs::read(self.file(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_TAIL)..]
            .iter()
            .map(|l| format!("  {l}\n"))
            .collect()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that does not outlive its owner.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self(child))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `program` and its arguments, killed by the kernel should this process die without a chance to do it.
fn bound(program: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).args(program);
    command
}

fn virtiofsd(parts: &Parts, desk: &Desk) -> Result<Command> {
    let log = File::create(desk.file("virtiofsd.log"))?;
    let mut command = bound(&[&parts.virtiofsd]);
    command
        .arg(format!(
            "--socket-path={}",
            desk.file("virtiofsd").display()
        ))
        .args([
            "-o",
            "source=/",
            "-o",
            "cache=always",
            "-o",
            "sandbox=chroot",
            "-o",
            "log_level=warn",
        ])
        .arg("--thread-pool-size=0")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(command)
}

fn qemu(job: &Job, parts: &Parts, desk: &Desk) -> Command {
    let file = |name: &str| desk.file(name).display().to_string();
    let mut kernel_line = "quiet loglevel=4 console=ttyS0 panic=-1 nokaslr mitigations=off \
                           random.trust_cpu=on no_timer_check"
        .to_owned();
    let mut command = bound(&parts.emulator.command());
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    // One RAM shared with the file server. Emulated `rep movsb` goes byte by byte: without the
    // flags that recommend it, kernels copy by words.
    command
        .args(["-machine", "q35,memory-backend=ram"])
        .args(["-cpu", "max,erms=off,fsrm=off"])
        .args(["-m", &format!("{}M", job.memory)])
        .args([
            "-object",
            &format!("memory-backend-memfd,id=ram,size={}M,share=on", job.memory),
        ]);
    match job.clock {
        Clock::Real => {
            command
                .args(["-accel", "tcg,thread=multi,tb-size=512"])
                .args(["-smp", &job.cpus.to_string()]);
            // An interrupt that an emulator loses leaves an idle CPU without a tick asleep, with a
            // task in its queue, for minutes. A tick that the interrupt controller repeats by
            // itself, rather than one that each tick asks for, finds what was lost within 4 ms.
            kernel_line += " nohz=off highres=off";
        }
        Clock::Instructions => {
            command
                .args(["-accel", "tcg,thread=single,tb-size=512"])
                .args(["-icount", "shift=0,sleep=off"])
                .args(["-smp", "1"]);
            kernel_line += " norandmaps";
        }
    }
    command
        .arg("-kernel")
        .arg(&parts.kernel)
        .arg("-initrd")
        .arg(desk.file("initramfs"))
        .args(["-append", &kernel_line])
        .args(["-serial", &format!("file:{}", file("console"))])
        .args([
            "-chardev",
            &format!("socket,id=host,path={}", file("virtiofsd")),
        ])
        .args([
            "-device",
            "vhost-user-fs-pci,chardev=host,tag=host,queue-size=1024",
        ])
        .args(["-device", "virtio-serial-pci,id=ports"]);
    let mut ports = vec![
        ("stdout", "/proc/self/fd/1".to_owned()),
        ("stderr", "/proc/self/fd/2".to_owned()),
        ("status", file("status")),
    ];
    if job.results.is_some() {
        ports.push(("results", file("results")));
    }
    for (name, path) in ports {
        command
            .args(["-chardev", &format!("file,id={name},path={path}")])
            .args([
                "-device",
                &format!("virtserialport,bus=ports.0,chardev={name},name=bed.{name}"),
            ]);
    }
    command
}

/// The shell script that is the command.
fn script(job: &Job) -> Result<String> {
    let directory = job
        .directory
        .to_str()
        .context("the directory's name is not text")?;
    let mut script = format!("cd {} || exit 126\n", quoted(directory));
    for (name, value) in &job.environment {
        script += &format!("export {name}={}\n", quoted(value));
    }
    script += "exec";
    for word in &job.command {
        script += " ";
        script += &quoted(word);
    }
    script += "\n";
    Ok(script)
}

fn settings(job: &Job, parts: &Parts) -> Result<String> {
    let modules = parts
        .modules
        .to_str()
        .context("the cache's name is not text")?;
    let results = if job.results.is_some() { "yes" } else { "no" };
    Ok(format!("modules={}\nresults={results}\n", quoted(modules)))
}

/// `word` as one word of a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Copies what comes, when it comes, to two places. Where nobody listens any more the machine goes
/// on unheard.
fn copy(mut from: impl Read, mut to: impl Write, mut also: impl Write) {
    let mut buffer = [0; 8192];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        let _ = to.write_all(bytes).and_then(|()| to.flush());
        let _ = also.write_all(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_survive_the_shell() {
        let word = "it's $HOME \"and\" \\n `x`";
        let shell = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("printf %s {}", quoted(word)))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&shell.stdout), word);
    }
}

//! A guest with the agent in it, seen from where the server would be.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_agent_api::v1::agent_client::AgentClient;
use bulkhead_agent_api::v1::{self as api, Stdio};
use bulkhead_agent_api::{GREETING_BYTES, Greeting, Purpose, Secret};
use bulkhead_vmm_api::control::{Action, FromVmm, Reply, ToVmm};
use bulkhead_vmm_api::{Control, ExitRecord, Launch, OpenDevice, Vmm};
use hyper_util::rt::TokioIo;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc, oneshot};
use tonic::transport::{Channel, Endpoint};

/// Longer than any step takes, also on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
const SECRET: Secret = Secret([42; 32]);

/// A stream other than control, with its greeting.
pub type Arrived = (Greeting, UnixStream);

type Waiting = Arc<std::sync::Mutex<HashMap<u64, oneshot::Sender<Arrived>>>>;

/// A running guest.
pub struct Guest {
    pub agent: AgentClient<Channel>,
    pub commands: mpsc::Sender<Ask>,
    vmm: Vmm,
    record: File,
    waiting: Waiting,
    numbers: AtomicU64,
    home: tempfile::TempDir,
}

/// For the task that speaks to the VMM.
pub enum Ask {
    Attach(OpenDevice, oneshot::Sender<u8>),
    Detach(u8, oneshot::Sender<()>),
    /// Ends every stream at once, as a server's death does.
    Cut,
}

fn artefact(name: &str) -> PathBuf {
    let directory = std::env::var("BULKHEAD_BIN_DIR").expect("BULKHEAD_BIN_DIR is not set");
    Path::new(&directory).join(name)
}

impl Guest {
    /// Boots and waits for the agent.
    pub async fn boot() -> Self {
        let home = tempfile::tempdir().unwrap();
        let open = |path: PathBuf| {
            OwnedFd::from(
                File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
            )
        };
        let socket = home.path().join("control.sock");
        let record_path = home.path().join("record");
        let record = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(record_path)
            .unwrap();
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap();
        let console = File::create(home.path().join("console")).unwrap();
        let launch = Launch {
            program: artefact("bulkhead-vmm"),
            id: "agent-test".into(),
            kvm: kvm.into(),
            kernel: open(artefact("vmlinux")),
            initramfs: Some(open(artefact("initramfs"))),
            command_line: "console=ttyS0 quiet loglevel=6 panic=-1 reboot=k maxcpus=1".into(),
            memory_mib: 256,
            vcpus: 1,
            guest_cid: 3,
            control: Control::listen(&socket).unwrap(),
            exit_record: record.try_clone().unwrap().into(),
            console: Some(console.into()),
            devices: vec![],
            cgroup_procs: None,
            messages: Some(io::stderr().as_fd().try_clone_to_owned().unwrap()),
        };
        let vmm = launch.spawn().unwrap();
        let control = Control::connect(&socket).unwrap();
        let waiting = Waiting::default();
        let (commands, asked) = mpsc::channel(4);
        let (streams, arriving) = mpsc::channel(4);
        tokio::spawn(serve(control, asked, streams, Arc::clone(&waiting)));
        let mut guest = Self {
            agent: AgentClient::new(channel(arriving)),
            commands,
            vmm,
            record,
            waiting,
            numbers: AtomicU64::new(1),
            home,
        };
        let answer = tokio::time::timeout(PATIENCE, guest.agent.identify(api::IdentifyRequest {}));
        match answer.await {
            Ok(Ok(_)) => guest,
            other => panic!("no agent ({other:?}); console:\n{}", guest.console()),
        }
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        let text = fs::read(self.home.path().join("console")).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// A fresh number: for operations, tokens and names.
    pub fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    pub fn operation(&self) -> String {
        format!("operation-{}", self.number())
    }

    /// Attaches a disk of this file and has the agent bind it.
    pub async fn attach(&mut self, serial: &str, file: &Path, read_only: bool) -> u8 {
        let window = self.plug(serial, file, read_only).await;
        let request = api::AttachDiskRequest {
            operation_id: self.operation(),
            window: window.into(),
            serial: serial.into(),
        };
        self.agent.attach_disk(request).await.unwrap();
        window
    }

    /// Attaches a disk without telling the agent.
    pub async fn plug(&self, serial: &str, file: &Path, read_only: bool) -> u8 {
        let disk = File::options()
            .read(true)
            .write(!read_only)
            .open(file)
            .unwrap();
        let length = disk.metadata().unwrap().len();
        let device = OpenDevice::disk(serial, read_only, vec![(disk.into(), 0, length)]);
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Ask::Attach(device, reply)).await;
        sent.map_err(|_| ()).unwrap();
        answer.await.unwrap()
    }

    /// Attaches image and scratch and prepares the sandbox.
    pub async fn prepare(&mut self) {
        self.prepare_with(|_| {}).await;
    }

    /// As [`Guest::prepare`], with another request.
    pub async fn prepare_with(&mut self, change: impl FnOnce(&mut api::PrepareRequest)) {
        let image = image(self.home.path());
        let scratch = scratch(self.home.path());
        self.attach("image", &image, true).await;
        self.attach("scratch", &scratch, false).await;
        let mut request = api::PrepareRequest {
            operation_id: self.operation(),
            hostname: "pod-of-tests".into(),
            resolv_conf: "nameserver 192.0.2.1\n".into(),
            wall_clock_nanoseconds: 1_700_000_000_000_000_000,
            entropy: vec![7; 32],
            scratch_serial: "scratch".into(),
            ..api::PrepareRequest::default()
        };
        change(&mut request);
        self.agent.prepare(request).await.unwrap();
    }

    /// Asks for one end of a process's stdio and takes the stream the agent dials.
    pub async fn stream(
        &mut self,
        container: &str,
        exec: &str,
        stdio: Stdio,
        offset: u64,
    ) -> Arrived {
        let token = self.number();
        let (arrived, arrival) = oneshot::channel();
        self.waiting.lock().unwrap().insert(token, arrived);
        let request = api::OpenStreamRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            stdio: stdio.into(),
            token,
            offset,
        };
        self.agent.open_stream(request).await.unwrap();
        tokio::time::timeout(PATIENCE, arrival)
            .await
            .unwrap()
            .unwrap()
    }

    /// Reads an output to its end, acknowledging it.
    pub async fn output(&mut self, container: &str, exec: &str, stdio: Stdio) -> String {
        let (greeting, stream) = self.stream(container, exec, stdio, 0).await;
        assert_eq!((greeting.purpose, greeting.offset), (Purpose::Output, 0));
        let bytes = tokio::time::timeout(PATIENCE, read_all(stream))
            .await
            .unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Ends the VM and tells why it ended.
    pub async fn end(mut self) -> Option<ExitRecord> {
        let request = api::ShutdownRequest {
            operation_id: self.operation(),
        };
        self.agent.shutdown(request).await.unwrap();
        self.vmm.kill().unwrap();
        self.vmm.wait().unwrap();
        ExitRecord::read(&self.record).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
        if std::thread::panicking() {
            eprintln!("guest's console:\n{}", self.console());
        }
    }
}

/// Reads to the end, acknowledging each piece.
pub async fn read_all(mut stream: UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = stream.read(&mut buffer).await.unwrap();
        if length == 0 {
            return all;
        }
        all.extend_from_slice(&buffer[..length]);
        stream
            .write_all(&(all.len() as u64).to_le_bytes())
            .await
            .unwrap();
    }
}

/// A channel over whichever control stream the agent dialled last.
fn channel(arriving: mpsc::Receiver<UnixStream>) -> Channel {
    let arriving = Arc::new(Mutex::new(arriving));
    let connector = tower::service_fn(move |_| {
        let arriving = Arc::clone(&arriving);
        async move {
            let next = arriving.lock().await.recv().await;
            next.map(TokioIo::new)
                .ok_or_else(|| io::Error::other("the VMM is gone"))
        }
    });
    Endpoint::from_static("http://guest").connect_with_connector_lazy(connector)
}

/// The server's end of `control.sock`.
async fn serve(
    control: Control,
    mut asked: mpsc::Receiver<Ask>,
    control_streams: mpsc::Sender<UnixStream>,
    waiting: Waiting,
) {
    let events = control.as_fd().try_clone_to_owned().unwrap();
    #[allow(deprecated)]
    let events = AsyncFd::new(events).unwrap();
    let mut control = control;
    let mut known = false;
    let mut answers: HashMap<String, Box<dyn FnOnce(Reply) + Send>> = HashMap::new();
    let mut guests_ends: Vec<OwnedFd> = Vec::new();
    let mut number = 0;
    loop {
        tokio::select! {
            ask = asked.recv() => {
                number += 1;
                let operation = number.to_string();
                let (action, files) = match ask {
                    None => return,
                    Some(Ask::Attach(device, reply)) => {
                        answers.insert(operation.clone(), Box::new(|answer| match answer {
                            Reply::Attached { window } => drop(reply.send(window)),
                            other => panic!("{other:?}"),
                        }));
                        let action = Action::Attach { device: device.device().clone() };
                        (action, Some(device))
                    }
                    Some(Ask::Detach(window, reply)) => {
                        let done = move |_| {
                            let _ = reply.send(());
                        };
                        answers.insert(operation.clone(), Box::new(done));
                        (Action::Detach { window }, None)
                    }
                    Some(Ask::Cut) => {
                        for end in guests_ends.drain(..) {
                            let _ = rustix::net::shutdown(&end, rustix::net::Shutdown::Both);
                        }
                        continue;
                    }
                };
                let files = files.as_ref().map(OpenDevice::files).unwrap_or_default();
                let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                control.send(&ToVmm::Request { operation, action }, &files).unwrap();
            }
            ready = events.readable() => {
                let mut ready = ready.unwrap();
                match control.receive() {
                    Ok(Some(FromVmm::Reply { operation, result })) => {
                        let answer = answers.remove(&operation).unwrap();
                        answer(result.unwrap());
                    }
                    Ok(Some(FromVmm::Dial { stream, port })) => {
                        assert_eq!(port, bulkhead_agent_api::PORT);
                        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
                        here.set_nonblocking(true).unwrap();
                        guests_ends.push(here.try_clone().unwrap().into());
                        control.send(&ToVmm::Stream { stream }, &[there.as_fd()]).unwrap();
                        let here = UnixStream::from_std(here).unwrap();
                        let first = !std::mem::replace(&mut known, true);
                        let (streams, waiting) = (control_streams.clone(), Arc::clone(&waiting));
                        tokio::spawn(greet(here, first, streams, waiting));
                    }
                    Ok(None) => return,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}

async fn greet(
    mut stream: UnixStream,
    first: bool,
    control: mpsc::Sender<UnixStream>,
    waiting: Waiting,
) {
    let mut greeting = [0; GREETING_BYTES];
    if stream.read_exact(&mut greeting).await.is_err() {
        return;
    }
    let greeting = Greeting::decode(&greeting).unwrap();
    if first {
        assert_eq!(greeting.purpose, Purpose::Control);
        assert!(greeting.secret.matches(&Secret::NONE));
        stream.write_all(&SECRET.0).await.unwrap();
    } else {
        assert!(greeting.secret.matches(&SECRET));
    }
    match greeting.purpose {
        Purpose::Control => control.send(stream).await.unwrap(),
        _ => {
            let asked = waiting.lock().unwrap().remove(&greeting.token);
            let _ = asked
                .expect("a stream nobody asked for")
                .send((greeting, stream));
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {output:?}");
}

/// An EROFS image with busybox in it.
pub fn image(home: &Path) -> PathBuf {
    let tree = home.join("tree");
    let image = home.join("image.erofs");
    if image.exists() {
        return image;
    }
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "home/user"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::copy("/usr/bin/busybox", tree.join("bin/busybox")).unwrap();
    for name in [
        "sh", "cat", "echo", "id", "ls", "sleep", "true", "touch", "hostname", "kill", "head",
        "dd", "mount", "umount", "mkdir", "mknod", "grep", "pwd", "env", "wc", "seq", "nc", "ps",
        "stat", "readlink", "setsid", "stty", "printf", "tail", "awk", "df",
    ] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    let passwd = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(tree.join("etc/passwd"), passwd).unwrap();
    fs::write(tree.join("etc/group"), "user:x:1000:\nlogs:x:40:user\n").unwrap();
    std::os::unix::fs::symlink("/etc", tree.join("outside")).unwrap();
    fs::create_dir_all(tree.join("secrets/of")).unwrap();
    fs::write(tree.join("etc/secret"), "secret").unwrap();
    fs::write(tree.join("bin/no-program"), "not a program").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(tree.join("bin/no-program"), executable).unwrap();
    run(
        "mkfs.erofs",
        &[image.to_str().unwrap(), tree.to_str().unwrap()],
    );
    image
}

/// A scratch disk whose file system is smaller than the disk.
pub fn scratch(home: &Path) -> PathBuf {
    let path = home.join("scratch.ext4");
    let disk = File::create(&path).unwrap();
    disk.set_len(64 << 20).unwrap();
    let name = path.to_str().unwrap();
    let options = "quotatype=prjquota,assume_storage_prezeroed=1,nodiscard";
    let features = "^has_journal,quota,project";
    run(
        "mke2fs",
        &[
            "-q", "-F", "-t", "ext4", "-m", "0", "-I", "256", "-O", features, "-E", options, name,
        ],
    );
    disk.set_len(256 << 20).unwrap();
    path
}

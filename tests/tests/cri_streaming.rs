//! Exec, attach and port-forward with clients that others have written: kubectl over SPDY, and
//! Kubernetes' client for Python over WebSocket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::{ContainerConfig, ExecRequest, PortForwardRequest};
use bulkhead_tests::kubectl::{Kubectl, of_url};
use bulkhead_tests::node::BASE;
use bulkhead_tests::request::{Pod, shell, sleeper};
use bulkhead_tests::{Cri, Node, suite};
use sha2::{Digest, Sha256};

suite! {
    exec_has_streams_and_an_exit_code,
    exec_of_much_output_is_whole,
    exec_of_a_slow_reader_waits,
    exec_ends_with_its_client,
    exec_over_websocket_has_streams_and_an_exit_code,
    exec_with_a_terminal_has_its_size,
    input_is_ended_over_websocket,
    tls_is_spoken_and_takes_up_a_new_certificate,
    url_is_good_for_one_use,
    url_that_is_used_late_is_refused,
    attach_is_seen_by_all_and_ends_input_once,
    ports_are_forwarded_many_at_once,
    port_that_nobody_serves_is_told,
    ports_are_forwarded_over_websocket,
}

/// Runs kubectl with this input.
fn run(kubectl: &Kubectl, arguments: &[&str], input: &[u8]) -> Result<Output> {
    let mut command = kubectl.command(arguments);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = piped.stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let input = input.to_vec();
    let writer = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output()?;
    drop(writer.join());
    Ok(output)
}

/// A kubectl that ends with its case.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(kubectl: &Kubectl, arguments: &[&str]) -> Result<Running> {
    let mut command = kubectl.command(arguments);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(Running(piped.stderr(Stdio::piped()).spawn()?))
}

/// Runs the client for Python at `url`; what it prints.
fn python(node: &Node, arguments: &[&str]) -> Result<String> {
    let script = node.scratch().join("streams.py");
    std::fs::write(&script, include_str!("../src/streams.py"))?;
    let mut command = Command::new("/usr/bin/python3");
    let output = command.arg(&script).args(arguments).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{:?}: {error}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn exec(id: &str, line: &str) -> ExecRequest {
    ExecRequest {
        container_id: id.to_owned(),
        cmd: ["/bin/sh", "-c", line].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    }
}

/// Looks again and again until `line`, run in the container, prints what is wanted.
fn becomes(
    cri: &Cri,
    id: &str,
    line: &str,
    mut wanted: impl FnMut(&str) -> bool,
) -> Result<String> {
    let mut printed = String::new();
    for _ in 0..300 {
        printed = cri.shell(id, line)?;
        if wanted(&printed) {
            return Ok(printed);
        }
        thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("{line} prints {printed:?} at last")
}

fn exec_has_streams_and_an_exit_code(node: &Node) -> Result<()> {
    let pod = node.pod("streams")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    let line = "cat; echo error >&2; exit 7";
    let arguments = ["exec", "-i", "pod", "--", "/bin/sh", "-c", line];
    let output = run(&kubectl, &arguments, b"one\0two\xff")?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.stdout == b"one\0two\xff",
        "{:?}; {error}",
        output.stdout
    );
    ensure!(error.starts_with("error\n"), "{error}");
    ensure!(error.contains("terminated with exit code 7"), "{error}");
    ensure!(output.status.code() == Some(7), "{:?}", output.status);
    let missing = run(&kubectl, &["exec", "pod", "--", "/no/such"], b"")?;
    let error = String::from_utf8_lossy(&missing.stderr);
    ensure!(error.contains("/no/such"), "{error}");
    Ok(())
}

fn exec_of_much_output_is_whole(node: &Node) -> Result<()> {
    let pod = node.pod("much")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    let line = "i=0; while [ $i -lt 400 ]; do head -c 20000 /bin/busybox; i=$((i + 1)); done";
    let sum = pod.cri.shell(&id, &format!("({line}) | sha256sum"))?;
    let output = run(&kubectl, &["exec", "pod", "--", "/bin/sh", "-c", line], b"")?;
    ensure!(output.stdout.len() == 8_000_000, "{}", output.stdout.len());
    let digest = Sha256::digest(&output.stdout);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(sum.starts_with(&digest), "{digest}, not {sum}");
    // And as much the other way.
    let arguments = ["exec", "-i", "pod", "--", "sha256sum"];
    let back = run(&kubectl, &arguments, &output.stdout)?;
    let back = String::from_utf8_lossy(&back.stdout).into_owned();
    ensure!(back.starts_with(&digest), "{back}");
    Ok(())
}

fn exec_of_a_slow_reader_waits(node: &Node) -> Result<()> {
    let pod = node.pod("slow")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    let line = "i=0; while [ $i -lt 1000 ]; do
        head -c 100000 /dev/zero; i=$((i + 1)); echo $i > /tmp/written; done";
    let mut child = start(&kubectl, &["exec", "pod", "--", "/bin/sh", "-c", line])?;
    // It stands still: three looks find the same.
    let mut seen = [String::new(), String::new()];
    let still = becomes(pod.cri, &id, "sleep 1; cat /tmp/written || true", |now| {
        let still = !now.is_empty() && seen.iter().all(|before| before == now);
        seen.rotate_left(1);
        seen[1] = now.to_owned();
        still
    })?;
    ensure!(still.parse::<u32>()? < 500, "{still} of 1000 were written");
    let mut output = Vec::new();
    let stdout = child.0.stdout.as_mut().context("no stdout")?;
    stdout.read_to_end(&mut output)?;
    ensure!(output.len() == 100_000_000, "{} bytes came", output.len());
    ensure!(child.0.wait()?.success(), "the exec");
    Ok(())
}

fn exec_ends_with_its_client(node: &Node) -> Result<()> {
    let pod = node.pod("vanishes")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    let count = "ps -o args | grep -c '^sleep 4321' || true";
    let child = start(&kubectl, &["exec", "-i", "pod", "--", "sleep", "4321"])?;
    becomes(pod.cri, &id, count, |count| count == "1")?;
    drop(child);
    becomes(pod.cri, &id, count, |count| count == "0")?;
    Ok(())
}

fn exec_over_websocket_has_streams_and_an_exit_code(node: &Node) -> Result<()> {
    let pod = node.pod("websocket")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "read line; echo \"read $line\"; echo error >&2; exit 9";
    let url = pod.cri.exec(exec(&id, line))?.url;
    let printed = python(node, &["exec", &url])?;
    ensure!(printed == "read from python\nerror\n9\n", "{printed:?}");
    Ok(())
}

fn exec_with_a_terminal_has_its_size(node: &Node) -> Result<()> {
    let pod = node.pod("size")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "trap 'stty size' WINCH; stty size; while :; do read -t 1 a b && exit $b; done";
    let request = ExecRequest {
        tty: true,
        stderr: false,
        ..exec(&id, line)
    };
    let url = pod.cri.exec(request)?.url;
    let printed = python(node, &["terminal", &url])?;
    ensure!(
        printed.contains("50 132") && printed.contains("10 40"),
        "{printed:?}"
    );
    ensure!(printed.ends_with("4\n"), "{printed:?}");
    Ok(())
}

fn input_is_ended_over_websocket(node: &Node) -> Result<()> {
    let pod = node.pod("half-closed")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let url = pod.cri.exec(exec(&id, "cat; echo end; exit 3"))?.url;
    let printed = python(node, &["end", &url])?;
    ensure!(printed == "from python\nend\n3\n", "{printed:?}");
    Ok(())
}

/// Makes a certificate for 127.0.0.1 that is its own authority, and its key.
fn certificate(directory: &Path) -> Result<()> {
    let mut command = Command::new("openssl");
    command
        .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
        .args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=tests"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(directory.join("key.pem"))
        .arg("-out")
        .arg(directory.join("certificate.pem"));
    let made = command.output()?;
    ensure!(made.status.success(), "{made:?}");
    Ok(())
}

fn tls_is_spoken_and_takes_up_a_new_certificate(node: &Node) -> Result<()> {
    let mut plan = node.plan("tls");
    let directory = plan.home.clone();
    std::fs::create_dir_all(&directory)?;
    let (chain, old) = (directory.join("certificate.pem"), directory.join("old.pem"));
    certificate(&directory)?;
    plan.settings = format!(
        "streaming.certificate = {chain:?}\nstreaming.key = {:?}",
        directory.join("key.pem")
    );
    let server = plan.start()?;
    let pod = Pod::run(&server.cri, node.pod_config("tls")?)?;
    let id = pod.start(&sleeper("sleeper", &node.image_on(&server.cri, BASE)?))?;
    let run = |trusted: &Path| -> Result<String> {
        let url = server.cri.exec(exec(&id, "cat; exit 5"))?.url;
        ensure!(url.starts_with("https://"), "{url}");
        python(node, &["end", &url, &trusted.display().to_string()])
    };
    let printed = run(&chain)?;
    ensure!(printed == "from python\n5\n", "{printed:?}");
    std::fs::rename(&chain, &old)?;
    certificate(&directory)?;
    let printed = run(&chain)?;
    ensure!(printed == "from python\n5\n", "{printed:?}");
    let refused = run(&old);
    ensure!(refused.is_err(), "the old one: {refused:?}");
    server.stop()
}

/// The first line of the answer to a client of SPDY.
fn answer(url: &str) -> Result<String> {
    let (host, path) = of_url(url)?;
    let mut stream = TcpStream::connect(host)?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    )?;
    let mut first = String::new();
    BufReader::new(stream).read_line(&mut first)?;
    Ok(first)
}

fn url_is_good_for_one_use(node: &Node) -> Result<()> {
    let pod = node.pod("token")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let url = pod.cri.exec(exec(&id, "true"))?.url;
    let (first, second) = (answer(&url)?, answer(&url)?);
    ensure!(first.starts_with("HTTP/1.1 101 "), "{first}");
    ensure!(second.starts_with("HTTP/1.1 404 "), "{second}");
    Ok(())
}

fn url_that_is_used_late_is_refused(node: &Node) -> Result<()> {
    let pod = node.pod("late")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let url = pod.cri.exec(exec(&id, "touch /ran"))?.url;
    // A URL holds for a minute.
    thread::sleep(Duration::from_secs(62));
    let late = answer(&url)?;
    ensure!(late.starts_with("HTTP/1.1 404 "), "{late}");
    let ran = pod.cri.shell(&id, "ls /ran 2>/dev/null || echo none")?;
    ensure!(ran == "none", "{ran}");
    Ok(())
}

fn attach_is_seen_by_all_and_ends_input_once(node: &Node) -> Result<()> {
    let pod = node.pod("attach")?;
    let config = ContainerConfig {
        stdin: true,
        stdin_once: true,
        ..shell("cat", &node.base()?, "cat; echo end >&2; sleep 1; exit 6")
    };
    let id = pod.start(&config)?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    let mut watcher = start(&kubectl, &["attach", "pod"])?;
    let mut writer = start(&kubectl, &["attach", "-i", "pod"])?;
    let mut stdin = writer.0.stdin.take().context("no stdin")?;
    let watched = watcher.0.stdout.take().context("no stdout")?;
    let mut lines = BufReader::new(watched).lines();
    // Attach replays nothing, so the watcher is there once it sees a line.
    let asks = thread::spawn(move || -> std::io::Result<()> {
        for number in 0.. {
            writeln!(stdin, "line {number}")?;
            thread::sleep(Duration::from_millis(200));
            if number == 40 {
                break;
            }
        }
        Ok(())
    });
    let line = lines.next().context("the watcher sees nothing")??;
    ensure!(line.starts_with("line "), "{line}");
    asks.join().map_err(|_| anyhow::anyhow!("the writer"))??;
    // The input has ended with the writer's.
    let ended = pod.cri.wait(&id)?;
    ensure!(ended.exit_code == 6, "{ended:?}");
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    ensure!(
        rest.last().is_some_and(|line| line == "line 40"),
        "{rest:?}"
    );
    let mut text = String::new();
    let stdout = writer.0.stdout.as_mut().context("no stdout")?;
    stdout.read_to_string(&mut text)?;
    ensure!(text.contains("line 40"), "{text}");
    Ok(())
}

/// A container that sends back, at port 7000, what each connection brings, to its end.
fn echo(image: &str) -> ContainerConfig {
    shell("echo", image, "exec nc -ll -p 7000 -e cat")
}

/// Forwards a port of the pod; the child, and the local port.
fn forward(kubectl: &Kubectl, port: u16) -> Result<(Running, u16)> {
    let mut child = start(kubectl, &["port-forward", "pod/pod", &format!(":{port}")])?;
    let stdout = child.0.stdout.as_mut().context("no stdout")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    // Forwarding from 127.0.0.1:40000 -> 7000
    let local = line.split(&[':', ' '][..]).nth(3).context("no port");
    let local = local.and_then(|port| Ok(port.parse()?));
    Ok((child, local.with_context(|| format!("{line:?}"))?))
}

fn ports_are_forwarded_many_at_once(node: &Node) -> Result<()> {
    let pod = node.pod("forward")?;
    let id = pod.start(&echo(&node.base()?))?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    becomes(
        pod.cri,
        &id,
        "netstat -ltn | grep -c :7000 || true",
        |count| count == "1",
    )?;
    let (_child, port) = forward(&kubectl, 7000)?;
    let streams: Result<Vec<TcpStream>, _> = (0..8)
        .map(|_| TcpStream::connect(("127.0.0.1", port)))
        .collect();
    let mut streams = streams?;
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&vec![b'a' + number as u8; 50_000])?;
    }
    // The last first, each to its end after it was half closed.
    for (number, stream) in streams.iter_mut().enumerate().rev() {
        stream.shutdown(Shutdown::Write)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        let wanted = vec![b'a' + number as u8; 50_000];
        ensure!(bytes == wanted, "{number}: {} bytes", bytes.len());
    }
    Ok(())
}

fn port_that_nobody_serves_is_told(node: &Node) -> Result<()> {
    let pod = node.pod("nobody")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let kubectl = Kubectl::of(node, &pod, &id)?;
    let (mut child, port) = forward(&kubectl, 7001)?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let mut bytes = Vec::new();
    // Closed or reset.
    drop(stream.read_to_end(&mut bytes));
    ensure!(bytes.is_empty(), "{bytes:?}");
    let mut error = String::new();
    let stderr = child.0.stderr.as_mut().context("no stderr")?;
    BufReader::new(stderr).read_line(&mut error)?;
    ensure!(
        error.contains("7001") && error.contains("refused"),
        "{error}"
    );
    Ok(())
}

fn ports_are_forwarded_over_websocket(node: &Node) -> Result<()> {
    let pod = node.pod("forward-ws")?;
    let id = pod.start(&echo(&node.base()?))?;
    becomes(
        pod.cri,
        &id,
        "netstat -ltn | grep -c :7000 || true",
        |count| count == "1",
    )?;
    let request = PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![7000],
    };
    let url = pod.cri.port_forward(request)?.url;
    let printed = python(node, &["forward", &url, "7000"])?;
    ensure!(printed == "from python\n", "{printed:?}");
    Ok(())
}

//! kubectl, a client of exec, attach and port-forward over SPDY, and as much of an API server as it
//! needs: one pod of one container, whose streams are at the URLs that the CRI answers with.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use bulkhead_cri_api::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use serde_json::{Value, json};

use crate::request::Pod;
use crate::{Cri, Node};

/// Where kubectl is.
const PROGRAM: &str = "BULKHEAD_TEST_KUBECTL";

/// An API server with one pod, `pod`.
pub struct Kubectl {
    program: PathBuf,
    address: SocketAddr,
    over: Arc<AtomicBool>,
}

struct Front {
    cri: Cri,
    pod: String,
    container: String,
}

impl Kubectl {
    /// Serves `container` of `pod` until dropped.
    pub fn of(node: &Node, pod: &Pod<'_>, container: &str) -> Result<Self> {
        let program = std::env::var_os(PROGRAM).with_context(|| format!("{PROGRAM} is not set"))?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let front = Arc::new(Front {
            cri: Cri::new(&node.server()?.socket())?,
            pod: pod.id.clone(),
            container: container.to_owned(),
        });
        let kubectl = Self {
            program: program.into(),
            address: listener.local_addr()?,
            over: Arc::default(),
        };
        let over = Arc::clone(&kubectl.over);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let front = Arc::clone(&front);
                // What goes wrong with a connection kubectl tells.
                thread::spawn(move || front.serve(client).map_err(|error| eprintln!("{error:#}")));
            }
        });
        Ok(kubectl)
    }

    /// kubectl with these arguments, to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--server=http://{}", self.address))
            .args(arguments)
            // No configuration and no cache of the machine's.
            .env("KUBECONFIG", "/dev/null")
            .env("HOME", "/nonexistent");
        command
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.address));
    }
}

impl Front {
    fn serve(&self, client: TcpStream) -> Result<()> {
        let mut reader = BufReader::new(client.try_clone()?);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let (first, headers) = head.split_once("\r\n").context("no request")?;
        let target = first.split(' ').nth(1).context("no target")?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query = Query(query);
        let url = match path.rsplit('/').next().unwrap_or_default() {
            "exec" => {
                let answer = self.cri.exec(ExecRequest {
                    container_id: self.container.clone(),
                    cmd: query.all("command"),
                    tty: query.on("tty"),
                    stdin: query.on("stdin"),
                    stdout: query.on("stdout"),
                    stderr: query.on("stderr"),
                });
                answer?.url
            }
            "attach" => {
                let answer = self.cri.attach(AttachRequest {
                    container_id: self.container.clone(),
                    tty: query.on("tty"),
                    stdin: query.on("stdin"),
                    stdout: query.on("stdout"),
                    stderr: query.on("stderr"),
                });
                answer?.url
            }
            "portforward" => {
                let answer = self.cri.port_forward(PortForwardRequest {
                    pod_sandbox_id: self.pod.clone(),
                    port: Vec::new(),
                });
                answer?.url
            }
            _ => return Ok(answer(client, path)?),
        };
        let (host, path) = of_url(&url)?;
        let server = TcpStream::connect(host)?;
        let request = format!("POST {path} HTTP/1.1\r\n{headers}");
        (&server).write_all(request.as_bytes())?;
        let (there, back) = (server.try_clone()?, client.try_clone()?);
        let forth = thread::spawn(move || carry(reader, &there));
        carry(server, &back);
        drop(forth.join());
        Ok(())
    }
}

/// The host and the path of a URL.
pub fn of_url(url: &str) -> Result<(&str, &str)> {
    let rest = url.strip_prefix("http://").context("no http URL")?;
    Ok(rest.split_at(rest.find('/').context("no path")?))
}

fn carry(mut from: impl Read, to: &TcpStream) {
    // Either end may go first.
    drop(io::copy(&mut from, &mut &*to));
    drop(to.shutdown(Shutdown::Write));
}

struct Query<'a>(&'a str);

impl Query<'_> {
    fn all(&self, name: &str) -> Vec<String> {
        let pairs = self.0.split('&').filter_map(|pair| pair.split_once('='));
        let values = pairs.filter(|(key, _)| *key == name);
        values.map(|(_, value)| decoded(value)).collect()
    }

    fn on(&self, name: &str) -> bool {
        self.all(name) == ["true"]
    }
}

/// A value of a query: `+` is a space, `%2F` a slash.
fn decoded(value: &str) -> String {
    let mut bytes = value.bytes();
    let mut text = Vec::new();
    while let Some(byte) = bytes.next() {
        text.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits: Vec<u8> = bytes.by_ref().take(2).collect();
                let digits = String::from_utf8_lossy(&digits).into_owned();
                u8::from_str_radix(&digits, 16).unwrap_or(b'?')
            }
            byte => byte,
        });
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// What kubectl asks before it opens a stream.
fn answer(mut client: TcpStream, path: &str) -> io::Result<()> {
    let body: Value = match path {
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"]}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []}),
        "/api/v1" => json!({
            "kind": "APIResourceList", "groupVersion": "v1",
            "resources": [{"name": "pods", "singularName": "", "namespaced": true,
                "kind": "Pod", "verbs": ["get"]}],
        }),
        _ => json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {"name": "pod", "namespace": "default"},
            "spec": {"containers": [{"name": "container", "image": "image", "stdin": true}]},
            "status": {"phase": "Running"},
        }),
    };
    let body = body.to_string();
    write!(
        client,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

//! One call of one plugin: a program that is told by its environment and its standard input
//! (CNI specification, section 2).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::CniError;
use super::reply::Refusal;

/// The longest answer, in bytes.
const ANSWER_BYTES: usize = 1 << 20;
/// How much of what a plugin says beside its answer is told, in bytes from the end.
const WORDS_BYTES: usize = 2048;

/// What is asked of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Give the pod the network.
    Add,
    /// Whether the pod still has it.
    Check,
    /// Take it back.
    Del,
    /// Whether it could be given.
    Status,
    /// Take back what is not listed.
    Gc,
}

impl Operation {
    /// Its name in CNI_COMMAND.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Status => "STATUS",
            Self::Gc => "GC",
        }
    }
}

/// The attachment that a call is about: what goes into the environment.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// CNI_CONTAINERID.
    pub container: &'a str,
    /// CNI_NETNS.
    pub netns: &'a Path,
    /// CNI_IFNAME.
    pub interface: &'a str,
    /// CNI_ARGS.
    pub arguments: &'a str,
}

/// Where a plugin's program is among `places`.
pub fn find(program: &str, places: &[PathBuf]) -> Result<PathBuf, CniError> {
    let paths = places.iter().map(|place| place.join(program));
    let mut files = paths.filter(|path| path.is_file());
    files.next().ok_or_else(|| CniError::NoProgram {
        program: program.to_owned(),
        places: places.to_vec(),
    })
}

/// Calls a plugin and returns its answer, `Null` where it has none. It is killed with all it has
/// started when it takes longer than `limit`, or when nobody waits for it any more.
pub async fn call(
    operation: Operation,
    program: &str,
    places: &[PathBuf],
    about: Option<About<'_>>,
    config: &Value,
    limit: Duration,
) -> Result<Value, CniError> {
    let path = find(program, places)?;
    let failed = |why: String| CniError::Plugin {
        program: program.to_owned(),
        operation: operation.name(),
        why,
    };
    let mut command = Command::new(&path);
    command
        .env("CNI_COMMAND", operation.name())
        .env("CNI_PATH", std::env::join_paths(places).unwrap_or_default())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(about) = about {
        command
            .env("CNI_CONTAINERID", about.container)
            .env("CNI_NETNS", about.netns)
            .env("CNI_IFNAME", about.interface)
            .env("CNI_ARGS", about.arguments);
    }
    let mut child = command
        .spawn()
        .map_err(|error| failed(format!("{} cannot be started: {error}", path.display())))?;
    let group = Group(child.id());
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let text = config.to_string();
    let mut words = String::new();
    let talk = async {
        let tell = async {
            if let Some(mut stdin) = stdin {
                // A plugin need not read it.
                let _ = stdin.write_all(text.as_bytes()).await;
            }
        };
        let ((), answer, ()) = tokio::join!(tell, start(stdout), end(stderr, &mut words));
        (answer, child.wait().await)
    };
    let talked = tokio::time::timeout(limit, talk).await;
    drop(group);
    let words = words.trim();
    let (answer, status) = talked.map_err(|_| {
        let seconds = limit.as_secs();
        let late = "s (network.cni_timeout_seconds)";
        failed(format!(
            "it did not end within {seconds} {late}{}",
            said(words)
        ))
    })?;
    let status = status.map_err(|error| failed(error.to_string()))?;
    let answer =
        answer.ok_or_else(|| failed(format!("it answers more than {ANSWER_BYTES} bytes")))?;
    if !status.success() {
        return Err(failed(refusal(&answer, words, &status.to_string())));
    }
    if !words.is_empty() {
        tracing::debug!(plugin = program, operation = operation.name(), "{words}");
    }
    if answer.trim_ascii().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&answer).map_err(|error| {
        let shown: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
        failed(format!(
            "its answer {shown:?} is no JSON: {error}{}",
            said(words)
        ))
    })
}

fn refusal(answer: &[u8], words: &str, status: &str) -> String {
    match serde_json::from_slice::<Refusal>(answer) {
        Ok(Refusal { code, msg, details }) => {
            let details = match details.as_str() {
                "" => String::new(),
                details => format!(" ({details})"),
            };
            format!("{msg}{details}, code {code}{}", said(words))
        }
        Err(_) => format!("it failed with {status}{}", said(words)),
    }
}

fn said(words: &str) -> String {
    match words {
        "" => String::new(),
        words => format!("; it says: {words}"),
    }
}

/// The whole, unless it is too long; what is too long is read to its end all the same, so that the
/// plugin does not wait.
async fn start(from: Option<impl AsyncRead + Unpin>) -> Option<Vec<u8>> {
    let mut kept = Vec::new();
    let mut fits = true;
    read(from, |bytes| {
        fits &= kept.len() + bytes.len() <= ANSWER_BYTES;
        if fits {
            kept.extend_from_slice(bytes);
        }
    })
    .await;
    fits.then_some(kept)
}

/// Keeps the end of it as text, also of what is not read to its end.
async fn end(from: Option<impl AsyncRead + Unpin>, words: &mut String) {
    let mut kept = Vec::new();
    read(from, |bytes| {
        kept.extend_from_slice(bytes);
        let surplus = kept.len().saturating_sub(WORDS_BYTES);
        kept.drain(..surplus);
        *words = String::from_utf8_lossy(&kept).into_owned();
    })
    .await;
}

async fn read(from: Option<impl AsyncRead + Unpin>, mut take: impl FnMut(&[u8])) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 8192];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        take(buffer.get(..count).unwrap_or_default());
    }
}

/// A process group that does not outlive the call.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let leader = self.0.and_then(|id| i32::try_from(id).ok());
        if let Some(leader) = leader.and_then(rustix::process::Pid::from_raw) {
            // Nobody left in it is no error.
            let _ = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use serde_json::json;

    const TIME_LIMIT: Duration = Duration::from_secs(60);

    async fn run(script: &str, limit: Duration) -> Result<Value, CniError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plugin");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let about = About {
            container: "abc",
            netns: Path::new("/run/netns/abc"),
            interface: "eth0",
            arguments: "K8S_POD_NAME=web",
        };
        let places = [directory.path().to_owned()];
        let config = json!({"name": "net"});
        let called = call(
            Operation::Add,
            "plugin",
            &places,
            Some(about),
            &config,
            limit,
        );
        called.await
    }

    #[tokio::test]
    async fn a_plugin_is_told_by_environment_and_input() {
        let script = r#"read line; echo "{\"in\": $line, \"env\": \"$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS\"}""#;
        let answer = run(script, TIME_LIMIT).await.unwrap();
        assert_eq!(answer["in"]["name"], "net");
        assert_eq!(
            answer["env"],
            "ADD abc /run/netns/abc eth0 K8S_POD_NAME=web"
        );
        assert_eq!(run("exit 0", TIME_LIMIT).await.unwrap(), Value::Null);
    }

    #[tokio::test]
    async fn a_failure_is_told_in_the_plugins_words() {
        for (script, expected) in [
            (
                r#"echo '{"code": 7, "msg": "bad config", "details": "no subnet"}'; exit 1"#,
                "bad config (no subnet), code 7",
            ),
            ("echo went wrong >&2; exit 3", "it says: went wrong"),
            ("kill -9 $$", "signal: 9"),
            ("echo garbage", "\"garbage\\n\" is no JSON"),
            ("head -c 2000000 /dev/zero", "more than 1048576 bytes"),
        ] {
            let error = run(script, TIME_LIMIT).await.unwrap_err().to_string();
            assert!(error.contains("plugin"), "{error}");
            assert!(error.contains(expected), "{script}: {error}");
        }
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let alive = directory.path().join("alive");
        let script = format!("(sleep 2; touch {}) & sleep 1000", alive.display());
        let error = run(&script, Duration::from_secs(1)).await.unwrap_err();
        assert!(error.to_string().contains("within 1 s"), "{error}");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(!alive.exists());
    }

    #[test]
    fn a_program_that_is_missing_is_named_with_the_places() {
        let error = find("nothing", &["/opt/cni/bin".into(), "/usr/lib/cni".into()]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("nothing") && error.contains("/opt/cni/bin, /usr/lib/cni"),
            "{error}"
        );
    }
}

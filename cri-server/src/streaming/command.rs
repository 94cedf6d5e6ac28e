//! The remote-command protocol: what exec and attach say beside the bytes. Its versions, 1 to 4
//! over SPDY and 1, 4 and 5 over WebSocket, are those of Kubernetes' `remotecommand` package.

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

use super::line::Line;
use super::pipe::Pipe;
use super::session::{Boxed, Outcome, Session, Size, Wanted};
use super::spdy::Opened;

/// What an exec or attach is done by.
pub type Work = Box<dyn FnOnce(Session) -> Boxed<Outcome> + Send>;

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `channel.k8s.io`, or no name at all.
    V1,
    /// `v2.channel.k8s.io`.
    V2,
    /// `v3.channel.k8s.io`: terminals have sizes.
    V3,
    /// `v4.channel.k8s.io`: exit codes can be read by programs.
    V4,
    /// `v5.channel.k8s.io`: input can be ended over WebSocket.
    V5,
}

impl Version {
    /// What the error stream says; nothing is success before version 4.
    pub fn status(self, outcome: &Outcome) -> Vec<u8> {
        let message = match outcome {
            Outcome::Exit(0) => String::new(),
            Outcome::Exit(code) => format!("command terminated with exit code {code}"),
            Outcome::Failed(why) => why.clone(),
        };
        if self < Self::V4 {
            return message.into_bytes();
        }
        // metav1.Status; clients take the code from `details.causes`.
        let status = match outcome {
            Outcome::Exit(0) => json!({"metadata": {}, "status": "Success"}),
            Outcome::Exit(code) => json!({
                "metadata": {}, "status": "Failure", "message": message,
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Outcome::Failed(_) => json!({
                "metadata": {}, "status": "Failure", "message": message,
                "reason": "InternalError", "details": {"causes": [{"message": message}]},
                "code": 500,
            }),
        };
        status.to_string().into_bytes()
    }
}

/// Reads terminal sizes: JSON objects one after the other, cut anywhere.
#[derive(Default)]
pub struct Sizes(Vec<u8>);

#[derive(Deserialize)]
struct Told {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

impl Sizes {
    /// The newest size in what was there and `bytes`. What is none is left out.
    pub fn read(&mut self, bytes: &[u8]) -> Option<Size> {
        let mut newest = None;
        for byte in bytes {
            self.0.push(*byte);
            // No object holds another, nor a string.
            if *byte == b'}' {
                if let Ok(told) = serde_json::from_slice::<Told>(&self.0) {
                    newest = Some(Size {
                        columns: told.width,
                        rows: told.height,
                    });
                }
                self.0.clear();
            }
            if self.0.len() > 256 {
                self.0.clear();
            }
        }
        newest
    }
}

/// Passes on sizes, of several only the newest.
pub async fn pass_on(mut newest: watch::Receiver<Option<Size>>, sizes: mpsc::Sender<Size>) {
    while let Ok(size) = newest.wait_for(Option::is_some).await.map(|size| *size) {
        newest.mark_unchanged();
        if let Some(size) = size
            && sizes.send(size).await.is_err()
        {
            return;
        }
        if newest.changed().await.is_err() {
            return;
        }
    }
}

/// The streams of an exec or attach over SPDY.
#[derive(Default)]
struct Streams {
    stdin: Option<Opened>,
    stdout: Option<Opened>,
    stderr: Option<Opened>,
    error: Option<Opened>,
    resize: Option<Opened>,
}

impl Streams {
    /// Streams come in any order, each with the header `streamtype`.
    async fn collect(wanted: Wanted, version: Version, come: &mut mpsc::Receiver<Opened>) -> Self {
        let mut streams = Self::default();
        loop {
            let resize = wanted.tty && version >= Version::V3;
            let missing = [
                streams.error.is_none(),
                wanted.stdin && streams.stdin.is_none(),
                wanted.stdout && streams.stdout.is_none(),
                wanted.stderr && streams.stderr.is_none(),
                resize && streams.resize.is_none(),
            ];
            if missing == [false; 5] {
                return streams;
            }
            let Some(opened) = come.recv().await else {
                return streams;
            };
            let (place, wanted) = match opened.headers.get("streamtype") {
                Some("error") => (&mut streams.error, true),
                Some("stdin") => (&mut streams.stdin, wanted.stdin),
                Some("stdout") => (&mut streams.stdout, wanted.stdout),
                Some("stderr") => (&mut streams.stderr, wanted.stderr),
                Some("resize") => (&mut streams.resize, resize),
                _ => continue,
            };
            // One that is not wanted, or a second one, is ended by being dropped.
            if wanted && place.is_none() {
                *place = Some(opened);
            }
        }
    }
}

/// Does an exec or attach with the streams that a SPDY client opens.
pub async fn over_spdy(
    wanted: Wanted,
    work: Work,
    version: Version,
    line: &Line,
    mut come: mpsc::Receiver<Opened>,
) {
    let collected = Streams::collect(wanted, version, &mut come);
    let Some(streams) = line.in_time(collected).await else {
        return;
    };
    let Some(error) = streams.error else { return };
    // From now on further streams are refused.
    drop(come);
    let (told, newest) = watch::channel(None);
    let (sizes, receiver) = mpsc::channel(1);
    let (stdout, out_sent) = streams.stdout.map(|one| (one.pipe, one.sent)).unzip();
    let (stderr, err_sent) = streams.stderr.map(|one| (one.pipe, one.sent)).unzip();
    let session = Session {
        stdin: streams.stdin.map(|one| Box::new(one.pipe) as _),
        stdout: stdout.map(|pipe| Box::new(pipe) as _),
        stderr: stderr.map(|pipe| Box::new(pipe) as _),
        sizes: receiver,
        gone: line.gone(),
    };
    let beside = async {
        tokio::join!(
            resized(streams.resize.map(|one| one.pipe), told),
            pass_on(newest, sizes)
        );
        std::future::pending().await
    };
    let outcome = tokio::select! {
        outcome = line.graced(work(session)) => outcome,
        () = beside => None,
    };
    let Some(outcome) = outcome else { return };
    // Clients may stop reading at the status: it comes after all output.
    let sent = async {
        for sent in [out_sent, err_sent].into_iter().flatten() {
            let _ = sent.await;
        }
        let mut pipe = error.pipe;
        let _ = pipe.write_all(&version.status(&outcome)).await;
        drop(pipe);
        let _ = error.sent.await;
    };
    tokio::select! {
        () = sent => {}
        () = line.lost() => {}
    }
}

async fn resized(pipe: Option<Pipe>, told: watch::Sender<Option<Size>>) {
    let Some(mut pipe) = pipe else { return };
    let (mut sizes, mut bytes) = (Sizes::default(), [0; 256]);
    while let Ok(read @ 1..) = pipe.read(&mut bytes).await {
        if let Some(size) = sizes.read(bytes.get(..read).unwrap_or_default()) {
            told.send_replace(Some(size));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_told_as_each_version_has_it() {
        let failed = Outcome::Failed("no such file".into());
        let text = |version: Version, outcome: &Outcome| {
            String::from_utf8(version.status(outcome)).unwrap()
        };
        assert_eq!(text(Version::V3, &Outcome::Exit(0)), "");
        assert_eq!(
            text(Version::V1, &Outcome::Exit(3)),
            "command terminated with exit code 3"
        );
        assert_eq!(text(Version::V2, &failed), "no such file");
        let json = |outcome: &Outcome| -> serde_json::Value {
            serde_json::from_slice(&Version::V4.status(outcome)).unwrap()
        };
        assert_eq!(json(&Outcome::Exit(0))["status"], "Success");
        let exit = json(&Outcome::Exit(137));
        assert_eq!(exit["reason"], "NonZeroExitCode");
        assert_eq!(
            exit["details"]["causes"],
            json!([{"reason": "ExitCode", "message": "137"}])
        );
        let failed = json(&failed);
        assert_eq!(
            (&failed["status"], &failed["message"]),
            (&json!("Failure"), &json!("no such file"))
        );
    }

    #[test]
    fn sizes_are_read_however_they_are_cut_and_the_newest_counts() {
        let mut sizes = Sizes::default();
        assert_eq!(sizes.read(b"{\"Width\":8"), None);
        let size = |columns, rows| Some(Size { columns, rows });
        assert_eq!(sizes.read(b"0,\"Height\":24}\n{\"Wi"), size(80, 24));
        let two = b"dth\":1,\"Height\":1}{\"Width\":2,\"Height\":3}";
        assert_eq!(sizes.read(two), size(2, 3));
        assert_eq!(sizes.read(b"{\"Width\":-1,\"Height\":70000}"), None);
        assert_eq!(sizes.read(&[b'x'; 10_000]), None);
        assert_eq!(sizes.read(b"{}"), None);
        assert_eq!(sizes.read(b"{\"Width\":5,\"Height\":6}"), size(5, 6));
        assert!(sizes.0.is_empty());
    }
}

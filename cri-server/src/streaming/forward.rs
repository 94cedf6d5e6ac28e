//! Port-forward: which streams or channels of a client are which connection to the pod.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::line::Line;
use super::pipe::Pipe;
use super::session::{Boxed, Forward};
use super::spdy::Opened;

/// What a port-forward is done by.
pub type Work = Box<dyn FnOnce(mpsc::Receiver<Forward>) -> Boxed<()> + Send>;

/// Streams of one connection, until both are there.
struct Half {
    since: Instant,
    port: Option<u16>,
    data: Option<Opened>,
    error: Option<Opened>,
}

/// Forwards what a SPDY client opens: for each connection a stream `data` and one `error`, which
/// have the same `requestID`.
pub async fn over_spdy(work: Work, line: &Arc<Line>, mut come: mpsc::Receiver<Opened>) {
    let (forwards, receiver) = mpsc::channel(1);
    let pairing = async {
        let mut halves: HashMap<String, Half> = HashMap::new();
        let mut errors = JoinSet::new();
        loop {
            let wait = halves.values().map(|half| half.since).min();
            let left = wait.map_or(Duration::MAX, |since| {
                line.limits.creation.saturating_sub(since.elapsed())
            });
            let Ok(opened) = timeout(left, come.recv()).await else {
                // What is dropped is ended for the client.
                halves.retain(|_, half| half.since.elapsed() < line.limits.creation);
                continue;
            };
            let Some(opened) = opened else { return };
            while errors.try_join_next().is_some() {}
            let Some(request) = request(&opened) else {
                continue;
            };
            // Of streams that were reset meanwhile halves remain as well.
            if halves.len() >= line.limits.streams && !halves.contains_key(&request) {
                continue;
            }
            let half = halves.entry(request.clone()).or_insert_with(|| Half {
                since: Instant::now(),
                port: None,
                data: None,
                error: None,
            });
            match opened.headers.get("streamtype") {
                Some("data") => {
                    half.port = port(opened.headers.get("port"));
                    half.data = Some(opened);
                }
                _ => half.error = Some(opened),
            }
            if half.data.is_none() || half.error.is_none() {
                continue;
            }
            let half = halves.remove(&request);
            let Some((port, data, error)) =
                half.and_then(|half| Some((half.port, half.data?, half.error?)))
            else {
                continue;
            };
            let (told, message) = oneshot::channel();
            errors.spawn(tell(message, error.pipe));
            let Some(port) = port else {
                let _ = told.send("the header port is no port from 1 to 65535".into());
                continue;
            };
            let forward = Forward {
                port,
                data: Box::new(data.pipe),
                error: told,
            };
            if forwards.send(forward).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        // Whoever forwards is done by dropping it.
        () = line.lost() => {}
        ((), ()) = async { tokio::join!(pairing, work(receiver)) } => {}
    }
}

/// What makes streams one pair. Clients older than `requestID` open `error` right before `data`.
fn request(opened: &Opened) -> Option<String> {
    let kind = opened.headers.get("streamtype")?;
    let named = opened.headers.get("requestid").map(str::to_owned);
    match kind {
        "error" => Some(named.unwrap_or_else(|| opened.id.to_string())),
        "data" => Some(named.unwrap_or_else(|| opened.id.wrapping_sub(2).to_string())),
        _ => None,
    }
}

/// A port, 1 to 65,535.
pub fn port(text: Option<&str>) -> Option<u16> {
    text?.parse().ok().filter(|port| *port > 0)
}

async fn tell(message: oneshot::Receiver<String>, mut pipe: Pipe) {
    if let Ok(message) = message.await {
        let _ = pipe.write_all(message.as_bytes()).await;
    }
}

//! The request that begins a stream: which URL it is for, and what is spoken after it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::rt::{Read, Write};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::command::{self, Version};
use super::forward;
use super::line::Line;
use super::session::Task;
use super::spdy;
use super::token::{Kind, Tokens};
use super::websocket::{self, Codec};

/// The most bytes of a request.
const REQUEST: usize = 16 << 10;
/// The most ports of a WebSocket.
const PORTS: usize = 100;
/// The name of SPDY in `Upgrade`.
const SPDY: &str = "SPDY/3.1";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// What may be spoken over SPDY: exec and attach, then port-forward.
const COMMANDS: [(&str, Version); 4] = [
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];
const FORWARDS: [(&str, Version); 1] = [("portforward.k8s.io", Version::V1)];
/// Likewise over WebSocket, with what is written in base64 in the second places.
const CODECS: [(&str, Codec); 7] = [
    ("v5.channel.k8s.io", codec(false, Version::V5)),
    ("v4.channel.k8s.io", codec(false, Version::V4)),
    ("v4.base64.channel.k8s.io", codec(true, Version::V4)),
    ("v3.channel.k8s.io", codec(false, Version::V3)),
    ("v2.channel.k8s.io", codec(false, Version::V2)),
    ("channel.k8s.io", codec(false, Version::V1)),
    ("base64.channel.k8s.io", codec(true, Version::V1)),
];
const FORWARD_CODECS: [(&str, Codec); 3] = [
    ("v4.channel.k8s.io", codec(false, Version::V4)),
    ("v4.base64.channel.k8s.io", codec(true, Version::V4)),
    ("portforward.k8s.io", codec(false, Version::V4)),
];

const fn codec(base64: bool, version: Version) -> Codec {
    Codec { base64, version }
}

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    kind: Kind,
    token: String,
    speech: Speech,
    /// The name of what is spoken, if the client has named any.
    name: Option<&'static str>,
}

#[derive(Debug, PartialEq, Eq)]
enum Speech {
    Spdy(Version),
    WebSocket {
        codec: Codec,
        /// The answer to the client's key.
        accept: String,
        ports: Vec<u16>,
    },
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: StatusCode,
    message: &'static str,
    header: Option<(HeaderName, &'static str)>,
}

/// What a client must name that forwards over WebSocket, unless the ports were named before.
const NO_PORTS: Refusal = Refusal {
    status: StatusCode::BAD_REQUEST,
    message: "over WebSocket, name 1 to 100 ports from 1 to 65535 as ?port=80&port=443",
    header: None,
};

fn refusal(status: StatusCode, message: &'static str) -> Refusal {
    Refusal {
        status,
        message,
        header: None,
    }
}

fn read(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Asked, Refusal> {
    if ![Method::GET, Method::POST].contains(method) {
        let mut refusal = refusal(StatusCode::METHOD_NOT_ALLOWED, "ask with GET or POST");
        refusal.header = Some((hyper::header::ALLOW, "GET, POST"));
        return Err(refusal);
    }
    let (kind, token) = path(uri.path()).ok_or(refusal(
        StatusCode::NOT_FOUND,
        "there is /exec/TOKEN, /attach/TOKEN and /portforward/TOKEN",
    ))?;
    let asked = |speech, name| Asked {
        kind,
        token: token.to_owned(),
        speech,
        name,
    };
    let upgrades = names(headers, &CONNECTION).any(|name| name.eq_ignore_ascii_case("upgrade"));
    let to =
        |name: &str| upgrades && names(headers, &UPGRADE).any(|to| to.eq_ignore_ascii_case(name));
    if to("websocket") {
        let table: &[_] = match kind {
            Kind::Exec | Kind::Attach => &CODECS,
            Kind::PortForward => &FORWARD_CODECS,
        };
        let (name, codec) = choose(headers, &SEC_WEBSOCKET_PROTOCOL, table)?;
        let (accept, ports) = (accept(headers)?, ports(kind, uri.query())?);
        let codec = codec.unwrap_or(self::codec(false, Version::V1));
        return Ok(asked(
            Speech::WebSocket {
                codec,
                accept,
                ports,
            },
            name,
        ));
    }
    if to(SPDY) {
        let table: &[_] = match kind {
            Kind::Exec | Kind::Attach => &COMMANDS,
            Kind::PortForward => &FORWARDS,
        };
        let (name, version) = choose(headers, &STREAM_PROTOCOL, table)?;
        return Ok(asked(Speech::Spdy(version.unwrap_or(Version::V1)), name));
    }
    Err(Refusal {
        status: StatusCode::UPGRADE_REQUIRED,
        message: "ask for an upgrade of the connection to SPDY/3.1 or websocket",
        header: Some((UPGRADE, "SPDY/3.1, websocket")),
    })
}

fn path(path: &str) -> Option<(Kind, &str)> {
    let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
    let all = [Kind::Exec, Kind::Attach, Kind::PortForward];
    let kind = all.into_iter().find(|one| one.to_string() == kind)?;
    Some((kind, token))
}

/// The names in all headers `name`, which separate them by commas.
fn names<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
}

/// The first of the client's protocols that is known. A client that names none gets the oldest.
fn choose<T: Copy>(
    headers: &HeaderMap,
    header: &HeaderName,
    table: &[(&'static str, T)],
) -> Result<(Option<&'static str>, Option<T>), Refusal> {
    let mut asked = names(headers, header).peekable();
    if asked.peek().is_none() {
        return Ok((None, None));
    }
    let found = asked.find_map(|name| table.iter().find(|(known, _)| *known == name));
    let (name, found) = found.ok_or(Refusal {
        status: StatusCode::FORBIDDEN,
        message: "none of the protocols asked for is spoken here",
        header: None,
    })?;
    Ok((Some(name), Some(*found)))
}

/// RFC 6455, 4.2.1 and 4.2.2.
fn accept(headers: &HeaderMap) -> Result<String, Refusal> {
    if headers
        .get(&SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        return Err(Refusal {
            status: StatusCode::UPGRADE_REQUIRED,
            message: "only version 13 of WebSocket is spoken",
            header: Some((SEC_WEBSOCKET_VERSION, "13")),
        });
    }
    let key = headers.get(&SEC_WEBSOCKET_KEY);
    let key = key.filter(|key| key.len() == 24);
    let missing = refusal(
        StatusCode::BAD_REQUEST,
        "Sec-WebSocket-Key is missing or wrong",
    );
    Ok(derive_accept_key(key.ok_or(missing)?.as_bytes()))
}

/// `port=80&port=443`, or `port=80,443`; none if there is nothing of it.
fn ports(kind: Kind, query: Option<&str>) -> Result<Vec<u16>, Refusal> {
    if kind != Kind::PortForward {
        return Ok(Vec::new());
    }
    let parts = query.unwrap_or_default().split('&');
    let values = parts.filter_map(|part| part.strip_prefix("port="));
    let ports = values
        .flat_map(|value| value.split(',').flat_map(|value| value.split("%2C")))
        .map(|value| forward::port(Some(value)));
    ports.take(PORTS + 1).collect::<Option<_>>().ok_or(NO_PORTS)
}

/// What is done after the answer.
struct Accepted {
    upgrade: OnUpgrade,
    speech: Speech,
    task: Task,
}

/// Serves a client's one request and what follows from it.
pub async fn serve<T>(io: T, line: &Arc<Line>, tokens: &Tokens)
where
    T: Read + Write + Unpin + Send + 'static,
{
    let accepted = Mutex::new(None);
    let service = hyper::service::service_fn(|mut request: Request<_>| {
        let answer = match answer(&mut request, tokens) {
            Ok((answer, next)) => {
                *accepted.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
                answer
            }
            Err(refusal) => refuse(&refusal),
        };
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    let connection = builder.max_buf_size(REQUEST).serve_connection(io, service);
    let asked = line.in_time(connection.with_upgrades()).await;
    let accepted = accepted
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let (Some(Ok(())), Some(accepted)) = (asked, accepted) else {
        return;
    };
    let Ok(upgraded) = accepted.upgrade.await else {
        return;
    };
    line.touch();
    let io = TokioIo::new(upgraded);
    match (accepted.task, accepted.speech) {
        (Task::Streams(wanted, work), Speech::Spdy(version)) => {
            let work = |streams| command::over_spdy(wanted, work, version, line, streams);
            spdy::serve(io, line, work).await;
        }
        (Task::Streams(wanted, work), Speech::WebSocket { codec, .. }) => {
            websocket::command(io, line, codec, wanted, work).await;
        }
        (Task::Forward(_, work), Speech::Spdy(_)) => {
            let work = |streams| forward::over_spdy(work, line, streams);
            spdy::serve(io, line, work).await;
        }
        (Task::Forward(ports, work), Speech::WebSocket { codec, .. }) => {
            websocket::forward(io, line, codec, &ports, work).await;
        }
    }
}

fn answer<B>(
    request: &mut Request<B>,
    tokens: &Tokens,
) -> Result<(Response<Full<Bytes>>, Accepted), Refusal> {
    let asked = read(request.method(), request.uri(), request.headers())?;
    let task = tokens.take(asked.kind, &asked.token, Instant::now());
    let mut task = task.ok_or(refusal(
        StatusCode::NOT_FOUND,
        "this URL was used before, or not within a minute, or never given",
    ))?;
    if let (Task::Forward(named, _), Speech::WebSocket { ports, .. }) = (&mut task, &asked.speech) {
        if named.is_empty() {
            named.clone_from(ports);
        }
        if !(1..=PORTS).contains(&named.len()) {
            return Err(NO_PORTS);
        }
    }
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let name = asked.name.map(HeaderValue::from_static);
    match &asked.speech {
        Speech::Spdy(_) => {
            headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
            name.map(|name| headers.insert(STREAM_PROTOCOL, name));
        }
        Speech::WebSocket { accept, .. } => {
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            if let Ok(accept) = HeaderValue::from_str(accept) {
                headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
            }
            name.map(|name| headers.insert(SEC_WEBSOCKET_PROTOCOL, name));
        }
    }
    let accepted = Accepted {
        upgrade: hyper::upgrade::on(request),
        speech: asked.speech,
        task,
    };
    Ok((response, accepted))
}

fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    let text = format!("{}\n", refusal.message);
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = refusal.status;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if let Some((name, value)) = &refusal.header {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if refusal.status == StatusCode::FORBIDDEN {
        // The kubelet's clients read from it what would have been understood.
        let known: Vec<_> = COMMANDS
            .iter()
            .chain(&FORWARDS)
            .map(|(name, _)| *name)
            .collect();
        if let Ok(known) = HeaderValue::from_str(&known.join(", ")) {
            headers.insert(ACCEPTED, known);
        }
    }
    response
}

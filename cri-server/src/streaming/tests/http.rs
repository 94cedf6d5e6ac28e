//! Requests that lead nowhere, limits of connections, and TLS.

use std::process::Command;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::spdy_client::{Client, ask};
use super::*;

const UPGRADE: &str = "Connection: keep-alive, Upgrade";
const SPDY: &str = "Upgrade: SPDY/3.1";
const WEBSOCKET: &str = "Upgrade: websocket";
const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
const VERSION: &str = "Sec-WebSocket-Version: 13";

#[tokio::test]
async fn requests_that_lead_nowhere_are_refused_and_leave_the_token() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 0));
    let forward = server.forward(echoes);
    let host = url.split("/exec").next().unwrap();
    let unknown = "X-Stream-Protocol-Version: v9.channel.k8s.io";
    let cases: [(&str, &[&str], &str); 14] = [
        (&url, &[], "426"),
        (&url, &[UPGRADE], "426"),
        (&url, &[SPDY], "426"),
        (&url, &[UPGRADE, "Upgrade: h2c"], "426"),
        (&url, &[UPGRADE, SPDY, unknown], "403"),
        (&url, &[UPGRADE, WEBSOCKET, VERSION], "400"),
        (&url, &[UPGRADE, WEBSOCKET, KEY], "426"),
        (
            &url,
            &[
                UPGRADE,
                WEBSOCKET,
                KEY,
                VERSION,
                "Sec-WebSocket-Protocol: chat",
            ],
            "403",
        ),
        (&forward, &[UPGRADE, WEBSOCKET, KEY, VERSION], "400"),
        (
            &format!("{forward}?port=0"),
            &[UPGRADE, WEBSOCKET, KEY, VERSION],
            "400",
        ),
        (&format!("{host}/exec/"), &[UPGRADE, SPDY], "404"),
        (&format!("{host}/exec/AAAA"), &[UPGRADE, SPDY], "404"),
        (&format!("{host}/metrics"), &[UPGRADE, SPDY], "404"),
        (&url.replace("/exec/", "/attach/"), &[UPGRADE, SPDY], "404"),
    ];
    for (url, headers, status) in cases {
        let (answer, _) = soon(ask(url, headers)).await;
        let wanted = format!("HTTP/1.1 {status} ");
        assert!(answer.starts_with(&wanted), "{url} {headers:?}: {answer}");
    }
    let client = Client::connect(&url, "v4.channel.k8s.io").await;
    drop(client);
    let (again, _) = soon(ask(&url, &[UPGRADE, SPDY])).await;
    assert!(again.starts_with("HTTP/1.1 404 "), "{again}");
}

#[tokio::test]
async fn requests_are_bounded_in_size_and_time() {
    let server = Server::with(Limits {
        creation: SHORT,
        ..short()
    })
    .await;
    let url = server.exec(ALL, |session| cat(session, 0));
    let long = format!("X: {}", "x".repeat(40_000));
    let (answer, _) = soon(ask(&url, &[&long])).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let host = url.split('/').nth(2).unwrap();
    let mut silent = TcpStream::connect(host).await.unwrap();
    assert_eq!(soon(silent.read(&mut [0; 9])).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn clients_are_bounded_in_number_and_make_room() {
    let server = Server::with(Limits {
        connections: 1,
        ..short()
    })
    .await;
    let url = |code| server.exec(ALL, move |session| cat(session, code));
    let mut first = Client::connect(&url(0), "v4.channel.k8s.io").await;
    first.open_all(["error", "stdin", "stdout", "stderr"]).await;
    let (answer, _) = soon(ask(&url(0), &[UPGRADE, SPDY])).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    drop(first);
    let waiting = async {
        loop {
            let (answer, _) = ask(&url(0), &[UPGRADE, SPDY]).await;
            if answer.starts_with("HTTP/1.1 101 ") {
                return;
            }
        }
    };
    soon(waiting).await;
}

fn certificate(directory: &std::path::Path) {
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ])
        .args([
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(directory.join("key"))
        .arg("-out")
        .arg(directory.join("certificate"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
}

/// The status of a request for `url` by a client that trusts `pem` alone.
async fn status(url: &str, pem: &[u8]) -> std::io::Result<String> {
    let rest = url.strip_prefix("https://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(pem).unwrap())
        .unwrap();
    let provider = tokio_rustls::rustls::crypto::aws_lc_rs::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let io = TcpStream::connect(host).await?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut io = TlsConnector::from(Arc::new(config))
        .connect(name, io)
        .await?;
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\n{UPGRADE}\r\n{SPDY}\r\n\r\n");
    io.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    io.read_exact(&mut head).await?;
    Ok(String::from_utf8_lossy(&head[9..]).into_owned())
}

#[tokio::test]
async fn tls_is_spoken_and_takes_up_a_new_certificate() {
    let directory = tempfile::tempdir().unwrap();
    certificate(directory.path());
    let path = |name| directory.path().join(name);
    let config = Config {
        certificate: Some(path("certificate")),
        key: Some(path("key")),
        ..Config::default()
    };
    let (streaming, server) = Streaming::listen(&config).await.unwrap();
    let server = Server {
        streaming,
        task: tokio::spawn(server),
    };
    let url = || server.exec(ALL, |session| cat(session, 0));
    let old = std::fs::read(path("certificate")).unwrap();
    assert_eq!(soon(status(&url(), &old)).await.unwrap(), "101");
    std::fs::write(path("key"), "no key").unwrap();
    assert_eq!(soon(status(&url(), &old)).await.unwrap(), "101");
    certificate(directory.path());
    let new = std::fs::read(path("certificate")).unwrap();
    assert_eq!(soon(status(&url(), &new)).await.unwrap(), "101");
    soon(status(&url(), &old)).await.unwrap_err();
}

#[tokio::test]
async fn a_certificate_that_is_none_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("empty.pem");
    std::fs::write(&path, "").unwrap();
    let config = Config {
        certificate: Some(path.clone()),
        key: Some(path),
        ..Config::default()
    };
    let error = Streaming::listen(&config).await.err().unwrap().to_string();
    assert!(error.contains("empty.pem"), "{error}");
}

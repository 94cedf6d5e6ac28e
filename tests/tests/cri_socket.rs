//! The CRI's socket, as clients written with other gRPC libraries meet it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::{Node, suite};

suite! {
    authority_of_a_request_does_not_matter,
}

/// HTTP/2 frame types and flags (RFC 9113 §6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// There is no host in the name of a unix socket, so libraries differ in what they send for one:
/// most `localhost`, some nothing.
fn authority_of_a_request_does_not_matter(node: &Node) -> Result<()> {
    for authority in [
        Some("localhost"),
        Some("localhost:0"),
        Some("cri.sock"),
        None,
    ] {
        let reply = version(node, authority).with_context(|| format!("{authority:?}"))?;
        let version = b"0.1.0";
        ensure!(
            reply.windows(version.len()).any(|bytes| bytes == version),
            "{authority:?}: {reply:?}"
        );
    }
    Ok(())
}

/// Calls `Version` on a connection of its own; answers the bytes of the reply.
fn version(node: &Node, authority: Option<&str>) -> Result<Vec<u8>> {
    let mut socket = UnixStream::connect(node.server()?.socket())?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut fields = vec![
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/runtime.v1.RuntimeService/Version"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    // Pseudo-header fields come first (RFC 9113 §8.3).
    fields.splice(3..3, authority.map(|authority| (":authority", authority)));
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(SETTINGS, 0, 0, &[]));
    sent.extend(frame(HEADERS, END_HEADERS, 1, &header_block(&fields)));
    // An empty message: not compressed, no bytes.
    sent.extend(frame(DATA, END_STREAM, 1, &[0; 5]));
    socket.write_all(&sent)?;
    loop {
        let mut head = [0; 9];
        socket.read_exact(&mut head)?;
        let [a, b, c, kind, ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        socket.read_exact(&mut payload)?;
        match kind {
            DATA => return Ok(payload),
            RST_STREAM | GOAWAY => bail!("refused with frame {kind}: {payload:?}"),
            _ => {}
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Literal fields without indexing (RFC 7541 §6.2.2), each shorter than 127 bytes.
fn header_block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend(text.bytes());
        }
    }
    block
}

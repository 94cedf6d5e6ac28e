//! Web servers as the host sees them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

/// After how long a silent server is taken for dead. Emulation on a busy machine is slow.
const SILENCE: Duration = Duration::from_secs(300);

/// Connects as soon as somebody listens.
pub fn connect(address: SocketAddr) -> Result<TcpStream> {
    for _ in 0..300 {
        if let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            stream.set_read_timeout(Some(SILENCE))?;
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("nobody listens on {address}")
}

/// The first page of a web server that may still be starting, without its header.
pub fn fetch(address: SocketAddr) -> Result<String> {
    get(address, "/")
}

/// As [`fetch`], another page.
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = connect(address)?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (header, page) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    ensure!(header.contains(" 200 OK"), "{address} answers {header}");
    Ok(page.to_owned())
}

//! The client's side of SPDY, as far as tests need it.

use flate2::{Compress, Compression, FlushCompress};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::soon;
use crate::streaming::spdy::test::{Deflater, Inflater};

/// What the server sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    Data(u32, bool, Vec<u8>),
    Reply(u32),
    Reset(u32, u32),
    Ping(u32),
    Away(u32),
    Window(u32, u32),
    Closed,
}

pub struct Client {
    pub io: BufReader<TcpStream>,
    /// The answer to the request: status line and headers.
    pub answer: String,
    deflater: Deflater,
    inflater: Inflater,
    next: u32,
}

/// Asks for `path` at the server of `url` with these header lines; the answer, and what follows.
pub async fn ask(url: &str, headers: &[&str]) -> (String, BufReader<TcpStream>) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut io = BufReader::new(TcpStream::connect(host).await.unwrap());
    let mut request = format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\n");
    headers
        .iter()
        .for_each(|line| request += &format!("{line}\r\n"));
    request += "Content-Length: 0\r\n\r\n";
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        match io.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(_) => break,
        }
    }
    (String::from_utf8(answer).unwrap(), io)
}

impl Client {
    pub async fn connect(url: &str, protocol: &str) -> Self {
        let protocol = format!("X-Stream-Protocol-Version: {protocol}");
        let headers = ["Connection: Upgrade", "Upgrade: SPDY/3.1", &protocol];
        let (answer, io) = soon(ask(url, &headers)).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        Self {
            io,
            answer,
            deflater: Deflater::new().unwrap(),
            inflater: Inflater::new(),
            next: 1,
        }
    }

    pub async fn raw(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.unwrap();
    }

    pub async fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) {
        let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
        let [d, e] = kind.to_be_bytes();
        let head = [0x80, 3, d, e, flags, a, b, c];
        self.raw(&[&head, payload].concat()).await;
    }

    pub async fn syn(&mut self, id: u32, block: &[u8]) {
        let payload = [&id.to_be_bytes()[..], &[0; 6], block].concat();
        self.control(1, 0, &payload).await;
    }

    /// Opens a stream; its number.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let block = self.deflater.write(headers).unwrap();
        self.syn(id, &block).await;
        id
    }

    /// Opens streams of these types.
    pub async fn open_all<const N: usize>(&mut self, kinds: [&str; N]) -> [u32; N] {
        let mut ids = [0; N];
        for (id, kind) in ids.iter_mut().zip(kinds) {
            *id = self.open(&[("streamtype", kind)]).await;
        }
        ids
    }

    pub async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        let [_, a, b, c] = (bytes.len() as u32).to_be_bytes();
        let head = [&id.to_be_bytes()[..], &[u8::from(fin), a, b, c]].concat();
        self.raw(&[&head, bytes].concat()).await;
    }

    pub async fn window(&mut self, id: u32, delta: u32) {
        let payload = [id.to_be_bytes(), delta.to_be_bytes()].concat();
        self.control(9, 0, &payload).await;
    }

    pub async fn frame(&mut self) -> Frame {
        soon(self.read()).await.unwrap_or(Frame::Closed)
    }

    async fn read(&mut self) -> std::io::Result<Frame> {
        let word = self.io.read_u32().await?;
        let length = self.io.read_u32().await?;
        let mut payload = vec![0; (length & 0xff_ffff) as usize];
        self.io.read_exact(&mut payload).await?;
        if word >> 31 == 0 {
            return Ok(Frame::Data(word, length >> 24 == 1, payload));
        }
        assert_eq!(word >> 16, 0x8003);
        let number = |place: usize| {
            u32::from_be_bytes(payload[place * 4..place * 4 + 4].try_into().unwrap())
        };
        Ok(match word & 0xffff {
            2 => {
                self.inflater.read(&payload[4..]).unwrap();
                Frame::Reply(number(0))
            }
            3 => Frame::Reset(number(0), number(1)),
            6 => Frame::Ping(number(0)),
            7 => Frame::Away(number(1)),
            9 => Frame::Window(number(0), number(1)),
            other => panic!("a frame of type {other}"),
        })
    }

    /// The next frame that is neither a reply nor a window.
    pub async fn event(&mut self) -> Frame {
        loop {
            match self.frame().await {
                Frame::Reply(_) | Frame::Window(..) => {}
                frame => return frame,
            }
        }
    }

    /// All of each of these streams, to their ends.
    pub async fn whole<const N: usize>(&mut self, ids: [u32; N]) -> [Vec<u8>; N] {
        let mut all = [const { Vec::new() }; N];
        let mut open = N;
        while open > 0 {
            match self.event().await {
                Frame::Data(id, fin, bytes) => {
                    if let Some(place) = ids.iter().position(|one| *one == id) {
                        all[place].extend(bytes);
                        open -= usize::from(fin);
                    }
                }
                other => panic!("{other:?} while {open} streams are open"),
            }
        }
        all
    }
}

/// A header block that is small and inflates to 8 MiB.
pub fn bomb() -> Vec<u8> {
    let mut compress = Compress::new(Compression::best(), true);
    let mut block = Vec::with_capacity(1 << 20);
    let plain = vec![0; 8 << 20];
    compress
        .compress_vec(&plain, &mut block, FlushCompress::Sync)
        .unwrap();
    block
}

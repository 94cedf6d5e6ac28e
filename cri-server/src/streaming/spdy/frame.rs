//! Frames (SPDY/3.1, 2.2): reading them is pure, and bounded by what the caller reads.

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes before every frame's payload.
pub const HEAD: usize = 8;
/// The largest control frame that is read. Those of Kubernetes have some hundred bytes.
const CONTROL: usize = 16 << 10;
/// The one version, in every control frame (2.2.1).
const VERSION: u16 = 3;
const CONTROL_BIT: u32 = 1 << 31;
const FIN: u8 = 1;

/// Numbers of control frames (2.6).
mod kind {
    pub const SYN_STREAM: u16 = 1;
    pub const SYN_REPLY: u16 = 2;
    pub const RST_STREAM: u16 = 3;
    pub const SETTINGS: u16 = 4;
    pub const PING: u16 = 6;
    pub const GOAWAY: u16 = 7;
    pub const HEADERS: u16 = 8;
    pub const WINDOW_UPDATE: u16 = 9;
}

/// Why a stream is reset (2.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// Data for a stream that is none.
    Invalid = 2,
    /// A stream that is not wanted.
    Refused = 3,
    /// A window larger than there can be.
    FlowControl = 7,
}

/// Why a connection is ended (2.6.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Away {
    /// All is said.
    Ok = 0,
    /// The client has not kept to the protocol.
    Protocol = 1,
}

/// What the client has done that ends its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(pub &'static str);

/// The first eight bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Bytes of a stream; they may be more than one wants to keep.
    Data { id: u32, fin: bool, length: usize },
    /// All else; `length` is bounded.
    Control { kind: u16, flags: u8, length: usize },
}

impl Head {
    /// Reads the first eight bytes.
    pub fn read(bytes: [u8; HEAD]) -> Result<Self, Wrong> {
        let [a, b, c, d, flags, e, f, g] = bytes;
        let word = u32::from_be_bytes([a, b, c, d]);
        // 24 bits.
        let length = u32::from_be_bytes([0, e, f, g]) as usize;
        if word & CONTROL_BIT == 0 {
            return match word {
                0 => Err(Wrong("data of stream 0")),
                id => Ok(Self::Data {
                    id,
                    fin: flags & FIN != 0,
                    length,
                }),
            };
        }
        if u16::from_be_bytes([a & 0x7f, b]) != VERSION {
            return Err(Wrong("a control frame of another version than 3"));
        }
        if length > CONTROL {
            return Err(Wrong("a control frame of more than 16 KiB"));
        }
        Ok(Self::Control {
            kind: u16::from_be_bytes([c, d]),
            flags,
            length,
        })
    }
}

/// A control frame, its header block still compressed.
#[derive(Debug, PartialEq, Eq)]
pub enum Control<'a> {
    SynStream {
        id: u32,
        fin: bool,
        block: &'a [u8],
    },
    /// SYN_REPLY or HEADERS: read only since its block is part of the compression.
    Headers {
        id: u32,
        fin: bool,
        block: &'a [u8],
    },
    Reset {
        id: u32,
    },
    /// The one setting that counts here, if it is among them: SETTINGS_INITIAL_WINDOW_SIZE.
    Settings {
        window: Option<u32>,
    },
    Ping(u32),
    GoAway,
    WindowUpdate {
        id: u32,
        delta: u32,
    },
    /// "must ignore the frame" (2.2.1).
    Unknown,
}

impl<'a> Control<'a> {
    /// Reads a control frame's payload.
    pub fn read(kind: u16, flags: u8, payload: &'a [u8]) -> Result<Self, Wrong> {
        let fin = flags & FIN != 0;
        let mut rest = payload;
        Ok(match kind {
            kind::SYN_STREAM => {
                let id = stream(&mut rest)?;
                // The stream it belongs to, the priority, the slot.
                let block = rest.get(6..).ok_or(Wrong("a SYN_STREAM that is cut off"))?;
                Self::SynStream { id, fin, block }
            }
            kind::SYN_REPLY | kind::HEADERS => Self::Headers {
                id: stream(&mut rest)?,
                fin,
                block: rest,
            },
            kind::RST_STREAM => Self::Reset {
                id: stream(&mut rest)?,
            },
            kind::SETTINGS => Self::Settings {
                window: window(rest)?,
            },
            kind::PING => Self::Ping(word(&mut rest)?),
            kind::GOAWAY => Self::GoAway,
            kind::WINDOW_UPDATE => Self::WindowUpdate {
                id: word(&mut rest)? & !CONTROL_BIT,
                delta: match word(&mut rest)? & !CONTROL_BIT {
                    0 => return Err(Wrong("a WINDOW_UPDATE by nothing")),
                    delta => delta,
                },
            },
            _ => Self::Unknown,
        })
    }
}

fn word(rest: &mut &[u8]) -> Result<u32, Wrong> {
    let cut = Wrong("a control frame that is cut off");
    let (word, after) = rest.split_first_chunk().ok_or(cut)?;
    *rest = after;
    Ok(u32::from_be_bytes(*word))
}

fn stream(rest: &mut &[u8]) -> Result<u32, Wrong> {
    match word(rest)? & !CONTROL_BIT {
        0 => Err(Wrong("a control frame for stream 0")),
        id => Ok(id),
    }
}

/// SETTINGS_INITIAL_WINDOW_SIZE (2.6.4): number 7.
fn window(mut rest: &[u8]) -> Result<Option<u32>, Wrong> {
    let count = word(&mut rest)?;
    if rest.len() as u64 != u64::from(count) * 8 {
        return Err(Wrong("a SETTINGS of another length than it says"));
    }
    let mut window = None;
    while !rest.is_empty() {
        let (number, value) = (word(&mut rest)? & 0xff_ffff, word(&mut rest)?);
        if number == 7 {
            window = Some(value);
        }
    }
    Ok(window)
}

fn control(kind: u16, payload: &[&[u8]]) -> Bytes {
    let length: usize = payload.iter().map(|part| part.len()).sum();
    let mut frame = BytesMut::with_capacity(HEAD + length);
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    // All payloads are of our own making and far below 16 MiB.
    frame.put_u32(length as u32);
    payload.iter().for_each(|part| frame.put_slice(part));
    frame.freeze()
}

/// Answers SYN_STREAM.
pub fn reply(id: u32, block: &[u8]) -> Bytes {
    control(kind::SYN_REPLY, &[&id.to_be_bytes(), block])
}

/// Resets a stream.
pub fn reset(id: u32, why: Reset) -> Bytes {
    let why = (why as u32).to_be_bytes();
    control(kind::RST_STREAM, &[&id.to_be_bytes(), &why])
}

/// Answers PING.
pub fn ping(number: u32) -> Bytes {
    control(kind::PING, &[&number.to_be_bytes()])
}

/// Ends the connection; `last` is the last stream that was accepted.
pub fn go_away(last: u32, why: Away) -> Bytes {
    let why = (why as u32).to_be_bytes();
    control(kind::GOAWAY, &[&last.to_be_bytes(), &why])
}

/// Lets the client send `delta` bytes more on a stream, or with 0 on all together.
pub fn window_update(id: u32, delta: u32) -> Bytes {
    control(
        kind::WINDOW_UPDATE,
        &[&id.to_be_bytes(), &delta.to_be_bytes()],
    )
}

/// What comes before `length` bytes of a stream, less than 16 MiB.
pub fn data(id: u32, fin: bool, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = id.to_be_bytes();
    let [_, e, f, g] = (length as u32).to_be_bytes();
    [a, b, c, d, u8::from(fin), e, f, g]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(frame: &[u8]) -> Result<Head, Wrong> {
        Head::read(*frame.first_chunk().unwrap())
    }

    #[test]
    fn what_is_written_is_read() {
        for (frame, wanted) in [
            (ping(7), Control::Ping(7)),
            (go_away(0, Away::Ok), Control::GoAway),
            (reset(5, Reset::Refused), Control::Reset { id: 5 }),
            (
                window_update(3, 9),
                Control::WindowUpdate { id: 3, delta: 9 },
            ),
            (
                reply(1, b"block"),
                Control::Headers {
                    id: 1,
                    fin: false,
                    block: b"block",
                },
            ),
        ] {
            let Ok(Head::Control {
                kind,
                flags,
                length,
            }) = read(&frame)
            else {
                panic!("{frame:?}");
            };
            let payload = frame.get(HEAD..).unwrap();
            assert_eq!(payload.len(), length);
            assert_eq!(Control::read(kind, flags, payload), Ok(wanted));
        }
        let head = Head::Data {
            id: 9,
            fin: true,
            length: 0x12_3456,
        };
        assert_eq!(Head::read(data(9, true, 0x12_3456)), Ok(head));
    }

    #[test]
    fn the_initial_window_is_found_among_settings() {
        let settings = [0, 0, 0, 2, 1, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0, 7, 0, 0, 2, 0];
        let window = Some(512);
        assert_eq!(
            Control::read(4, 0, &settings),
            Ok(Control::Settings { window })
        );
        let short = settings.get(..19).unwrap();
        assert!(Control::read(4, 0, short).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(
            head in any::<[u8; HEAD]>(),
            kind in 0_u16..12,
            flags in any::<u8>(),
            payload in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            if let Ok(Head::Control { length, .. }) = Head::read(head) {
                prop_assert!(length <= CONTROL);
            }
            if let Ok(Control::SynStream { id, block, .. } | Control::Headers { id, block, .. }) =
                Control::read(kind, flags, &payload)
            {
                prop_assert!(id > 0 && id < CONTROL_BIT);
                prop_assert!(payload.ends_with(block));
            }
        }
    }
}

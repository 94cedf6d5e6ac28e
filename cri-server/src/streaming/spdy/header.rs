//! Header blocks (SPDY/3.1, 2.6.10): compressed with a dictionary, one stream for a connection.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::frame::Wrong;

/// The most that the header blocks of one frame are inflated to.
const INFLATED: usize = 32 << 10;
/// The most headers of one frame.
const MOST: u32 = 64;

/// The dictionary's first part: these words (`_` for a space), each after its length in four bytes.
const WORDS: &str = "\
    options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base \
    content-encoding content-language content-length content-location content-md5 \
    content-range content-type date etag expect expires from host if-match if-modified-since \
    if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer \
    transfer-encoding upgrade user-agent vary via warning www-authenticate method get status \
    200_OK version HTTP/1.1 url public set-cookie keep-alive origin";
/// The dictionary's second part.
const REST: &str = "\
    10010120120220520630030230330430530630740240540640740840941041141241341441541641\
    7502504505203 Non-Authoritative Information204 No Content301 Moved Permanently40\
    0 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error\
    501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept O\
    ct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,imag\
    e/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/\
    javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1\
    ,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in WORDS.split(' ') {
        // Words are shorter than 256 bytes.
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend(
            word.bytes()
                .map(|byte| if byte == b'_' { b' ' } else { byte }),
        );
    }
    bytes.extend_from_slice(REST.as_bytes());
    bytes
}

/// Names and values of one frame.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of `name`, which is compared without regard to case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut all = self.0.iter();
        let found = all.find(|(one, _)| one.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// Reads the blocks of a connection, in order.
pub struct Inflater(Decompress);

impl Inflater {
    /// Before the first block.
    pub fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Reads a frame's block. After an error no further block can be read.
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, Wrong> {
        let inflated = self.inflate(block)?;
        parse(&inflated)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, Wrong> {
        let mut output = Vec::with_capacity(1024);
        let mut rest = block;
        loop {
            let (read, written) = (self.0.total_in(), self.0.total_out());
            let result = self
                .0
                .decompress_vec(rest, &mut output, FlushDecompress::Sync);
            match result {
                Ok(Status::Ok | Status::BufError) => {}
                Ok(Status::StreamEnd) => return Err(Wrong("a header block that ends all blocks")),
                Err(error) if error.needs_dictionary().is_some() => self
                    .0
                    .set_dictionary(&dictionary())
                    .map(|_| ())
                    .map_err(|_| Wrong("a header block with another dictionary"))?,
                Err(_) => return Err(Wrong("a header block that cannot be inflated")),
            }
            // What was read is a part of `rest`.
            let read = (self.0.total_in() - read) as usize;
            rest = rest.get(read..).unwrap_or_default();
            let still = self.0.total_out() == written && read == 0;
            if output.len() < output.capacity() && (rest.is_empty() || still) {
                break;
            }
            if output.len() == output.capacity() {
                if output.len() >= INFLATED {
                    return Err(Wrong("header blocks of more than 32 KiB"));
                }
                output.reserve_exact(output.len());
            }
        }
        match rest.is_empty() {
            true => Ok(output),
            false => Err(Wrong("a header block with something behind it")),
        }
    }
}

fn parse(mut rest: &[u8]) -> Result<Headers, Wrong> {
    let count = number(&mut rest)?;
    if count > MOST {
        return Err(Wrong("more than 64 headers"));
    }
    let mut headers = Vec::new();
    for _ in 0..count {
        headers.push((text(&mut rest)?, text(&mut rest)?));
    }
    match rest.is_empty() {
        true => Ok(Headers(headers)),
        false => Err(Wrong("a header block with something behind it")),
    }
}

fn number(rest: &mut &[u8]) -> Result<u32, Wrong> {
    let cut = Wrong("a header block that is cut off");
    let (number, after) = rest.split_first_chunk().ok_or(cut)?;
    *rest = after;
    Ok(u32::from_be_bytes(*number))
}

fn text(rest: &mut &[u8]) -> Result<String, Wrong> {
    let length = number(rest)? as usize;
    let cut = Wrong("a header block that is cut off");
    let (text, after) = rest.split_at_checked(length).ok_or(cut)?;
    *rest = after;
    String::from_utf8(text.to_vec()).map_err(|_| Wrong("a header that is no UTF-8"))
}

/// Writes the blocks of a connection, in order.
pub struct Deflater(Compress);

impl Deflater {
    /// Before the first block.
    pub fn new() -> Result<Self, Wrong> {
        let mut compress = Compress::new(Compression::fast(), true);
        let set = compress.set_dictionary(&dictionary());
        set.map_err(|_| Wrong("a dictionary that is not taken"))?;
        Ok(Self(compress))
    }

    /// A frame's block.
    pub fn write(&mut self, headers: &[(&str, &str)]) -> Result<Vec<u8>, Wrong> {
        // What is written here is short.
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = Vec::with_capacity(plain.len() + 128);
        let result = self.0.compress_vec(&plain, &mut block, FlushCompress::Sync);
        match result {
            Ok(Status::Ok) if block.len() < block.capacity() => Ok(block),
            _ => Err(Wrong("a header block that cannot be compressed")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_dictionary_is_that_of_the_protocol() {
        let mut compress = Compress::new(Compression::fast(), true);
        // Its Adler-32 sum is in the first bytes of every client's first block.
        let sum = compress.set_dictionary(&dictionary()).unwrap();
        assert_eq!(sum, 0xe3c6_a7c2);
    }

    #[test]
    fn blocks_without_the_dictionary_are_read_as_well() {
        let mut block = Vec::with_capacity(100);
        let mut compress = Compress::new(Compression::fast(), true);
        let plain = [0, 0, 0, 1, 0, 0, 0, 1, b'a', 0, 0, 0, 2, b'b', b'c'];
        let result = compress.compress_vec(&plain, &mut block, FlushCompress::Sync);
        assert_eq!(result.unwrap(), Status::Ok);
        let headers = Inflater::new().read(&block).unwrap();
        assert_eq!((headers.get("A"), headers.get("b")), (Some("bc"), None));
    }

    proptest! {
        #[test]
        fn blocks_are_read_as_they_were_written(
            blocks in proptest::collection::vec(
                proptest::collection::vec(("[a-z]{1,20}", ".{0,40}"), 0..8), 1..6),
        ) {
            let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::new());
            for block in blocks {
                let pairs: Vec<(&str, &str)> =
                    block.iter().map(|(name, value)| (&name[..], &value[..])).collect();
                // What the server writes is short.
                let Ok(written) = deflater.write(&pairs) else { return Ok(()) };
                prop_assert_eq!(inflater.read(&written), Ok(Headers(block)));
            }
        }

        #[test]
        fn any_bytes_are_headers_or_an_error(
            plain in proptest::collection::vec(any::<u8>(), 0..200),
            noise in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Ok(Headers(headers)) = parse(&plain) {
                let length: usize = headers.iter().map(|(a, b)| 8 + a.len() + b.len()).sum();
                prop_assert_eq!(length + 4, plain.len());
            }
            let begun = [&[0x78, 0xbb, 0xe3, 0xc6, 0xa7, 0xc2], &noise[..]].concat();
            for block in [&noise, &begun] {
                if let Ok(inflated) = Inflater::new().inflate(block) {
                    prop_assert!(inflated.len() <= INFLATED);
                }
            }
        }
    }
}

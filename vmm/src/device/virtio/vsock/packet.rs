//! The header of a vsock packet (virtio 1.2 §5.10.6).

/// Bytes of a header, little endian, before the payload.
pub const HEADER_BYTES: usize = 44;
/// The largest payload sent or accepted, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// The host's address (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;
/// The only socket type served: stream (virtio 1.2 §5.10.6).
pub const TYPE_STREAM: u16 = 1;
/// Flag of [`Op::Shutdown`]: the sender will receive no more (virtio 1.2 §5.10.6.4).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet means (virtio 1.2 §5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Opens a connection.
    Request,
    /// Accepts a [`Op::Request`].
    Response,
    /// Ends a connection at once.
    Reset,
    /// Ends one or both directions.
    Shutdown,
    /// Carries payload.
    Data,
    /// Tells the sender's credit.
    CreditUpdate,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest,
    /// Not an operation of the specification.
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// A packet without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub source_cid: u64,
    /// Address of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of payload that follow.
    pub length: u32,
    /// Socket type.
    pub kind: u16,
    /// What the packet means.
    pub op: Op,
    /// Flags of [`Op::Shutdown`].
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buffer: u32,
    /// Bytes that ever left the sender's receive buffer, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            source_cid: u64::from_le_bytes(fields.next()),
            destination_cid: u64::from_le_bytes(fields.next()),
            source_port: u32::from_le_bytes(fields.next()),
            destination_port: u32::from_le_bytes(fields.next()),
            length: u32::from_le_bytes(fields.next()),
            kind: u16::from_le_bytes(fields.next()),
            op: Op::from(u16::from_le_bytes(fields.next())),
            flags: u32::from_le_bytes(fields.next()),
            buffer: u32::from_le_bytes(fields.next()),
            forwarded: u32::from_le_bytes(fields.next()),
        }
    }

    /// Writes a header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&u16::from(self.op).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet when no connection takes it.
    pub fn refusal(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }
}

/// The fields of a header in their order.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        // A header's fields fill its bytes exactly, so the split always succeeds.
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let mut bytes = [0; HEADER_BYTES];
        for (value, byte) in (1u8..).zip(&mut bytes) {
            *byte = value;
        }
        assert_eq!(Header::decode(&bytes).encode(), bytes);
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = 3;
        bytes[8] = 2;
        bytes[16..20].copy_from_slice(&7u32.to_le_bytes());
        bytes[20..24].copy_from_slice(&1024u32.to_le_bytes());
        bytes[28] = 1;
        bytes[30] = 5;
        let header = Header::decode(&bytes);
        assert_eq!((header.source_cid, header.destination_cid), (3, 2));
        assert_eq!((header.source_port, header.destination_port), (7, 1024));
        assert_eq!((header.kind, header.op), (TYPE_STREAM, Op::Data));
    }
}

//! The end of what the guest wrote to its console.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_vmm_api::CONSOLE_TAIL_BYTES;

/// Keeps the last [`CONSOLE_TAIL_BYTES`]. Clones share it.
#[derive(Clone)]
pub struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    copy: Option<Arc<File>>,
}

impl Console {
    /// An empty console. Bytes also go to `copy`, as far as it takes them at once: it must not
    /// block.
    pub fn new(copy: Option<File>) -> Self {
        Self {
            tail: Arc::default(),
            copy: copy.map(Arc::new),
        }
    }

    /// The tail as text, with invalid UTF-8 replaced.
    pub fn tail(&self) -> String {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(tail.make_contiguous()).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if tail.len() == CONSOLE_TAIL_BYTES {
                tail.pop_front();
            }
            tail.push_back(*byte);
        }
        drop(tail);
        if let Some(copy) = &self.copy {
            // A reader that does not keep up loses bytes; the guest must not wait for it.
            let _ = (&**copy).write(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let mut console = Console::new(None);
        console.write_all(&[b'a'; CONSOLE_TAIL_BYTES]).unwrap();
        console.write_all(b"\xffend").unwrap();
        let tail = console.tail();
        assert!(tail.ends_with("a\u{fffd}end"));
        assert_eq!(tail.chars().count(), CONSOLE_TAIL_BYTES);
    }
}

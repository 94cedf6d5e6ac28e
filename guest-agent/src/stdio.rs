//! A process's stdin, stdout and stderr, each a stream to the host of its own.

mod end;
mod input;
mod output;
mod ring;

pub use end::End;
pub use input::Input;
pub use output::{Closing, Opening, Output, Progress, StreamError};

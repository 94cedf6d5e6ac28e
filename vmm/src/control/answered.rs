//! Operations that were performed, so that one asked for again is answered and not repeated.

use std::collections::VecDeque;

use bulkhead_vmm_api::control::Reply;

/// How many operations are remembered: a server asks again for the last ones only, those whose
/// answer it may have missed.
const KEPT: usize = 256;

/// What came of the last operations.
#[derive(Default)]
pub struct Answered(VecDeque<(String, Result<Reply, String>)>);

impl Answered {
    /// What came of `operation`, if it is remembered.
    pub fn result(&self, operation: &str) -> Option<Result<Reply, String>> {
        self.0
            .iter()
            .rev()
            .find(|(kept, _)| kept == operation)
            .map(|(_, result)| result.clone())
    }

    /// Remembers an operation, unless its answer is of the moment and large.
    pub fn keep(&mut self, operation: &str, result: &Result<Reply, String>) {
        if matches!(result, Ok(Reply::Stats { .. })) {
            return;
        }
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back((operation.to_owned(), result.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_operations_are_remembered_and_no_more() {
        let mut answered = Answered::default();
        answered.keep("first", &Ok(Reply::Attached { window: 2 }));
        answered.keep("second", &Err("no".into()));
        assert_eq!(
            answered.result("first"),
            Some(Ok(Reply::Attached { window: 2 }))
        );
        assert_eq!(answered.result("second"), Some(Err("no".into())));
        (0..KEPT).for_each(|n| answered.keep(&n.to_string(), &Ok(Reply::Done)));
        assert_eq!(answered.result("second"), None);
        assert_eq!(answered.0.len(), KEPT);
    }
}

//! Huge pages: hugetlb.<size>.max.

use super::{CgroupError, Setting};
use crate::container::spec::HugepageLimit;

pub(super) fn settings(limits: &[HugepageLimit]) -> Result<Vec<Setting>, CgroupError> {
    limits
        .iter()
        .map(|limit| {
            let size = &limit.page_size;
            if size.is_empty() || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(CgroupError::Invalid(format!(
                    "page size {size:?} is malformed"
                )));
            }
            Ok(Setting {
                // A limit on pages the guest cannot have is kept by itself.
                optional: true,
                ..Setting::new(&format!("hugetlb.{size}.max"), limit.limit)
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_size_cannot_name_another_file() {
        let limit = HugepageLimit {
            page_size: "../x".into(),
            limit: 0,
        };
        assert!(settings(&[limit]).is_err());
    }
}

//! Settings of a pod's network namespace that are for the pod's own stack, which is the guest's.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::error::NetworkError;

/// The values that sysctls have in this thread's namespace; their names have dots, so that none
/// leads out of /proc/sys. Blocks.
pub fn read(names: &[String]) -> Result<BTreeMap<String, String>, NetworkError> {
    let read = |name: &String| {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let value = fs::read_to_string(&path);
        let value = value.map_err(|source| NetworkError::state(&path, source))?;
        Ok((name.clone(), value.trim().to_owned()))
    };
    names.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_what_is_not_there_is_named() {
        let names = ["net.core.somaxconn", "net.ipv4.no_such"].map(str::to_owned);
        let read_one = read(&names[..1]).unwrap();
        assert!(read_one[&names[0]].parse::<u32>().is_ok(), "{read_one:?}");
        let error = read(&names).unwrap_err().to_string();
        assert!(error.contains("/proc/sys/net/ipv4/no_such"), "{error}");
    }
}

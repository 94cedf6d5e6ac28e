//! Settings of the host's stack that let packets pass between the bridge and the world.

use std::fs;
use std::io;
use std::path::Path;

use super::error::NetworkError;

const CONF6: &str = "/proc/sys/net/ipv6/conf";

/// Whether this host speaks IPv6: the kernel has it and nobody has switched it off. Blocks.
pub fn has_ipv6() -> bool {
    let off = fs::read_to_string(Path::new(CONF6).join("all/disable_ipv6"));
    off.is_ok_and(|off| off.trim() == "0")
}

/// Switches forwarding on, which stays on, since others may have come to need it. Blocks.
pub fn switch_on(ipv6: bool) -> Result<(), NetworkError> {
    set(Path::new("/proc/sys/net/ipv4/ip_forward"), "1")?;
    match ipv6 {
        true => switch_on_ipv6(),
        false => Ok(()),
    }
}

/// IPv6 is forwarded where `all/forwarding` says so, and the kernel copies that into every
/// interface, where it means: this is a router, which takes no default route from advertisements
/// (`accept_ra` of the kernel's ip-sysctl). A host that lives by them would lose its way out. So
/// each interface that was a host stays one: advertisements are accepted through the change
/// (`accept_ra` 2), then both settings are as they were. Only `all` has changed.
fn switch_on_ipv6() -> Result<(), NetworkError> {
    let conf = Path::new(CONF6);
    let all = conf.join("all/forwarding");
    if get(&all)? != "0" {
        return Ok(());
    }
    let entries = fs::read_dir(conf).map_err(|source| NetworkError::state(conf, source))?;
    let mut hosts = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|source| NetworkError::state(conf, source))?
            .path();
        if path.ends_with("all") || get(&path.join("forwarding"))? != "0" {
            continue;
        }
        let advertised = get(&path.join("accept_ra"))? == "1";
        if advertised {
            set(&path.join("accept_ra"), "2")?;
        }
        hosts.push((path, advertised));
    }
    set(&all, "1")?;
    for (path, advertised) in hosts {
        set(&path.join("forwarding"), "0")?;
        if advertised {
            set(&path.join("accept_ra"), "1")?;
        }
    }
    Ok(())
}

/// Makes an interface of ours one that learns nothing from what pods send: no address, no route.
/// Its own addresses count at once, without looking for another owner first. Its `forwarding` stays
/// off: pods are told of their gateway, and switching it on would drop the host's default routes
/// too, whatever interface they are by. Blocks.
pub fn settle(name: &str, ipv6: bool) -> Result<(), NetworkError> {
    let conf = Path::new(CONF6).join(name);
    if !ipv6 {
        return set(&conf.join("disable_ipv6"), "1");
    }
    for (key, value) in [
        ("accept_ra", "0"),
        ("autoconf", "0"),
        ("accept_redirects", "0"),
        ("accept_dad", "0"),
        ("disable_ipv6", "0"),
    ] {
        set(&conf.join(key), value)?;
    }
    Ok(())
}

/// Lets packets of 127.0.0.0/8 leave and enter by an interface of ours. Blocks.
pub fn route_loopback(name: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/ipv4/conf/{name}/route_localnet");
    set(Path::new(&path), "1")
}

fn get(path: &Path) -> Result<String, NetworkError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        // No IPv6 in this kernel, or an interface that has gone in the meantime.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(NetworkError::state(path, source)),
    }
}

fn set(path: &Path, value: &str) -> Result<(), NetworkError> {
    let current = get(path)?;
    // Writing would reset other settings of the host even when the value stays.
    if current.is_empty() || current == value {
        return Ok(());
    }
    match fs::write(path, value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetworkError::state(path, error))
        }
        _ => Ok(()),
    }
}

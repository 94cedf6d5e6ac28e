//! What can go wrong with a pod's network.

use std::io;
use std::path::{Path, PathBuf};

use super::CARDS;
use super::cni::CniError;
use super::prefix::Ipv4Prefix;

/// Why a pod has no network, or why it could not be taken down.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A sandbox id that cannot be part of a file name.
    #[error("sandbox id `{0}` is not usable: 1 to 128 letters, digits, `-` and `_` are")]
    SandboxId(String),
    /// A file or directory of ours failed.
    #[error("network state {path}: {source}")]
    State {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A step in making or entering a network namespace failed.
    #[error("network namespace {path}: cannot {step}: {source}")]
    Namespace {
        /// Where the namespace is mounted.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused a change of links, addresses or traffic control.
    #[error("cannot {step}: {source}{}", hint(source))]
    Netlink {
        /// What was tried, on which link.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// No tap device.
    #[error("cannot {step} a tap device: {source}; is the `tun` module available?")]
    Tap {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The address translation could not be set.
    #[error("nftables table `{table}`: {reason}")]
    Nat {
        /// The table.
        table: String,
        /// What `nft` said, or why it could not be run.
        reason: String,
    },
    /// All addresses are taken.
    #[error(
        "no free address left in {pool}: remove pods, or configure a larger pool \
         (leases are listed in {leases})"
    )]
    Exhausted {
        /// The pool.
        pool: Ipv4Prefix,
        /// The directory of the leases.
        leases: PathBuf,
    },
    /// The pool is unusable on this host.
    #[error("address pool {pool} cannot be used: {reason}; configure another pool")]
    Pool {
        /// The pool.
        pool: String,
        /// Why.
        reason: String,
    },
    /// Every network we would choose by ourselves is in use on this host.
    #[error("every default address pool overlaps a route of this host; configure a pool")]
    NoFreePool,
    /// Every bridge name is taken.
    #[error("bridges {0}0 to {0}255 all exist already; remove those that are not in use")]
    NoFreeBridge(&'static str),
    /// CNI plugins gave none, or did not take it back.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// A link that no guest can have for its card.
    #[error("link {link} cannot be the pod's: {why}")]
    Unusable {
        /// The link in the pod's namespace.
        link: String,
        /// What about it.
        why: String,
    },
    /// More links than cards.
    #[error("the pod has {0} links; {CARDS} are possible")]
    Cards(usize),
    /// What plugins promised and did not do.
    #[error("CNI plugins promised {}, and the pod's links do not have them", .0.join(", "))]
    Missing(Vec<String>),
    /// What the kubelet tells makes no sense.
    #[error("pod_cidr: {0}")]
    PodCidr(String),
    /// What is asked of the host's ports cannot be.
    #[error("the pod cannot have its ports of the host: {0}")]
    HostPort(String),
    /// Another pod has it.
    #[error("port {port} of the host belongs to the pod {holder}; remove that pod first")]
    HostPortTaken {
        /// The port with its protocol.
        port: String,
        /// The other pod's namespace and name.
        holder: String,
    },
    /// The thread that owns the host's side is gone.
    #[error("the network's owner thread has ended; restart the server")]
    Ended,
}

impl NetworkError {
    pub(super) fn state(path: &Path, source: io::Error) -> Self {
        Self::State {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn pool(pool: &dyn std::fmt::Display, reason: String) -> Self {
        Self::Pool {
            pool: pool.to_string(),
            reason,
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::Unsupported | io::ErrorKind::NotFound => {
            "; a kernel module is missing (bridge, veth, sch_ingress, cls_u32 or act_mirred)"
        }
        io::ErrorKind::PermissionDenied => "; the server needs CAP_NET_ADMIN and CAP_SYS_ADMIN",
        _ => "",
    }
}

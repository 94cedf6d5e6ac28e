//! What a guest's agent takes for itself, which must not grow with what comes and goes in its pod.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bulkhead_cri_api::v1::PodSandboxStatusRequest;

use crate::node::is_reference;
use crate::request::Pod;

/// Figures that are as they were as soon as what has ended is gone.
const COUNTED: [&str; 5] = ["descriptors", "mounts", "cgroups", "processes", "zombies"];

/// The agent's own memory, in bytes.
pub const MEMORY: &str = "memoryBytes";

/// By how many bytes the agent's memory may differ between two looks at the same state: the stacks
/// of the threads that happen to be there, and where its allocator has put what lives long.
const ROOM: u64 = 96 << 10;

/// How often to look until the figures are as they should be, and how long to wait in between.
const LOOKS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(100);

/// The figures by their names in the status of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage(BTreeMap<String, u64>);

impl Usage {
    /// What the pod's agent says now. The reference has none.
    pub fn look(pod: &Pod<'_>) -> Result<Option<Self>> {
        if is_reference() {
            return Ok(None);
        }
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let info = pod.cri.pod_sandbox_status(request)?.info;
        let agent = info.get("agent").context("the status has no agent")?;
        let figures: BTreeMap<String, serde_json::Value> = serde_json::from_str(agent)?;
        let number = |(name, value): (String, serde_json::Value)| {
            let value = value.as_u64().with_context(|| format!("{name}: {value}"))?;
            Ok((name, value))
        };
        let figures = figures.into_iter().map(number).collect::<Result<_>>()?;
        Ok(Some(Self(figures)))
    }

    /// As [`Usage::look`], once nothing comes or goes any more.
    pub fn settled(pod: &Pod<'_>) -> Result<Option<Self>> {
        let Some(mut last) = Self::look(pod)? else {
            return Ok(None);
        };
        let mut same = 0;
        for _ in 0..LOOKS {
            thread::sleep(PAUSE);
            let now = Self::look(pod)?.context("no usage")?;
            same = match COUNTED
                .iter()
                .all(|name| last.0.get(*name) == now.0.get(*name))
            {
                true => same + 1,
                false => 0,
            };
            last = now;
            if same == 3 {
                return Ok(Some(last));
            }
        }
        bail!("the agent does not come to rest: {last:?}")
    }

    /// A figure.
    pub fn number(&self, name: &str) -> Result<u64> {
        let number = self.0.get(name).copied();
        number.with_context(|| format!("the usage has no {name}: {self:?}"))
    }

    /// Waits until the agent takes no more of its guest than `before`; what has just ended may
    /// still be on its way out.
    pub fn returns_to(before: &Option<Self>, pod: &Pod<'_>) -> Result<()> {
        let Some(before) = before else {
            return Ok(());
        };
        let mut last = None;
        for _ in 0..LOOKS {
            let now = Self::look(pod)?.context("no usage")?;
            let mut grown = Vec::new();
            for name in COUNTED {
                if now.number(name)? > before.number(name)? {
                    grown.push(name);
                }
            }
            if now.number(MEMORY)? > before.number(MEMORY)? + ROOM {
                grown.push(MEMORY);
            }
            if grown.is_empty() {
                return Ok(());
            }
            last = Some((grown, now));
            thread::sleep(PAUSE);
        }
        bail!("the agent has grown: {last:?}, before: {before:?}")
    }
}
